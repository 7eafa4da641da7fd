"""Gradient clipping by the global norm."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients so that their L2 norm over all ranks is at most `max_norm`.

    Returns the norm before clipping: a scalar, equal on all ranks. One all-reduce for sharded
    gradients.
    """
    params = [p for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in params], foreach=True)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    nn.utils.clip_grads_with_norm_(params, max_norm, norm, foreach=True)
    return norm
