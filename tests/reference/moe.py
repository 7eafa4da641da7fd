"""Slow twin of the router and the MoE layer: plain loops over tokens, groups and experts.

Everything runs in the dtype of the inputs (fp64 in most tests); autograd gives the gradients.
"""

import torch
from torch import Tensor

from torchtitan.models.moe import MoEArgs


def choose_experts(choice: list[float], args: MoEArgs) -> list[int]:
    """Experts of one token, best first, from its scores for the choice (bias included)."""
    allowed = list(range(args.num_experts))
    if args.num_expert_groups is not None:
        size = args.num_experts // args.num_expert_groups

        def group_score(group: int) -> float:
            best, *others = sorted(choice[group * size : (group + 1) * size], reverse=True)
            return best if args.group_score_func == "max" else best + others[0]

        groups = sorted(range(args.num_expert_groups), key=group_score, reverse=True)
        kept = groups[: args.num_limited_groups]
        allowed = [expert for expert in allowed if expert // size in kept]
    return sorted(allowed, key=lambda expert: choice[expert], reverse=True)[: args.top_k]


def route(
    x_TD: Tensor, gate_ED: Tensor, bias_E: Tensor | None, args: MoEArgs
) -> list[dict[int, Tensor]]:
    """For every token its experts and their (differentiable) weights."""
    bias = [0.0] * args.num_experts if bias_E is None else bias_E.tolist()
    chosen = []
    for x_D in x_TD:
        logits = [(gate_D * x_D).sum() for gate_D in gate_ED]
        if args.score_func == "sigmoid":
            scores = [1 / (1 + torch.exp(-logit)) for logit in logits]
        else:
            exps = [torch.exp(logit) for logit in logits]
            scores = [e / sum(exps) for e in exps]
        experts = choose_experts([s.item() + b for s, b in zip(scores, bias, strict=True)], args)
        total = sum(scores[e] for e in experts) if args.route_norm else 1.0
        chosen.append({e: scores[e] / total * args.route_scale for e in experts})
    return chosen


def feed_forward(x_D: Tensor, w1_FD: Tensor, w2_DF: Tensor, w3_FD: Tensor) -> Tensor:
    gate_F = w1_FD @ x_D
    return w2_DF @ (gate_F / (1 + torch.exp(-gate_F)) * (w3_FD @ x_D))


def moe(x_TD: Tensor, state: dict[str, Tensor], args: MoEArgs) -> Tensor:
    """The layer's output for every token. state: parameters and bias by their names in `MoE`."""
    choices = route(x_TD, state["router.gate.weight"], state.get("expert_bias"), args)
    stacks = [state[f"experts.{w}"] for w in ("w1", "w2", "w3")]
    out = []
    for x_D, weights in zip(x_TD, choices, strict=True):
        y_D = torch.zeros_like(x_D)
        if args.num_shared_experts:
            y_D = feed_forward(
                x_D, *(state[f"shared_experts.{w}.weight"] for w in ("w1", "w2", "w3"))
            )
        for expert, weight in weights.items():
            expert_weights = [stack[expert] for stack in stacks]
            if args.score_before_experts:
                y_D = y_D + feed_forward(weight * x_D, *expert_weights)
            else:
                y_D = y_D + weight * feed_forward(x_D, *expert_weights)
        out.append(y_D)
    return torch.stack(out)
