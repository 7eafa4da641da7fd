"""Matrix products over groups of rows: one expert, one group.

Rows of `x` are sorted by group; group e holds `counts[e]` of them (zero is fine).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Public since torch 2.12 or so; the same kernel under a private name in 2.11.
_kernel = getattr(F, "grouped_mm", None) or torch._grouped_mm


def grouped_mm(x_RK: Tensor, w_EKN: Tensor, counts_E: Tensor) -> Tensor:
    """x[rows of group e] @ w[e] for every e: (R, N), R = counts.sum(). Differentiable, no host
    sync.

    Falls back to `grouped_mm_loop` where the kernel can't go.
    """
    if not _kernel_takes(x_RK, w_EKN):
        return grouped_mm_loop(x_RK, w_EKN, counts_E)
    return _kernel(x_RK, w_EKN, offs=counts_E.cumsum(0, dtype=torch.int32))


@torch.compiler.disable  # data-dependent splits
def grouped_mm_loop(x_RK: Tensor, w_EKN: Tensor, counts_E: Tensor) -> Tensor:
    """The plain loop: any dtype, any size, one product a group; the reference of `grouped_mm`."""
    counts = counts_E.tolist()  # host sync: torch.split wants Python integers
    rows = torch.split(x_RK, counts)
    return torch.cat([x_e @ w_e for x_e, w_e in zip(rows, w_EKN.unbind(0), strict=True)])


def _kernel_takes(x_RK: Tensor, w_EKN: Tensor) -> bool:
    # Both K and N must be whole multiples of 16 bytes; fp64 isn't there at all, fp32 and fp16 only
    # on CPU, and of those torch's shape function (needed under torch.compile) knows bf16 only.
    if any(size * x_RK.element_size() % 16 for size in w_EKN.shape[1:]):
        return False
    if x_RK.dtype == torch.bfloat16:
        return True
    on_cpu = x_RK.device.type == "cpu" and x_RK.dtype in (torch.float32, torch.float16)
    return on_cpu and not torch.compiler.is_compiling()
