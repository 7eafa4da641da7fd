"""Warnings about routing settings that cannot do what they are for, one sentence each.

They are no errors: a published model may have them, and must load and compute as it was trained.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import ceil

from torchtitan.config.schedule_tables import EXPERT_COEFFICIENTS
from torchtitan.models.moe.args import MoEArgs

# The z-loss evens out nothing, and the bias's speed is no weight of a loss.
BALANCING = tuple(name for name in EXPERT_COEFFICIENTS if name != "z_loss_coeff")
LOSSES = tuple(name for name in EXPERT_COEFFICIENTS if name != "load_balance_coeff")
# The sequence-wise loss is counted on scores, whatever experts the tokens go to.
_BY_COUNTS = ("load_balance_coeff", "global_balance_coeff")


def without_effect(args: MoEArgs, of_phases: Mapping[str, float] | None = None) -> Iterator[str]:
    """Yield sentences for the log of a training run.

    of_phases: largest value that a phase of the run sets, by name of EXPERT_COEFFICIENTS.
    """
    for name, value in (of_phases or {}).items():
        args = replace(args, **{name: max(getattr(args, name) or 0.0, value)})
    yield from _router(args)
    if args._debug_force_load_balance:
        yield (
            "debug.moe_force_load_balance = true: tokens go to the experts in turn, whatever the "
            f"router says{_idle(args, _BY_COUNTS)}; it is for benchmarks, set it to false to "
            "train"
        )
    elif args.top_k == args.num_experts:
        yield (
            f"{_key('top_k')} = {args.top_k} takes all experts: the router chooses nothing"
            f"{_idle(args, BALANCING)}; set num_experts above top_k"
        )
    else:
        yield from _groups(args)
        yield from _balance(args)


def _key(name: str) -> str:
    return f"model.args.moe_args.{name}"


def _idle(args: MoEArgs, names: tuple[str, ...]) -> str:
    found = [name for name in names if getattr(args, name)]
    return f", and {', '.join(found)} can't even out anything" if found else ""


def _router(args: MoEArgs) -> Iterator[str]:
    """Yield cases in which the main loss gives the router no gradient. AdamW and Muon then make
    steps of their usual size from what is left, rounding noise."""
    others = [name for name in LOSSES if getattr(args, name)]
    rest = f"it learns from {', '.join(others)} alone" if others else "it moves by rounding noise"
    if args.top_k == 1 and args.route_norm:
        yield (
            f"{_key('top_k')} = 1 with route_norm = true: the weight of the one expert is its "
            "score over itself, always 1, so the main loss gives the router no gradient and "
            f"{rest}; set route_norm to false or top_k to 2 or more (a model that was trained so "
            "computes something else then)"
        )
    elif args.num_experts == 1 and args.score_func == "softmax":
        yield (
            f"{_key('num_experts')} = 1 with score_func = 'softmax': the score of the one expert "
            f"is always 1, so the main loss gives the router no gradient and {rest}; set "
            "num_experts to 2 or more, or use a dense layer"
        )


def _groups(args: MoEArgs) -> Iterator[str]:
    if args.num_expert_groups is None or args.num_limited_groups is None:
        return
    groups, limited, size = (
        args.num_expert_groups,
        args.num_limited_groups,
        args.num_experts // args.num_expert_groups,
    )
    reason = None
    if limited == groups:
        reason = f"is all of num_expert_groups ({groups})"
    elif args.group_score_func == "max" and limited >= args.top_k:
        reason = (
            f"is not below top_k ({args.top_k}), and by group_score_func = 'max' a token's best "
            "groups then hold its best experts"
        )
    least = ceil(args.top_k / size)
    if reason:
        lower = f"set it to {least} or more, below {limited}" if least < limited else ""
        if least == limited - 1:
            lower = f"set it to {least}"
        yield (
            f"{_key('num_limited_groups')} = {limited} {reason}: the limit changes no choice; "
            f"{lower + ', or ' if lower else ''}leave num_limited_groups and num_expert_groups out"
        )
    elif args.top_k == limited * size and size > 1:
        yield (
            f"{_key('top_k')} = {args.top_k} takes all experts of the {limited} groups of {size} "
            "that num_limited_groups allows: the router chooses groups, not experts; lower top_k "
            "or raise num_limited_groups"
        )


def _balance(args: MoEArgs) -> Iterator[str]:
    if not any(getattr(args, name) for name in BALANCING) and args.load_balance_coeff is None:
        yield (
            f"Nothing evens out the expert load: {_key('load_balance_coeff')} is not set (1e-3 is "
            "the usual speed of the bias)"
        )
    if args.load_balance_coeff is not None and args.load_balance_coeff >= 1:
        yield (
            f"{_key('load_balance_coeff')} = {args.load_balance_coeff:g} moves the bias by more "
            "than any score, which lies between 0 and 1, in each step: the bias chooses the "
            "experts, not the router; set it to 1e-3, the usual speed"
        )
