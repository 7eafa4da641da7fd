"""Causal attention on a CPU, a block of queries at a time, by batched matrix products.

Each block is multiplied with the keys up to its own last one, so that most of the scores that the
mask would hide are never computed. The backward pass computes the scores of a block again; nothing
is kept but queries, keys and values. torch's flash kernel for CPUs does as much, but its products
are one head's, and too small to be fast: at 512 tokens it takes 1.7 times as long, and its heads
must have as many channels of values as of keys.

Letters: H heads of one sequence, Q queries of a block, K keys up to the last of them, C channels.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_QUERIES = 128  # of a block
_MAX_SCORES = 2**22  # of a block, 16 MiB; heads are taken so many at a time


def can_use_blocks(q_BSHC: Tensor, k_BSHC: Tensor) -> bool:
    """Tell whether `causal_blocks` is the kernel for these queries and keys.

    Not for bf16: a product would round its scores to 8 bits, which the flash kernel doesn't.
    """
    same_positions = q_BSHC.size(1) == k_BSHC.size(1)
    return q_BSHC.device.type == "cpu" and q_BSHC.dtype == torch.float32 and same_positions


def causal_blocks(q_BSHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, scale: float) -> Tensor:
    """softmax(scale · q kᵀ + causal mask) v for every head: (B, S, H, channels of v)."""
    return _causal_blocks(q_BSHC, k_BSHC, v_BSHC, scale)


@torch.library.custom_op("torchtitan::causal_blocks", mutates_args=(), device_types="cpu")
def _causal_blocks(q_BSHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, scale: float) -> Tensor:
    out_BSHC = q_BSHC.new_empty(v_BSHC.shape)
    for q, k, v, out in _by_heads(q_BSHC, k_BSHC, v_BSHC, out_BSHC):
        for begin, end in _blocks(q.size(1)):
            probs_HQK = _probs(q[:, begin:end], k[:, :end], scale)
            out[:, begin:end] = probs_HQK @ v[:, :end]
    return out_BSHC


@_causal_blocks.register_fake
def _(q_BSHC, k_BSHC, v_BSHC, scale):
    return q_BSHC.new_empty(v_BSHC.shape)


@torch.library.custom_op("torchtitan::causal_blocks_backward", mutates_args=(), device_types="cpu")
def _causal_blocks_backward(
    grad_BSHC: Tensor, q_BSHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grads = torch.empty_like(q_BSHC), torch.empty_like(k_BSHC), torch.empty_like(v_BSHC)
    inputs = grad_BSHC, q_BSHC, k_BSHC, v_BSHC
    for grad, q, k, v, grad_q, grad_k, grad_v in _by_heads(*inputs, *grads):
        # The last block sees every key, so that its gradients are the first in their places.
        for begin, end in reversed(_blocks(q.size(1))):
            queries, keys, is_first = slice(begin, end), slice(end), end == q.size(1)
            probs_HQK = _probs(q[:, queries], k[:, keys], scale)
            _put(grad_v[:, keys], probs_HQK.mT @ grad[:, queries], 1.0, is_first)
            grad_HQK = grad[:, queries] @ v[:, keys].mT
            grad_HQK = torch._softmax_backward_data(grad_HQK, probs_HQK, -1, q.dtype)
            _put(grad_q[:, queries], grad_HQK @ k[:, keys], scale, True)
            _put(grad_k[:, keys], grad_HQK.mT @ q[:, queries], scale, is_first)
    return grads


def _put(place: Tensor, x: Tensor, factor: float, is_first: bool) -> None:
    torch.mul(x, factor, out=place) if is_first else place.add_(x, alpha=factor)


@_causal_blocks_backward.register_fake
def _(grad_BSHC, q_BSHC, k_BSHC, v_BSHC, scale):
    return tuple(torch.empty_like(t) for t in (q_BSHC, k_BSHC, v_BSHC))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_BSHC):
    return *_causal_blocks_backward(grad_BSHC, *ctx.saved_tensors, ctx.scale), None


_causal_blocks.register_autograd(_backward, setup_context=_save)


def _by_heads(*tensors_BSHC: Tensor) -> Iterator[list[Tensor]]:
    """Cut tensors into sequences and heads, some at a time: views (H, S, C) of each tensor."""
    B, S, H, _ = tensors_BSHC[0].shape
    heads = max(1, _MAX_SCORES // (_QUERIES * max(1, S)))
    for b in range(B):
        for h in range(0, H, heads):
            yield [t[b, :, h : h + heads].transpose(0, 1) for t in tensors_BSHC]


def _blocks(seq_len: int) -> list[tuple[int, int]]:
    """List the begin and end of each block of queries."""
    begins = range(0, seq_len, _QUERIES)
    return [(begin, min(begin + _QUERIES, seq_len)) for begin in begins]


def _probs(q_HQC: Tensor, k_HKC: Tensor, scale: float) -> Tensor:
    """Softmax of the last Q of K queries over the keys that each may see: (H, Q, K)."""
    H, Q, _ = q_HQC.shape
    K = k_HKC.size(1)
    scores_HQK = q_HQC.new_empty(H, Q, K).baddbmm_(q_HQC, k_HKC.mT, beta=0, alpha=scale)
    later_QQ = q_HQC.new_full((Q, Q), -torch.inf).triu_(1)
    scores_HQK[:, :, K - Q :] += later_QQ
    return scores_HQK.softmax(dim=-1)
