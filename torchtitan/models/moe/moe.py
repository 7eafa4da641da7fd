"""The mixture-of-experts layer: route, dispatch, compute, combine.

Letters: B batch, S sequence, T tokens (B·S), D model dim, F expert hidden dim, E experts, G expert
groups, L local experts, K top-k, R rows received after dispatch.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchtitan.config.router_stats import ROUTER_STATS
from torchtitan.config.schedule_tables import EXPERT_COEFFICIENTS
from torchtitan.models.moe.args import MoEArgs
from torchtitan.models.moe.aux_loss import (
    attach_loss,
    global_balance_sum,
    sequence_balance_sum,
    z_sum,
)
from torchtitan.models.moe.dispatcher import (
    LocalDispatcher,
    TokenDispatcher,
    TokenExchange,
    WholeTokenDispatcher,
)
from torchtitan.models.moe.load import RoutingLoad
from torchtitan.models.moe.router import TokenChoiceTopKRouter
from torchtitan.models.moe.router_stats import RoutedTokens, router_sums
from torchtitan.ops.buffers import KeepsBufferDtypes
from torchtitan.ops.init import init_parameters
from torchtitan.ops.linear import (
    Joint,
    Linear,
    feed_forward,
    grouped_ffn,
    grouped_ffn_operator,
    grouped_linear,
    grouped_linear_joint,
)
from torchtitan.ops.permute import RowOrder
from torchtitan.ops.swiglu import swiglu
from torchtitan.protocols.layers import ExpertWeights, MoELayer

__all__ = ["MoEArgs", "FeedForward", "TokenChoiceTopKRouter", "GroupedExperts", "MoE"]


class FeedForward(nn.Module):
    """SwiGLU feed-forward layer: w2(silu(w1 x) · w3 x), (..., dim) to (..., dim)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w1 = Linear(dim, hidden_dim)
        self.w2 = Linear(hidden_dim, dim)
        self.w3 = Linear(dim, hidden_dim)
        self.w13 = Joint("w1.weight", "w3.weight", dim=0)

    def forward(self, x: Tensor) -> Tensor:
        return feed_forward(x, self.w13, (self.w1, self.w3), self.w2)


class GroupedExperts(ExpertWeights):
    """SwiGLU experts as stacked weights: w1, w3 (E, F, D) and w2 (E, D, F)."""

    def __init__(self, *, dim: int, hidden_dim: int, num_experts: int, use_grouped_mm: bool = True):
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.w3 = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.w13 = Joint("w1", "w3", dim=1)  # gate over up
        self.use_grouped_mm = use_grouped_mm

    def forward(
        self,
        x: Tensor,
        rows: Tensor | RowOrder,
        weights: Tensor | None = None,
        exchange: TokenExchange | None = None,
    ) -> Tensor:
        """Pass rows through their experts, (R, D), or tokens to the sums over theirs, (T, D).

        x: rows sorted by expert (R, D), or tokens (T, D).
        rows: int32 rows of each expert (L,), or the order of the tokens' rows from `sort_slots`.
        weights: fp32 factors on the experts' outputs, (R,) or (T, K).
        exchange: x is its message, on its way; None = x is here.
        """
        gate_up, down = (self.stack("w1"), self.stack("w3")), self.stack("w2")
        if isinstance(rows, RowOrder):
            assert weights is not None, "tokens come with their routing weights"
            if exchange is not None:
                operator = grouped_ffn_operator(x, self.w13, gate_up, down, self.fp8)
                if operator is not None:
                    return exchange.through(operator, x, weights, rows)
                x = exchange.finish(x)
            return grouped_ffn(x, self.w13, gate_up, down, weights, rows, self.fp8)
        how: Any = {"loop": not self.use_grouped_mm, "fp8": self.fp8}
        gate_RF, up_RF = grouped_linear_joint(x, self.w13, gate_up, rows, **how)
        return grouped_linear(swiglu(gate_RF, up_RF, weights), down, rows, **how)


