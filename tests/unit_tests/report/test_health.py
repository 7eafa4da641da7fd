"""The first table of a report tells a run that is well from one to look at."""

from pathlib import Path

import numpy as np

from torchtitan.report.health import health
from torchtitan.report.read import Curve, Run

WELL = {
    "loss": (7.7, 4.3),
    "validation_loss": (7.6, 4.5),
    "skipped_steps": (0, 0),
    "rewinds": (0, 0),
    "grad_norm": (1.5, 0.4),
    "max_violation": (5.0, 0.2),
    "dead_experts": (9, 0),
    "data_percent": (3, 1),
    "memory_percent": (60, 61),
    "mfu_percent": (38, 41),
}


def run_of(steps: int = 400, **ends: tuple[float, float]) -> Run:
    """A run whose numbers go straight from one end to the other, in 40 records."""
    at = np.linspace(1, steps, 40).astype(np.int64)
    curves = {name: Curve(at, np.linspace(*pair, 40)) for name, pair in ends.items()}
    return Run("run", Path("run"), curves, settings={"training.max_norm": 1.0})


def marks(run: Run) -> dict[str, bool | None]:
    return {check.what: check.fine for check in health(run)}


def test_a_run_that_is_well_has_nothing_to_look_at():
    found = marks(run_of(**WELL))
    assert len(found) == 9 and all(found.values()), found


def test_each_number_that_is_not_usual_is_marked_and_no_other():
    sick = {
        "loss": ("loss", (7.7, 8.0)),
        "validation_loss": ("validation loss", (4.4, 4.6)),
        "rewinds": ("steps skipped, rewinds", (0, 1)),
        "grad_norm": ("gradient norm", (1.5, 40)),
        "max_violation": ("max-violation", (5, 4)),
        "dead_experts": ("experts without a token", (9, 3)),
        "data_percent": ("waiting for data", (1, 30)),
        "memory_percent": ("memory of the device", (60, 97)),
        "mfu_percent": ("MFU", (38, 9)),
    }
    for name, (what, ends) in sick.items():
        found = marks(run_of(**WELL | {name: ends}))
        assert [w for w, fine in found.items() if not fine] == [what]


def test_early_experts_are_not_judged():
    found = marks(run_of(100, **WELL | {"dead_experts": (9, 3), "max_violation": (5, 4)}))
    assert [fine for fine in found.values()].count(None) == 2 and False not in found.values()


def test_numbers_that_a_run_has_not_are_left_out():
    assert marks(run_of(tps=(1, 1))) == {}
