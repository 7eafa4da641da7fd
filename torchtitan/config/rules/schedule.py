"""Rules for [[schedule.phase]]: for each phase alone, in sequence, and on this layout."""

from itertools import pairwise

from torchtitan.config.degrees import Degrees, check_sequence, nearest
from torchtitan.config.job_config import JobConfig, LRScheduler
from torchtitan.config.phases import BatchShape, RunSchedule, StepSettings
from torchtitan.config.rules.numbers import MOST_TOKENS
from torchtitan.config.schedule_tables import COEFFICIENTS, Phase
from torchtitan.config.schema import as_text
from torchtitan.tools.errors import UserError

# Limit, because each stair is checked before the run begins.
MOST_STAIRS = 10_000


def check_schedule(schedule: RunSchedule, config: JobConfig, degrees: Degrees) -> None:
    """Raise `UserError` for the first impossible phase."""
    phases = schedule.phases
    if phases:
        _check_decay_is_left_to_phases(config.lr_scheduler)
        if config.optimizer.lr <= 0:
            raise UserError(
                f"optimizer.lr = {config.optimizer.lr} must be above 0 with [[schedule.phase]]: it "
                "is the rate before the first phase, and the phases' rates are measured against it."
            )
    dp_degree = degrees.dp_replicate * degrees.dp_shard
    pairs = pairwise(schedule.ends)
    for n, (phase, (before, end)) in enumerate(zip(phases, pairs, strict=True), start=1):
        where = phase.title(n)
        _check_numbers(phase, where)
        is_dry_run = config.comm.mode == "fake_backend"
        _check_sequences(phase, where, end, degrees, is_dry_run=is_dry_run)
        _check_shapes(phase, where)
        _check_batch_size(phase, where, before.batch_size, end, dp_degree)


def _check_sequences(
    phase: Phase, where: str, end: StepSettings, degrees: Degrees, *, is_dry_run: bool
) -> None:
    for name in ("seq_len", "local_batch_size"):
        value = getattr(phase, name)
        if value is not None and value < 1:
            raise UserError(f"{where}: {name} = {value} must be 1 or more.")
    changed = [name for name in BatchShape._fields if getattr(phase, name) is not None]
    if changed and is_dry_run:
        raise UserError(
            f"{where}: {changed[0]} = {as_text(getattr(phase, changed[0]))} needs the data "
            'positions of all ranks, but comm.mode = "fake_backend" runs one of them; leave '
            "either out."
        )
    if phase.seq_len is not None:
        check_sequence(f"{where}: seq_len", phase.seq_len, degrees)
    if not end.seq_len <= phase.tokens <= MOST_TOKENS:
        raise UserError(
            f"{where}: tokens = {as_text(phase.tokens)} must be a number of tokens, at least one "
            f"sequence (seq_len, {end.seq_len}) and at most {MOST_TOKENS:,}."
        )


def _check_decay_is_left_to_phases(lr_scheduler: LRScheduler) -> None:
    for key in ("decay_ratio", "decay_type", "min_lr_factor"):
        value, default = getattr(lr_scheduler, key), getattr(LRScheduler(), key)
        if value != default:
            raise UserError(
                f"lr_scheduler.{key} = {as_text(value)}, but with [[schedule.phase]] the phases "
                "set the decay of the learning rate (lr, lr_shape); leave it out "
                "(lr_scheduler.warmup_steps still applies)."
            )


def _check_numbers(phase: Phase, where: str) -> None:
    for name in ("lr", *COEFFICIENTS):
        value = getattr(phase, name)
        if value is not None and value < 0:
            raise UserError(
                f"{where}: {name} = {as_text(value)} must be a finite number, 0 or more."
            )


def _check_shapes(phase: Phase, where: str) -> None:
    for name, shape in (("lr", phase.lr_shape), ("batch_size", phase.batch_size_shape)):
        if shape != "constant" and getattr(phase, name) is None:
            raise UserError(
                f'{where}: {name}_shape = "{shape}" needs an end: set {name} to the value at the '
                f"end of the phase, or leave {name}_shape out."
            )
    stairs = phase.batch_size_shape == "linear"
    if stairs != (phase.batch_size_step is not None):
        raise UserError(
            f"{where}: batch_size_step, the height of a stair in sequences, belongs to "
            f'batch_size_shape = "linear"; {"set it" if stairs else "leave it out"}.'
        )


def _check_batch_size(
    phase: Phase, where: str, before: int, end: StepSettings, dp_degree: int
) -> None:
    """Check that all batch sizes of the phase are whole forward passes of all ranks."""
    unit = end.local_batch_size * dp_degree
    step = phase.batch_size_step
    if phase.batch_size is None and end.batch_size % unit:
        raise UserError(
            f"{where}: local_batch_size = {end.local_batch_size} x the data-parallel degree "
            f"({dp_degree}) must divide the batch_size that the phase begins with "
            f"({end.batch_size} sequences); change it, or set batch_size, too."
        )
    for name, size in (("batch_size", end.batch_size), ("batch_size_step", step)):
        if size is not None and (size < 1 or size % unit):
            below = max(size // unit, 0) * unit
            legal = [number for number in (below, below + unit) if number]
            raise UserError(
                f"{where}: {name} = {size} must be a multiple of {unit}, one forward pass of all "
                "ranks (local_batch_size x the data-parallel degree); set it to "
                f"{nearest(size, legal)}."
            )
    way = abs(end.batch_size - before)
    if step is not None and way % step:
        raise UserError(
            f"{where}: batch_size_step = {step} must divide the difference between {before} and "
            f"{end.batch_size} sequences ({way})."
        )
    if step is not None and way // step > MOST_STAIRS:
        raise UserError(
            f"{where}: batch_size_step = {step} makes {way // step} stairs from {before} to "
            f"{end.batch_size} sequences, but at most {MOST_STAIRS} are allowed; raise it."
        )
    if step is not None and before % unit:
        raise UserError(
            f"{where}: the batch size of {before} sequences at its start is not a multiple of "
            f"{unit}, one forward pass of all ranks (local_batch_size x the data-parallel degree); "
            "change local_batch_size in a phase of its own."
        )
