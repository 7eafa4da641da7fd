"""Tells where a run that goes on takes other sequences a step than before."""

import math

from torchtitan.tools.logging import logger


def tell_other_batch(
    before: int, now: int, *, local_batch_size: int, dp_degree: int, in_phase: bool = False
) -> None:
    """Say so where the sequences of a step have changed, and which settings keep them.

    before: of the checkpoint's run at the step where this one goes on; now: of this run there.
    local_batch_size, dp_degree: of this run; their product must divide the sequences of a step.
    in_phase: a phase may say how many they are.
    """
    if before == now:
        return
    size = math.gcd(before // dp_degree, local_batch_size) if before % dp_degree == 0 else 0
    if in_phase:
        way_out = "batch_size of [[schedule.phase]] and training.global_batch_size say how many"
    elif size == local_batch_size:
        way_out = f"set training.global_batch_size = {before} to keep them"
    elif size:
        way_out = (
            f"set training.global_batch_size = {before} and training.local_batch_size = {size} to "
            "keep them"
        )
    else:
        way_out = (
            f"{dp_degree} data-parallel ranks can't share {before} evenly: to keep them, start as "
            f"many as divide {before} and set training.global_batch_size = {before}"
        )
    logger.warning(
        f"A step has {now} sequences from here on; it had {before} when the checkpoint was saved: "
        f"{way_out}"
    )
