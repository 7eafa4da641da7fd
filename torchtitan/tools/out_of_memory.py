"""The sentence for a device or a machine whose memory is used up, with the way out."""

import torch

from torchtitan.tools.launcher import planned_processes


def out_of_memory(error: Exception) -> str | None:
    """Return the sentence; None for other errors."""
    if host_is_full(error):
        what = "This machine's memory is used up"
    elif isinstance(error, torch.OutOfMemoryError):
        what = str(error).partition("\n")[0].partition(" GPU ")[0].rstrip(".")
    else:
        return None
    return (
        f"{what}; python scripts/plan.py CONFIG.toml --world-size {planned_processes()[0]} shows "
        "where a run's memory goes, and names the nearest change with which it fits."
    )


def host_is_full(error: Exception) -> bool:
    """Return whether an allocation on the host has failed: Python's, or torch's on the CPU."""
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
