"""Initial weights that depend on the seed and the parameter's name, not on how it is sharded.

The same seed then gives the same model on one process, under FSDP, with experts spread over ranks
or with the layers split into pipeline parts.
"""

import hashlib
import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from torchtitan.ops import lora


@torch.no_grad()
def init_parameters(module: nn.Module, std: float) -> None:
    """Set vectors (norms) to one, all else to normal with `std`, seeded by `torch.initial_seed`.

    Of adapters, A becomes uniform up to 1 / sqrt(inputs), as Kaiming's rule gives it, and B zero.
    """
    for name, param in module.named_parameters():
        if param.ndim == 1:
            nn.init.ones_(param)
            continue
        if name.endswith(lora.B):
            nn.init.zeros_(param)
            continue
        bound = 1 / math.sqrt(param.shape[-1]) if name.endswith(lora.A) else None
        local, start = _local_part(param)
        if param.ndim == 2:
            _copy_part(local, _drawn(param.shape, std, bound, name, local), start)
            continue
        # Each expert of a stack has a random stream of its own; a rank draws only those it holds.
        for i, local_i in enumerate(local):
            stream = f"{name}/{start[0] + i}"
            _copy_part(local_i, _drawn(param.shape[1:], std, bound, stream, local), start[1:])


def _local_part(param: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """This rank's part of a parameter, and the index in the whole at which it starts."""
    if not isinstance(param, DTensor):
        return param, (0,) * param.ndim
    _, start = compute_local_shape_and_global_offset(
        param.shape, param.device_mesh, param.placements
    )
    return param.to_local(), tuple(start)


def _drawn(shape: torch.Size, std: float, bound: float | None, stream: str, like: Tensor) -> Tensor:
    """Draw a whole tensor: uniform up to `bound`, or normal with `std` where it is None."""
    if like.is_meta:
        return torch.empty(shape, device="meta")
    digest = hashlib.sha256(f"{torch.initial_seed()}/{stream}".encode()).digest()
    generator = torch.Generator(like.device).manual_seed(int.from_bytes(digest[:8]) >> 1)
    # fp32 whatever the default dtype, so that a bf16 model starts from the rounded fp32 weights.
    whole = torch.empty(shape, device=like.device, dtype=torch.float32)
    if bound is not None:
        return whole.uniform_(-bound, bound, generator=generator)
    return whole.normal_(std=std, generator=generator)


def _copy_part(target: Tensor, whole: Tensor, start: tuple[int, ...]) -> None:
    if target.numel():
        target.copy_(
            whole[tuple(slice(s, s + n) for s, n in zip(start, target.shape, strict=True))]
        )
