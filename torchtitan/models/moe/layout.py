"""Expert groups, EP ranks and nodes: what their layout means for the traffic between nodes.

Node-limited routing bounds the *groups* of a token. It bounds the nodes as well only where a group
stands on one node, and fully only where a node holds one group.
"""

import torch

from torchtitan.models.moe.args import MoEArgs
from torchtitan.models.moe.moe import TokenChoiceTopKRouter
from torchtitan.tools.logging import logger

# Enough for two digits of an average of a few nodes.
_TOKENS = 4096


def say_expert_layout(args: MoEArgs, *, ep: int, nodes: int) -> None:
    """Log one line on what travels between nodes, and warn where groups and nodes don't match."""
    if ep == 1:
        return
    per_node = args.num_experts // nodes
    line = f"Expert layout: {args.num_experts} experts over {ep} ranks on {nodes} nodes"
    if nodes > 1:
        line += f"; a token meets {expected_remote_nodes(args, nodes):.2f} remote nodes"
        if args.num_expert_groups is not None:
            line += f" ({expected_remote_nodes(args, nodes, limited=False):.2f} without the limit)"
        line += ", under random routing"
    logger.info("%s", line)
    if nodes == 1 or args.num_expert_groups is None:
        return
    group_size = args.num_experts // args.num_expert_groups
    if per_node % group_size and group_size % per_node:
        logger.warning(
            "Groups of %d experts straddle nodes of %d: a group limit doesn't bound a token's "
            "nodes; use num_expert_groups = %d, one group a node",
            group_size,
            per_node,
            nodes,
        )
    elif per_node != group_size:
        logger.warning(
            "%s: num_limited_groups limits the nodes best with one group a node, that is "
            "num_expert_groups = %d for %d nodes",
            f"{per_node // group_size} groups share a node"
            if per_node > group_size
            else f"a group spans {group_size // per_node} nodes",
            nodes,
            nodes,
        )


@torch.no_grad()
def expected_remote_nodes(args: MoEArgs, nodes: int, *, limited: bool = True) -> float:
    """Nodes other than its own that a token's experts stand on, on average.

    By the router itself, on independent normal logits; the experts stand in order on `nodes` nodes,
    and the token on any of them alike.
    """
    router = TokenChoiceTopKRouter(
        dim=args.num_experts,
        num_experts=args.num_experts,
        num_expert_groups=args.num_expert_groups if limited else None,
        num_limited_groups=args.num_limited_groups if limited else None,
        top_k=args.top_k,
        score_func=args.score_func,
        group_score_func=args.group_score_func,
    )
    router.gate.weight.copy_(torch.eye(args.num_experts))
    logits = torch.randn(_TOKENS, args.num_experts, generator=torch.Generator().manual_seed(0))
    _, ids_TK, _ = router(logits)
    met_TN = torch.zeros(_TOKENS, nodes).scatter_(1, ids_TK // (args.num_experts // nodes), 1)
    return met_TN.sum().item() / _TOKENS * (nodes - 1) / nodes
