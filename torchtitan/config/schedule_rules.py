"""Which phases of [[schedule.phase]] can be: each alone, one after the other, on this layout."""

import math

from torchtitan.config.degrees import nearest
from torchtitan.config.job_config import JobConfig, LRScheduler
from torchtitan.config.recipe import Phase
from torchtitan.config.schema import as_text
from torchtitan.tools.errors import UserError


def check_schedule(config: JobConfig, global_batch_size: int, dp_degree: int) -> None:
    """Raise `UserError` for the first phase that can't be; global_batch_size: resolved, before the
    first phase."""
    phases = config.schedule.phase
    if phases:
        _check_decay_is_left_to_phases(config.lr_scheduler)
        if config.optimizer.lr <= 0:
            raise UserError(
                f"optimizer.lr = {config.optimizer.lr} must be above 0 with [[schedule.phase]]: it "
                "is the rate before the first phase, and the phases' rates are measured against it."
            )
    unit = config.training.local_batch_size * dp_degree
    batch_size = global_batch_size
    for n, phase in enumerate(phases, start=1):
        where = f"schedule.phase {n}" + (f" ('{phase.name}')" if phase.name else "")
        _check_numbers(phase, where, config.training.seq_len)
        _check_shapes(phase, where)
        if phase.batch_size is not None:
            _check_batch_size(phase, where, batch_size, unit)
            batch_size = phase.batch_size


def _check_decay_is_left_to_phases(lr_scheduler: LRScheduler) -> None:
    for key in ("decay_ratio", "decay_type", "min_lr_factor"):
        value, default = getattr(lr_scheduler, key), getattr(LRScheduler(), key)
        if value != default:
            raise UserError(
                f"lr_scheduler.{key} = {as_text(value)}, but with [[schedule.phase]] the phases "
                "say how the learning rate falls (lr, lr_shape); leave it out "
                "(lr_scheduler.warmup_steps still holds)."
            )


def _check_numbers(phase: Phase, where: str, seq_len: int) -> None:
    if not seq_len <= phase.tokens < math.inf:
        raise UserError(
            f"{where}: tokens = {as_text(phase.tokens)} must be a number of tokens, at least one "
            f"sequence (training.seq_len, {seq_len})."
        )
    if phase.lr is not None and not 0 <= phase.lr < math.inf:
        raise UserError(f"{where}: lr = {as_text(phase.lr)} must be a finite number, 0 or more.")
    coefficients = (
        "load_balance_coeff",
        "sequence_balance_coeff",
        "global_balance_coeff",
        "mtp_loss_weight",
    )
    for name in coefficients:
        value = getattr(phase, name)
        if value is not None and not 0 <= value < math.inf:
            raise UserError(
                f"{where}: {name} = {as_text(value)} must be a finite number, 0 or more."
            )


def _check_shapes(phase: Phase, where: str) -> None:
    for name, shape in (("lr", phase.lr_shape), ("batch_size", phase.batch_size_shape)):
        if shape != "constant" and getattr(phase, name) is None:
            raise UserError(
                f'{where}: {name}_shape = "{shape}" leads nowhere: set {name} to where it ends, or '
                f"leave {name}_shape out."
            )
    stairs = phase.batch_size_shape == "linear"
    if stairs != (phase.batch_size_step is not None):
        raise UserError(
            f"{where}: batch_size_step, the height of a stair in sequences, belongs to "
            f'batch_size_shape = "linear"; {"set it" if stairs else "leave it out"}.'
        )


def _check_batch_size(phase: Phase, where: str, before: int, unit: int) -> None:
    """All sizes on the way must be whole forward passes of all ranks."""
    for name in ("batch_size", "batch_size_step"):
        size = getattr(phase, name)
        if size is not None and (size < 1 or size % unit):
            below = max(size // unit, 0) * unit
            legal = [number for number in (below, below + unit) if number]
            raise UserError(
                f"{where}: {name} = {size} must be a multiple of {unit}, one forward pass of all "
                "ranks (training.local_batch_size x the data-parallel degree); set it to "
                f"{nearest(size, legal)}."
            )
    step = phase.batch_size_step
    if step is not None and (phase.batch_size - before) % step:
        raise UserError(
            f"{where}: batch_size_step = {step} must divide the way from {before} to "
            f"{phase.batch_size} sequences ({abs(phase.batch_size - before)})."
        )
