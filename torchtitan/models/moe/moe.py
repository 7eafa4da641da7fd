"""The mixture-of-experts layer: route, dispatch, compute, combine.

Letters: B batch, S sequence, T tokens (B·S), D model dim, F expert hidden dim, E experts, G expert
groups, L local experts, K top-k, R rows received after dispatch.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan.models.moe.args import MoEArgs
from torchtitan.models.moe.aux_loss import (
    attach_loss,
    global_balance_sum,
    sequence_balance_sum,
    z_sum,
)
from torchtitan.models.moe.dispatcher import LocalDispatcher, TokenDispatcher
from torchtitan.models.moe.load import RoutingLoad
from torchtitan.models.moe.router import TokenChoiceTopKRouter
from torchtitan.models.moe.router_stats import SUMS, entropy_sum, limited_sum
from torchtitan.ops.buffers import KeepsBufferDtypes
from torchtitan.ops.expert_ffn import expert_ffn
from torchtitan.ops.grouped_mm import grouped_mm, grouped_mm_loop, local_part
from torchtitan.ops.init import init_parameters
from torchtitan.ops.permute import sort_slots
from torchtitan.ops.swiglu import swiglu
from torchtitan.protocols.layers import ExpertWeights, MoELayer

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


class GroupedExperts(ExpertWeights):
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


class MoE(KeepsBufferDtypes, MoELayer):
    """Routed experts plus shared ones.

    Buffers: `expert_bias` (E,) fp32, part of the state dict (None without balancing);
    `tokens_per_expert` (E,) int64 and `traffic` (2, 3) int64, tokens and their ways of the current
    optimizer step (see balancing.py); `watched` (5,) fp32, what router_stats.py sums over the step;
    `tokens_in_step` () fp32, by which the router's own losses are divided, and
    `global_tokens_per_expert` (E,) int64, the step before's on all ranks (see aux_loss.py).
    """

    router: TokenChoiceTopKRouter
    experts: GroupedExperts
    dispatcher: TokenDispatcher

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
    ) -> Tensor | tuple[Tensor, RoutingLoad]:
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
        w13_E2FD = self.experts.w13
        if w13_E2FD is not None and self._all_in_one:
            order = sort_slots(ids_TK, self.router.num_experts)
            out_TD = expert_ffn(x_TD, w13_E2FD, self.experts.w2, weights_TK, order)
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
        return (out_BSD, RoutingLoad(load_E, traffic, watched)) if return_load else out_BSD

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
            self.experts.use_grouped_mm
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
