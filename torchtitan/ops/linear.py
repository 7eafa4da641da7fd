"""All products of activations with a model's weights.

Every such product is computed by a layer or function of this file, in every layout and on every
fast path. A change to how they are computed (weights in the compute dtype, low-rank adapters) is
made here, and reaches all of them (FP8: ops/fp8):

    Linear                 attention's projections, feed-forwards, the projection of MTP
    linear_joint           several of those on one input
    feed_forward           three of those with SwiGLU between them
    Gate                   the router's logits, to fp32 precision
    Output                 the head: logits, or the loss without holding them
    grouped_linear(_joint) experts, on rows that are sorted by expert
    grouped_ffn            all of an MoE layer's experts, fused
    Linear.dense_weight    for the one use that is not such a product: absorbed up-projections

Letters: T tokens, R rows sorted by expert, E experts, D model dim, F hidden dim, V vocabulary.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan.ops import grouped_mm
from torchtitan.ops.expert_ffn import (
    ExpertOperator,
    expert_ffn,
    expert_ffn_chain,
    expert_operator,
)
from torchtitan.ops.fp8.experts import fp8_expert_ffn, fp8_expert_operator
from torchtitan.ops.fp8.feed_forward import fp8_feed_forward
from torchtitan.ops.fp8.linear import Fp8Recipe, fp8_grouped_linear, fp8_linear
from torchtitan.ops.fp8.quantize import BLOCK
from torchtitan.ops.fp8.scaled import scaled_linear
from torchtitan.ops.fp8.weight import Fp8Weight
from torchtitan.ops.grouped_mm import local_part
from torchtitan.ops.linear_cross_entropy import linear_cross_entropy
from torchtitan.ops.lora import (
    LowRank,
    Stack,
    add_grouped_low_rank,
    add_low_rank,
    new_adapter,
    parts,
    product,
)
from torchtitan.ops.permute import RowOrder
from torchtitan.ops.router_logits import router_logits
from torchtitan.ops.swiglu import swiglu

__all__ = [
    "Gate",
    "Joint",
    "Linear",
    "Output",
    "feed_forward",
    "fp8_weights",
    "grouped_ffn",
    "grouped_ffn_operator",
    "grouped_linear",
    "grouped_linear_joint",
    "joints",
    "linear_joint",
]


class Linear(nn.Linear):
    """Linear layer without bias, x · weightᵀ: (..., in_features) to (..., out_features).

    lora_A, lora_B: of its low-rank adapter (ops/lora.py); None = it has none.
    fp8: how the product with the weight is computed in FP8; None = in the dtype of the input.
    """

    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        self.lora_scale = 0.0
        self.fp8: Fp8Recipe | None = None

    def adapt(self, rank: int, alpha: float) -> None:
        """Add a low-rank adapter beside the weight."""
        self.lora_A, self.lora_B = new_adapter(self.weight, rank)
        self.lora_scale = alpha / rank

    @property
    def lora(self) -> LowRank | None:
        first, second = self.lora_A, self.lora_B
        if first is None or second is None:
            return None
        return LowRank(first, second, self.lora_scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.adapted(_product(x, self.weight, self.fp8), x)

    def adapted(self, y: Tensor, x: Tensor) -> Tensor:
        """Add the adapter's product, if there is one, to that of the weight.

        y: x · weightᵀ.
        """
        lora = self.lora
        return y if lora is None else add_low_rank(y, x, lora)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (out, in) in `dtype`, adapter included, for products other than
        `forward`'s.

        Call it inside of a forward pass, where FSDP has gathered the weight.
        """
        lora, weight = self.lora, self.weight
        if isinstance(weight, Fp8Weight):
            weight = weight.dense()
        return (weight if lora is None else weight.float() + product(lora)).to(dtype)


def _product(x: Tensor, weight: Tensor, fp8: Fp8Recipe | None) -> Tensor:
    if fp8 is None:
        return F.linear(x, weight)
    return fp8_linear(x, weight, fp8) if _in_blocks(fp8) else scaled_linear(x, weight, fp8)


def _in_blocks(fp8: Fp8Recipe | None) -> bool:
    return fp8 is not None and fp8.scales == "blockwise"


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
        x_TD, labels_T = x_BSD.flatten(0, -2), labels_BS.flatten()
        return linear_cross_entropy(x_TD, self.weight, labels_T, self.fp8)


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


def fp8_weights(module: nn.Module) -> tuple[str, ...]:
    """List the parameters of a module, experts included, that products take in blocks of FP8."""
    if not _in_blocks(getattr(module, "fp8", None)):
        return ()
    return ("weight",) if isinstance(module, Linear) else ("w1", "w2", "w3")


def linear_joint(x: Tensor, joint: Joint, layers: Sequence[Linear]) -> tuple[Tensor, ...]:
    """Compute `layer(x)` for each of `layers`, whose weights are those of `joint`."""
    if joint.tensor is None:
        return tuple(layer(x) for layer in layers)
    sizes = [layer.out_features for layer in layers]
    recipes = {layer.fp8 for layer in layers}
    # Scales of FP8 weights must not reach from one weight into the next.
    apart = _in_blocks(layers[0].fp8) and not any(size % BLOCK for size in sizes[:-1])
    if len(recipes) == 1 and (None in recipes or apart):
        outputs = _product(x, joint.tensor, layers[0].fp8).split(sizes, dim=-1)
    else:
        weights = joint.tensor.split(sizes)
        pairs = zip(weights, layers, strict=True)
        outputs = [_product(x, weight, layer.fp8) for weight, layer in pairs]
    return tuple(layer.adapted(y, x) for layer, y in zip(layers, outputs, strict=True))


