"""Traffic between nodes that follows from the layout of expert groups, EP ranks and nodes.

Node-limited routing bounds the *groups* of a token. It bounds the nodes as well only where a group
stands on one node, and fully only where a node holds one group.
"""

import logging
import math
from dataclasses import replace

import torch
from torch import nn

from torchtitan.models.moe.args import MoEArgs
from torchtitan.models.moe.router import TokenChoiceTopKRouter
from torchtitan.tools.logging import logger

# Enough for two digits of an average of a few nodes.
_TOKENS = 4096


def log_expert_layout(args: MoEArgs, *, ep: int, nodes: int) -> None:
    """Log one line on the traffic between nodes, and warn where groups and nodes don't match.

    ep: ranks of an EP group.
    nodes: nodes that it spans.
    """
    if ep == 1 or not logger.isEnabledFor(logging.WARNING):  # a plan builds ranks in silence
        return
    line = f"Expert layout: {args.num_experts} experts over {ep} ranks on {nodes} node"
    if nodes > 1:
        line += f"s; a token meets {expected_remote_nodes(args, nodes):.2f} remote nodes"
        if args.num_expert_groups is not None:
            line += f" ({expected_remote_nodes(args, nodes, limited=False):.2f} without the limit)"
        line += ", under random routing"
    logger.info("%s", line)
    groups = args.num_expert_groups
    if nodes > 1 and groups is not None and groups != nodes:
        better = _better_layout(args, groups, ep, nodes)
        logger.warning("%s; %s", _mismatch(args, groups, nodes), better)


def _mismatch(args: MoEArgs, groups: int, nodes: int) -> str:
    group_size, per_node = args.num_experts // groups, args.num_experts // nodes
    if per_node % group_size and group_size % per_node:
        return (
            f"Groups of {group_size} experts straddle nodes of {per_node}: a group limit doesn't "
            "bound a token's nodes"
        )
    crowd = (
        f"{per_node // group_size} groups share a node"
        if per_node > group_size
        else f"A group spans {group_size // per_node} nodes"
    )
    return f"{crowd}: num_limited_groups limits the nodes best with one group a node"


def _better_layout(args: MoEArgs, groups: int, ep: int, nodes: int) -> str:
    """Advise one group a node: by as many groups as nodes, or as many nodes as groups."""
    per_node = args.num_experts // nodes
    # The same share of all experts as now, and enough for top_k.
    share = math.ceil((args.num_limited_groups or groups) * nodes / groups)
    limited = max(share, math.ceil(args.top_k / per_node))
    advice = f"use num_expert_groups = {nodes} and num_limited_groups = {limited}"
    if per_node == 1 and args.group_score_func == "top2_sum":
        advice += " (with group_score_func = 'max': a group has one expert)"
    degree = groups * ep // nodes
    if args.num_experts % degree == 0 and degree > 1:
        advice += (
            f", or keep the groups and set expert_parallel_degree = {degree}, "
            f"{groups} nodes of {ep // nodes}"
        )
    return advice


@torch.no_grad()
def expected_remote_nodes(args: MoEArgs, nodes: int, *, limited: bool = True) -> float:
    """Estimate on how many nodes other than its own a token's experts stand, on average.

    The router itself chooses, on independent normal logits. Experts stand in order on the nodes,
    and the token is on any node with the same probability.

    limited: with the group limit of `args`, otherwise without groups.
    """
    rule = replace(args.routing, _debug_force_load_balance=False)
    if not limited:
        rule = replace(rule, num_expert_groups=None, num_limited_groups=None)
    with torch.device("meta"):  # draws no random numbers, which belong to the run
        router = TokenChoiceTopKRouter.of(rule, dim=args.num_experts)
    router.gate.weight = nn.Parameter(torch.eye(args.num_experts))
    logits = torch.randn(_TOKENS, args.num_experts, generator=torch.Generator().manual_seed(0))
    _, ids_TK, _ = router(logits)
    met_TN = torch.zeros(_TOKENS, nodes).scatter_(1, ids_TK // (args.num_experts // nodes), 1)
    return met_TN.sum().item() / _TOKENS * (nodes - 1) / nodes