class MoE(KeepsBufferDtypes, MoELayer):
    """Routed experts plus shared ones.

    Its buffers, of which only the first is part of the state dict:

    expert_bias: (E,) fp32; None without balancing.
    tokens_per_expert: (E,) int64, of the current optimizer step (see balancing.py).
    traffic: (2, 3) int64, rows sent in the current optimizer step (see balancing.py).
    router_stats: (N,) fp32, sums of router_stats.py over the current optimizer step.
    overflow: () fp32, largest of the current optimizer step (see dispatcher.py).
    tokens_in_step: () fp32, by which the router's own losses are divided (see aux_loss.py).
    global_tokens_per_expert: (E,) int64, the step before's on all ranks (see aux_loss.py).
    """

    router: TokenChoiceTopKRouter
    experts: GroupedExperts
    dispatcher: TokenDispatcher

    def __init__(self, moe_args: MoEArgs, dim: int, hidden_dim: int):
        super().__init__()
        self.router = TokenChoiceTopKRouter.of(moe_args.routing, dim=dim)
        self.dispatcher = LocalDispatcher(moe_args.num_experts)
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
        self.collect_router_stats = False
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
            ("router_stats", torch.zeros(len(ROUTER_STATS))),
            ("tokens_in_step", torch.ones(())),
            ("overflow", torch.zeros(())),
        ):
            self.register_buffer(name, value.float(), persistent=False)

    def forward(
        self, x_BSD: Tensor, token_mask_BS: Tensor | None = None, *, return_load: bool = False
    ) -> Tensor | tuple[Tensor, RoutingLoad]:
        """Map (B, S, D) to (B, S, D); with `return_load` also return the batch's load.

        token_mask_BS: bool, False = padding, which is computed but not counted in the load.
        """
        x_TD = x_BSD.flatten(0, 1)
        token_mask_T = None if token_mask_BS is None else token_mask_BS.flatten()
        stats = None
        if self._needs_scores:
            weights_TK, ids_TK, load_E, stats = self._route_with_scores(x_BSD, token_mask_BS)
        else:
            weights_TK, ids_TK, load_E = self.router(x_TD, self.expert_bias, token_mask_T)

        if self.shared_experts is not None:
            begun_TD = self.dispatcher.start_shared(self.shared_experts, x_TD)
        # Not in functions of their own: the compiler would break off at their calls.
        whole = cast(WholeTokenDispatcher, self.dispatcher) if self._all_in_one else None
        if whole is not None:
            sums, record = whole.start_routed(self.experts, x_TD, ids_TK, weights_TK)
        else:
            rows_RD, counts_L, record = self.dispatcher.dispatch(x_TD, ids_TK, weights_TK)
            weights_R = record.weights_R
            if self.score_before_experts:
                rows_RD = (rows_RD * weights_R.unsqueeze(-1)).to(rows_RD.dtype)
                weights_R = None
            sums = self.experts(rows_RD, counts_L, weights_R)
        finish = self.dispatcher.combine if whole is None else whole.finish_routed
        if self.shared_experts is None:
            out_TD = finish(sums, record)
        else:  # while sums travel
            shared_TD = self.dispatcher.finish_shared(self.shared_experts, begun_TD)
            out_TD = finish(sums, record) + shared_TD
        out_BSD = out_TD.view_as(x_BSD)
        overflow = None if whole is None else record.overflow
        load = RoutingLoad(load_E, record.traffic, stats, overflow)
        return (out_BSD, load) if return_load else out_BSD

    @property
    def _needs_scores(self) -> bool:
        losses = self.sequence_balance_coeff or self.global_balance_coeff or self.z_loss_coeff
        needed = bool(self.collect_router_stats or losses)
        return needed and self.training and torch.is_grad_enabled()

    def _route_with_scores(
        self, x_BSD: Tensor, mask_BS: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Route, with the router's losses attached to the weights.

        Returns the three results of the router and the batch's `router_sums`.
        """
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
        routed = RoutedTokens(scores_TE, self.expert_bias, ids_TK, mask_T, balance, z, in_batch)
        return weights_TK, ids_TK, load_E, router_sums(routed)

    def set_coefficients(self, values: Mapping[str, float]) -> None:
        """Take over those of this layer among `values`, for the steps to come."""
        for name in EXPERT_COEFFICIENTS:
            setattr(self, name, values.get(name, getattr(self, name)))

    @property
    def _all_in_one(self) -> bool:
        """True if the experts get whole tokens, and are one operator where there is one.

        That moves fewer bytes. It is for gate and up in one tensor, since joining them in each pass
        would copy them, and for experts without adapters; or where the dispatcher prefers it.
        """
        experts, dispatcher = self.experts, self.dispatcher
        joined = experts.w13.tensor is not None and not experts.lora_scales
        worth_it = joined or dispatcher.prefers_whole_tokens
        possible = experts.use_grouped_mm and not self.score_before_experts
        return worth_it and possible and dispatcher.whole_tokens

    def init_weights(self, init_std: float) -> None:
        """Initialise a layer that stands alone; inside a model, the model does it."""
        init_parameters(self, init_std)
        self.init_buffers()

    def init_buffers(self) -> None:
        self.tokens_per_expert.zero_()
        self.global_tokens_per_expert.zero_()
        self.traffic.zero_()
        self.router_stats.zero_()
        self.overflow.zero_()
        self.tokens_in_step.fill_(1)
        if self.expert_bias is not None:
            self.expert_bias.zero_()
