"""Rows that an EP rank sends and receives, from choices of the real router.

The router itself chooses, on independent normal logits, as in models/moe/layout.py; with forced
balance its own even choice. A skewed router adds a bias to each expert's logit, drawn once from a
normal distribution that is as wide as makes the wanted load.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn

from torchtitan.models.moe import MoEArgs
from torchtitan.models.moe.router import TokenChoiceTopKRouter
from torchtitan.planning.ranks import PlannedRun

# Enough for two digits of a mean.
_TOKENS = 4096


@dataclass(frozen=True)
class Routing:
    """Routing of one layer and micro-batch in an EP group.

    tokens: routed by each rank.
    received: rows that arrive at the busiest rank.
    slots: their copies for its experts.
    mean_slots: mean of `slots` over ranks.
    rows: sent one way by all ranks of the group together, by (copies, tier): one copy of a token
        for each "expert", "rank" or "node" of it, to the tier "self", "node" or "remote".
    split_sizes: sizes that the busiest rank's dispatcher hears from the device, by "rank" or
        "node".
    skew: largest load of an expert over the mean.
    """

    tokens: int
    received: int
    slots: int
    mean_slots: float
    rows: dict[tuple[str, str], int]
    split_sizes: dict[str, list[int]]
    skew: float

    @property
    def rank_skew(self) -> float:
        """Load of the busiest rank over the mean."""
        return self.slots / self.mean_slots


@cache
def route(args: MoEArgs, *, tokens: int, ep: int, nodes: int, skew: float = 1.0) -> Routing:
    """Return the routing of a layer.

    tokens: of each rank.
    ep: ranks of the EP group.
    nodes: nodes that it spans.
    skew: largest load of an expert over the mean; up to 1.0: that of random logits, a little above
        1.
    """
    ids_TK = _choose(args, tokens, skew)
    load_E = torch.bincount(ids_TK.flatten(), minlength=args.num_experts).double()
    rank_TK = ids_TK // (args.num_experts // ep)
    per_node = ep // nodes
    scale = tokens / len(ids_TK)
    slots_R = torch.bincount(rank_TK.flatten(), minlength=ep).double() * scale
    rows_R = _places(rank_TK, ep) * scale
    rows_N = _places(rank_TK // per_node, nodes) * scale
    me = int(slots_R.argmax())
    return Routing(
        tokens=tokens,
        received=_whole(rows_R[me]) * ep,
        slots=_whole(slots_R[me]) * ep,
        mean_slots=slots_R.sum().item(),
        rows=_rows(slots_R, rows_R, rows_N),
        split_sizes=_split_sizes(slots_R, rows_R, rows_N, me),
        skew=(load_E.max() / load_E.mean()).item(),
    )


def _whole(x: Tensor) -> int:
    return round(x.item())


def _places(place_TK: Tensor, count: int) -> Tensor:
    """Count the tokens that have an expert at each place."""
    met = torch.zeros(len(place_TK), count, dtype=torch.bool)
    return met.scatter_(1, place_TK, True).sum(dim=0).double()


def _rows(slots_R: Tensor, rows_R: Tensor, rows_N: Tensor) -> dict[tuple[str, str], int]:
    """Every rank sends alike, so sums over senders need one row of destinations."""
    ep, nodes = len(rows_R), len(rows_N)

    def by_rank(to_R: Tensor) -> dict[str, float]:
        total = to_R.sum().item()  # of one sender; each destination is one sender's own rank
        return {
            "self": total,
            "node": total * (ep // nodes - 1),
            "remote": total * (ep - ep // nodes),
        }

    # Two hops: to the peer on each node, which passes on inside of the node what all nodes sent.
    within = by_rank(rows_R * nodes)
    between = rows_N.sum().item() * (ep // nodes)
    by_node = {
        "self": between + within["self"],
        "node": within["node"],
        "remote": between * (nodes - 1),
    }
    ways = {"expert": by_rank(slots_R), "rank": by_rank(rows_R), "node": by_node}
    return {(way, tier): round(rows) for way, each in ways.items() for tier, rows in each.items()}


def _split_sizes(slots_R: Tensor, rows_R: Tensor, rows_N: Tensor, me: int) -> dict[str, list[int]]:
    """Return the sizes that `AllToAllDispatcher` and `NodeLimitedDispatcher` ask the device for.

    me: the busiest rank. Every rank sends alike: each sends to `me` what it sends to itself.
    """
    ep, nodes = len(rows_R), len(rows_N)
    per_node = ep // nodes
    rows, slots, to_nodes = ([_whole(x) for x in each] for each in (rows_R, slots_R, rows_N))
    home, here = divmod(me, per_node)
    relayed = [n * nodes for n in rows[home * per_node : (home + 1) * per_node]]
    by_node = to_nodes + [to_nodes[home]] * nodes + relayed + [relayed[here]] * per_node
    return {
        "rank": rows + [rows[me]] * ep + [slots[me]] * ep,
        "node": by_node + [slots[me] * nodes] * per_node,
    }


@cache
@torch.no_grad()
def _choose(args: MoEArgs, tokens: int, skew: float) -> Tensor:
    """Choose the experts (T, K) of a sample of tokens; of all tokens where the choice is forced."""
    rule = args.routing
    if rule._debug_force_load_balance:
        with torch.device("meta"):
            router = TokenChoiceTopKRouter.of(rule, dim=8)
        return router._balanced_choice(tokens, torch.device("cpu"))
    with torch.device("meta"):  # draws no random numbers
        router = TokenChoiceTopKRouter.of(rule, dim=rule.num_experts)
    router.gate.weight = nn.Parameter(torch.eye(rule.num_experts))
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(_TOKENS, rule.num_experts, generator=generator)
    bias_E = torch.randn(rule.num_experts, generator=generator)
    if skew <= 1:
        return router(logits)[1]
    low, high = 0.0, 8.0  # of the bias' width
    for _ in range(12):
        width = (low + high) / 2
        ids_TK = router(logits + width * bias_E)[1]
        load_E = torch.bincount(ids_TK.flatten(), minlength=rule.num_experts)
        low, high = (low, width) if load_E.max() / load_E.double().mean() > skew else (width, high)
    return ids_TK


def without_limit(args: MoEArgs) -> MoEArgs:
    """Return the same experts without groups."""
    return replace(args, num_expert_groups=None, num_limited_groups=None)


def planned_routing(run: PlannedRun, skew: float) -> Routing | None:
    """Return the routing of a layer of the run; None without experts."""
    args, degrees = run.model_args, run.degrees
    if not args.has_experts:
        return None
    tokens, nodes = run.tokens_per_rank * degrees.etp, run.nodes_per_ep_group
    return route(args.moe_args, tokens=tokens, ep=degrees.ep, nodes=nodes, skew=skew)


def copies(run: PlannedRun) -> str:
    """Return the place to which a token is sent once: a "rank" or a "node"."""
    dispatch = run.config.parallelism.expert_parallel_dispatch
    spans_nodes = run.degrees.ep * run.degrees.etp > run.node_size
    limited = dispatch == "node_limited" or (dispatch == "auto" and spans_nodes)
    return "node" if limited else "rank"
