"""Losses of the router beside the model's own: balance in a sequence or a batch, and the z-loss.

Balance inside of a sequence (DeepSeek-V3 report, arXiv 2412.19437, equations 17 to 20), for a
sequence of S tokens with scores s:

    L = alpha · Σ_i f_i P_i     f_i = E / (K S) · tokens that have expert i among the K best of s
                                P_i = mean over the tokens of s_i / Σ_j s_j

A sequence is a row of the batch, also where several documents are packed into it; padding doesn't
count. The K best are taken before bias and group limit, as the report writes it.

Balance inside of the global batch (Qwen, arXiv 2501.11873): the same sum, with

    f_i = E / Σ_j c_j · c_i      c_i = tokens that all ranks sent to expert i in the optimizer step
                                 before this one

c counts what the router has really chosen, with bias and group limit. A sequence may then use few
experts, as long as the batch uses all. The counts of the step itself are only whole after its
last forward pass: they would take a second one. A buffer that fills micro-batch by micro-batch (the
paper's) makes the loss depend on how a step is cut. Those of the step before are whole and the same
for every layout and accumulation, and cost no communication: the update of the expert bias sums
them anyway. It acts one step later, too; in between a router moves by one update. The counts are
part of a checkpoint. A run that begins, also from weights alone, has none, and its first step
counts as even: f = 1, whose loss has no gradient.

z-loss (ST-MoE, arXiv 2202.08906): the mean over tokens of (log Σ_i exp(logit_i))², which keeps
logits small.

**Scaling.** All are means over all tokens of the optimizer step: a sequence weighs as much as it
has tokens, and everything is divided by `tokens_in_step`, the tokens (without padding) of all ranks
and micro-batches. So accumulation, DP and EP need no correction. Where a sequence
is split over ranks (CP), its f is counted over all of them; the rest is a sum over tokens already.
P is never summed over ranks: each rank's gradients are those of its own tokens' share.

The losses enter the backward pass where they arise (`_Attach`), so a layer's output and the model's
stay what they are, and recomputing the layer changes nothing.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def sequence_balance_sum(
    scores_BSE: Tensor,
    mask_BS: Tensor | None,
    top_k: int,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Sum S · L / alpha over sequences: scalar.

    scores_BSE: of the router, at least fp32.
    mask_BS: bool, False = padding.
    top_k: experts a token.
    group: the ranks that hold the other parts of these sequences; each gets the share of its own
        tokens.
    """
    ids_BSK = scores_BSE.detach().topk(top_k, dim=-1, sorted=False).indices
    chosen_BSE = torch.zeros_like(scores_BSE, requires_grad=False).scatter_(-1, ids_BSK, 1.0)
    share_BSE = _shares(scores_BSE)
    tokens_BS = torch.ones_like(share_BSE[..., 0]) if mask_BS is None else mask_BS.to(share_BSE)
    counts_BE = torch.einsum("bse,bs->be", chosen_BSE, tokens_BS.detach())
    length_B = tokens_BS.detach().sum(dim=1)
    if group is not None:
        both = torch.cat((counts_BE, length_B.unsqueeze(1)), dim=1)
        dist.all_reduce(both, group=group)
        counts_BE, length_B = both[:, :-1], both[:, -1]
    f_BE = counts_BE * (scores_BSE.size(-1) / top_k) / length_B.clamp(min=1).unsqueeze(1)
    return (f_BE * torch.einsum("bse,bs->be", share_BSE, tokens_BS)).sum()


def _shares(scores: Tensor) -> Tensor:
    return scores / scores.sum(dim=-1, keepdim=True).clamp(min=1e-20)


def global_balance_sum(scores_TE: Tensor, mask_T: Tensor | None, counts_E: Tensor) -> Tensor:
    """Compute T · L / alpha of this rank's T tokens: scalar.

    scores_TE: of the router, at least fp32.
    mask_T: bool, False = padding.
    counts_E: int64, tokens per expert in the step before; all zero = there was none.
    """
    share_TE = _shares(scores_TE)
    counted_TE = share_TE if mask_T is None else share_TE * mask_T.unsqueeze(1)
    total = counts_E.sum()
    f_E = counts_E.to(share_TE) * counts_E.numel() / total.clamp(min=1)
    f_E = torch.where(total > 0, f_E, 1.0)
    return (f_E * counted_TE.sum(dim=0)).sum()


def z_sum(logits_TE: Tensor, mask_T: Tensor | None) -> Tensor:
    """Sum (log Σ exp logits)² over tokens: scalar.

    logits_TE: of the router, at least fp32.
    mask_T: bool, False = padding.
    """
    z_T = logits_TE.logsumexp(dim=-1).square()
    return (z_T if mask_T is None else z_T * mask_T).sum()


def attach_loss(tensor: Tensor, loss: Tensor) -> Tensor:
    """Return `tensor`, whose backward pass also runs that of `loss` (a scalar)."""
    return _Attach.apply(tensor, loss)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, loss: Tensor) -> Tensor:
        ctx.like = (loss.dtype, loss.device)
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        dtype, device = ctx.like
        return grad, torch.ones((), dtype=dtype, device=device)
