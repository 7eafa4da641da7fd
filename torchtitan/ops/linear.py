"""All products of activations with a model's weights.

Every such product is computed by a layer or function of this file, in every layout and on every
fast path. A change to how they are computed (weights in the compute dtype today) is made here, and
reaches all of them:

    Linear                 attention's projections, feed-forwards, the projection of MTP
    linear_joint           several of those on one input
    Gate                   the router's logits, to fp32 precision
    Output                 the head: logits, or the loss without holding them
    grouped_linear(_joint) experts, on rows that are sorted by expert
    grouped_ffn            all of an MoE layer's experts, fused
    Linear.dense_weight    for the one use that is not such a product: absorbed up-projections

Letters: T tokens, R rows sorted by expert, E experts, D model dim, F hidden dim, V vocabulary.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan.ops.expert_ffn import expert_ffn
from torchtitan.ops.grouped_mm import grouped_linear, local_part
from torchtitan.ops.linear_cross_entropy import linear_cross_entropy
from torchtitan.ops.permute import RowOrder
from torchtitan.ops.router_logits import router_logits

__all__ = [
    "Gate",
    "Joint",
    "Linear",
    "Output",
    "grouped_ffn",
    "grouped_linear",
    "grouped_linear_joint",
    "joints",
    "linear_joint",
]


class Linear(nn.Linear):
    """Linear layer without bias, x · weightᵀ: (..., in_features) to (..., out_features)."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (out, in) in `dtype`, for products other than `forward`'s.

        Call it inside of a forward pass, where FSDP has gathered the weight.
        """
        return self.weight.to(dtype)


class Gate(Linear):
    """The router's linear layer: hidden states (T, D) to logits (T, E), at least fp32."""

    def forward(self, x_TD: Tensor) -> Tensor:
        return router_logits(x_TD, self.weight)


class Output(Linear):
    """The model's head: hidden states to logits, or with labels to the loss without logits kept."""

    def forward(self, x_BSD: Tensor, labels_BS: Tensor | None = None) -> Tensor:
        """Compute logits (..., V), or with labels the scalar of `linear_cross_entropy`."""
        if labels_BS is None:
            return super().forward(x_BSD)
        return linear_cross_entropy(x_BSD.flatten(0, -2), self.weight, labels_BS.flatten())


class Joint:
    """Weights of one module that take the same input, so that one product can serve all of them.

    names: the module's parameters, in order, such as "w1.weight".
    dim: dim along which they are concatenated; 0 of (out, in), 1 of (E, out, in).
    tensor: all of them as one, set by components/optimizer/compute_weights.py; None: one product
        for each parameter.
    """

    def __init__(self, *names: str, dim: int):
        self.names = names
        self.dim = dim
        self.tensor: Tensor | None = None


def joints(module: nn.Module) -> list[Joint]:
    """List the joints that the module declares as attributes."""
    return [value for value in vars(module).values() if isinstance(value, Joint)]


def linear_joint(x: Tensor, joint: Joint, layers: Sequence[Linear]) -> tuple[Tensor, ...]:
    """Compute `layer(x)` for each of `layers`, whose weights are those of `joint`."""
    if joint.tensor is None:
        return tuple(layer(x) for layer in layers)
    return F.linear(x, joint.tensor).split([layer.out_features for layer in layers], dim=-1)


def grouped_linear_joint(
    rows_RD: Tensor,
    joint: Joint,
    weights: Sequence[Tensor],
    counts_E: Tensor,
    *,
    loop: bool = False,
) -> tuple[Tensor, ...]:
    """Compute `grouped_linear` for each of `weights`, which are those of `joint`, of equal size.

    Each is a product of its own: a single one would round the rows' gradient once instead of twice,
    and layouts with expert parallelism would no longer equal those without to the last bit.
    """
    if joint.tensor is not None:
        weights = joint.tensor.chunk(len(weights), dim=joint.dim)
    return tuple(grouped_linear(rows_RD, each, counts_E, loop=loop) for each in weights)


def grouped_ffn(
    x_TD: Tensor,
    joint: Joint,
    gate_up: Sequence[Tensor],
    w2_EDF: Tensor,
    weights_TK: Tensor,
    order: RowOrder,
) -> Tensor:
    """Compute `expert_ffn` with gate and up from `joint`, or of `gate_up` where it has no tensor.

    gate_up: w1 and w3, (E, F, D) each.
    """
    w13_E2FD = joint.tensor
    if w13_E2FD is None:
        w13_E2FD = torch.cat([local_part(weight) for weight in gate_up], dim=joint.dim)
    return expert_ffn(x_TD, w13_E2FD, local_part(w2_EDF), weights_TK, order)
