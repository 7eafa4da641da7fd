"""The load of experts: tokens of a batch that each one got, and rows that travelled for them."""

from typing import NamedTuple

import torch
from torch import Tensor

from torchtitan.ops import permute


def count_tokens(ids_TK: Tensor, num_experts: int, token_mask_T: Tensor | None = None) -> Tensor:
    """Count the tokens routed to each expert: (E,) int64. No host sync.

    (`torch.bincount` waits for the GPU, `torch.histc` has no integer kernel on CPU.)

    ids_TK: int64, experts of each token.
    token_mask_T: bool, False = don't count.
    """
    if ids_TK.is_cuda:
        return permute.count_tokens(ids_TK, num_experts, token_mask_T)
    if token_mask_T is None:
        ones_N = torch.ones_like(ids_TK.flatten())
    else:
        ones_N = token_mask_T.to(ids_TK.dtype).unsqueeze(1).expand_as(ids_TK).flatten()
    return ones_N.new_zeros(num_experts).scatter_add_(0, ids_TK.flatten(), ones_N)


class RoutingLoad(NamedTuple):
    """Result of one micro-batch's routing, or of a step's (see `step_loads`).

    tokens_E: int64 tokens per expert, padding left out.
    traffic: (2, 3) int64 rows sent, see `TokenDispatcher.dispatch`; None where nothing travelled.
    stats: (N,) fp32, sums of router_stats.py; None where they are not measured.
    overflow: () fp32, see `WholeTokenDispatcher`; None where there is always room.
    """

    tokens_E: Tensor
    traffic: Tensor | None
    stats: Tensor | None = None
    overflow: Tensor | None = None
