"""Causal attention inside of each packed document, on a GPU. No block of scores between two
documents is computed.

cuDNN's kernel takes all documents in one call where the package that leads to it is installed
(cudnn_documents.py). Elsewhere flash attention's does, with a call of cuDNN's for each long one
(packed_documents.py). torch alone has no such path to cuDNN's kernel at MLA's head sizes (2.11:
rebuilt at every call, and its backward pass reads a wrong length); flex attention runs at half the
speed of causal attention.
"""

import torch
from torch import Tensor

from torchtitan.ops import cudnn_documents, packed_documents
from torchtitan.ops.causal_runs import can_use_runs
from torchtitan.ops.packed_documents import Packed


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
    out = _document_attention(q, k, v, starts, longest, scale, starts_on_host)[0]
    return out.unflatten(0, q_BSHC.shape[:2])


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

    q, k, v: (T, H, C); v may have fewer channels.
    """
    return attend(q, k, v, starts, longest, starts_on_host, scale)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    longest: int,
    starts_on_host: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute what `_document_attention` returns, by the best kernel for it."""
    found = cudnn_documents.attend(q, k, v, starts, longest, scale)
    if found is not None:
        return found
    return packed_documents.attend(q, k, v, starts, longest, starts_on_host, scale)


def attend_backward(
    packed: Packed,
    log_sums: Tensor,
    starts: Tensor,
    longest: int,
    starts_on_host: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    found = cudnn_documents.attend_backward(packed, log_sums, starts, longest, scale)
    if found is not None:
        return found
    return packed_documents.attend_backward(
        packed, log_sums, starts, longest, starts_on_host, scale
    )


@_document_attention.register_fake
def _(q, k, v, starts, longest, scale, starts_on_host=None):
    return q.new_empty(v.shape), q.new_empty((q.size(1), q.size(0)), dtype=torch.float32)


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
    packed = Packed(grad, q, k, v, out)
    return attend_backward(packed, log_sums, starts, longest, starts_on_host, scale)


@_document_attention_backward.register_fake
def _(grad, q, k, v, out, log_sums, starts, longest, scale, starts_on_host=None):
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
