"""Work of each rank of a proof: train, save, resume, and compare with the run on one process."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from torchtitan.config import JobConfig
from torchtitan.proof.compare import Difference, differences, other_bits
from torchtitan.proof.record import Key, Record, RecordedTrainer
from torchtitan.trainer import Trainer

REFERENCE = "reference.pt"
# Kept of a check on a rank; the rest says the same.
MOST_DIFFERENCES = 50


@dataclass(frozen=True)
class RankResult:
    """Result of one check on one rank.

    keys: of everything compared.
    differences: the first MOST_DIFFERENCES, in order.
    worst: largest error of each kind.
    """

    keys: list[Key]
    differences: list[Difference]
    worst: dict[str, float]


def middle(config: JobConfig) -> int:
    """Return the step after which a run is saved: two before the end."""
    return config.training.steps - 2


def in_folder(config: JobConfig, folder: Path, resume: Path | None = None) -> JobConfig:
    """Return the same run in another folder.

    resume: checkpoint to begin from; None: its own, if there is one.
    """
    checkpoint = replace(
        config.checkpoint,
        initial_load_path=None if resume is None else str(resume),
        initial_load_model_only=False,
    )
    return replace(config, job=replace(config.job, dump_folder=str(folder)), checkpoint=checkpoint)


def checkpoint_of(config: JobConfig) -> Path:
    """Return the path of the checkpoint that a run saves in its middle."""
    return Path(config.job.dump_folder, config.checkpoint.folder, f"step-{middle(config)}")


def train_reference(config: JobConfig) -> list[Key]:
    """Train on one process, and keep the record beside the outputs; return its keys, in order."""
    record = _train(config)
    _keep(record, Path(config.job.dump_folder, REFERENCE))
    return list(record)


def train_and_compare(config: JobConfig, reference: Path) -> RankResult:
    """Train the layout, and compare it with one process; each rank keeps its record for
    `resume_exactly`.

    reference: folder of the run on one process.
    """
    record = _train(config)
    _keep(record, _own_record(config))
    return _against(reference, record, config)


def resume_exactly(config: JobConfig) -> RankResult:
    """Resume a run in its middle, and compare it with itself: not a bit may differ."""
    record = _resume(config)
    found = other_bits(record, torch.load(_own_record(config)))
    return RankResult(list(record), found[:MOST_DIFFERENCES], {})


def resume_and_compare(config: JobConfig, reference: Path) -> RankResult:
    """Begin from the checkpoint of another layout, and compare with the run on one process.

    reference: folder of the run on one process.
    """
    return _against(reference, _resume(config), config)


def _against(reference: Path, record: Record, config: JobConfig) -> RankResult:
    in_bf16 = config.optimizer.state_dtype == "bfloat16"
    found, worst = differences(record, torch.load(reference / REFERENCE), bf16_state=in_bf16)
    return RankResult(list(record), found[:MOST_DIFFERENCES], worst)


def _keep(record: Record, file: Path) -> None:
    torch.save({key: piece.tensor for key, piece in record.items()}, file)


def _own_record(config: JobConfig) -> Path:
    return Path(config.job.dump_folder, f"rank-{os.environ['RANK']}.pt")


def _train(config: JobConfig) -> Record:
    """Train all steps, and save in the middle."""
    trainer, record = RecordedTrainer(config), {}
    try:
        for step in trainer.steps(config.training.steps):
            record |= step
            if trainer.step == middle(config):
                record |= trainer.state()
                save(trainer)
        return record | trainer.state()
    finally:
        trainer.close()


def _resume(config: JobConfig) -> Record:
    """Resume from the checkpoint that the config finds; record the loaded state and all steps
    after it."""
    trainer, record = RecordedTrainer(config), {}
    try:
        assert trainer.step == middle(config), f"resumed at step {trainer.step}"
        record |= trainer.state()
        for step in trainer.steps(config.training.steps):
            record |= step
        return record | trainer.state()
    finally:
        trainer.close()


def save(trainer: Trainer) -> None:
    trainer.checkpoint.save(trainer.run_state, trainer.step)
    trainer.checkpoint.finish()
