"""Gradient clipping by the global norm."""

from collections import defaultdict
from collections.abc import Iterable
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchtitan.ops.grad_norm import total_norm
from torchtitan.tools.utils import local_device


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients so that their L2 norm over all ranks is at most `max_norm`.

    Returns the norm before clipping: a scalar, equal on all ranks. Each rank adds up the squares of
    what it holds, a part of which r ranks hold the same counting 1/r; then one all-reduce over all
    ranks, whatever the meshes (dense, experts, one for each pipeline stage).
    """
    by_copies = defaultdict(list)
    for p in parameters:
        if p.grad is not None:
            local = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
            by_copies[_copies(p.grad)].append(local)
    squares = [
        nn.utils.get_total_norm(grads, foreach=True).square() / copies
        for copies, grads in by_copies.items()
    ]
    # On the device, where the ranks can meet; offloaded gradients are on the host.
    total = torch.stack(squares).sum().to(local_device())
    dist.all_reduce(total)
    norm = total.sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch does
    for grads in by_copies.values():
        torch._foreach_mul_(grads, factor.to(grads[0].device))
    return norm


@torch.no_grad()
def clip_factor(parameters: Iterable[nn.Parameter], max_norm: float) -> tuple[Tensor, Tensor]:
    """One process: the norm, and what to multiply gradients by instead of clipping them in a pass
    of its own. Gradients may be parts of one tensor, in any dtype.
    """
    norm = total_norm([p.grad for p in parameters if p.grad is not None])
    return norm, (max_norm / (norm + 1e-6)).clamp(max=1.0)


def _copies(grad: Tensor) -> int:
    """How many ranks hold the same numbers."""
    if not isinstance(grad, DTensor):
        return dist.get_world_size()
    sizes = zip(grad.device_mesh.shape, grad.placements, strict=True)
    return prod(size for size, placement in sizes if placement.is_replicate())
