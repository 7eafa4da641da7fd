"""What a mixture-of-experts layer is made of, and the rules that its numbers must keep."""

from dataclasses import dataclass
from typing import Literal

from torchtitan.config.degrees import divisors
from torchtitan.config.rules.numbers import check_argument_numbers
from torchtitan.tools.errors import UserError

ScoreFunc = Literal["softmax", "sigmoid"]
GroupScoreFunc = Literal["top2_sum", "max"]

# Of one layer; the largest published models have a few hundred.
MOST_EXPERTS = 65_536
_COUNTS = ("num_experts", "num_shared_experts", "top_k", "num_expert_groups", "num_limited_groups")


@dataclass(frozen=True, kw_only=True)
class MoEArgs:
    """Sizes and routing rules of one MoE layer. Raises `UserError` (a ValueError) for broken rules.

    num_experts: routed experts. num_shared_experts: experts every token passes, held as one FFN.
    score_func: from router logits to scores. route_norm: divide a token's chosen scores by their
        sum. route_scale: then multiply by this.
    score_before_experts: weight the experts' input, not their output (DeepSeek: the output).
    top_k: experts a token.
    num_expert_groups, num_limited_groups: node-limited routing (DeepSeek-V3 report, section 2.1.2):
        experts stand in equal groups, and a token may only use experts of its best
        `num_limited_groups` groups. With one group a node this bounds the nodes a token is sent to.
        It saves traffic only where a token is sent once per *node* (or rank); with a plain
        all-to-all, one copy per chosen expert, the same number of bytes travels with or without it.
    use_grouped_mm: grouped GEMM for the experts; off = a plain loop over them.
    load_balance_coeff: speed of the expert bias that evens out the load without an auxiliary loss
        (arXiv 2408.15664), per optimizer step; 0 = a bias that stays as it was loaded, None = no
        bias.
    _debug_force_load_balance: ignore the router's choice and spread tokens evenly (benchmarks).
    sequence_balance_coeff: weight of the sequence-wise balance loss (the V3 report trains with
        0.0001). global_balance_coeff: of the one over the global batch, with the loads of the step
        before (after Qwen). z_loss_coeff: of the router's z-loss (ST-MoE: 0.001). All three:
        aux_loss.py.
    group_score_func: a group's score is the sum of its two best experts (V3) or its best one (V2).
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
        check_routing(
            num_experts=self.num_experts,
            top_k=self.top_k,
            score_func=self.score_func,
            num_expert_groups=self.num_expert_groups,
            num_limited_groups=self.num_limited_groups,
            group_score_func=self.group_score_func,
        )
        if self.route_scale <= 0:
            raise UserError(f"route_scale ({self.route_scale}) must be above 0.")
        if self.num_shared_experts < 0:
            raise UserError(
                f"num_shared_experts ({self.num_shared_experts}) must be 0 (none) or more."
            )
        for name in ("sequence_balance_coeff", "global_balance_coeff", "z_loss_coeff"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} ({getattr(self, name)}) must be 0 (off) or more.")
        if self.load_balance_coeff is not None and self.load_balance_coeff < 0:
            raise UserError(
                f"load_balance_coeff ({self.load_balance_coeff}) must be 0 (a bias that stays as "
                "it is) or more; leave it out (None) for no expert bias."
            )


def check_routing(
    *,
    num_experts: int,
    top_k: int,
    score_func: str,
    num_expert_groups: int | None,
    num_limited_groups: int | None,
    group_score_func: str,
) -> None:
    """Raise `UserError` with the fields, their values and the rule when a router can't be built."""
    if score_func not in ("softmax", "sigmoid"):
        raise UserError(f"score_func ({score_func!r}) must be 'softmax' or 'sigmoid'.")
    if group_score_func not in ("top2_sum", "max"):
        raise UserError(f"group_score_func ({group_score_func!r}) must be 'top2_sum' or 'max'.")
    if num_experts < 1:
        raise UserError(f"num_experts ({num_experts}) must be 1 or more.")
    if not 1 <= top_k <= num_experts:
        raise UserError(f"top_k ({top_k}) must lie between 1 and num_experts ({num_experts}).")
    if num_expert_groups is None:
        if num_limited_groups is not None:
            raise UserError(
                f"num_limited_groups ({num_limited_groups}) needs num_expert_groups: set it to a "
                f"divisor of num_experts ({num_experts}), or leave both out."
            )
        return
    _check_groups(num_experts, top_k, num_expert_groups, num_limited_groups, group_score_func)


def _check_groups(
    num_experts: int,
    top_k: int,
    num_expert_groups: int,
    num_limited_groups: int | None,
    group_score_func: str,
) -> None:
    legal = divisors(num_experts)
    if num_expert_groups not in legal:
        nearest = min(legal, key=lambda n: abs(n - num_expert_groups))
        raise UserError(
            f"num_expert_groups ({num_expert_groups}) must divide num_experts ({num_experts}); "
            f"the nearest that does is {nearest}."
        )
    if num_limited_groups is None:
        raise UserError(
            f"num_limited_groups is missing: with num_expert_groups ({num_expert_groups}) set, say "
            f"how many groups a token may use, from 1 to {num_expert_groups}."
        )
    if not 1 <= num_limited_groups <= num_expert_groups:
        raise UserError(
            f"num_limited_groups ({num_limited_groups}) must lie between 1 and num_expert_groups "
            f"({num_expert_groups})."
        )
    experts_per_group = num_experts // num_expert_groups
    if group_score_func == "top2_sum" and experts_per_group < 2:
        raise UserError(
            f"num_expert_groups ({num_expert_groups}) leaves {experts_per_group} of num_experts "
            f"({num_experts}) in a group, but group_score_func 'top2_sum' needs at least 2: use at "
            f"most {max(1, num_experts // 2)} groups, or group_score_func 'max'."
        )
    allowed_experts = num_limited_groups * experts_per_group
    if top_k > allowed_experts:
        raise UserError(
            f"top_k ({top_k}) is larger than the {allowed_experts} experts of num_limited_groups "
            f"({num_limited_groups}) groups of {experts_per_group}: lower top_k or raise "
            "num_limited_groups."
        )
