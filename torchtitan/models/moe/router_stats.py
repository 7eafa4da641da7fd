"""What the router of a layer does, beyond the load: five sums over the tokens of a step.

balance   sequence-wise balance loss before its weight (aux_loss.py); 1 = even
z         z-loss before its weight
entropy   of a token's scores, over ln E: 1 = undecided, 0 = one expert
limited   tokens whose experts the group limit has changed
global    balance loss over the global batch before its weight; 1 = even
"""

import math

import torch
from torch import Tensor

SUMS = ("balance", "z", "entropy", "limited", "global")


@torch.no_grad()
def entropy_sum(scores_TE: Tensor, mask_T: Tensor | None) -> Tensor:
    """Σ over tokens of the entropy of score_i / Σ scores, over ln E: scalar."""
    share_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True).clamp(min=1e-20)
    entropy_T = torch.special.entr(share_TE).sum(dim=-1) / math.log(max(2, scores_TE.size(-1)))
    return (entropy_T if mask_T is None else entropy_T * mask_T).sum()


@torch.no_grad()
def limited_sum(
    scores_TE: Tensor, expert_bias: Tensor | None, ids_TK: Tensor, mask_T: Tensor | None
) -> Tensor:
    """Tokens that would have had other experts without the group limit: scalar."""
    for_choice_TE = scores_TE if expert_bias is None else scores_TE + expert_bias
    best_T = for_choice_TE.topk(ids_TK.size(1), dim=-1).values[:, -1]
    worst_T = for_choice_TE.gather(1, ids_TK).amin(dim=-1)
    changed_T = worst_T < best_T
    return (changed_T if mask_T is None else changed_T & mask_T).sum().to(scores_TE.dtype)
