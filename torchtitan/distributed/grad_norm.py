"""Gradient clipping by the global norm."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchtitan.ops.grad_norm import total_norm


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients so that their L2 norm over all ranks is at most `max_norm`; returns the norm
    before.
    """
    groups = _by_mesh(parameters)
    norm = _global_norm(groups)
    for group in groups:
        nn.utils.clip_grads_with_norm_(group, max_norm, norm, foreach=True)
    return norm


@torch.no_grad()
def clip_factor(parameters: Iterable[nn.Parameter], max_norm: float) -> tuple[Tensor, Tensor]:
    """The norm, and what to multiply gradients by instead of clipping them in a pass of its own."""
    norm = _global_norm(_by_mesh(parameters))
    return norm, (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch does


def _by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Dense weights and experts lie on different meshes, which torch can't mix in one norm."""
    groups = defaultdict(list)
    for p in parameters:
        if p.grad is not None:
            groups[p.grad.device_mesh if isinstance(p.grad, DTensor) else None].append(p)
    return list(groups.values())


def _global_norm(groups: list[list[nn.Parameter]]) -> Tensor:
    """L2 norm over all ranks, a scalar that is equal on all of them: one norm (and one all-reduce)
    for each mesh, then the root of the sum of squares.
    """
    norms = [_norm(group) for group in groups]
    return torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else norms[0]


def _norm(params: list[nn.Parameter]) -> Tensor:
    grads = [p.grad for p in params]
    if not isinstance(grads[0], DTensor):
        return total_norm(grads)
    return nn.utils.get_total_norm(grads, foreach=True).full_tensor()
