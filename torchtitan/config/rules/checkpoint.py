"""Rules for [checkpoint], and for settings that need a checkpoint."""

from torchtitan.config.job_config import CHECKPOINT_PARTS, JobConfig
from torchtitan.tools.errors import UserError, suggest


def check_checkpoint(config: JobConfig, world_size: int) -> None:
    """Raise `UserError` for the first setting that contradicts another one."""
    checkpoint, training = config.checkpoint, config.training
    if checkpoint.create_seed_checkpoint and not checkpoint.enable:
        raise UserError(
            "checkpoint.create_seed_checkpoint = true needs checkpoint.enable = true; set that, or "
            "leave create_seed_checkpoint out."
        )
    for part in checkpoint.exclude_from_loading:
        if part not in CHECKPOINT_PARTS:
            raise UserError(
                f"checkpoint.exclude_from_loading names '{part}', which is not a checkpoint's part"
                f"{suggest(part, CHECKPOINT_PARTS)}"
            )
    for key in ("non_finite_loss", "loss_spike"):
        if getattr(training, key) == "rewind" and (not checkpoint.enable or checkpoint.load_only):
            raise UserError(
                f'training.{key} = "rewind" needs checkpoints to go back to; set '
                "checkpoint.enable to true and checkpoint.load_only to false, or choose "
                '"skip_step".'
            )
    if checkpoint.enable:
        _check_start(config, world_size)


def _check_start(config: JobConfig, world_size: int) -> None:
    checkpoint = config.checkpoint
    if checkpoint.create_seed_checkpoint and world_size > 1:
        raise UserError(
            f"checkpoint.create_seed_checkpoint = true needs one process, but there are "
            f"{world_size}; start it with NGPU=1 (any layout can start from that checkpoint)."
        )
    if checkpoint.create_seed_checkpoint and checkpoint.load_only:
        raise UserError(
            "checkpoint.create_seed_checkpoint saves and checkpoint.load_only forbids it; set one "
            "of them to false."
        )
    if checkpoint.initial_load_in_hf_quantized and not checkpoint.initial_load_in_hf:
        raise UserError(
            "checkpoint.initial_load_in_hf_quantized = true needs checkpoint.initial_load_in_hf = "
            "true; set that, or leave it out."
        )
    if checkpoint.last_save_in_hf and not checkpoint.last_save_model_only:
        raise UserError(
            "checkpoint.last_save_in_hf = true, but Hugging Face's format holds only weights; set "
            "checkpoint.last_save_model_only to true."
        )
    if checkpoint.last_save_in_hf and config.ema.enable:
        raise UserError(
            "checkpoint.last_save_in_hf = true writes only the weights, and their average "
            "(ema.enable = true) would be lost; set last_save_in_hf to false, and convert the last "
            "checkpoint with scripts/checkpoint_conversion/convert_to_hf.py, also with --ema."
        )
    if checkpoint.initial_load_in_hf and not checkpoint.initial_load_model_only:
        raise UserError(
            "checkpoint.initial_load_model_only = false, but Hugging Face's format "
            "(checkpoint.initial_load_in_hf) holds only weights; set it to true."
        )
