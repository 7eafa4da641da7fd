"""Multi-head latent attention between its projections, fused on a GPU: rotary positions, assembling
of queries and keys, attention.

One operator leads from the projections' outputs to the heads' outputs, around cuDNN's attention
kernel (causal, and long documents) or flash attention's (short ones). Each tensor in between is
written once, in the layout that the next kernel reads. Reference: the plain lines of
`Attention.forward`.
"""

import torch
from torch import Tensor

from torchtitan.ops import packed_documents
from torchtitan.ops.attention import Documents
from torchtitan.ops.causal_runs import cudnn_takes
from torchtitan.ops.packed_documents import Packed


@torch.compiler.assume_constant_result
def can_fuse(device_type: str, dtype: torch.dtype, nope: int, rope: int, v: int) -> bool:
    """Whether this device has the kernels for heads of these sizes (channels).

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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output, and the tensors that the backward pass needs: queries, keys, padded values
    and the kernel's output (short documents only, otherwise empty), logarithms of the softmax's
    sums.
    """
    from torchtitan.ops import mla_triton

    by_length = starts_on_host is not None
    padded = None if starts is None or by_length else q_BSHC.size(-1)
    q, k, v = mla_triton.assemble(
        q_BSHC, kv_BSHC, k_rope_BSC, table, positions_BS, v_channels, padded
    )
    if starts is None:
        out, log_sums, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *(t.transpose(1, 2) for t in (q, k, v)), None, True, 0.0, True, False, scale=scale
        )
        return out.transpose(1, 2).contiguous(), q, k, q.new_empty(0), q.new_empty(0), log_sums
    if starts_on_host is not None:
        flat_q, flat_k, flat_v = (t.flatten(0, 1) for t in (q, k, v))
        out, log_sums = packed_documents.attend(
            flat_q, flat_k, flat_v, starts, starts_on_host, scale
        )
        return out.view_as(v), q, k, q.new_empty(0), q.new_empty(0), log_sums
    whole, log_sums, *_ = torch.ops.aten._flash_attention_forward(
        *(t.flatten(0, 1) for t in (q, k, v)), starts, starts, longest, longest, 0.0, True, False,
        scale=scale,
    )  # fmt: skip
    out = whole.view_as(q)[..., :v_channels].contiguous()
    return out, q, k, v, whole, log_sums


@_mla_attention.register_fake
def _(
    q_BSHC, kv_BSHC, k_rope_BSC, table, positions_BS, starts, longest, v_channels, scale,
    starts_on_host=None,
):  # fmt: skip
    B, S, H, QK = q_BSHC.shape
    new = q_BSHC.new_empty
    out, q, k = new(B, S, H, v_channels), new(B, S, H, QK), new(B, S, H, QK)
    if starts is None:
        return out, q, k, new(0), new(0), new(B, H, S, 1, dtype=torch.float32)
    log_sums = new(H, B * S, dtype=torch.float32)
    if starts_on_host is not None:
        return out, q, k, new(0), new(0), log_sums
    return out, q, k, new(B, S, H, QK), new(B * S, H, QK), log_sums


@torch.library.custom_op("torchtitan::mla_attention_backward", mutates_args=(), device_types="cuda")
def _mla_attention_backward(
    grad_BSHC: Tensor,
    out_BSHC: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    whole: Tensor,
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
    if starts is None:
        dq, dk, dv = _cudnn_backward(grad_BSHC, q, k, kv_BSHC[..., -V:], out_BSHC, log_sums, scale)
    elif starts_on_host is not None:
        tensors = (grad_BSHC, q, k, kv_BSHC[..., -V:], out_BSHC)
        packed = Packed(*(t.flatten(0, 1) for t in tensors))
        grads = packed_documents.attend_backward(packed, log_sums, starts, starts_on_host, scale)
        dq, dk, dv = (grad.unflatten(0, q.shape[:2]) for grad in grads)
    else:
        grad = torch.nn.functional.pad(grad_BSHC, (0, q.size(-1) - V)).flatten(0, 1)
        no_dropout = torch.empty(2, dtype=torch.uint64, device=q.device)
        grads = torch.ops.aten._flash_attention_backward(
            grad, *(t.flatten(0, 1) for t in (q, k, v)), whole, log_sums, starts, starts, longest,
            longest, 0.0, True, no_dropout, no_dropout[0], scale=scale,
        )  # fmt: skip
        dq, dk, dv = (grad.view_as(q) for grad in grads)
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
    grad, out, q, k, v, whole, log_sums, kv_BSHC, table, positions, starts, starts_on_host, longest,
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
