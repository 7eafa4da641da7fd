"""Our whole step: the trainer as a run builds it, fed with random tokens."""

import tempfile
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.breakdown import StepProfile
from benchmarks.rows import random_batches, summary
from benchmarks.timing import peak_gib, time_steps
from torchtitan.components.metrics.logger import device_name
from torchtitan.config import ConfigManager, JobConfig
from torchtitan.tools.flops import peak_flops
from torchtitan.tools.utils import TORCH_DTYPES, device_type
from torchtitan.trainer import Trainer
from torchtitan.trainer.preflight import check_config
from torchtitan.trainer.step_log import Interval


def settings_of(options: list[str], *, warmup: int, steps: int, document: int) -> dict[str, Any]:
    """Settings for ours and every peer. Raises `UserError` for options that don't go together."""
    config = ConfigManager().parse_args([*options, "--job.dump_folder=."])
    _, model_args, tokenizer = check_config(config)
    training, optimizer, parallelism = config.training, config.optimizer, config.parallelism
    return {
        "device": device_type(),
        "batch": training.local_batch_size,
        "seq_len": training.seq_len,
        "weights": training.dtype,
        "compute": training.mixed_precision_param,
        "compile": config.compile.enable,
        "parallelism": {
            name: degree for name, degree in asdict(parallelism).items() if name.endswith("degree")
        },
        "recompute": config.activation_checkpoint.mode,
        "max_norm": training.max_norm,
        "lr": optimizer.lr,
        "betas": [optimizer.beta1, optimizer.beta2],
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
        "eos_id": tokenizer.eos_id,
        "model_args": asdict(model_args),
        "flops_per_token": model_args.train_flops_per_token(training.seq_len),
        "peak_flops": peak_flops(
            device_name(torch.device(device_type())), TORCH_DTYPES[training.mixed_precision_param]
        ),
        "warmup": warmup,
        "steps": steps,
        "mean_document": document,
    }


def run(options: list[str], settings: dict[str, Any], *, profile: bool) -> dict[str, Any]:
    """One row: speed, memory and (with `profile`) where the time of a step goes."""
    with tempfile.TemporaryDirectory() as folder:
        config = ConfigManager().parse_args([*options, f"--job.dump_folder={folder}"])
        trainer = Trainer(config)
        try:
            return _run(trainer, config, settings, profile=profile)
        finally:
            trainer.close()


def _run(
    trainer: Trainer, config: JobConfig, settings: dict[str, Any], *, profile: bool
) -> dict[str, Any]:
    dims = trainer.dims
    batches = random_batches(settings, dims.dp_rank(trainer.rank))
    sequences = settings["batch"] * trainer.accumulation * dims.dp_degree / dims.world_size
    losses = []

    def step() -> None:
        trainer.step += 1
        trainer.gc.run(trainer.step)
        losses.append(trainer.train_step(batches, Interval()).loss)

    # Hooks before the first step: a hook that comes later would make torch.compile start again.
    marks = (
        StepProfile(trainer, tokens=settings["batch"] * settings["seq_len"]) if profile else None
    )
    seconds = time_steps(step, settings["warmup"], settings["steps"])
    row = summary("ours", settings, seconds, losses, sequences)
    row["peak_gib"] = peak_gib()
    if marks is not None:
        row["breakdown"] = marks.measure(step, row["step_seconds"]["median"])
    return row
