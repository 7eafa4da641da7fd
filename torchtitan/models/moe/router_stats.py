"""Router statistics: what the router of a layer does beyond the load, as sums over tokens.

A statistic is a line of `ROUTER_STATS` (config/router_stats.py) and the function of its name here,
which sums over one micro-batch. `MoE.router_stats` adds the sums up over the optimizer step.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torchtitan.config.router_stats import ROUTER_STATS


class RoutedTokens(NamedTuple):
    """Routing of one micro-batch.

    scores_TE: of the router, at least fp32.
    expert_bias: (E,) fp32, added to the scores for the choice only; or None.
    ids_TK: int64, the experts chosen.
    mask_T: bool, False = padding; None = no padding.
    balance, z, global_balance: sums of aux_loss.py before their weights, scalars.
    """

    scores_TE: Tensor
    expert_bias: Tensor | None
    ids_TK: Tensor
    mask_T: Tensor | None
    balance: Tensor
    z: Tensor
    global_balance: Tensor


# Each returns a scalar, the sum over the tokens that are no padding.
FUNCTIONS: dict[str, Callable[[RoutedTokens], Tensor]] = {}


def statistic(function: Callable[[RoutedTokens], Tensor]) -> Callable[[RoutedTokens], Tensor]:
    """Decorate the function of a line of `ROUTER_STATS`."""
    FUNCTIONS[function.__name__] = function
    return function


@torch.no_grad()
def router_sums(routed: RoutedTokens) -> Tensor:
    """All statistics of a micro-batch in the order of `ROUTER_STATS`: (N,) fp32."""
    return torch.stack([FUNCTIONS[name](routed).detach().float() for name in ROUTER_STATS])


@statistic
def router_balance_loss(routed: RoutedTokens) -> Tensor:
    """Sequence-wise balance loss before its weight; its mean is 1 with even use."""
    return routed.balance


@statistic
def router_z_loss(routed: RoutedTokens) -> Tensor:
    """z-loss before its weight."""
    return routed.z


@statistic
def router_global_balance_loss(routed: RoutedTokens) -> Tensor:
    """Balance loss over the global batch before its weight; its mean is 1 with even use."""
    return routed.global_balance


@statistic
def router_entropy(routed: RoutedTokens) -> Tensor:
    """Entropy of score_i / Σ scores, over ln E: 1 = undecided, 0 = one expert."""
    scores_TE, mask_T = routed.scores_TE, routed.mask_T
    share_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True).clamp(min=1e-20)
    entropy_T = torch.special.entr(share_TE).sum(dim=-1) / math.log(max(2, scores_TE.size(-1)))
    return (entropy_T if mask_T is None else entropy_T * mask_T).sum()


@statistic
def limited_percent(routed: RoutedTokens) -> Tensor:
    """Number of tokens that would have had other experts without the group limit."""
    scores_TE, ids_TK, mask_T = routed.scores_TE, routed.ids_TK, routed.mask_T
    bias_E = routed.expert_bias
    for_choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    best_T = for_choice_TE.topk(ids_TK.size(1), dim=-1).values[:, -1]
    worst_T = for_choice_TE.gather(1, ids_TK).amin(dim=-1)
    changed_T = worst_T < best_T
    return (changed_T if mask_T is None else changed_T & mask_T).sum().to(scores_TE.dtype)
