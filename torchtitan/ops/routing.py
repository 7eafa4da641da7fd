"""Each token's experts and weights from the router's logits, in one kernel on GPUs.

Reference: `TokenChoiceTopKRouter` in models/moe/router.py, with every rule and its reason, which
also runs everywhere else.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Rule(NamedTuple):
    """`RoutingRule` (models/moe/args.py) in the kernel's terms, made by `TokenChoiceTopKRouter`.

    groups: number of expert groups; 0 = no groups.
    limited: groups that a token may use; 0 = no groups.
    top2: a group's score is the sum of its two best, otherwise its best.
    """

    top_k: int
    groups: int
    limited: int
    top2: bool
    sigmoid: bool
    norm: bool
    scale: float


def can_route(logits_TE: Tensor, rule: Rule) -> bool:
    """Tell whether the kernel applies: fp32 on a GPU, experts and groups in powers of two."""
    E = logits_TE.size(1)
    sizes_fit = E & (E - 1) == 0 and rule.groups & (rule.groups - 1) == 0
    return logits_TE.is_cuda and logits_TE.dtype == torch.float32 and sizes_fit


def route(logits_TE: Tensor, bias_E: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
    """Choose experts: weights (T, K) fp32, differentiable by the logits, and ids (T, K) int64.

    Of equal scores the lower id wins.

    bias_E: fp32, added to the scores for the choice only; None = no bias.
    """
    return _route(logits_TE, bias_E, *rule)


@torch.library.custom_op("torchtitan::route", mutates_args=(), device_types="cuda")
def _route(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    groups: int,
    limited: int,
    top2: bool,
    sigmoid: bool,
    norm: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    from torchtitan.ops import routing_triton

    rule = Rule(top_k, groups, limited, top2, sigmoid, norm, scale)
    return routing_triton.route(logits_TE, bias_E, **rule._asdict())


@_route.register_fake
def _(logits_TE, bias_E, top_k, *rule):
    shape = logits_TE.size(0), top_k
    return logits_TE.new_empty(shape), logits_TE.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("torchtitan::route_backward", mutates_args=(), device_types="cuda")
def _route_backward(
    grad_TK: Tensor, logits_TE: Tensor, ids_TK: Tensor, sigmoid: bool, norm: bool, scale: float
) -> Tensor:
    from torchtitan.ops import routing_triton

    return routing_triton.route_backward(
        grad_TK, logits_TE, ids_TK, sigmoid=sigmoid, norm=norm, scale=scale
    )


@_route_backward.register_fake
def _(grad_TK, logits_TE, ids_TK, sigmoid, norm, scale):
    return torch.empty_like(logits_TE)


def _save(ctx, inputs, output) -> None:
    logits_TE, _, *rule = inputs
    ctx.rule = Rule(*rule)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits_TE, output[1])


def _backward(ctx, grad_TK, _):
    rule = ctx.rule
    grad_TE = _route_backward(
        grad_TK.contiguous(), *ctx.saved_tensors, rule.sigmoid, rule.norm, rule.scale
    )
    return grad_TE, *[None] * 8


_route.register_autograd(_backward, setup_context=_save)
