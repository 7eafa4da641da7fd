"""Matrix products over groups of rows: each expert's rows are a group.

Rows of `x` are sorted by group; group e has `counts[e]` of them (zero is fine).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchtitan.tools.utils import eager

# Public since torch 2.12 or so; the same kernel under a private name in 2.11.
kernel = getattr(F, "grouped_mm", None) or torch._grouped_mm


def local_part(weights: Tensor) -> Tensor:
    """This rank's part of a tensor: all of a plain tensor, the local part of a DTensor."""
    return weights.to_local() if isinstance(weights, DTensor) else weights


def grouped_linear(
    x_RK: Tensor, weight_ENK: Tensor, counts_E: Tensor, *, loop: bool = False
) -> Tensor:
    """Compute x[rows of group e] · weight[e]ᵀ for every e: (R, N). Differentiable, no host sync.

    weight_ENK: of a DTensor, the groups that this rank holds are used.
    counts_E: int32, rows of each group; their sum is R.
    loop: use `grouped_mm_loop`, as also where the kernel doesn't apply (`why_loop`).
    """
    w_EKN = local_part(weight_ENK).transpose(1, 2)
    on_cpu, compiling = x_RK.device.type == "cpu", torch.compiler.is_compiling()
    if loop or why_loop(x_RK.dtype, w_EKN.shape[1:], on_cpu=on_cpu, compiling=compiling):
        return grouped_mm_loop(x_RK, w_EKN, counts_E)
    return _GroupedMM.apply(x_RK, w_EKN, counts_E.cumsum(0, dtype=torch.int32))


class _GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RK: Tensor, w_EKN: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_RK, w_EKN, ends_E)
        return kernel(x_RK, w_EKN, offs=ends_E)

    @staticmethod
    def backward(ctx: Any, grad_RN: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        needs_x, needs_w, _ = ctx.needs_input_grad
        grad_x_RK, grad_w_ENK = _gradients(grad_RN, *ctx.saved_tensors, needs_x, needs_w)
        grad_w_EKN = grad_w_ENK.transpose(1, 2)
        return grad_x_RK if needs_x else None, grad_w_EKN if needs_w else None, None


@torch.library.custom_op("torchtitan::grouped_mm_backward", mutates_args=())
def _gradients(
    grad_RN: Tensor, x_RK: Tensor, w_EKN: Tensor, ends_E: Tensor, needs_x: bool, needs_w: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x, and of w as (E, N, K); of what needs none, of no size.

    An operator of its own, since a rank may have no row at all, which the kernel refuses here; and
    the number of rows is unknown while a layer is compiled.
    """
    E, K, N = w_EKN.shape
    grad_x, grad_w = x_RK.new_empty(0, 0), x_RK.new_empty(0, 0, 0)
    rows = x_RK.size(0)
    grad_RN = grad_RN.contiguous()
    if needs_x:
        w_ENK = w_EKN.transpose(1, 2)
        grad_x = kernel(grad_RN, w_ENK, offs=ends_E) if rows else torch.zeros_like(x_RK)
    if needs_w:
        grad_w = kernel(grad_RN.t(), x_RK, offs=ends_E) if rows else x_RK.new_zeros(E, N, K)
    return grad_x, grad_w


@_gradients.register_fake
def _(grad_RN, x_RK, w_EKN, ends_E, needs_x, needs_w):
    E, K, N = w_EKN.shape
    grad_x = x_RK.new_empty(x_RK.shape if needs_x else (0, 0))
    return grad_x, x_RK.new_empty((E, N, K) if needs_w else (0, 0, 0))


@eager  # data-dependent splits
def grouped_mm_loop(x_RK: Tensor, w_EKN: Tensor, counts_E: Tensor) -> Tensor:
    """Compute one product a group: any dtype, any size; the reference of `grouped_linear`."""
    counts = counts_E.tolist()  # host sync: torch.split takes Python integers
    rows = torch.split(x_RK, counts)
    return torch.cat([x_e @ w_e for x_e, w_e in zip(rows, w_EKN.unbind(0), strict=True)])


def why_loop(
    dtype: torch.dtype, sizes: Sequence[int], *, on_cpu: bool, compiling: bool = False
) -> str | None:
    """Reason for which `grouped_linear` must use the loop, None where the kernel applies.

    The loop costs a host sync and a product for each expert.

    sizes: (K, N) of the weights.
    """
    if any(size * dtype.itemsize % 16 for size in sizes):
        return f"sizes {tuple(sizes)} are not multiples of 16 bytes"
    if dtype == torch.bfloat16:
        return None
    if not on_cpu:
        return f"the GPU kernel takes bfloat16, not {dtype}"
    if dtype not in (torch.float32, torch.float16):
        return f"the CPU kernel doesn't take {dtype}"
    # The kernel's shape function in torch, which torch.compile needs, accepts bf16 only.
    return f"torch.compile can't follow the kernel in {dtype}" if compiling else None
