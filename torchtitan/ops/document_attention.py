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
    if starts_on_host is not None and can_use_runs(q.device.type, q.dtype, q.size(-1), v.size(-1)):
        return _by_length(q, k, v, starts, starts_on_host, scale)[0].view_as(v_BSHC)
    # The kernel needs equal channels; zeros add nothing to the sums.
    v = F.pad(v, (0, q.size(-1) - v.size(-1)))
    out = _document_attention(q, k, v, starts, longest, scale)[0]
    return out.view_as(q_BSHC)[..., : v_BSHC.size(-1)]


@torch.library.custom_op("torchtitan::document_attention", mutates_args=())
def _document_attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output (T, H, C), and the logarithms of the softmax's sums (H, T) fp32.

    q, k, v: (T, H, C).
    """
    out, log_sums, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, starts, starts, longest, longest, 0.0, True, False, scale=scale
    )
    return out, log_sums


@_document_attention.register_fake
def _(q, k, v, starts, longest, scale):
    return torch.empty_like(q), q.new_empty((q.size(1), q.size(0)), dtype=torch.float32)


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
) -> tuple[Tensor, Tensor, Tensor]:
    no_dropout = torch.empty(2, dtype=torch.uint64, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, log_sums, starts, starts, longest, longest, 0.0, True,
        no_dropout, no_dropout[0], scale=scale,
    )  # fmt: skip


@_document_attention_backward.register_fake
def _(grad, q, k, v, out, log_sums, starts, longest, scale):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx, inputs, output) -> None:
    q, k, v, starts, ctx.longest, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, starts)


def _backward(ctx, grad, _):
    grads = _document_attention_backward(
        grad.contiguous(), *ctx.saved_tensors, ctx.longest, ctx.scale
    )
    return *grads, None, None, None


_document_attention.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("torchtitan::document_attention_by_length", mutates_args=())
def _by_length(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, starts_on_host: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return packed_documents.attend(q, k, v, starts, starts_on_host, scale)


@_by_length.register_fake
def _(q, k, v, starts, starts_on_host, scale):
    return q.new_empty(v.shape), q.new_empty((q.size(1), q.size(0)), dtype=torch.float32)


@torch.library.custom_op("torchtitan::document_attention_by_length_backward", mutates_args=())
def _by_length_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sums: Tensor,
    starts: Tensor,
    starts_on_host: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    packed = packed_documents.Packed(grad, q, k, v, out)
    return packed_documents.attend_backward(packed, log_sums, starts, starts_on_host, scale)


@_by_length_backward.register_fake
def _(grad, q, k, v, out, log_sums, starts, starts_on_host, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_by_length(ctx, inputs, output) -> None:
    *tensors, ctx.scale = inputs
    q, k, v, *starts = tensors
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, *starts)


def _differentiate_by_length(ctx, grad, _):
    grads = _by_length_backward(grad.contiguous(), *ctx.saved_tensors, ctx.scale)
    return *grads, None, None, None


_by_length.register_autograd(_differentiate_by_length, setup_context=_save_by_length)
