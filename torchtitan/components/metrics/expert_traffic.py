"""Traffic of expert parallelism in a step: numbers of a log record, and a line for the console.

The dispatchers count, summed over ranks and micro-batches: rows sent (hidden states with their
expert ids and weights), and rows that one copy of a token per expert would have sent; each to the
same rank, to another rank of the node, and to another node. (Node-limited dispatch takes two hops,
and both count.)
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from torchtitan.components.metrics.expert_load import Numbers

_TIERS = ("self", "node", "remote")


def traffic_numbers(traffic: Mapping[int, Tensor], bytes_per_row: int) -> Numbers:
    """Numbers of one step's traffic.

    `rows_sent_<tier>`, `bytes_sent_<tier>` (tier: self, node, remote; nothing leaves the rank for
    "self", so it has no bytes), `traffic_saved_percent` of the rows to other nodes (and
    `..._off_rank_percent` of all that leave their rank) against one copy per expert; the first
    three also by layer, as `layer_<name>`.

    traffic: (2, 3) int64, by layer; see `TokenDispatcher.dispatch`.
    bytes_per_row: forward and backward.
    """
    if not traffic:
        return {}
    layers = {
        layer: _numbers_of(counts.tolist(), bytes_per_row) for layer, counts in traffic.items()
    }
    whole = torch.stack(list(traffic.values())).sum(dim=0)
    total = _numbers_of(whole.tolist(), bytes_per_row)
    by_layer = {
        f"layer_{name}": {layer: numbers[name] for layer, numbers in layers.items()}
        for name in total
        if name != "rows_sent_self"
    }
    return {**total, **by_layer}


def _numbers_of(counts: list[list[int]], bytes_per_row: int) -> dict[str, float]:
    sent, copies = (dict(zip(_TIERS, line, strict=True)) for line in counts)
    numbers: dict[str, float] = {f"rows_sent_{tier}": rows for tier, rows in sent.items()}
    numbers |= {f"bytes_sent_{tier}": sent[tier] * bytes_per_row for tier in ("node", "remote")}
    numbers["traffic_saved_off_rank_percent"] = _saved_percent(
        sent["node"] + sent["remote"], copies["node"] + copies["remote"]
    )
    if copies["remote"]:
        numbers["traffic_saved_percent"] = _saved_percent(sent["remote"], copies["remote"])
    return numbers


def _saved_percent(sent: int, copies: int) -> float:
    return 100 * (1 - sent / copies) if copies else 0.0


def traffic_line(numbers: Numbers, tokens: int) -> str:
    """Format the traffic of a token and layer for the console.

    tokens: that all ranks together processed.
    """
    layers = numbers["layer_rows_sent_remote"]
    per_token = 1 / (tokens * len(layers))

    def part(tier: str) -> str:
        rows, size = numbers[f"rows_sent_{tier}"] * per_token, numbers[f"bytes_sent_{tier}"]
        return f"{rows:.2f} rows a token and layer ({size / 2**20:,.1f} MiB)"

    line = (
        f"traffic: to other nodes {part('remote')}, inside nodes {part('node')}; rows count one "
        "way, MiB all layers, dispatch and combine, forward and backward"
    )
    if "traffic_saved_percent" in numbers:
        by_layer = numbers["layer_traffic_saved_percent"].items()
        line += (
            f"; {numbers['traffic_saved_percent']:.0f}% fewer rows to other nodes than with one "
            "copy per expert "
            f"(layer {', '.join(f'{layer}: {each:.0f}%' for layer, each in by_layer)})"
        )
    return line