def feed_forward(x: Tensor, joint: Joint, gate_up: Sequence[Linear], down: Linear) -> Tensor:
    """Compute w2(silu(w1 x) · w3 x), (..., D) to (..., D); in FP8 as one operator.

    gate_up, down: w1 and w3, whose weights are those of `joint`; w2.
    """
    layers, fp8 = (*gate_up, down), down.fp8
    in_fp8 = all(_in_blocks(layer.fp8) and layer.lora is None for layer in layers)
    if fp8 is None or not in_fp8 or down.weight.size(1) % BLOCK:
        return down(swiglu(*linear_joint(x, joint, gate_up)))
    weights = tuple(layer.weight for layer in gate_up) if joint.tensor is None else (joint.tensor,)
    return fp8_feed_forward(x, weights, down.weight, fp8)


def grouped_linear(
    rows_RK: Tensor,
    stack: Stack,
    counts_E: Tensor,
    *,
    loop: bool = False,
    fp8: Fp8Recipe | None = None,
) -> Tensor:
    """Compute `grouped_mm.grouped_linear`, with the stack's adapter where it has one.

    fp8: see `Linear`.
    """
    weight, lora = parts(stack)
    product_RN = _grouped_product(rows_RK, weight, counts_E, loop, fp8)
    return add_grouped_low_rank(product_RN, rows_RK, lora, counts_E, loop=loop)


def grouped_linear_joint(
    rows_RD: Tensor,
    joint: Joint,
    stacks: Sequence[Stack],
    counts_E: Tensor,
    *,
    loop: bool = False,
    fp8: Fp8Recipe | None = None,
) -> tuple[Tensor, ...]:
    """Compute `grouped_linear` for each of `stacks`, which are those of `joint`, of equal size.

    Each is a product of its own, so the rows' gradient is rounded twice; `grouped_ffn` has one for
    both, and rounds once. Layouts that take different ways differ by that in bf16.
    """
    weights, adapters = zip(*map(parts, stacks), strict=True)
    if joint.tensor is not None:
        weights = joint.tensor.chunk(len(stacks), dim=joint.dim)
    return tuple(
        add_grouped_low_rank(
            _grouped_product(rows_RD, weight, counts_E, loop, fp8),
            rows_RD,
            lora,
            counts_E,
            loop=loop,
        )
        for weight, lora in zip(weights, adapters, strict=True)
    )


def _grouped_product(
    rows_RK: Tensor, weight_ENK: Tensor, counts_E: Tensor, loop: bool, fp8: Fp8Recipe | None
) -> Tensor:
    if fp8 is None:
        return grouped_mm.grouped_linear(rows_RK, weight_ENK, counts_E, loop=loop)
    ends_E = counts_E.cumsum(0, dtype=torch.int32)
    return fp8_grouped_linear(rows_RK, local_part(weight_ENK), ends_E, fp8)


def _expert_weights(
    joint: Joint, gate_up: Sequence[Stack], down: Stack
) -> tuple[Tensor, Tensor, tuple[LowRank | None, ...]]:
    """Return w13, w2, and the adapters of w1, w3 and w2."""
    weights, adapters = zip(*map(parts, (*gate_up, down)), strict=True)
    w13_E2FD = joint.tensor
    if w13_E2FD is None:
        w13_E2FD = torch.cat([local_part(weight) for weight in weights[:-1]], dim=joint.dim)
    return w13_E2FD, local_part(weights[-1]), adapters


def grouped_ffn(
    x_TD: Tensor,
    joint: Joint,
    gate_up: Sequence[Stack],
    down: Stack,
    weights_TK: Tensor,
    order: RowOrder,
    fp8: Fp8Recipe | None = None,
) -> Tensor:
    """Compute `expert_ffn` with gate and up from `joint`, or of `gate_up` where it has no tensor.

    gate_up, down: w1 and w3, (E, F, D) each; w2, (E, D, F).
    fp8: see `Linear`. With adapters each product is an operator of its own.
    """
    w13_E2FD, w2_EDF, adapters = _expert_weights(joint, gate_up, down)
    if fp8 is None:
        return expert_ffn(x_TD, w13_E2FD, w2_EDF, weights_TK, order, adapters)
    if not any(adapters):
        return fp8_expert_ffn(x_TD, w13_E2FD, w2_EDF, weights_TK, order, fp8)
    in_fp8 = partial(_grouped_product, loop=False, fp8=fp8)
    return expert_ffn_chain(x_TD, w13_E2FD, w2_EDF, weights_TK, order, adapters, product=in_fp8)


def grouped_ffn_operator(
    x_TD: Tensor,
    joint: Joint,
    gate_up: Sequence[Stack],
    down: Stack,
    fp8: Fp8Recipe | None = None,
) -> tuple[ExpertOperator, Tensor, Tensor] | None:
    """Return the operator that computes `grouped_ffn`, with its weights w13 and w2; None where it
    is computed operation by operation."""
    weights, adapters = zip(*map(parts, (*gate_up, down)), strict=True)
    if fp8 is None:
        operator = expert_operator(x_TD, local_part(weights[-1]))
    else:
        operator = fp8_expert_operator(fp8)
    if operator is None or any(adapters):
        return None
    w13_E2FD, w2_EDF, _ = _expert_weights(joint, gate_up, down)
    return operator, w13_E2FD.contiguous(), w2_EDF
