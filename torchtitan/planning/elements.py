"""Number of elements of a layer's weights: all, those that are trained, those of adapters; bytes
that FSDP saves by gathering them in FP8."""

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, cast

from torch import nn

from torchtitan.ops.fp8.quantize import BLOCK
from torchtitan.ops.grouped_mm import local_part
from torchtitan.ops.linear import fp8_weights
from torchtitan.ops.lora import is_adapter
from torchtitan.protocols.layers import ExpertWeights


@dataclass(frozen=True)
class Elements:
    """Number of elements, or bytes, of weights.

    dense, experts: that several ranks share.
    alone: of the others.
    """

    dense: int
    experts: int
    alone: int

    def times(self, factor: int) -> "Elements":
        return Elements(self.dense * factor, self.experts * factor, self.alone * factor)

    def __sub__(self, other: "Elements") -> "Elements":
        return Elements(
            self.dense - other.dense, self.experts - other.experts, self.alone - other.alone
        )

    def only(self, kinds: Collection[str]) -> "Elements":
        """Keep those of some kinds.

        kinds: names of fields.
        """
        kept = ("dense" in kinds, "experts" in kinds, "alone" in kinds)
        return Elements(self.dense * kept[0], self.experts * kept[1], self.alone * kept[2])

    @property
    def gathered(self) -> int:
        return self.dense + self.experts


def count_elements(module: nn.Module, shared: list[nn.Parameter]) -> dict[str, Elements]:
    """Count a module's elements: all, the trained ones, those of adapters."""
    stacks = [each for each in module.modules() if isinstance(each, ExpertWeights)]
    experts = {id(p) for each in stacks for p in each.parameters()}
    of_several = {id(p) for p in shared}

    def count(named: Iterable[tuple[str, nn.Parameter]]) -> Elements:
        of: Counter[str] = Counter()
        for _, p in named:
            kind = "experts" if id(p) in experts else "dense"
            of[kind if id(p) in of_several else "alone"] += local_part(p).numel()
        return Elements(of["dense"], of["experts"], of["alone"])

    named = list(module.named_parameters())
    return {
        "weights": count(named),
        "trained": count((name, p) for name, p in named if p.requires_grad),
        "adapters": count((name, p) for name, p in named if is_adapter(name) and p.requires_grad),
    }


def saved_in_fp8(module: nn.Module, gathered: list[nn.Parameter]) -> Elements:
    """Count the bytes that FSDP saves where it gathers weights in FP8 with their scales."""
    under_fsdp, saved = {id(p) for p in gathered}, Counter[str]()
    for layer in module.modules():
        params = dict(layer.named_parameters(recurse=False))
        for weight in map(params.__getitem__, fp8_weights(layer)):
            if cast(Any, layer).fp8.gather and id(weight) in under_fsdp:
                *stack, N, K = local_part(weight).shape
                in_fp8 = prod(stack) * (N * K + 4 * -(-N // BLOCK) * -(-K // BLOCK))
                kind = "experts" if isinstance(layer, ExpertWeights) else "dense"
                saved[kind] += local_part(weight).nbytes - in_fp8
    return Elements(saved["dense"], saved["experts"], 0)
