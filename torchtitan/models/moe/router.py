"""The router: which experts a token goes to, and with what weights.

Letters: T tokens, D model dim, E experts, G expert groups, K top-k.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn

from torchtitan.models.moe.args import RoutingRule
from torchtitan.models.moe.load import count_tokens
from torchtitan.ops.linear import Gate
from torchtitan.ops.routing import Rule, can_route, route
from torchtitan.tools.utils import eager


class TokenChoiceTopKRouter(nn.Module):
    """Each token chooses its experts; with groups, from its best few groups only.

    The order of DeepSeek-V3's gate: scores in fp32 → bias, for the choice only → group limit →
    top-k → weights gathered from the *unbiased* scores → normalise → scale. Left-out groups are
    masked with −inf: with 0 a biased score below zero would let their experts in. Under mixed
    precision the gate's weight arrives rounded to bf16, the form in which DeepSeek's checkpoints
    hold it; the product with it and all that follows is fp32.

    dim: model dim.
    arguments: the fields of `RoutingRule`, by name (num_experts, num_expert_groups,
        num_limited_groups, top_k, score_func, route_norm, route_scale, …). Raises `UserError` (a
        ValueError) as it does.
    """

    # Whether the choice of experts stays out of compiled graphs, set by decoder/parallelize.py.
    choose_outside_graphs = False

    def __init__(self, *, dim: int, **arguments: Any):
        super().__init__()
        self.rule = RoutingRule(**arguments)
        self.gate = Gate(dim, self.rule.num_experts)

    @classmethod
    def of(cls, rule: RoutingRule, *, dim: int) -> Self:
        """Build a router with this rule."""
        return cls(dim=dim, **vars(rule))

    @property
    def num_experts(self) -> int:
        return self.rule.num_experts

    @property
    def top_k(self) -> int:
        return self.rule.top_k

    def forward(
        self,
        x_TD: Tensor,
        expert_bias: Tensor | None = None,
        token_mask_T: Tensor | None = None,
        *,
        return_scores: bool = False,
    ) -> tuple[Tensor, ...]:
        """Choose experts and their weights.

        x_TD: hidden states (T, D).
        expert_bias: (E,) fp32, added to the scores for the choice only.
        token_mask_T: bool, False = not counted in num_tokens_per_expert.
        return_scores: return logits and scores, too.

        Returns top_scores (T, K) fp32, the weights; selected_experts_indices (T, K) int64;
        num_tokens_per_expert (E,) int64; with `return_scores` also logits and scores (T, E), at
        least fp32.
        """
        rule = self.rule
        logits_TE = self.gate(x_TD)
        fits = can_route(logits_TE, self.kernel_rule) and not rule._debug_force_load_balance
        if fits and not return_scores:
            weights_TK, ids_TK = route(logits_TE, expert_bias, self.kernel_rule)
            return weights_TK, ids_TK, count_tokens(ids_TK, rule.num_experts, token_mask_T)
        scores_TE = (
            logits_TE.sigmoid() if rule.score_func == "sigmoid" else logits_TE.softmax(dim=-1)
        )
        choose = self._choose_outside_graphs if self.choose_outside_graphs else self._choose
        ids_TK = choose(scores_TE.detach(), expert_bias)
        weights_TK = scores_TE.gather(1, ids_TK)
        if rule.route_norm:
            # 1e-20 keeps a sum of underflowed sigmoids from dividing by zero.
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        weights_TK = weights_TK * rule.route_scale
        routing = weights_TK, ids_TK, count_tokens(ids_TK, rule.num_experts, token_mask_T)
        return (*routing, logits_TE, scores_TE) if return_scores else routing

    @property
    def kernel_rule(self) -> Rule:
        """The rule in the kernel's terms. `num_experts` is the width of the logits there."""
        rule = self.rule
        return Rule(
            top_k=rule.top_k,
            groups=rule.num_expert_groups or 0,
            limited=rule.num_limited_groups or 0,
            top2=rule.group_score_func == "top2_sum",
            sigmoid=rule.score_func == "sigmoid",
            norm=rule.route_norm,
            scale=rule.route_scale,
        )

    def _choose(self, scores_TE: Tensor, expert_bias: Tensor | None) -> Tensor:
        """Ids (T, K) of the experts of each token."""
        if self.rule._debug_force_load_balance:
            return self._balanced_choice(scores_TE.size(0), scores_TE.device)
        scores_for_choice = scores_TE if expert_bias is None else scores_TE + expert_bias
        if self.rule.num_expert_groups is not None:
            scores_for_choice = self._get_node_limited_routing_scores(scores_for_choice)
        return scores_for_choice.topk(self.rule.top_k, dim=-1, sorted=False).indices

    @eager
    def _choose_outside_graphs(self, scores_TE: Tensor, expert_bias: Tensor | None) -> Tensor:
        return self._choose(scores_TE, expert_bias)

    def _get_node_limited_routing_scores(self, scores_for_choice: Tensor) -> Tensor:
        """Scores (T, E) with those of all but the `num_limited_groups` best groups set to −inf."""
        scores_TGe = scores_for_choice.unflatten(-1, (self.rule.num_expert_groups or 1, -1))
        if self.rule.group_score_func == "max":
            group_scores_TG = scores_TGe.amax(dim=-1)
        else:
            group_scores_TG = scores_TGe.topk(2, dim=-1).values.sum(dim=-1)
        limited = self.rule.num_limited_groups or 1
        best_TM = group_scores_TG.topk(limited, dim=-1, sorted=False).indices
        left_out_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter_(1, best_TM, False)
        return scores_TGe.masked_fill(left_out_TG.unsqueeze(-1), float("-inf")).flatten(-2)

    def _balanced_choice(self, num_tokens: int, device: torch.device) -> Tensor:
        """Ids (T, K) that load every expert equally (exactly, when E divides T) within the group
        limit.

        Token t takes group t and others at even distances (as many as it may use), and in each
        t // G on, so a token's experts spread as the limit allows: plain round-robin over the
        experts would put all of them into one group, on one node.
        """
        # Without groups every expert is a group of its own that any token may use.
        G = self.rule.num_expert_groups or self.rule.num_experts
        M = min(self.rule.num_limited_groups or self.rule.top_k, self.rule.top_k)
        experts_per_group = self.rule.num_experts // G
        t_T1 = torch.arange(num_tokens, device=device).unsqueeze(1)
        k_1K = torch.arange(self.rule.top_k, device=device).unsqueeze(0)
        # Groups of one token stand G // M apart, so that no two coincide and none is favoured.
        group_TK = (t_T1 + (k_1K % M) * (G // M)) % G
        expert_TK = (t_T1 // G + k_1K // M) % experts_per_group
        return group_TK * experts_per_group + expert_TK
