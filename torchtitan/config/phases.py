"""The phases of [[schedule.phase]]: settings of a step as a function of the tokens seen before it.

No state is kept: a run that is resumed, or rewound, in the middle of a phase continues unchanged.
Without phases all values are those of the config, and `lr_scheduler` shapes the learning rate.

    learning rate   from the rate at the end of the previous phase (first: optimizer.lr)
    batch size      in stairs of equal height, so that the layout can't change the sizes; the sizes
                    from first to last share the phase evenly (first: training.global_batch_size)
    coefficients    constant in a phase (first: those of the model arguments)
    batch shape     sequence length, sequences in one forward pass, YaRN: constant in a phase
                    (first: [training] and the model arguments)
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

from torchtitan.config.degrees import nearest
from torchtitan.config.job_config import JobConfig
from torchtitan.config.schedule_tables import COEFFICIENTS, Phase
from torchtitan.tools.errors import UserError


class BatchShape(NamedTuple):
    """Shape of a forward pass.

    seq_len: tokens of a sequence.
    local_batch_size: sequences.
    yarn: as model.args.yarn; None = the model's own.
    """

    seq_len: int
    local_batch_size: int
    yarn: str | None


@dataclass(frozen=True)
class StepSettings:
    """Settings of one optimizer step.

    phase: number from 1; 0 = before the first phase, or no phases.
    name: of the phase.
    lr: learning rate.
    batch_size: sequences over all ranks.
    seq_len, local_batch_size, yarn: see `BatchShape`.
    coefficients: those that a phase has set so far; all others are the model's own.
    """

    phase: int
    name: str
    lr: float
    batch_size: int
    seq_len: int
    local_batch_size: int
    yarn: str | None = None
    coefficients: dict[str, float] = field(default_factory=dict)

    def accumulation(self, dp_degree: int) -> int:
        """Micro-batches of a data-parallel rank."""
        return self.batch_size // (self.local_batch_size * dp_degree)

    @property
    def title(self) -> str:
        return f"{self.phase} '{self.name}'" if self.name else str(self.phase)

    @property
    def batch_shape(self) -> BatchShape:
        return BatchShape(self.seq_len, self.local_batch_size, self.yarn)

    def describe(self) -> str:
        sequences = f"{self.batch_size} sequences of {self.seq_len} tokens a step"
        parts = [f"learning rate {self.lr:.3g}", sequences]
        parts += [f'yarn "{self.yarn}"'] if self.yarn else []
        return ", ".join(parts + [f"{name} {v:g}" for name, v in self.coefficients.items()])

    def numbers(self) -> dict[str, float]:
        """Numbers for the log; empty without phases."""
        if not self.phase:
            return {}
        sizes = {"batch_size": self.batch_size, "seq_len": self.seq_len}
        return {"phase": self.phase, **sizes, **self.coefficients}


def coefficients_set(phases: Sequence[Phase]) -> set[str]:
    """List the coefficients that some phase sets."""
    return {name for phase in phases for name in _values_set(phase, COEFFICIENTS)}


def largest_coefficients(phases: Sequence[Phase]) -> dict[str, float]:
    """Return the largest value of each coefficient that some phase sets."""
    return {
        name: max(value for phase in phases if (value := getattr(phase, name)) is not None)
        for name in coefficients_set(phases)
    }


class RunSchedule:
    """Settings over the whole run.

    phases: in order.
    before: settings before the first phase.
    """

    def __init__(self, phases: Sequence[Phase], before: StepSettings):
        self.phases = list(phases)
        self._before = [before]  # the values at the end of each phase
        for n, phase in enumerate(self.phases, start=1):
            self._before.append(_entered(self._before[-1], phase, n))

    @classmethod
    def of(cls, config: JobConfig, batch_size: int) -> Self:
        """Build the schedule of a config.

        batch_size: sequences of the first step, over all ranks; -1 resolved.
        """
        training = config.training
        before = StepSettings(
            phase=0,
            name="",
            lr=config.optimizer.lr,
            batch_size=batch_size,
            seq_len=training.seq_len,
            local_batch_size=training.local_batch_size,
        )
        return cls(config.schedule.phase, before)

    @property
    def tokens(self) -> float:
        """Tokens of all phases together."""
        return sum(phase.tokens for phase in self.phases)

    @property
    def ends(self) -> list[StepSettings]:
        """Settings before the first phase, and at the end of each phase."""
        return list(self._before)

    def at(self, tokens: int) -> StepSettings:
        """Settings of the step after `tokens` tokens; past the last phase, those at its end."""
        start = 0.0
        for n, phase in enumerate(self.phases):
            if tokens < start + phase.tokens:
                return _within(self._before[n], self._before[n + 1], phase, tokens - start)
            start += phase.tokens
        return self._before[-1]

    def begun(self, tokens: int) -> list[StepSettings]:
        """Settings at the end of each phase that has begun after `tokens` tokens."""
        ends, start = [], 0.0
        for n, phase in enumerate(self.phases, start=1):
            if start <= tokens:
                ends.append(self._before[n])
            start += phase.tokens
        return ends or [self._before[0]]

    def num_steps(self) -> int:
        """Count the optimizer steps until the phases are over."""
        return sum(number for number, _, _ in self._equal_steps())

    def first_sequences(self) -> list[int]:
        """Number, from 0, of the first sequence after all tokens of earlier phases, for each phase.

        It may be in the middle of a step of the previous phase.
        """
        firsts: list[int] = []
        runs, seq_len = self._equal_steps(), self._before[0].seq_len
        began = sequences, tokens = 0, 0  # before the last run of equal steps; after it
        end = 0.0
        for phase in self.phases:
            while tokens < end:
                began = sequences, tokens
                number, batch_size, seq_len = next(runs)
                sequences += number * batch_size
                tokens += number * batch_size * seq_len
            firsts.append(began[0] + math.ceil((end - began[1]) / seq_len))
            end += phase.tokens
        return firsts

    def _equal_steps(self) -> Iterator[tuple[int, int, int]]:
        """Yield runs of equal steps until the phases are over: their number, batch size and
        sequence length. Only the last step of a run may cross the end of a phase."""
        tokens, end = 0, 0.0
        for n, phase in enumerate(self.phases):
            start, end = end, end + phase.tokens
            while tokens < end:
                now = self.at(tokens)
                tokens_of_step = now.batch_size * now.seq_len
                border = start + _end_of_stair(self._before[n], now, phase)
                number = max(1, math.ceil((min(border, end) - tokens) / tokens_of_step))
                last = self.at(tokens + (number - 1) * tokens_of_step)
                if last.batch_size != now.batch_size:  # rounding has put it on the next stair
                    number -= 1
                yield number, now.batch_size, now.seq_len
                tokens += number * tokens_of_step


def _entered(before: StepSettings, phase: Phase, number: int) -> StepSettings:
    """Settings at the end of a phase."""
    named = _values_set(phase, ("lr", "batch_size", *BatchShape._fields))
    values = before.coefficients | _values_set(phase, COEFFICIENTS)
    in_order = {name: values[name] for name in COEFFICIENTS if name in values}
    return replace(before, phase=number, name=phase.name, coefficients=in_order, **named)


def _values_set(phase: Phase, names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(phase, name)) is not None}


def _within(before: StepSettings, end: StepSettings, phase: Phase, tokens: float) -> StepSettings:
    progress = tokens / phase.tokens
    now = end
    if phase.lr_shape != "constant":
        left = (
            1 - progress if phase.lr_shape == "linear" else (1 + math.cos(math.pi * progress)) / 2
        )
        now = replace(now, lr=end.lr + (before.lr - end.lr) * left)
    if phase.batch_size_shape == "linear":
        height, num_sizes = _stairs(before, phase)
        climbed = math.floor(progress * num_sizes)
        step = math.copysign(height, end.batch_size - before.batch_size)
        now = replace(now, batch_size=before.batch_size + int(step) * climbed)
    return now


def _stairs(before: StepSettings, phase: Phase) -> tuple[int, int]:
    """Height of a stair, and the number of batch sizes, first and last included."""
    # config/rules/schedule.py refuses a phase with stairs that lacks one of these two
    assert phase.batch_size is not None and phase.batch_size_step is not None
    height = phase.batch_size_step
    return height, abs(phase.batch_size - before.batch_size) // height + 1


def _end_of_stair(before: StepSettings, now: StepSettings, phase: Phase) -> float:
    """Tokens of the phase after which its batch size changes next."""
    if phase.batch_size_shape == "constant":
        return phase.tokens
    height, num_sizes = _stairs(before, phase)
    climbed = abs(now.batch_size - before.batch_size) // height
    return phase.tokens * (climbed + 1) / num_sizes


def resolve_global_batch_size(config: JobConfig, dp_degree: int) -> int:
    """Sequences per optimizer step, with -1 resolved. Raises `UserError` where they are not a
    multiple of one forward pass of all ranks."""
    wanted, local = config.training.global_batch_size, config.training.local_batch_size
    unit = local * dp_degree
    if wanted == -1:
        return unit
    if wanted < 1 or wanted % unit:
        below = max(wanted // unit, 0) * unit
        raise UserError(
            f"training.global_batch_size = {wanted} must be -1 or a multiple of {unit}, "
            f"training.local_batch_size ({local}) x the data-parallel degree ({dp_degree}); "
            f"set it to {nearest(wanted, [number for number in (below, below + unit) if number])}."
        )
    return wanted


def run_schedule(config: JobConfig, dp_degree: int) -> RunSchedule:
    """Schedule of a run on `dp_degree` data-parallel ranks. Raises `UserError` for an impossible
    batch size."""
    return RunSchedule.of(config, resolve_global_batch_size(config, dp_degree))
