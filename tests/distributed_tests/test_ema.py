"""The average of the weights on every layout: kept by parts, loaded by any other layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed_tests.resume_ranks import options
from tests.distributed_tests.test_resume import CP, EP, LAYOUTS, PP, TP, run_of
from tests.distributed_tests.training_ranks import of_all_stages, whole
from torchtitan.config import ConfigManager
from torchtitan.trainer import Trainer

# Each saves, and is loaded by the next.
RING = {
    "one process": LAYOUTS["one process"],
    "PP 2, EP 2": (4, {PP: 2, EP: 2}),
    "CP 2, TP 2, EP 4": (4, {CP: 2, TP: 2, EP: 4}),
}
NEXT = dict(zip(RING, [*list(RING)[1:], *list(RING)[:1]], strict=True))
# Without the loss that the other rows of test_resume.py have on: its gradient is next to nothing
# here, and AdamW would take its rounding for a direction.
EMA = {
    "ema__enable": True,
    "ema__decay": 0.5,
    "model__args.moe_args.global_balance_coeff": 0.0,
}


def average_of(folder: Path, changes: dict[str, Any]) -> dict[str, Tensor]:
    """Whole tensors on every rank, after the run."""
    trainer = Trainer(ConfigManager().parse_args(options(folder, changes)))
    trainer.train()
    average = {name: whole(tensor) for name, tensor in trainer.average.tensors().items()}
    average = of_all_stages(average, trainer)
    trainer.close()
    return average


@pytest.fixture(scope="module")
def averages(ranks, tmp_path_factory):
    """The folder and the average of each layout's run, trained once."""
    runs = {}

    def run(name: str):
        if name not in runs:
            world_size, settings = RING[name]
            folder, changes = tmp_path_factory.mktemp("ema"), run_of(world_size, settings) | EMA
            changes["debug__seed"] = 7
            runs[name] = folder, ranks(world_size).run(average_of, folder, changes)[0]
        return runs[name]

    return run


@pytest.mark.parametrize("name", list(RING)[1:])
def test_every_layout_averages_like_one_process(averages, name):
    """Up to the rounding of AdamW's steps, which are large here: a third of the weights' size."""
    expected, ours = averages("one process")[1], averages(name)[1]
    assert ours.keys() == expected.keys()
    for key, tensor in expected.items():
        error = (ours[key] - tensor).norm().item()
        assert error <= 1e-4 * tensor.norm().item(), f"{key} is off by {error:.1e}"


@pytest.mark.parametrize(("source", "target"), NEXT.items())
def test_any_layout_takes_the_average_of_any_other(ranks, averages, source, target, tmp_path):
    """To the bit: the last step is done already, so nothing is added."""
    folder, expected = averages(source)
    world_size, settings = RING[target]
    start = {
        "checkpoint__initial_load_path": folder / "checkpoint/step-3",
        "checkpoint__initial_load_model_only": False,
    }
    changes = run_of(world_size, settings) | EMA | start
    for loaded in ranks(world_size).run(average_of, tmp_path, changes):
        assert loaded.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(loaded[key], tensor), key
