"""Limits of numbers that hold for all settings and model arguments.

Floats must be finite and within the range of fp32, in which a run uses them. Integers have an upper
limit far above all practical values, so that nothing overflows and no check takes minutes.
"""

import dataclasses
import math
from typing import Any, get_type_hints

from torchtitan.config.job_config import JobConfig
from torchtitan.config.schema import alternatives, as_text, entries
from torchtitan.tools.errors import UserError

# Normal numbers of fp32; smaller ones are flushed to 0 by some kernels.
LARGEST_FLOAT = 3.4028234663852886e38
SMALLEST_FLOAT = 2.0**-126
# fp32 distinguishes positions up to here; the width of a matrix is far below.
LARGEST_SIZE = 2**24
# Tokens of one forward pass: kernels index their rows with 32 bits.
MOST_TOKENS_A_PASS = 2**31 - 1
# fp64 holds all integers up to here.
MOST_TOKENS = 2**53

# The largest integer, and the keys that it holds for. All other keys: OTHERWISE.
OTHERWISE = 2**31 - 1
_LARGEST = {
    1_024: "training.dataset_num_workers",
    65_536: "training.dataset_lanes",
    LARGEST_SIZE: "training.seq_len training.local_batch_size schedule.phase.seq_len "
    "schedule.phase.local_batch_size validation.seq_len validation.local_batch_size",
    # "Never" may be written as a huge number of steps.
    2**53: "training.steps training.gc_freq lr_scheduler.warmup_steps checkpoint.interval "
    "checkpoint.load_step ema.start_step ema.interval metrics.log_freq profiling.profile_freq "
    "metrics.routing_moved_freq validation.freq validation.steps",
    2**63 - 1: "debug.seed",
}
_LARGEST_OF = {key: most for most, keys in _LARGEST.items() for key in keys.split()}
# Floats that may be inf, which switches something off.
_MAY_BE_INF = ("training.max_norm",)


def check_numbers(config: JobConfig) -> None:
    """Raise `UserError` for the first number beyond the limits of its type."""
    for entry in entries(config):
        if entry.value == math.inf and entry.key in _MAY_BE_INF:
            continue
        rule = broken_rule(entry.value, entry.type, _LARGEST_OF.get(entry.key, OTHERWISE))
        if rule:
            raise UserError(f"{entry.title} = {as_text(entry.value)} must be {rule}.")
    for title, batch, seq_len in _forward_passes(config):
        if batch * seq_len > MOST_TOKENS_A_PASS:
            raise UserError(
                f"{title}local_batch_size ({batch}) x seq_len ({seq_len}) = {batch * seq_len} must "
                f"be at most {MOST_TOKENS_A_PASS}, the tokens of one forward pass; lower either."
            )


def _forward_passes(config: JobConfig) -> list[tuple[str, int, int]]:
    batch, seq_len = config.training.local_batch_size, config.training.seq_len
    passes = [("training.", batch, seq_len)]
    for n, phase in enumerate(config.schedule.phase, start=1):
        batch, seq_len = phase.local_batch_size or batch, phase.seq_len or seq_len
        passes.append((f"{phase.title(n)}: ", batch, seq_len))
    if config.validation.enable:
        validation = config.validation
        passes.append(("validation.", validation.local_batch_size, validation.seq_len))
    return passes


def broken_rule(value: Any, kind: Any, largest: int = OTHERWISE) -> str | None:
    """Describe the limit that a number breaks, to follow "must be"; None where it breaks none.

    Values that are not numbers break none.

    value: an integer may stand for a float.
    kind: type annotation of the value.
    largest: limit of integers, in absolute value.
    """
    if type(value) not in (int, float):
        return None
    if float not in alternatives(kind):
        if abs(value) <= largest:
            return None
        return f"an integer of {f'at most {largest:,}' if value > 0 else f'at least {-largest:,}'}"
    if not abs(value) <= LARGEST_FLOAT:  # NaN fails every comparison
        return f"a finite number within {LARGEST_FLOAT:.3g} of 0, the range of fp32"
    if 0 < abs(value) < SMALLEST_FLOAT:
        return f"0 or at least {SMALLEST_FLOAT:.3g}, the smallest number of fp32"
    return None


def check_argument_numbers(args: Any, largest: dict[str, int]) -> None:
    """Raise `UserError` for the first number in a model's arguments beyond its limit.

    args: a dataclass.
    largest: limits of integers other than LARGEST_SIZE, by field.
    """
    hints = get_type_hints(type(args))
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        rule = broken_rule(value, hints[field.name], largest.get(field.name, LARGEST_SIZE))
        if rule:
            raise UserError(f"{field.name} ({as_text(value)}) must be {rule}.")
