"""Gradient clipping by the global norm."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients so that their L2 norm over all ranks is at most `max_norm`.

    Returns the norm before clipping: a scalar, equal on all ranks. Dense weights and experts lie on
    different meshes, which torch can't mix in one norm: one norm (and one all-reduce) for each
    mesh, then the root of the sum of squares.
    """
    groups = defaultdict(list)
    for p in parameters:
        if p.grad is not None:
            groups[p.grad.device_mesh if isinstance(p.grad, DTensor) else None].append(p)
    norms = [_norm(group) for group in groups.values()]
    norm = torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else norms[0]
    for group in groups.values():
        nn.utils.clip_grads_with_norm_(group, max_norm, norm, foreach=True)
    return norm


def _norm(params: list[nn.Parameter]) -> Tensor:
    norm = nn.utils.get_total_norm([p.grad for p in params], foreach=True)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
