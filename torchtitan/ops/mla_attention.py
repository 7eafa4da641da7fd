"""Multi-head latent attention between its projections, fused on a GPU: rotary positions, assembling
of queries and keys, attention.

One operator leads from the projections' outputs to the heads' outputs, around cuDNN's attention
kernel or, inside of packed documents, what document_attention.py chooses. Each tensor in between is
written once, in the layout that the next kernel reads. Reference: the plain lines of
`Attention.forward`.
"""

import torch
from torch import Tensor

from torchtitan.ops import document_attention
from torchtitan.ops.attention import Documents
from torchtitan.ops.causal_runs import cudnn_takes
from torchtitan.ops.packed_documents import Packed


@torch.compiler.assume_constant_result
def can_fuse(device_type: str, dtype: torch.dtype, nope: int, rope: int, v: int) -> bool:
    """Tell whether this device has the kernels for heads of these sizes (channels).

    Not in a deterministic run, which takes the plain path, whose kernels torch chooses.
    """
    powers_of_two = all(n & (n - 1) == 0 for n in (nope, rope, v))
    fits = v <= nope + rope <= 2 * v
    half = dtype in (torch.bfloat16, torch.float16)
    if device_type != "cuda" or not (powers_of_two and fits and half):
        return False
    return not torch.are_deterministic_algorithms_enabled() and cudnn_takes(dtype, nope + rope, v)


def mla_attention(
    q_BSHC: Tensor,
    kv_BSHC: Tensor,
    k_rope_BSC: Tensor,
    table: Tensor,
    *,
    v_channels: int,
    scale: float,
    mask: Documents | None = None,
    positions_BS: Tensor | None = None,
) -> Tensor:
    """Attention with MLA's queries, keys and values: (B, S, H, v_channels).

    q_BSHC: channels without position, then rotary ones.
    kv_BSHC: keys' channels without position, then values.
    k_rope_BSC: rotary channels that all heads' keys share.
    table: from `rope_table`.
    scale: factor of the scores before the softmax.
    mask: None = causal.
    positions_BS: int64; None = 0, 1, ….
    """
    starts, longest, on_host = (None, 0, None) if mask is None else mask
    return _mla_attention(
        q_BSHC, kv_BSHC.contiguous(), k_rope_BSC, table, positions_BS, starts, longest,
        v_channels, scale, on_host,
    )[0]  # fmt: skip


@torch.library.custom_op("torchtitan::mla_attention", mutates_args=(), device_types="cuda")
def _mla_attention(
    q_BSHC: Tensor,
    kv_BSHC: Tensor,
    k_rope_BSC: Tensor,
    table: Tensor,
    positions_BS: Tensor | None,
    starts: Tensor | None,
    longest: int,
    v_channels: int,
    scale: float,
    starts_on_host: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output, and the tensors that the backward pass needs: queries, keys, logarithms of
    the softmax's sums.
    """
    from torchtitan.ops import mla_triton

    q, k, v = mla_triton.assemble(q_BSHC, kv_BSHC, k_rope_BSC, table, positions_BS, v_channels)
    if starts is None:
        out, log_sums, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *(t.transpose(1, 2) for t in (q, k, v)), None, True, 0.0, True, False, scale=scale
        )
        return out.transpose(1, 2).contiguous(), q, k, log_sums
    flat_q, flat_k, flat_v = (t.flatten(0, 1) for t in (q, k, v))
    out, log_sums = document_attention.attend(
        flat_q, flat_k, flat_v, starts, longest, starts_on_host, scale
    )
    return out.view(v.shape), q, k, log_sums


@_mla_attention.register_fake
def _(
    q_BSHC, kv_BSHC, k_rope_BSC, table, positions_BS, starts, longest, v_channels, scale,
    starts_on_host=None,
):  # fmt: skip
    B, S, H, QK = q_BSHC.shape
    new = q_BSHC.new_empty
    sums = (B, H, S, 1) if starts is None else (H, B * S)
    log_sums = new(sums, dtype=torch.float32)
    return new(B, S, H, v_channels), new(B, S, H, QK), new(B, S, H, QK), log_sums


@torch.library.custom_op("torchtitan::mla_attention_backward", mutates_args=(), device_types="cuda")
def _mla_attention_backward(
    grad_BSHC: Tensor,
    out_BSHC: Tensor,
    q: Tensor,
    k: Tensor,
    log_sums: Tensor,
    kv_BSHC: Tensor,
    table: Tensor,
    positions_BS: Tensor | None,
    starts: Tensor | None,
    starts_on_host: Tensor | None,
    longest: int,
    rope: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from torchtitan.ops import mla_triton

    V = grad_BSHC.size(-1)
    v = kv_BSHC[..., -V:]
    if starts is None:
        dq, dk, dv = _cudnn_backward(grad_BSHC, q, k, v, out_BSHC, log_sums, scale)
    else:
        packed = Packed(*(t.flatten(0, 1) for t in (grad_BSHC, q, k, v, out_BSHC)))
        grads = document_attention.attend_backward(
            packed, log_sums, starts, longest, starts_on_host, scale
        )
        dq, dk, dv = (grad.unflatten(0, q.shape[:2]) for grad in grads)
    return mla_triton.take_apart(dq, dk, dv, table, positions_BS, rope, V)


def _cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, scale: float
) -> list[Tensor]:
    B, S = q.shape[:2]
    no_dropout = torch.empty((), dtype=torch.int64, device=q.device)
    grad, q, k, v, out = (t.transpose(1, 2) for t in (grad, q, k, v, out))
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, log_sums, no_dropout, no_dropout, None, None, None, S, S, 0.0, True,
        scale=scale,
    )  # fmt: skip
    return [grad.transpose(1, 2) for grad in grads]


@_mla_attention_backward.register_fake
def _(
    grad, out, q, k, log_sums, kv_BSHC, table, positions, starts, starts_on_host, longest,
    rope, scale,
):  # fmt: skip
    return torch.empty_like(q), torch.empty_like(kv_BSHC), q.new_empty(*q.shape[:2], rope)


def _save(ctx, inputs, output) -> None:
    _, kv_BSHC, k_rope_BSC, table, positions_BS, starts, ctx.longest, _, ctx.scale, on_host = inputs
    ctx.rope = k_rope_BSC.size(-1)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, kv_BSHC, table, positions_BS, starts, on_host)


def _backward(ctx, grad_BSHC, *_):
    grads = _mla_attention_backward(
        grad_BSHC.contiguous(), *ctx.saved_tensors, ctx.longest, ctx.rope, ctx.scale
    )
    return *grads, *[None] * 7


_mla_attention.register_autograd(_backward, setup_context=_save)
