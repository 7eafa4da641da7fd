"""MLA's queries, keys and values assembled for the attention kernel, and gradients taken apart, in
one Triton kernel each; reference: the plain lines of `Attention.forward`.

Forward rotates the rotary channels of queries and of the shared key, and writes that key next to
each head's own channels: every input is read once, every output written once. Backward rotates the
gradients back and sums the shared key's over the heads. Arithmetic in fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _turned(x, cos, sin, ROWS: tl.constexpr, ROPE: tl.constexpr):
    even, odd = tl.split(tl.reshape(x.to(tl.float32), (ROWS, ROPE // 2, 2)))
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return tl.reshape(turned, (ROWS, ROPE))


@triton.jit
def _assemble(
    q, kv, k_rope, table, positions, q_out, k_out, S, H, q_stride, k_rope_stride,
    NOPE: tl.constexpr, ROPE: tl.constexpr, V: tl.constexpr,
    HEADS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    here = heads[:, None] < H
    position = tl.load(positions + token) if POSITIONS else token % S
    pairs, nope, rope = tl.arange(0, ROPE // 2), tl.arange(0, NOPE), tl.arange(0, ROPE)
    cos = tl.load(table + position * ROPE + 2 * pairs)[None, :]
    sin = tl.load(table + position * ROPE + 2 * pairs + 1)[None, :]
    kind = q_out.dtype.element_ty
    QK: tl.constexpr = NOPE + ROPE

    source = q + token * q_stride + heads[:, None] * QK
    target = (token * H + heads[:, None]) * QK
    tl.store(q_out + target + nope[None, :], tl.load(source + nope[None, :], mask=here), mask=here)
    x = tl.load(source + NOPE + rope[None, :], mask=here, other=0.0)
    x = _turned(x, cos, sin, HEADS, ROPE).to(kind)
    tl.store(q_out + target + NOPE + rope[None, :], x, mask=here)

    source = kv + (token * H + heads[:, None]) * (NOPE + V)
    tl.store(k_out + target + nope[None, :], tl.load(source + nope[None, :], mask=here), mask=here)
    x = tl.load(k_rope + token * k_rope_stride + rope)[None, :]
    x = _turned(x, cos, sin, 1, ROPE).to(kind)
    x = tl.broadcast_to(x, (HEADS, ROPE))
    tl.store(k_out + target + NOPE + rope[None, :], x, mask=here)


@triton.jit
def _take_apart(
    dq, dk, dv, table, positions, dq_out, dkv_out, dk_rope_out, S, H,
    dq_b, dq_s, dq_h, dk_b, dk_s, dk_h, dv_b, dv_s, dv_h,
    NOPE: tl.constexpr, ROPE: tl.constexpr, V: tl.constexpr,
    HEADS: tl.constexpr, BLOCKS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    b, s = token // S, token % S
    position = tl.load(positions + token) if POSITIONS else s
    pairs, nope, rope = tl.arange(0, ROPE // 2), tl.arange(0, NOPE), tl.arange(0, ROPE)
    channels = tl.arange(0, V)[None, :]
    cos = tl.load(table + position * ROPE + 2 * pairs)[None, :]
    sin = -tl.load(table + position * ROPE + 2 * pairs + 1)[None, :]
    kind = dq_out.dtype.element_ty
    QK: tl.constexpr = NOPE + ROPE
    shared = tl.zeros((ROPE,), tl.float32)
    for block in tl.static_range(BLOCKS):
        heads = block * HEADS + tl.arange(0, HEADS)
        here = heads[:, None] < H
        source = dq + b * dq_b + s * dq_s + heads[:, None] * dq_h
        target = dq_out + (token * H + heads[:, None]) * QK
        tl.store(target + nope[None, :], tl.load(source + nope[None, :], mask=here), mask=here)
        x = tl.load(source + NOPE + rope[None, :], mask=here, other=0.0)
        x = _turned(x, cos, sin, HEADS, ROPE).to(kind)
        tl.store(target + NOPE + rope[None, :], x, mask=here)

        source = dk + b * dk_b + s * dk_s + heads[:, None] * dk_h
        target = dkv_out + (token * H + heads[:, None]) * (NOPE + V)
        tl.store(target + nope[None, :], tl.load(source + nope[None, :], mask=here), mask=here)
        x = tl.load(source + NOPE + rope[None, :], mask=here, other=0.0)
        shared += tl.sum(x.to(tl.float32), axis=0)
        source = dv + b * dv_b + s * dv_s + heads[:, None] * dv_h
        tl.store(target + NOPE + channels, tl.load(source + channels, mask=here), mask=here)
    x = _turned(shared[None, :], cos, sin, 1, ROPE)
    tl.store(dk_rope_out + token * ROPE + rope[None, :], x.to(kind))


def assemble(
    q_BSHC: Tensor,
    kv_BSHC: Tensor,
    k_rope_BSC: Tensor,
    table: Tensor,
    positions_BS: Tensor | None,
    v_channels: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Assemble queries and keys (B, S, H, C); values are a view of kv.

    Arguments as in `mla_attention`.
    """
    B, S, H, QK = q_BSHC.shape
    V, ROPE = v_channels, k_rope_BSC.size(-1)
    q, k = (torch.empty(B, S, H, QK, dtype=q_BSHC.dtype, device=q_BSHC.device) for _ in "qk")
    heads = min(16, triton.next_power_of_2(H))
    _assemble[(B * S, triton.cdiv(H, heads))](
        q_BSHC, kv_BSHC, k_rope_BSC, table, positions_BS, q, k,
        S, H, q_BSHC.stride(1), k_rope_BSC.stride(1),
        NOPE=QK - ROPE, ROPE=ROPE, V=V, HEADS=heads, POSITIONS=positions_BS is not None,
    )  # fmt: skip
    return q, k, kv_BSHC[..., -V:]


def take_apart(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    table: Tensor,
    positions_BS: Tensor | None,
    rope: int,
    v_channels: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of q, kv and k_rope, the inputs of `assemble`.

    dq, dk, dv: gradients of its outputs, (B, S, H, C).
    """
    B, S, H, QK = dq.shape
    dq_out = torch.empty(B, S, H, QK, dtype=dq.dtype, device=dq.device)
    dkv_out = dq_out.new_empty(B, S, H, QK - rope + v_channels)
    dk_rope_out = dq_out.new_empty(B, S, rope)
    heads = min(16, triton.next_power_of_2(H))
    strides = [stride for t in (dq, dk, dv) for stride in t.stride()[:3]]
    _take_apart[(B * S,)](
        dq, dk, dv, table, positions_BS, dq_out, dkv_out, dk_rope_out, S, H, *strides,
        NOPE=QK - rope, ROPE=rope, V=v_channels, HEADS=heads, BLOCKS=triton.cdiv(H, heads),
        POSITIONS=positions_BS is not None,
    )  # fmt: skip
    return dq_out, dkv_out, dk_rope_out
