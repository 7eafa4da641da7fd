"""The converter "lora": low-rank adapters beside a model's matrices (ops/lora.py).

Adapted can be the layers' `Linear` matrices (attention's projections, dense and shared
feed-forwards) and the stacks of experts, w1, w2 and w3. Embedding, head, norms and the router's
gate can't.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from torchtitan.components.finetuning.patterns import check_patterns, matches_any
from torchtitan.config import LoRA, LoRAOverride
from torchtitan.config.schema import as_text
from torchtitan.ops.linear import Linear
from torchtitan.protocols.layers import ExpertWeights
from torchtitan.tools.errors import UserError


class AdapterSize(NamedTuple):
    """Rank and alpha of one adapter."""

    rank: int
    alpha: float


def add_adapters(model: nn.Module, lora: LoRA) -> None:
    """Add adapters to a whole model on the meta device, in place. Raises `UserError` for patterns
    that match nothing that can be adapted."""
    sizes = adapter_sizes(model, lora)
    for name, module in model.named_modules():
        if isinstance(module, ExpertWeights):
            experts = module
            for stack in ("w1", "w2", "w3"):
                if size := sizes.get(f"{name}.{stack}"):
                    experts.adapt(stack, *size)
        elif name in sizes:
            layer = model.get_submodule(name)
            assert isinstance(layer, Linear)
            layer.adapt(*sizes[name])


def adapter_sizes(model: nn.Module, lora: LoRA) -> dict[str, AdapterSize]:
    """Map each matrix that gets an adapter to the adapter's size. Raises `UserError` as
    `add_adapters` does.

    model: the whole one; with or without adapters.
    """
    possible = adaptable(model)
    _check("lora.fqns", lora.fqns, possible, model)
    for n, table in enumerate(lora.override, start=1):
        _check(f"lora.override {n}: fqns", table.fqns, possible, model)
    adapted = [name for name in possible if matches_any(name, lora.fqns)]
    for n, table in enumerate(lora.override, start=1):
        if not any(matches_any(name, table.fqns) for name in adapted):
            raise UserError(
                f"lora.override {n}: fqns {as_text(table.fqns)} matches no matrix that lora.fqns "
                f"{as_text(lora.fqns)} adapts; widen lora.fqns, or leave the table out."
            )
    return {name: _size_of(name, lora) for name in adapted}


def adaptable(model: nn.Module) -> list[str]:
    """List the names of all matrices that can have an adapter."""
    names = []
    for name, module in model.named_modules():
        if isinstance(module, ExpertWeights):
            names += [f"{name}.{stack}" for stack in ("w1", "w2", "w3")]
        elif type(module) is Linear:
            names.append(name)
    return names


def _size_of(name: str, lora: LoRA) -> AdapterSize:
    for table in lora.override:
        if matches_any(name, table.fqns):
            rank = lora.rank if table.rank is None else table.rank
            return AdapterSize(rank, lora.alpha if table.alpha is None else table.alpha)
    return AdapterSize(lora.rank, lora.alpha)


def _check(key: str, patterns: Iterable[str], possible: list[str], model: nn.Module) -> None:
    others = {name for name, _ in model.named_modules()} - set(possible)
    others |= {name for name, _ in model.named_parameters()}
    for pattern in patterns:
        if any(matches_any(name, [pattern]) for name in possible):
            continue
        found = sorted(name for name in others if matches_any(name, [pattern]))
        if found:
            raise UserError(
                f"{key}: {as_text(pattern)} names {found[0]}, which can't have an adapter: only "
                "attention's projections, feed-forwards and experts (w1, w2, w3) can; name these, "
                "or train it whole with training.trainable_fqns."
            )
        check_patterns(key, [pattern], set(possible), "matrix")


def lora_of(table: Mapping[str, Any]) -> LoRA:
    """Make the table [lora] from a checkpoint's meta.json."""
    override = [LoRAOverride(**each) for each in table["override"]]
    return LoRA(**{**table, "override": override})


def sizes_as_text(sizes: Mapping[str, AdapterSize]) -> str:
    """Describe the sizes for the log: "rank 16, alpha 32 (40 matrices)"."""
    counts: dict[AdapterSize, int] = {}
    for size in sizes.values():
        counts[size] = counts.get(size, 0) + 1
    return "; ".join(
        f"rank {size.rank}, alpha {size.alpha:g} ({count} matrices)"
        for size, count in counts.items()
    )
