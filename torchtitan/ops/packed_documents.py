"""Attention inside of packed documents by two kernels: cuDNN's once for each long document, and
flash attention's once for neighbouring short ones, or for all. For machines without the package
that cudnn_documents.py needs.

cuDNN's kernel is nearly twice as fast, but takes documents of one length at a time, and a call
takes the host 0.1 ms. It builds a plan for each length that it meets, in 20 ms: so lengths are
rounded up to one of few, with the tokens that follow. A document's own queries don't see these
(attention is causal), and in the backward pass their queries have no share of the softmax.

Letters: T tokens of all documents, H heads, C channels.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan.ops.causal_runs import kernel_backward, kernel_forward

# Tokens from which on a document has a call of its own; of fewer, a call doesn't fill a GPU.
LONG = 3072


class Stretch(NamedTuple):
    """Tokens of one call.

    tokens: of one long document, or of neighbouring short ones.
    documents: the short ones among all documents; None = the tokens are a long one's.
    """

    tokens: slice
    documents: slice | None

    @property
    def length(self) -> int:
        return self.tokens.stop - self.tokens.start


def stretches(starts: list[int]) -> Iterator[Stretch]:
    """Divide the tokens between the calls.

    starts: token at which each document begins, and the end of the last one.
    """
    first = 0  # of the short documents before the current one
    last = len(starts) - 1
    for i in range(last + 1):
        is_long = i < last and starts[i + 1] - starts[i] >= LONG
        if first < i and (is_long or i == last):
            yield Stretch(slice(starts[first], starts[i]), slice(first, i))
        if is_long:
            yield Stretch(slice(starts[i], starts[i + 1]), None)
            first = i + 1


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    longest: int,
    starts_on_host: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output (T, H, channels of v), and logarithms of the softmax's sums, fp32 (H, T).

    q, k, v: (T, H, C), bf16 or fp16; v may have fewer channels.
    starts, longest, starts_on_host: see `Documents`; without the last one flash attention computes
        all.
    """
    if starts_on_host is None:
        out, log_sums = _flash(q, k, v, starts, longest, scale)
        return out[..., : v.size(2)].contiguous(), log_sums
    out = q.new_empty(*v.shape)
    log_sums = q.new_empty(q.size(1), q.size(0), dtype=torch.float32)
    for stretch in stretches(starts_on_host.tolist()):
        here, length = stretch.tokens, stretch.length
        if stretch.documents is None:
            own_q, own_k, own_v = (_rounded_up(t, here) for t in (q, k, v))
            its_out, its_sums = (t[0] for t in kernel_forward(own_q, own_k, own_v, True, scale))
        else:
            its_starts = _starts_of(stretch, starts)
            its_out, its_sums = _flash(q[here], k[here], v[here], its_starts, LONG, scale)
        out[here] = its_out[:length, :, : v.size(2)]
        log_sums[:, here] = its_sums[:, :length]
    return out, log_sums


class Packed(NamedTuple):
    """Inputs of a backward pass: the output's gradient and `attend`'s tensors, (T, H, C)."""

    grad: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor


def attend_backward(
    packed: Packed,
    log_sums: Tensor,
    starts: Tensor,
    longest: int,
    starts_on_host: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v.

    log_sums: from `attend`.
    """
    _, q, k, v, _ = packed
    if starts_on_host is None:
        dq, dk, dv = _flash_backward(packed, log_sums, starts, longest, scale)
        return dq, dk, dv[..., : v.size(2)].contiguous()
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    for stretch in stretches(starts_on_host.tolist()):
        here, length = stretch.tokens, stretch.length
        if stretch.documents is None:
            own = Packed(*(_rounded_up(t, here) for t in packed))
            sums = log_sums.new_full((1, q.size(1), own.q.size(1)), torch.inf)  # shares of 0
            sums[0, :, :length] = log_sums[:, here]
            its = kernel_backward(own.grad, own.q, own.out, sums, own.k, own.v, True, scale)
            its = [t[0] for t in its]
        else:
            own = Packed(*(t[here] for t in packed))
            its_starts = _starts_of(stretch, starts)
            its = _flash_backward(own, log_sums[:, here], its_starts, LONG, scale)
        for whole, part in zip(grads, its, strict=True):
            whole[here] = part[:length, :, : whole.size(2)]
    return grads


def rounded(length: int) -> int:
    """Round up to one of 32 lengths in each octave: 64 more up to 4096, 128 more up to 8192, ….

    So at most 3 % are added.
    """
    step = 1 << max(0, (length - 1).bit_length() - 6)
    return -(-length // step) * step


def _rounded_up(t: Tensor, tokens: slice) -> Tensor:
    """Return these tokens and some that follow, (1, `rounded`, …); zeros behind the very last."""
    size = rounded(tokens.stop - tokens.start)
    found = t[tokens.start : tokens.start + size]
    return F.pad(found, (0, 0, 0, 0, 0, size - found.size(0))).unsqueeze(0)


def _starts_of(stretch: Stretch, starts: Tensor) -> Tensor:
    """Return where its documents begin, from its own first token on, and where the last ends."""
    assert stretch.documents is not None
    first, behind = stretch.documents.start, stretch.documents.stop
    return starts[first : behind + 1] - stretch.tokens.start


def _flash(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    out, log_sums, *_ = torch.ops.aten._flash_attention_forward(
        q, k, _as_wide(v, q), starts, starts, longest, longest, 0.0, True, False, scale=scale
    )
    return out, log_sums


def _flash_backward(
    own: Packed, log_sums: Tensor, starts: Tensor, longest: int, scale: float
) -> list[Tensor]:
    no_dropout = torch.empty(2, dtype=torch.uint64, device=starts.device)
    grad, v, out = (_as_wide(t, own.q) for t in (own.grad, own.v, own.out))
    return torch.ops.aten._flash_attention_backward(
        grad, own.q, own.k, v, out, log_sums.contiguous(), starts, starts, longest, longest, 0.0,
        True, no_dropout, no_dropout[0], scale=scale,
    )  # fmt: skip


def _as_wide(t: Tensor, q: Tensor) -> Tensor:
    """Give values as many channels as queries have, which the kernel needs; zeros add nothing."""
    missing = q.size(-1) - t.size(-1)
    return F.pad(t, (0, missing)) if missing else t
