"""The warning about a resumed run whose steps have another number of sequences than before."""

import math

from torchtitan.tools.logging import logger


def warn_of_other_batch(
    before: int, now: int, *, local_batch_size: int, dp_degree: int, in_phase: bool = False
) -> None:
    """Warn where the number of sequences a step has changed, and name the settings that keep it.

    before: sequences a step of the checkpoint's run, at the step where this one resumes.
    now: sequences a step of this run, at the same step.
    local_batch_size, dp_degree: of this run; their product must divide the sequences of a step.
    in_phase: whether the step is in a phase, which may set their number.
    """
    if before == now:
        return
    size = math.gcd(before // dp_degree, local_batch_size) if before % dp_degree == 0 else 0
    if in_phase:
        way_out = "batch_size of [[schedule.phase]] and training.global_batch_size set the number"
    elif size == local_batch_size:
        way_out = f"set training.global_batch_size = {before} to keep them"
    elif size:
        way_out = (
            f"set training.global_batch_size = {before} and training.local_batch_size = {size} to "
            "keep them"
        )
    else:
        way_out = (
            f"{dp_degree} data-parallel ranks can't share {before} evenly: to keep them, start a "
            f"number that divides {before} and set training.global_batch_size = {before}"
        )
    logger.warning(
        f"A step has {now} sequences from now on; it had {before} when the checkpoint was saved: "
        f"{way_out}"
    )
