"""Causal attention of some runs of a sequence's queries, by cuDNN's kernel (context parallelism).

A run of neighbouring queries sees all keys before it, and causally those of its own positions: two
calls of the kernel, of which each returns the logarithms of its softmax's sums. With these the two
outputs are merged; and with the merged ones the backward pass of each call computes its part of the
whole softmax's gradient (as in ring attention, arXiv 2310.01889). Flex attention, which takes any
mask, reaches half of the kernel's speed forward and a third backward (docs/performance.md).

Letters: Q queries of all runs, K keys.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention


class _Part(NamedTuple):
    """Queries and keys of one call.

    causal: their positions are the same; otherwise all keys are earlier.
    """

    queries: slice
    keys: slice
    causal: bool


def _parts(borders: list[int]) -> Iterator[list[_Part]]:
    """List the calls of each run, the last run first.

    borders: position at which each run begins, and at which it ends.
    """
    runs, done = list(zip(borders[::2], borders[1::2], strict=True)), 0
    found = []
    for begin, end in runs:
        queries = slice(done, done + end - begin)
        done = queries.stop
        parts = [_Part(queries, slice(begin, end), True)]
        found.append(parts + [_Part(queries, slice(0, begin), False)] * (begin > 0))
    return reversed(found)


@torch.compiler.assume_constant_result
def can_use_runs(device_type: str, dtype: torch.dtype, qk: int, v: int) -> bool:
    """Tell whether this device has the kernel for heads of these sizes (channels).

    Not in a deterministic run, whose kernels torch chooses.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    if device_type != "cuda" or not half or torch.are_deterministic_algorithms_enabled():
        return False
    return cudnn_takes(dtype, qk, v)


@lru_cache
def cudnn_takes(dtype: torch.dtype, qk: int, v: int) -> bool:
    """Tell whether cuDNN's kernel takes heads with so many channels of queries and of values."""
    qk_1HSC, v_1HSC = (
        torch.empty(1, 128, 1, c, dtype=dtype, device="cuda").transpose(1, 2).requires_grad_()
        for c in (qk, v)
    )
    return can_use_cudnn_attention(SDPAParams(qk_1HSC, qk_1HSC, v_1HSC, None, 0.0, True, False))


def causal_runs(
    q_BQHC: Tensor, k_BKHC: Tensor, v_BKHC: Tensor, borders: tuple[int, ...], scale: float
) -> Tensor:
    """Compute causal attention of the queries of some runs: (B, Q, H, channels of v).

    k, v: of all positions up to the end of the last run.
    borders: position at which each run begins, and at which it ends, in order.
    """
    tensors = (t.contiguous() for t in (q_BQHC, k_BKHC, v_BKHC))
    return _causal_runs(*tensors, list(borders), scale)[0]


@torch.library.custom_op("torchtitan::causal_runs", mutates_args=())
def _causal_runs(
    q: Tensor, k: Tensor, v: Tensor, borders: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output, and the logarithms of the softmax's sums (B, H, Q) fp32."""
    out = q.new_empty(*q.shape[:3], v.size(3))
    log_sums = q.new_empty(q.size(0), q.size(2), q.size(1), dtype=torch.float32)
    for parts in _parts(borders):
        results = [
            kernel_forward(q[:, p.queries], k[:, p.keys], v[:, p.keys], p.causal, scale)
            for p in parts
        ]
        queries = parts[0].queries
        if len(results) == 1:
            out[:, queries], log_sums[..., queries] = results[0]
            continue
        (own, own_sums), (before, sums) = results
        both = torch.logaddexp(own_sums, sums)
        log_sums[..., queries] = both
        shares = [(s - both).exp().transpose(1, 2).unsqueeze(3) for s in (own_sums, sums)]
        out[:, queries] = own * shares[0] + before * shares[1]
    return out, log_sums


@_causal_runs.register_fake
def _(q, k, v, borders, scale):
    B, Q, H, _ = q.shape
    return q.new_empty(B, Q, H, v.size(3)), q.new_empty(B, H, Q, dtype=torch.float32)


@torch.library.custom_op("torchtitan::causal_runs_backward", mutates_args=())
def _causal_runs_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sums: Tensor,
    borders: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = (torch.empty_like(t) for t in (q, k, v))
    # The last run sees every key, so that its gradients are the first in their places.
    for i, parts in enumerate(_parts(borders)):
        for queries, keys, causal in parts:
            grads = kernel_backward(
                grad[:, queries],
                q[:, queries],
                out[:, queries],
                log_sums[..., queries],
                k[:, keys],
                v[:, keys],
                causal,
                scale,
            )
            new = causal, i == 0, i == 0
            places = grad_q[:, queries], grad_k[:, keys], grad_v[:, keys]
            for place, part, first in zip(places, grads, new, strict=True):
                place.copy_(part) if first else place.add_(part)
    return grad_q, grad_k, grad_v


@_causal_runs_backward.register_fake
def _(grad, q, k, v, out, log_sums, borders, scale):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def kernel_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output of one call, and the logarithms of the softmax's sums (B, H, Q)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if q.is_cuda:
        out, log_sums, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )
        return out.transpose(1, 2), log_sums.squeeze(3)
    scores = _scores(q, k, causal, scale)
    log_sums = scores.logsumexp(3)
    out = (scores - log_sums.unsqueeze(3)).exp().to(v.dtype) @ v
    return out.transpose(1, 2), log_sums.float()


def kernel_backward(
    grad: Tensor,
    q: Tensor,
    out: Tensor,
    log_sums: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of one call's queries, keys and values.

    out, log_sums: of the whole softmax, of which this call's is a part.
    """
    grad, q, out, k, v = (t.transpose(1, 2) for t in (grad, q, out, k, v))
    log_sums = log_sums.unsqueeze(3).contiguous()
    if q.is_cuda:
        no_dropout = torch.empty((), dtype=torch.int64, device=q.device)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, log_sums, no_dropout, no_dropout, None, None, None, q.size(2),
            k.size(2), 0.0, causal, scale=scale,
        )  # fmt: skip
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
    shares = (_scores(q, k, causal, scale) - log_sums).exp()
    grad_shares = grad @ v.mT
    grad_scores = shares * (grad_shares - (grad * out).sum(3, keepdim=True)) * scale
    dq, dk = grad_scores.to(k.dtype) @ k, grad_scores.mT.to(q.dtype) @ q
    dv = shares.mT.to(v.dtype) @ grad
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * scale
    hidden = torch.ones_like(scores, dtype=torch.bool).triu(1) if causal else None
    return scores if hidden is None else scores.masked_fill(hidden, -torch.inf)


def _save(ctx, inputs, output) -> None:
    q, k, v, ctx.borders, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(ctx, grad, _):
    grads = _causal_runs_backward(grad.contiguous(), *ctx.saved_tensors, ctx.borders, ctx.scale)
    return *grads, None, None


_causal_runs.register_autograd(_differentiate, setup_context=_save)
