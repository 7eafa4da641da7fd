"""Causal attention inside of each packed document, on a GPU, with flash attention's kernel for
sequences of any length. It computes no block of scores between two documents.

torch has no such path to cuDNN's kernel at MLA's head sizes (2.11: rebuilt at every call, and its
backward pass reads a wrong length); flex attention runs at half the speed of causal attention. Long
documents are worth calls of their own (packed_documents.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan.ops import packed_documents
from torchtitan.ops.causal_runs import can_use_runs


def document_attention(
    q_BSHC: Tensor,
    k_BSHC: Tensor,
    v_BSHC: Tensor,
    starts: Tensor,
    longest: int,
    starts_on_host: Tensor | None,
    scale: float,
) -> Tensor:
    """Attention of bf16 or fp16 heads: (B, S, H, channels of v).

    starts, longest, starts_on_host: see `Documents`.
    """
    q, k, v = (t.flatten(0, 1) for t in (q_BSHC, k_BSHC, v_BSHC))
    if not can_use_runs(q.device.type, q.dtype, q.size(-1), v.size(-1)):
        starts_on_host = None
    if starts_on_host is None:
        # The kernel needs equal channels; zeros add nothing to the sums.
        v = F.pad(v, (0, q.size(-1) - v.size(-1)))
    out = _document_attention(q, k, v, starts, longest, scale, starts_on_host)[0]
    return out.unflatten(0, q_BSHC.shape[:2])[..., : v_BSHC.size(-1)]


@torch.library.custom_op("torchtitan::document_attention", mutates_args=())
def _document_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    longest: int,
    scale: float,
    starts_on_host: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the output (T, H, channels of v), and logarithms of the softmax's sums, fp32 (H, T).

    q, k, v: (T, H, C); v may have fewer channels with `starts_on_host`.
    """
    if starts_on_host is not None:
        return packed_documents.attend(q, k, v, starts, starts_on_host, scale)
    out, log_sums, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, starts, starts, longest, longest, 0.0, True, False, scale=scale
    )
    return out, log_sums


@_document_attention.register_fake
def _(q, k, v, starts, longest, scale, starts_on_host=None):
    out = torch.empty_like(q) if starts_on_host is None else q.new_empty(v.shape)
    return out, q.new_empty((q.size(1), q.size(0)), dtype=torch.float32)


@torch.library.custom_op("torchtitan::document_attention_backward", mutates_args=())
def _document_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sums: Tensor,
    starts: Tensor,
    longest: int,
    scale: float,
    starts_on_host: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    if starts_on_host is not None:
        packed = packed_documents.Packed(grad, q, k, v, out)
        return packed_documents.attend_backward(packed, log_sums, starts, starts_on_host, scale)
    no_dropout = torch.empty(2, dtype=torch.uint64, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, log_sums, starts, starts, longest, longest, 0.0, True,
        no_dropout, no_dropout[0], scale=scale,
    )  # fmt: skip


@_document_attention_backward.register_fake
def _(grad, q, k, v, out, log_sums, starts, longest, scale, starts_on_host=None):
    if starts_on_host is None:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:
    q, k, v, starts, ctx.longest, ctx.scale, starts_on_host = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, starts, starts_on_host)


def _backward(ctx, grad, _):
    *tensors, starts_on_host = ctx.saved_tensors
    grads = _document_attention_backward(
        grad.contiguous(), *tensors, ctx.longest, ctx.scale, starts_on_host
    )
    return *grads, None, None, None, None


_document_attention.register_autograd(_backward, setup_context=_save)
