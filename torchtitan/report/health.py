"""Checks of a run's numbers against what is usual: the first table of its report.

The bounds are those of docs/read_a_run.md, which says more about each number. They are a first
look, not a verdict: a run may be well outside of one.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from torchtitan.report.read import Curve, Run

# Before so many steps experts and losses are still on their way.
EARLY = 300


class Check(NamedTuple):
    """One check.

    fine: whether the number is usual; None = too early to say.
    """

    what: str
    value: str
    usual: str
    fine: bool | None


def health(run: Run) -> list[Check]:
    """Checks of a run; those for which it has no numbers are left out."""
    found = [check(run) for check in _CHECKS]
    return [check for check in found if check is not None]


def _newest(curve: Curve) -> float:
    """Median of the newest quarter of the records."""
    values = curve.values[-max(1, len(curve.values) // 4) :]
    return float(np.median(values))


def _loss(run: Run) -> Check | None:
    curve = run.curve("loss")
    if curve is None:
        return None
    first, now = float(curve.values[0]), _newest(curve)
    fine = None if len(curve.values) < 8 else now < first
    return Check("loss", f"{first:.2f} at first, {now:.2f} now", "falls", fine)


def _validation(run: Run) -> Check | None:
    curve = run.curve("validation_loss")
    if curve is None or len(curve.values) < 2:
        return None
    least = float(curve.values.min())
    value = f"{curve.last:.3f} at step {curve.steps[-1]:,}, at its least {least:.3f}"
    # Two per cent are the noise of short runs; rising for long is overfitting.
    return Check("validation loss", value, "falls with the loss", curve.last <= 1.02 * least)


def _undone_steps(run: Run) -> Check | None:
    curves = [run.curve(name) for name in ("skipped_steps", "rewinds")]
    counts = [int(curve.last) for curve in curves if curve is not None]
    if not counts:
        return None
    return Check("steps skipped, rewinds", ", ".join(map(str, counts)), "0", not any(counts))


def _gradients(run: Run) -> Check | None:
    curve, bound = run.curve("grad_norm"), run.settings.get("training.max_norm")
    if curve is None or not isinstance(bound, int | float) or not np.isfinite(bound):
        return None
    now = _newest(curve)
    usual = f"settles below {10 * bound:g} (10 x training.max_norm)"
    return Check("gradient norm", f"{now:.3g}", usual, now < 10 * bound)


def _dead_experts(run: Run) -> Check | None:
    curve = run.curve("dead_experts")
    if curve is None:
        return None
    fine = _in_time(curve, curve.last == 0)
    return Check("experts without a token", f"{curve.last:.0f}", "0 after some hundred steps", fine)


def _balance(run: Run) -> Check | None:
    curve = run.curve("max_violation")
    if curve is None:
        return None
    now = _newest(curve)
    fine = _in_time(curve, now < 1)
    usual = "below 1 after some hundred steps (largest load over the mean, minus 1)"
    return Check("max-violation", f"{now:.2f}", usual, fine)


def _in_time(curve: Curve, fine: bool) -> bool | None:
    """Judge a number that is not usual only after the first steps."""
    return None if not fine and curve.steps[-1] < EARLY else fine


def _data(run: Run) -> Check | None:
    curve = run.curve("data_percent")
    if curve is None:
        return None
    now = _newest(curve)
    return Check("waiting for data", f"{now:.1f} % of a step", "below 5 %", now < 5)


def _memory(run: Run) -> Check | None:
    curve = run.curve("memory_percent")
    if curve is None:
        return None
    return Check("memory of the device", f"{curve.last:.0f} %", "below 95 %", curve.last < 95)


def _mfu(run: Run) -> Check | None:
    curve = run.curve("mfu_percent")
    if curve is None:
        return None
    now = _newest(curve)
    return Check("MFU", f"{now:.1f} %", "30 to 50 %; below 20 % look at the times", now >= 20)


_CHECKS: tuple[Callable[[Run], Check | None], ...] = (
    _loss,
    _validation,
    _undone_steps,
    _gradients,
    _balance,
    _dead_experts,
    _data,
    _memory,
    _mfu,
)
