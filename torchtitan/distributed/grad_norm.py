"""Gradient clipping by the global norm."""

from collections import defaultdict
from collections.abc import Iterable
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchtitan.ops.grad_norm import total_norm
from torchtitan.ops.grouped_mm import local_part
from torchtitan.tools.utils import local_device


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients so that their L2 norm over all ranks is at most `max_norm`.

    Returns the norm before clipping: a scalar tensor, equal on all ranks.
    """
    parameters = list(parameters)
    norm, factor = clip_factor(parameters, max_norm)
    for grads in _local_grads(parameters).values():
        torch._foreach_mul_(grads, factor.to(grads[0].device))
    return norm


@torch.no_grad()
def clip_factor(parameters: Iterable[nn.Parameter], max_norm: float) -> tuple[Tensor, Tensor]:
    """Compute the L2 norm of all gradients over all ranks, and the factor that clips them.

    The optimizer multiplies by the factor as it reads the gradients, which saves a pass over them.
    Gradients of this rank may be parts of one tensor, in any dtype.

    Each rank adds up the squares of the gradients it holds; those that r ranks hold alike count
    1/r. Then one all-reduce over all ranks, whatever the meshes (dense, experts, one for each
    pipeline stage).

    Returns scalar tensors, equal on all ranks.
    """
    grads_by_copies = _local_grads(parameters)
    squares = [total_norm(g).square() / copies for copies, g in grads_by_copies.items()]
    if not squares:  # a pipeline's stage of which nothing is trained
        squares = [torch.zeros(())]
    # Moved to the device for the all-reduce; offloaded gradients are on the host.
    total = torch.stack([s.to(local_device()) for s in squares]).sum()
    if _world_size() > 1:
        dist.all_reduce(total)
    norm = total.sqrt()
    return norm, (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch does


def _local_grads(parameters: Iterable[nn.Parameter]) -> dict[int, list[Tensor]]:
    """Collect this rank's parts of the gradients, by the number of ranks that hold the same."""
    by_copies = defaultdict(list)
    for p in parameters:
        if p.grad is not None:
            by_copies[_copies(p.grad)].append(local_part(p.grad))
    return by_copies


def _copies(grad: Tensor) -> int:
    """Count the ranks that hold the same part of this gradient."""
    if not isinstance(grad, DTensor):
        return _world_size()
    sizes = zip(grad.device_mesh.shape, grad.placements, strict=True)
    return prod(size for size, placement in sizes if placement.is_replicate())


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
