"""The sentence for a device whose memory is used up, with the way out."""

import torch

from torchtitan.tools.launcher import planned_processes


def out_of_memory(error: Exception) -> str | None:
    """None for other errors."""
    if not isinstance(error, torch.OutOfMemoryError):
        return None
    what = str(error).partition("\n")[0].partition(" GPU ")[0].rstrip(".")
    return (
        f"{what}; python scripts/plan.py CONFIG.toml --world-size {planned_processes()[0]} shows "
        "where a run's memory goes, and names the nearest change with which it fits."
    )
