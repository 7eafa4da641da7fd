"""Number of elements of a layer's weights: all, those that are trained, those of adapters."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from torchtitan.ops.grouped_mm import local_part
from torchtitan.ops.lora import is_adapter
from torchtitan.protocols.layers import ExpertWeights


@dataclass(frozen=True)
class Elements:
    """Number of elements of weights.

    dense, experts: that FSDP gathers.
    alone: of the others.
    """

    dense: int
    experts: int
    alone: int

    @property
    def gathered(self) -> int:
        return self.dense + self.experts


def count_elements(module: nn.Module, gathered: list[nn.Parameter]) -> dict[str, Elements]:
    """Count a module's elements: all, the trained ones, those of adapters."""
    stacks = [each for each in module.modules() if isinstance(each, ExpertWeights)]
    experts = {id(p) for each in stacks for p in each.parameters()}
    under_fsdp = {id(p) for p in gathered}

    def count(named: Iterable[tuple[str, nn.Parameter]]) -> Elements:
        of: Counter[str] = Counter()
        for _, p in named:
            kind = "experts" if id(p) in experts else "dense"
            of[kind if id(p) in under_fsdp else "alone"] += local_part(p).numel()
        return Elements(of["dense"], of["experts"], of["alone"])

    named = list(module.named_parameters())
    return {
        "weights": count(named),
        "trained": count((name, p) for name, p in named if p.requires_grad),
        "adapters": count((name, p) for name, p in named if is_adapter(name) and p.requires_grad),
    }
