"""The validation set: another dataset, read once from beginning to end each time."""

from torchtitan.config import JobConfig, Validation
from torchtitan.data.build import build_text_dataloader
from torchtitan.data.catalog import check_dataset
from torchtitan.data.dataloader import ParallelAwareDataLoader
from torchtitan.data.settings import validation_data, validation_dataset
from torchtitan.data.tokenizer import Tokenizer
from torchtitan.tools.errors import UserError


def check_validation_data(settings: Validation, max_seq_len: int) -> None:
    """Raise `UserError` for what can be known to be wrong before a run."""
    if not settings.enable:
        return
    if settings.seq_len > max_seq_len:
        raise UserError(
            f"validation.seq_len = {settings.seq_len} must be at most the model's max_seq_len "
            f"({max_seq_len}; it follows seq_len of [training], or of the phase with the shortest "
            "sequences); lower it, or set model.args.max_seq_len."
        )
    check_dataset(validation_dataset(settings))


def build_validation_dataloader(
    config: JobConfig, tokenizer: Tokenizer, *, dp_rank: int, dp_degree: int
) -> ParallelAwareDataLoader:
    """Loader of the same examples in any layout, and for any seed of the run."""
    return build_text_dataloader(
        validation_data(config.validation, config.chat),
        tokenizer,
        dp_rank=dp_rank,
        dp_degree=dp_degree,
        assets_path=config.model.hf_assets_path,
    )
