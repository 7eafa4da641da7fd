"""Arguments of a mixture-of-experts layer and of its router, with the checks of their values."""

from dataclasses import dataclass, fields
from typing import Literal

from torchtitan.config.degrees import divisors
from torchtitan.config.rules.numbers import check_argument_numbers
from torchtitan.config.schedule_tables import EXPERT_COEFFICIENTS
from torchtitan.tools.errors import UserError

ScoreFunc = Literal["softmax", "sigmoid"]
GroupScoreFunc = Literal["top2_sum", "max"]

# Of one layer; the largest published models have a few hundred.
MOST_EXPERTS = 65_536
_COUNTS = ("num_experts", "num_shared_experts", "top_k", "num_expert_groups", "num_limited_groups")


@dataclass(frozen=True, kw_only=True)
class RoutingRule:
    """Arguments of a router: how it chooses experts and weights them. Raises `UserError` (a
    ValueError) for values that can't hold.

    A new argument is a field here and in `MoEArgs`, and router.py uses it. The GPU kernel
    (ops/routing.py) must take it too, or `TokenChoiceTopKRouter.forward` go past the kernel.

    num_experts: routed experts.
    num_expert_groups, num_limited_groups: node-limited routing (DeepSeek-V3 report, section 2.1.2):
        experts stand in equal groups, and a token may only use experts of its best
        `num_limited_groups` groups. With one group a node this bounds the nodes a token is sent to.
        It saves traffic only where a token is sent once per *node* (or rank); with a plain
        all-to-all, one copy per chosen expert, the same number of bytes travels with or without it.
    top_k: experts a token.
    score_func: from router logits to scores.
    route_norm: divide a token's chosen scores by their sum.
    route_scale: then multiply by this.
    group_score_func: a group's score is the sum of its two best experts (V3) or its best one (V2).
    _debug_force_load_balance: ignore the router's choice and spread tokens evenly (benchmarks).
    """

    num_experts: int
    num_expert_groups: int | None = None
    num_limited_groups: int | None = None
    top_k: int
    score_func: ScoreFunc = "sigmoid"
    route_norm: bool = False
    route_scale: float = 1.0
    group_score_func: GroupScoreFunc = "top2_sum"
    _debug_force_load_balance: bool = False

    def __post_init__(self) -> None:
        if self.score_func not in ("softmax", "sigmoid"):
            raise UserError(f"score_func ({self.score_func!r}) must be 'softmax' or 'sigmoid'.")
        if self.group_score_func not in ("top2_sum", "max"):
            raise UserError(
                f"group_score_func ({self.group_score_func!r}) must be 'top2_sum' or 'max'."
            )
        if self.num_experts < 1:
            raise UserError(f"num_experts ({self.num_experts}) must be 1 or more.")
        if not 1 <= self.top_k <= self.num_experts:
            raise UserError(
                f"top_k ({self.top_k}) must lie between 1 and num_experts ({self.num_experts})."
            )
        if self.num_expert_groups is not None:
            self._check_groups(self.num_expert_groups, self.num_limited_groups)
        elif self.num_limited_groups is not None:
            raise UserError(
                f"num_limited_groups ({self.num_limited_groups}) needs num_expert_groups: set it "
                f"to a divisor of num_experts ({self.num_experts}), or leave both out."
            )
        if self.route_scale <= 0:
            raise UserError(f"route_scale ({self.route_scale}) must be above 0.")

    def _check_groups(self, groups: int, limited: int | None) -> None:
        legal = divisors(self.num_experts)
        if groups not in legal:
            raise UserError(
                f"num_expert_groups ({groups}) must divide num_experts ({self.num_experts}); "
                f"the nearest that does is {min(legal, key=lambda n: abs(n - groups))}."
            )
        if limited is None:
            raise UserError(
                f"num_limited_groups is missing: with num_expert_groups ({groups}) set, say "
                f"how many groups a token may use, from 1 to {groups}."
            )
        if not 1 <= limited <= groups:
            raise UserError(
                f"num_limited_groups ({limited}) must lie between 1 and num_expert_groups "
                f"({groups})."
            )
        size = self.num_experts // groups
        if self.group_score_func == "top2_sum" and size < 2:
            raise UserError(
                f"num_expert_groups ({groups}) leaves {size} of num_experts "
                f"({self.num_experts}) in a group, but group_score_func 'top2_sum' needs at least "
                f"2: use at most {max(1, self.num_experts // 2)} groups, or group_score_func 'max'."
            )
        if self.top_k > limited * size:
            raise UserError(
                f"top_k ({self.top_k}) is larger than the {limited * size} experts of "
                f"num_limited_groups ({limited}) groups of {size}: lower top_k or raise "
                "num_limited_groups."
            )


@dataclass(frozen=True, kw_only=True)
class MoEArgs:
    """Sizes, routing and balancing of one MoE layer. Raises `UserError` (a ValueError) for values
    that can't hold.

    `RoutingRule` explains the router's arguments; `routing` returns them as one.

    num_shared_experts: experts every token passes, held as one FFN.
    score_before_experts: weight the experts' input, not their output (DeepSeek: the output).
    use_grouped_mm: grouped GEMM for the experts; off = a plain loop over them.
    load_balance_coeff: speed of the expert bias that evens out the load without an auxiliary loss
        (arXiv 2408.15664), per optimizer step; 0 = a bias that stays as it was loaded, None = no
        bias.
    sequence_balance_coeff: weight of the sequence-wise balance loss (the V3 report trains with
        0.0001; aux_loss.py).
    global_balance_coeff: weight of the balance loss over the global batch, with the loads of the
        step before (after Qwen; aux_loss.py).
    z_loss_coeff: weight of the router's z-loss (ST-MoE: 0.001; aux_loss.py).
    """

    num_experts: int = 8
    num_shared_experts: int = 1
    score_func: ScoreFunc = "sigmoid"
    route_norm: bool = False
    route_scale: float = 1.0
    score_before_experts: bool = True

    top_k: int = 1
    num_expert_groups: int | None = None
    num_limited_groups: int | None = None

    use_grouped_mm: bool = True
    load_balance_coeff: float | None = 1e-3
    _debug_force_load_balance: bool = False

    group_score_func: GroupScoreFunc = "top2_sum"
    sequence_balance_coeff: float = 0.0
    global_balance_coeff: float = 0.0
    z_loss_coeff: float = 0.0

    def __post_init__(self) -> None:
        check_argument_numbers(self, dict.fromkeys(_COUNTS, MOST_EXPERTS))
        _ = self.routing  # checked as it is built
        if self.num_shared_experts < 0:
            raise UserError(
                f"num_shared_experts ({self.num_shared_experts}) must be 0 (none) or more."
            )
        for name in EXPERT_COEFFICIENTS:
            if name != "load_balance_coeff" and getattr(self, name) < 0:
                raise UserError(f"{name} ({getattr(self, name)}) must be 0 (off) or more.")
        if self.load_balance_coeff is not None and self.load_balance_coeff < 0:
            raise UserError(
                f"load_balance_coeff ({self.load_balance_coeff}) must be 0 (a bias that stays as "
                "it is) or more; leave it out (None) for no expert bias."
            )

    @property
    def routing(self) -> RoutingRule:
        """The router's arguments."""
        return RoutingRule(**{f.name: getattr(self, f.name) for f in fields(RoutingRule)})
