"""The learning rate as one pure function of the step: warm-up, stable, decay.

The factor that multiplies `optimizer.lr`, with W = warm-up steps, D = decay steps, N = total steps
and steps counted from 0 (step 0 is the first optimizer step):

    warm-up   step < W        (step + 1) / W, so the first step is not wasted on a rate of zero
    stable    step <= N - D   1
    decay     after that      from 1 towards the floor; the floor itself would be reached at step N,
                              one past the last, so that the last step still learns

With [[schedule.phase]] only the warm-up is used; the phases set the rest (config/phases.py).

This is torchtitan v0.2's schedule, so that its TOML files mean the same here. The warm-up-stable-
decay shape was made known by MiniCPM (https://arxiv.org/abs/2404.06395).
"""

import math
from collections.abc import Callable
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from torchtitan.tools.logging import logger

DecayType = Literal["linear", "sqrt", "cosine"]

# Progress through the decay (0 to 1) -> what is left of the way down to the floor (1 to 0).
_DECAY_SHAPES = {
    "linear": lambda progress: 1.0 - progress,
    "sqrt": lambda progress: 1.0 - math.sqrt(progress),
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def lr_factor(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int,
    decay_ratio: float | None,
    decay_type: DecayType,
    min_lr_factor: float,
) -> float:
    """Compute the factor for optimizer step `step` (from 0), between 0 and 1.

    Where warm-up and decay do not fit, the warm-up wins over the decay and the total over both.
    From `total_steps` on the factor stays at `min_lr_factor`.

    decay_ratio: the decay takes the last `round(decay_ratio * total_steps)` steps; None = all steps
        after the warm-up.
    """
    warmup, decay = _phase_lengths(total_steps, warmup_steps, decay_ratio)
    if step < warmup:
        return (step + 1) / warmup
    steps_into_decay = step - (total_steps - decay)
    if steps_into_decay <= 0 or decay == 0:
        return 1.0
    left = _DECAY_SHAPES[decay_type](min(steps_into_decay / decay, 1.0))
    return min_lr_factor + (1.0 - min_lr_factor) * left


def build_lr_scheduler(
    optimizer: Optimizer,
    *,
    total_steps: int,
    warmup_steps: int,
    decay_ratio: float | None,
    decay_type: DecayType,
    min_lr_factor: float,
) -> LambdaLR:
    """Build a `LambdaLR` over `lr_factor`; call its `step()` once after each `optimizer.step()`.

    A checkpoint keeps its step count; the rates and the schedule itself come from the config, so a
    resumed run may change `training.steps`. Warns where warm-up or decay are shortened.
    """
    warmup, decay = _phase_lengths(total_steps, warmup_steps, decay_ratio)
    if warmup < warmup_steps:
        logger.warning(
            f"lr_scheduler.warmup_steps = {warmup_steps} is more than training.steps = "
            f"{total_steps}: the learning rate only warms up, over {warmup} steps"
        )
    elif decay_ratio is not None and decay < round(decay_ratio * total_steps):
        logger.warning(
            f"lr_scheduler.warmup_steps = {warmup_steps} and lr_scheduler.decay_ratio = "
            f"{decay_ratio} together exceed training.steps = {total_steps}: the decay is shortened "
            f"to {decay} steps"
        )

    def factor(step: int) -> float:
        return lr_factor(
            step,
            total_steps=total_steps,
            warmup_steps=warmup_steps,
            decay_ratio=decay_ratio,
            decay_type=decay_type,
            min_lr_factor=min_lr_factor,
        )

    return LambdaLR(optimizer, factor)


def build_phase_lr_scheduler(
    optimizer: Optimizer, rate: Callable[[], float], *, lr: float, warmup_steps: int
) -> LambdaLR:
    """Build the scheduler of a run with phases: linear warm-up in steps, times the phases' rate.

    rate: returns the learning rate of the phases for the current step; called again by
        `resume_lr_scheduler`.
    lr: base learning rate of the optimizer.
    """

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / max(1, warmup_steps)) * rate() / lr

    return LambdaLR(optimizer, factor)


def resume_lr_scheduler(scheduler: LambdaLR, steps: int) -> None:
    """Resume after `steps` steps, with the base rates that the optimizer has now (the config's)."""
    factors = [factor(steps) for factor in scheduler.lr_lambdas]
    rates = [rate * factor for rate, factor in zip(scheduler.base_lrs, factors, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    state = scheduler.state_dict()
    scheduler.load_state_dict(state | {"last_epoch": steps, "_last_lr": rates})


def _phase_lengths(
    total_steps: int, warmup_steps: int, decay_ratio: float | None
) -> tuple[int, int]:
    warmup = min(warmup_steps, total_steps)
    rest = total_steps - warmup
    decay = rest if decay_ratio is None else min(round(decay_ratio * total_steps), rest)
    return warmup, decay
