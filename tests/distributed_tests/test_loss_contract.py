"""The debug model's losses are a contract: a change of numerics must not go unseen."""

from pathlib import Path

import pytest
import torch

from tests.helpers import Ranks
from torchtitan.config import ConfigManager
from torchtitan.trainer import Trainer
from torchtitan.trainer.step_log import Interval

REPO = Path(__file__).parents[2]
CONTRACT = REPO / "tests/assets/losses/deepseek_v3_debugmodel_cpu.txt"
# Of the shipped text, see torchtitan/data/sample/README.md (a test there recomputes it).
UNIGRAM_ENTROPY = 6.4340


def contract() -> list[float]:
    return [float(line) for line in CONTRACT.read_text().splitlines()]


def first_losses(steps: int, dump_folder: str) -> list[float]:
    config = REPO / "train_configs/debug_model.toml"
    options = [f"--job.config_file={config}", f"--job.dump_folder={dump_folder}"]
    trainer = Trainer(ConfigManager().parse_args(options))
    batches, losses = iter(trainer.dataloader), []
    for _ in range(steps):
        trainer.step += 1
        losses.append(trainer.train_step(batches, Interval()).loss)
    trainer.close()
    return losses


@pytest.mark.skipif(torch.cuda.is_available(), reason="the losses are those of CPUs")
def test_the_debug_model_repeats_its_committed_losses(ranks, tmp_path) -> None:
    """Five steps: enough for the router, both kinds of layers, the optimizer and the bias to show.
    Other processors round differently, hence not bit for bit.
    """
    pool: Ranks = ranks(2)
    losses = pool.run(first_losses, 5, str(tmp_path))[0]
    assert losses == pytest.approx(contract()[:5], rel=2e-4)


def test_the_committed_run_learned_more_than_token_frequencies() -> None:
    losses = contract()
    assert len(losses) == 280
    assert sum(losses[-20:]) / 20 < 4.4 < UNIGRAM_ENTROPY
