"""torch's Adam and AdamW on what this rank holds of each DTensor.

The update is elementwise, so it needs no plan of how DTensors are placed: torch makes one for each
list of weights, which took seconds of the first step. States are DTensors all the same, for
checkpoints.
"""

from typing import Any

from torch import Tensor
from torch.optim import Adam, AdamW

from torchtitan.ops.grouped_mm import local_part


class LocalAdam(Adam):
    """torch's Adam, on local tensors."""

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        has_complex = super()._init_group(group, *lists)
        _to_local(lists)
        return has_complex


class LocalAdamW(AdamW):
    """torch's AdamW, on local tensors."""

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        has_complex = super()._init_group(group, *lists)
        _to_local(lists)
        return has_complex


def _to_local(lists: tuple[list[Tensor], ...]) -> None:
    """lists: weights, gradients, states, steps, which `_init_group` has filled."""
    for tensors in lists:
        tensors[:] = [local_part(tensor) for tensor in tensors]
