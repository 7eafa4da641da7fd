"""The mixture-of-experts layer: route, dispatch, compute, combine.

Letters: B batch, S sequence, T tokens (B·S), D model dim, F expert hidden dim, E experts, G expert
groups, L local experts, K top-k, R rows received after dispatch.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan.models.moe.args import MoEArgs, check_routing
from torchtitan.models.moe.aux_loss import (
    attach_loss,
    global_balance_sum,
    sequence_balance_sum,
    z_sum,
)
from torchtitan.models.moe.balancing import Load, count_tokens
from torchtitan.models.moe.dispatcher import LocalDispatcher, TokenDispatcher
from torchtitan.models.moe.watch import SUMS, entropy_sum, limited_sum
from torchtitan.ops.buffers import KeepsBufferDtypes
from torchtitan.ops.expert_ffn import expert_ffn
from torchtitan.ops.grouped_mm import grouped_mm, grouped_mm_loop, local_part
from torchtitan.ops.init import init_parameters
from torchtitan.ops.permute import sort_slots
from torchtitan.ops.router_logits import router_logits
from torchtitan.ops.routing import Rule, can_route, route
from torchtitan.ops.swiglu import swiglu

__all__ = ["MoEArgs", "FeedForward", "TokenChoiceTopKRouter", "GroupedExperts", "MoE"]


class FeedForward(nn.Module):
    """SwiGLU feed-forward layer: w2(silu(w1 x) · w3 x), (..., dim) to (..., dim).

    w13: both weights as one, where compute-dtype weights are kept
    (components/optimizer/compute_weights.py).
    """

    fused_weights = {"w13": (("w1.weight", "w3.weight"), 0)}
    w13: Tensor | None = None

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.w13 is not None:
            return self.w2(swiglu(*F.linear(x, self.w13).chunk(2, dim=-1)))
        return self.w2(swiglu(self.w1(x), self.w3(x)))


class TokenChoiceTopKRouter(nn.Module):
    """Each token chooses its experts; with groups, from its best few groups only.

    The order of DeepSeek-V3's gate: scores in fp32 → bias, for the choice only → group limit →
    top-k → weights gathered from the *unbiased* scores → normalise → scale. Left-out groups are
    masked with −inf: with 0 a biased score below zero would let their experts in. Under mixed
    precision the gate's weight arrives rounded to bf16, the form in which DeepSeek's checkpoints
    hold it; the product with it and all that follows is fp32.

    Raises `UserError` (a ValueError) at construction; the rules are `check_routing`'s. When node
    limiting saves traffic, and when not, is told at `MoEArgs`.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_experts: int,
        num_expert_groups: int | None = None,
        num_limited_groups: int | None = None,
        top_k: int,
        score_func: str = "sigmoid",
        route_norm: bool = False,
        route_scale: float = 1.0,
        group_score_func: str = "top2_sum",
        _debug_force_load_balance: bool = False,
    ):
        super().__init__()
        check_routing(
            num_experts=num_experts,
            top_k=top_k,
            score_func=score_func,
            num_expert_groups=num_expert_groups,
            num_limited_groups=num_limited_groups,
            group_score_func=group_score_func,
        )
        self.gate = nn.Linear(dim, num_experts, bias=False)
        self.num_experts = num_experts
        self.num_expert_groups = num_expert_groups
        self.num_limited_groups = num_limited_groups
        self.top_k = top_k
        self.score_func = score_func
        self.route_norm = route_norm
        self.route_scale = route_scale
        self.group_score_func = group_score_func
        self._debug_force_load_balance = _debug_force_load_balance

    def forward(
        self,
        x_TD: Tensor,
        expert_bias: Tensor | None = None,
        token_mask_T: Tensor | None = None,
        *,
        return_scores: bool = False,
    ) -> tuple[Tensor, ...]:
        """Choose experts and their weights.

        expert_bias: (E,) fp32, added to the scores for the choice only. token_mask_T: bool, False =
        not counted in num_tokens_per_expert.

        Returns top_scores (T, K) fp32, the weights; selected_experts_indices (T, K) int64;
        num_tokens_per_expert (E,) int64; with `return_scores` also logits and scores (T, E), at
        least fp32.
        """
        logits_TE = router_logits(x_TD, self.gate.weight)
        fits = can_route(logits_TE, self._rule) and not self._debug_force_load_balance
        if fits and not return_scores:
            weights_TK, ids_TK = route(logits_TE, expert_bias, self._rule)
            return weights_TK, ids_TK, count_tokens(ids_TK, self.num_experts, token_mask_T)
        scores_TE = (
            logits_TE.sigmoid() if self.score_func == "sigmoid" else logits_TE.softmax(dim=-1)
        )
        ids_TK = self._choose(scores_TE.detach(), expert_bias)
        weights_TK = scores_TE.gather(1, ids_TK)
        if self.route_norm:
            # 1e-20 keeps a sum of underflowed sigmoids from dividing by zero.
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        weights_TK = weights_TK * self.route_scale
        routing = weights_TK, ids_TK, count_tokens(ids_TK, self.num_experts, token_mask_T)
        return (*routing, logits_TE, scores_TE) if return_scores else routing

    @property
    def _rule(self) -> Rule:
        return Rule(
            top_k=self.top_k,
            groups=self.num_expert_groups or 0,
            limited=self.num_limited_groups or 0,
            top2=self.group_score_func == "top2_sum",
            sigmoid=self.score_func == "sigmoid",
            norm=self.route_norm,
            scale=self.route_scale,
        )

    def _choose(self, scores_TE: Tensor, expert_bias: Tensor | None) -> Tensor:
        if self._debug_force_load_balance:
            return self._balanced_choice(scores_TE.size(0), scores_TE.device)
        scores_for_choice = scores_TE if expert_bias is None else scores_TE + expert_bias
        if self.num_expert_groups is not None:
            scores_for_choice = self._get_node_limited_routing_scores(scores_for_choice)
        return scores_for_choice.topk(self.top_k, dim=-1, sorted=False).indices

    def _get_node_limited_routing_scores(self, scores_for_choice: Tensor) -> Tensor:
        """Scores (T, E) with those of all but the `num_limited_groups` best groups set to −inf."""
        scores_TGe = scores_for_choice.unflatten(-1, (self.num_expert_groups, -1))
        if self.group_score_func == "max":
            group_scores_TG = scores_TGe.amax(dim=-1)
        else:
            group_scores_TG = scores_TGe.topk(2, dim=-1).values.sum(dim=-1)
        best_TM = group_scores_TG.topk(self.num_limited_groups, dim=-1, sorted=False).indices
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
        G = self.num_expert_groups or self.num_experts
        M = min(self.num_limited_groups or self.top_k, self.top_k)
        experts_per_group = self.num_experts // G
        t_T1 = torch.arange(num_tokens, device=device).unsqueeze(1)
        k_1K = torch.arange(self.top_k, device=device).unsqueeze(0)
        # Groups of one token stand G // M apart, so that no two coincide and none is favoured.
        group_TK = (t_T1 + (k_1K % M) * (G // M)) % G
        expert_TK = (t_T1 // G + k_1K // M) % experts_per_group
        return group_TK * experts_per_group + expert_TK


class GroupedExperts(nn.Module):
    """SwiGLU experts as stacked weights: w1, w3 (E, F, D) and w2 (E, D, F).

    w13: (E, 2F, D), gate over up, where compute-dtype weights are kept
    (components/optimizer/compute_weights.py).
    """

    fused_weights = {"w13": (("w1", "w3"), 1)}
    w13: Tensor | None = None

    def __init__(self, *, dim: int, hidden_dim: int, num_experts: int, use_grouped_mm: bool = True):
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.w3 = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.use_grouped_mm = use_grouped_mm

    def forward(self, rows_RD: Tensor, counts_L: Tensor, weights_R: Tensor | None = None) -> Tensor:
        """Pass rows, sorted by expert, through their experts: (R, D).

        counts_L: int64 rows of each expert. weights_R: factors on the experts' outputs.
        """
        mm = grouped_mm if self.use_grouped_mm else grouped_mm_loop
        w1, w3 = (self.w1, self.w3) if self.w13 is None else self.w13.chunk(2, dim=1)
        w1_LDF, w2_LFD, w3_LDF = (
            local_part(weight).transpose(1, 2) for weight in (w1, self.w2, w3)
        )
        hidden_RF = swiglu(mm(rows_RD, w1_LDF, counts_L), mm(rows_RD, w3_LDF, counts_L), weights_R)
        return mm(hidden_RF, w2_LFD, counts_L)


class MoE(KeepsBufferDtypes):
    """Routed experts plus shared ones.

    Buffers: `expert_bias` (E,) fp32, part of the state dict (None without balancing);
    `tokens_per_expert` (E,) int64 and `traffic` (2, 3) int64, tokens and their ways of the current
    optimizer step (see balancing.py); `watched` (5,) fp32, what watch.py sums over the step;
    `tokens_in_step` () fp32, by which the router's own losses are divided, and
    `global_tokens_per_expert` (E,) int64, the step before's on all ranks (see aux_loss.py).
    """

    def __init__(self, moe_args: MoEArgs, dim: int, hidden_dim: int):
        super().__init__()
        self.router = TokenChoiceTopKRouter(
            dim=dim,
            num_experts=moe_args.num_experts,
            num_expert_groups=moe_args.num_expert_groups,
            num_limited_groups=moe_args.num_limited_groups,
            top_k=moe_args.top_k,
            score_func=moe_args.score_func,
            route_norm=moe_args.route_norm,
            route_scale=moe_args.route_scale,
            group_score_func=moe_args.group_score_func,
            _debug_force_load_balance=moe_args._debug_force_load_balance,
        )
        self.dispatcher: TokenDispatcher = LocalDispatcher(moe_args.num_experts)
        self.experts = GroupedExperts(
            dim=dim,
            hidden_dim=hidden_dim,
            num_experts=moe_args.num_experts,
            use_grouped_mm=moe_args.use_grouped_mm,
        )
        self.shared_experts = (
            FeedForward(dim, hidden_dim * moe_args.num_shared_experts)
            if moe_args.num_shared_experts > 0
            else None
        )
        self.score_before_experts = moe_args.score_before_experts
        self.load_balance_coeff = moe_args.load_balance_coeff
        self.sequence_balance_coeff = moe_args.sequence_balance_coeff
        self.global_balance_coeff = moe_args.global_balance_coeff
        self.z_loss_coeff = moe_args.z_loss_coeff
        self.watch_routing = False  # fill `watched`
        # The ranks that hold the other parts of each sequence (context parallelism), if any.
        self.sequence_group: dist.ProcessGroup | None = None
        bias_E = None
        if moe_args.load_balance_coeff is not None:
            bias_E = torch.zeros(moe_args.num_experts, dtype=torch.float32)
        self.register_buffer("expert_bias", bias_E)
        for name in ("tokens_per_expert", "global_tokens_per_expert"):
            zeros_E = torch.zeros(moe_args.num_experts, dtype=torch.int64)
            self.register_buffer(name, zeros_E, persistent=False)
        self.register_buffer("traffic", torch.zeros(2, 3, dtype=torch.int64), persistent=False)
        for name, value in (
            ("watched", torch.zeros(len(SUMS))),
            ("tokens_in_step", torch.ones(())),
        ):
            self.register_buffer(name, value.float(), persistent=False)

    def forward(
        self, x_BSD: Tensor, token_mask_BS: Tensor | None = None, *, return_load: bool = False
    ) -> Tensor | tuple[Tensor, Load]:
        """(B, S, D) to (B, S, D); with `return_load` also the batch's load.

        token_mask_BS: bool, False = padding, which is computed but not counted in the load.
        """
        x_TD = x_BSD.flatten(0, 1)
        token_mask_T = None if token_mask_BS is None else token_mask_BS.flatten()
        watched = None
        if self._needs_scores:
            weights_TK, ids_TK, load_E, watched = self._route_and_watch(x_BSD, token_mask_BS)
        else:
            weights_TK, ids_TK, load_E = self.router(x_TD, self.expert_bias, token_mask_T)

        if self.shared_experts is not None:
            begun_TD = self.dispatcher.begin_beside(self.shared_experts, x_TD)
        if self._all_in_one:
            experts, order = self.experts, sort_slots(ids_TK, self.router.num_experts)
            out_TD = expert_ffn(x_TD, experts.w13, experts.w2, weights_TK, order)
            traffic = None
        else:
            rows_RD, counts_L, record = self.dispatcher.dispatch(x_TD, ids_TK, weights_TK)
            weights_R = record.weights_R
            if self.score_before_experts:
                rows_RD = (rows_RD * weights_R.unsqueeze(-1)).to(rows_RD.dtype)
                weights_R = None
            rows_RD = self.experts(rows_RD, counts_L, weights_R)
            out_TD = self.dispatcher.combine(rows_RD, record)
            traffic = record.traffic

        if self.shared_experts is not None:
            out_TD = out_TD + self.dispatcher.end_beside(self.shared_experts, begun_TD)
        out_BSD = out_TD.view_as(x_BSD)
        return (out_BSD, Load(load_E, traffic, watched)) if return_load else out_BSD

    @property
    def _needs_scores(self) -> bool:
        losses = self.sequence_balance_coeff or self.global_balance_coeff or self.z_loss_coeff
        return bool(self.watch_routing or losses) and self.training and torch.is_grad_enabled()

    def _route_and_watch(
        self, x_BSD: Tensor, mask_BS: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The router's three results, its losses attached to the weights; the batch's sums."""
        mask_T = None if mask_BS is None else mask_BS.flatten()
        weights_TK, ids_TK, load_E, logits_TE, scores_TE = self.router(
            x_BSD.flatten(0, 1), self.expert_bias, mask_T, return_scores=True
        )
        scores_BSE = scores_TE.unflatten(0, x_BSD.shape[:2])
        balance = sequence_balance_sum(scores_BSE, mask_BS, self.router.top_k, self.sequence_group)
        z = z_sum(logits_TE, mask_T)
        in_batch = global_balance_sum(scores_TE, mask_T, self.global_tokens_per_expert)
        loss = self.sequence_balance_coeff * balance + self.z_loss_coeff * z
        loss = loss + self.global_balance_coeff * in_batch
        weights_TK = attach_loss(weights_TK, loss / self.tokens_in_step)
        limited = limited_sum(scores_TE, self.expert_bias, ids_TK, mask_T)
        sums = (balance, z, entropy_sum(scores_TE, mask_T), limited, in_batch)
        watched = torch.stack([s.detach().float() for s in sums])
        return weights_TK, ids_TK, load_E, watched

    def set_coefficients(self, values: Mapping[str, float]) -> None:
        """Those of this layer among `values`, for the steps to come."""
        for name in ("load_balance_coeff", "sequence_balance_coeff", "global_balance_coeff"):
            setattr(self, name, values.get(name, getattr(self, name)))

    @property
    def _all_in_one(self) -> bool:
        """Whether dispatch, compute and combine can be one operator: same numbers, fewer bytes."""
        return (
            self.experts.w13 is not None
            and self.experts.use_grouped_mm
            and isinstance(self.dispatcher, LocalDispatcher)
            and not self.score_before_experts
        )

    def init_weights(self, init_std: float) -> None:
        """Fill a layer that stands alone; inside a model, the model does."""
        init_parameters(self, init_std)
        self.init_buffers()

    def init_buffers(self) -> None:
        self.tokens_per_expert.zero_()
        self.global_tokens_per_expert.zero_()
        self.traffic.zero_()
        self.watched.zero_()
        self.tokens_in_step.fill_(1)
        if self.expert_bias is not None:
            self.expert_bias.zero_()
