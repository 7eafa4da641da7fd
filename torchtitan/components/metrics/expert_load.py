"""Balance of the experts' load: numbers of a log record, from counts summed over ranks."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchtitan.config.router_stats import ROUTER_STATS

# By name: a number, or one for each layer ({layer: number, or a list with one per expert}).
Numbers = dict[str, Any]


def relative_load(loads: torch.Tensor) -> torch.Tensor:
    """Divide tokens per expert (layers, E) by the layer's mean; 1 is a fair share.

    A layer without any token counts as balanced: all ones.
    """
    loads = loads.double()
    mean = loads.mean(dim=-1, keepdim=True)
    return torch.where(mean > 0, loads / mean.clamp(min=torch.finfo(torch.double).tiny), 1.0)


def load_balance(layers: Sequence[int], relative: torch.Tensor) -> Numbers:
    """Numbers of a record about `relative_load`, (layers, E).

    MaxVio = (largest load - mean) / mean is DeepSeek's measure of imbalance
    (https://arxiv.org/abs/2408.15664): 0 is perfect, 1 is an expert with twice its
    share. Given per layer, for the worst layer, and as the mean over layers.
    """
    violation = relative.max(dim=-1).values - 1
    return {
        "max_violation": violation.max().item(),
        "mean_max_violation": violation.mean().item(),
        "min_load": relative.min().item(),
        "layer_max_violation": dict(zip(layers, violation.tolist(), strict=True)),
        "layer_min_load": dict(zip(layers, relative.min(dim=-1).values.tolist(), strict=True)),
    }


def balance_numbers(
    loads: Mapping[int, Tensor], biases: Mapping[int, Tensor | None], num_groups: int | None
) -> Numbers:
    """Numbers about one step's load, each for the worst layer, and by layer as `layer_<name>`:

    dead_experts    experts without a token (of all layers together)
    load_entropy    entropy of the shares over ln E; 1 = even
    bias_range      largest minus smallest bias
    max_group_load  load of the fullest expert group over the mean

    loads: tokens per expert (E,), by layer.
    biases: expert bias (E,), by layer.
    num_groups: expert groups; None = no groups.
    """
    if not loads:
        return {}
    relative_LE = relative_load(torch.stack(list(loads.values())).cpu())
    by_layer = {
        "dead_experts": (relative_LE == 0).sum(dim=1).tolist(),
        "load_entropy": _entropy(relative_LE).tolist(),
    }
    worst = {"dead_experts": sum, "load_entropy": min}
    present = [bias for bias in biases.values() if bias is not None]
    if len(present) == len(biases):
        by_layer["bias_range"] = [(bias.max() - bias.min()).item() for bias in present]
    if num_groups is not None:
        groups_LG = relative_LE.unflatten(1, (num_groups, -1)).mean(dim=2)
        by_layer["max_group_load"] = groups_LG.max(dim=1).values.tolist()
    numbers: Numbers = {name: worst.get(name, max)(values) for name, values in by_layer.items()}
    return numbers | {
        f"layer_{name}": dict(zip(loads, values, strict=True)) for name, values in by_layer.items()
    }


def _entropy(relative_LE: Tensor) -> Tensor:
    shares_LE = relative_LE / relative_LE.sum(dim=1, keepdim=True)
    return torch.special.entr(shares_LE).sum(dim=1) / math.log(max(2, relative_LE.size(1)))


def routing_numbers(
    sums: Mapping[int, Tensor], tokens: int, loads: Mapping[int, Tensor]
) -> Numbers:
    """Numbers that `metrics.log_routing` adds: router statistics as means over tokens, each as mean
    over layers and by layer (`layer_<name>`); and layer_expert_load, of each expert over the mean.

    sums: (N,) fp32 by layer, in the order of `ROUTER_STATS`.
    tokens: valid ones of the step, all ranks.
    loads: tokens per expert (E,), by layer.
    """
    scale = torch.tensor(list(ROUTER_STATS.values())) / max(1, tokens)
    means = {layer: (each.cpu() * scale).tolist() for layer, each in sums.items()}
    numbers: Numbers = {}
    for i, name in enumerate(ROUTER_STATS):
        by_layer = {layer: values[i] for layer, values in means.items()}
        numbers[name] = sum(by_layer.values()) / max(1, len(by_layer))
        numbers[f"layer_{name}"] = by_layer
    relative_LE = relative_load(torch.stack(list(loads.values())).cpu())
    rounded = [[round(load, 4) for load in line] for line in relative_LE.tolist()]
    return numbers | {"layer_expert_load": dict(zip(loads, rounded, strict=True))}


def cross_node_percent(traffic: Mapping[str, Any]) -> dict[str, float]:
    """Share of the rows sent by dispatch that go to other nodes; empty where nothing was sent."""
    rows = [traffic.get(f"rows_sent_{tier}", 0) for tier in ("self", "node", "remote")]
    return {"cross_node_percent": 100 * rows[2] / sum(rows)} if sum(rows) else {}


def violation_numbers(loads: Mapping[int, Tensor]) -> dict[str, float]:
    """`max_violation`, `mean_max_violation` and `min_load` of `load_balance`, for the alarms."""
    if not loads:
        return {}
    every = load_balance(list(loads), relative_load(torch.stack(list(loads.values())).cpu()))
    return {name: value for name, value in every.items() if isinstance(value, float)}
