"""Low-rank adapters beside a weight: y = x Wᵀ + scale · (x Aᵀ) Bᵀ, with W frozen (LoRA).

arXiv 2106.09685. A is (r, in) and B (out, r); a stack of experts has (E, r, in) and (E, out, r).
They are parameters of the module that has the weight, kept in fp32 and computed with in the
activations' dtype. B starts at zero, so that the first outputs are those of W, to the bit.

Letters: R rows sorted by expert, E experts, r rank.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan.ops.grouped_mm import grouped_linear, local_part

A, B = "lora_A", "lora_B"  # ends of the parameters' names


class LowRank(NamedTuple):
    """An adapter.

    A: (r, in), or (E, r, in) of experts.
    B: (out, r), or (E, out, r).
    scale: alpha / r.
    """

    A: Tensor
    B: Tensor
    scale: float


class Adapted(NamedTuple):
    """A stack of experts' weights, (E, out, in), with its adapter."""

    weight: Tensor
    lora: LowRank


Stack = Tensor | Adapted


def parts(stack: Stack) -> tuple[Tensor, LowRank | None]:
    """Split a stack into weight and adapter; None = it has none."""
    return stack if isinstance(stack, Adapted) else (stack, None)


def new_adapter(weight: Tensor, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Make A and B for a weight (…, out, in), unfilled fp32."""
    *stack, out, into = weight.shape
    sizes = (*stack, rank, into), (*stack, out, rank)
    first, second = (torch.empty(s, device=weight.device, dtype=torch.float32) for s in sizes)
    return nn.Parameter(first), nn.Parameter(second)


def add_low_rank(y: Tensor, x: Tensor, lora: LowRank) -> Tensor:
    """Add the adapter's product: y + scale · (x Aᵀ) Bᵀ, with y (…, out) and x (…, in)."""
    narrow = F.linear(x, lora.A.to(x.dtype))
    return y + lora.scale * F.linear(narrow, lora.B.to(x.dtype))


def add_grouped_low_rank(
    y_RN: Tensor, x_RK: Tensor, lora: LowRank | None, counts_E: Tensor, *, loop: bool = False
) -> Tensor:
    """Add each expert's low-rank product to its rows; None = there is no adapter."""
    if lora is None:
        return y_RN
    first, second = (local_part(each).to(x_RK.dtype) for each in lora[:2])
    narrow = grouped_linear(x_RK, first, counts_E, loop=loop)
    return y_RN + lora.scale * grouped_linear(narrow, second, counts_E, loop=loop)


def product(lora: LowRank) -> Tensor:
    """Compute scale · B A in fp32, of whole plain matrices: (out, in)."""
    return lora.scale * (lora.B.float() @ lora.A.float())


def is_adapter(name: str) -> bool:
    """Tell whether a parameter's name is that of an adapter."""
    return name.endswith((A, B))


def matrix_of(name: str) -> str:
    """Name the matrix of an adapter's parameter: layers.0.attention.wq, or layers.1.moe.experts.w1
    of a stack."""
    return name.removesuffix(A).removesuffix(B)[:-1]


def weight_of(name: str) -> str:
    """Name the weight beside which an adapter's parameter lies."""
    # A dot follows a module's name; an underscore that of a stack, which is a parameter.
    of_stack = name.removesuffix(A).removesuffix(B).endswith("_")
    return matrix_of(name) if of_stack else f"{matrix_of(name)}.weight"


def has_dim(name: str, dim: int, ndim: int) -> bool:
    """Tell whether a parameter has this dim of the weight: A has no outputs, B has no inputs.

    dim: of `ndim` dims, the last two of which are outputs and inputs.
    """
    lacks = {A: ndim - 2, B: ndim - 1}
    return not any(name.endswith(end) and dim == missing for end, missing in lacks.items())
