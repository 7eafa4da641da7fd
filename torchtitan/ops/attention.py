"""Attention for all layers: the choice of a kernel, and the masks that the kernels take.

A mask is made once a step, outside of the layers, in the form that the device's kernel takes:
`None` is causal attention, anything else comes from `document_mask`.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from torchtitan.ops.causal_blocks import can_use_blocks, causal_blocks
from torchtitan.ops.causal_runs import can_use_runs, causal_runs
from torchtitan.ops.cudnn_documents import places_for
from torchtitan.ops.document_attention import document_attention
from torchtitan.ops.packed_documents import LONG
from torchtitan.tools.utils import to_device


class Documents(NamedTuple):
    """Packed documents.

    starts: (places + 1,) int32, position in the flattened batch at which each document begins, and
        the end of the last one, once more for each place that is left (`places_for`).
    longest: length of the longest document, or more.
    starts_on_host: the same without places that are left, where some document is long
        (ops/packed_documents.py).
    """

    starts: Tensor
    longest: int
    starts_on_host: Tensor | None = None


class CausalRuns(NamedTuple):
    """Causal attention of some runs of neighbouring queries.

    borders: position at which each run begins, and at which it ends.
    blocks: the same mask for kernels that take any.
    """

    borders: tuple[int, ...]
    blocks: BlockMask


_BLOCK = 128  # of a flex `BlockMask`
AttentionMask = Tensor | Documents | CausalRuns | BlockMask | None

# Fastest first. cuDNN leads: on an H200 at qk 192 / v 128 it runs 540 / 400 TFLOP/s forward /
# backward, flash (V padded) 290 / 235, memory-efficient 139 / 50 (docs/performance.md).
_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@cache
def _compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function of flex attention, which is fast and free of S × S buffers only then.

    Called at first use: torch.compile imports inductor, 2 seconds that few runs need.
    """
    return torch.compile(fn)


def number_documents(tokens_BS: Tensor, eos_id: int | None) -> Tensor:
    """Number the documents of each sequence from 0; return the number of each token's, int64.

    A document ends with (and includes) `eos_id`; None = a sequence is one document.
    """
    if eos_id is None:
        return torch.zeros_like(tokens_BS)
    ends_BS = tokens_BS == eos_id
    return ends_BS.cumsum(dim=1) - ends_BS.int()


def document_mask(
    documents_BS: Tensor,
    queries_Q: Tensor | None = None,
    device: torch.device | None = None,
) -> AttentionMask:
    """Block-causal mask of packed documents: a token sees the earlier tokens of its own document.

    documents_BS: int64, equal for neighbouring tokens of one document. On the CPU is best: nothing
        waits for the GPU there.
    queries_Q: see `causal_mask`; None = all positions.
    device: of the mask; None = that of `documents_BS`.

    Returns on the CPU bool (B, 1, S, S), True = may be seen. On a GPU `Documents`, or None where
    every sequence is one document; for given queries a flex `BlockMask`.
    """
    device = device or documents_BS.device
    if queries_Q is not None:
        num_keys = int(queries_Q[-1]) + 1  # host sync: once a batch
        return _mask(queries_Q, documents_BS.to(device)[:, :num_keys])
    if device.type == "cpu":
        return _mask(torch.arange(documents_BS.size(1)), documents_BS)
    return _documents(documents_BS, device)


def _documents(documents_BS: Tensor, device: torch.device) -> Documents | None:
    """Return what GPUs' kernels take; None where every sequence is one document."""
    ends_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    ends_BS[:, :-1] = documents_BS[:, 1:] != documents_BS[:, :-1]
    ends_BS = ends_BS.cpu()  # host sync for documents on the GPU: how many there are
    ends = ends_BS.flatten().nonzero().flatten().int() + 1
    if ends.numel() == documents_BS.size(0):
        return None
    starts = F.pad(ends, (1, 0))
    S, longest = documents_BS.size(1), int(starts.diff().max())
    left = places_for(ends.numel()) - ends.numel()
    on_device = to_device(F.pad(starts, (0, left), value=int(ends[-1])), device)
    if longest >= LONG:
        return Documents(on_device, S, starts)
    # Rounded up, so that compiled graphs see few lengths; the kernel skips the blocks beyond.
    return Documents(on_device, min(S, 1 << (longest - 1).bit_length()))


def starts_of(mask: Documents | None, shape: torch.Size, device: torch.device) -> Tensor:
    """Return where documents begin, as `Documents.starts`, of any batch.

    mask: None = each of the sequences of this shape is one document.
    """
    if mask is not None:
        return mask.starts
    B, S = shape
    return torch.arange(0, B * S + 1, S, dtype=torch.int32, device=device)


def with_places(starts: Tensor, places: int, tokens: int) -> Tensor:
    """Give `Documents.starts` more places, which have no tokens.

    tokens: of all documents, where the last one ends.
    """
    return F.pad(starts, (0, places + 1 - starts.numel()), value=tokens)


def causal_mask(queries_Q: Tensor) -> Tensor | CausalRuns:
    """Causal mask for some positions of a sequence, whose keys begin at position 0.

    queries_Q: int64 positions of the queries, in order; keys are all positions to the last of them.

    Returns on the CPU bool (B, 1, Q, K), True = may be seen.
    """
    positions_Q = queries_Q.cpu()  # host sync: once a batch
    mask = _mask(queries_Q, queries_Q.new_zeros(1, int(positions_Q[-1]) + 1))
    return CausalRuns(_borders(positions_Q), mask) if isinstance(mask, BlockMask) else mask


def _borders(positions_Q: Tensor) -> tuple[int, ...]:
    """Return where each run of neighbouring positions begins, and where it ends."""
    jumps = (positions_Q.diff() != 1).nonzero().flatten() + 1
    runs = positions_Q.tensor_split(jumps)
    return tuple(border for run in runs for border in (int(run[0]), int(run[-1]) + 1))


def _mask(queries_Q: Tensor, document_BK: Tensor) -> Tensor | BlockMask:
    """Mask for some queries: on the CPU bool (B, 1, Q, K), True = may be seen, because flex
    attention has no CPU backward; on accelerators a flex `BlockMask`.
    """
    if queries_Q.device.type == "cpu":
        return _may_see(queries_Q, document_BK)
    return _block_mask(queries_Q, document_BK)


def _block_mask(queries_Q: Tensor, document_BK: Tensor) -> BlockMask:
    """The same mask by blocks of 128 x 128: none seen, some, all.

    A query sees the keys from its document's first to itself, so the first and last of a block's
    queries tell of the block. torch's `create_block_mask` looks at every pair instead, in a kernel
    whose compilation took minutes (16,384 keys, torch 2.11, docs/LOG.md).
    """
    B, K = document_BK.shape
    Q, block = len(queries_Q), _BLOCK
    begins_BK = torch.ones_like(document_BK, dtype=torch.bool)
    begins_BK[:, 1:] = document_BK[:, 1:] != document_BK[:, :-1]
    keys_K = torch.arange(K, device=queries_Q.device)
    first_BK = torch.where(begins_BK, keys_K, 0).cummax(dim=1).values
    first_BQ, last_Q = first_BK[:, queries_Q], queries_Q

    def may_see(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (first_BQ[b, q] <= k) & (k <= last_Q[q])

    # The last block repeats its last query. Positions grow, and so do their documents' first keys.
    padded_Q = torch.arange(-(-Q // block) * block, device=queries_Q.device).clamp(max=Q - 1)
    first, last = (t[..., padded_Q].unflatten(-1, (-1, block)) for t in (first_BQ, last_Q))
    begin_k = keys_K[::block]
    end_k = begin_k + block - 1
    seen = (first[:, :, :1] <= end_k) & (last[:, -1:] >= begin_k)
    whole = (first[:, :, -1:] <= begin_k) & (last[:, :1] >= end_k)
    whole[:, -1] &= Q % block == 0  # as torch's: a block that isn't full of queries hides some
    lists = [_listed(blocks.unsqueeze(1)) for blocks in (seen & ~whole, whole)]
    return BlockMask.from_kv_blocks(
        *lists[0], *lists[1], BLOCK_SIZE=block, mask_mod=may_see, seq_lengths=(Q, K)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many blocks are marked in each row, int32, and all blocks, marked ones first."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.int()


def _may_see(queries_Q: Tensor, document_BK: Tensor) -> Tensor:
    keys_K = torch.arange(document_BK.size(1), device=document_BK.device)
    same_document = document_BK[:, None, queries_Q, None] == document_BK[:, None, None]
    return same_document & (queries_Q[:, None] >= keys_K)


def attention(
    q_BSHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, *, scale: float, mask: AttentionMask = None
) -> Tensor:
    """softmax(scale · q kᵀ + mask) v for every head: (B, S, H, channels of v).

    q and k share their number of channels; v may have fewer (MLA: 192 and 128). k and v may have
    fewer heads, each for as many neighbouring heads of q (grouped-query attention).
    """
    if (group := q_BSHC.size(2) // k_BSHC.size(2)) > 1:
        k_BSHC, v_BSHC = (t.repeat_interleave(group, dim=2) for t in (k_BSHC, v_BSHC))
    v_channels = v_BSHC.size(-1)
    if isinstance(mask, CausalRuns):
        if can_use_runs(q_BSHC.device.type, q_BSHC.dtype, q_BSHC.size(-1), v_channels):
            return causal_runs(q_BSHC, k_BSHC, v_BSHC, mask.borders, scale)
        mask = mask.blocks
    if isinstance(mask, Documents):
        if q_BSHC.dtype in (torch.bfloat16, torch.float16):
            return document_attention(q_BSHC, k_BSHC, v_BSHC, *mask, scale)
        # fp32 on a GPU holds S × S scores: meant for small sizes.
        queries_S = torch.arange(q_BSHC.size(1), device=q_BSHC.device)
        mask = _may_see(queries_S, _documents_of(mask, q_BSHC.shape[:2]))
    if mask is None and can_use_blocks(q_BSHC, k_BSHC):
        return causal_blocks(q_BSHC, k_BSHC, v_BSHC, scale)
    if q_BSHC.device.type == "cpu" and v_channels < q_BSHC.size(-1):
        # The CPU's flash kernel needs equal channels; without that kernel SDPA holds S × S scores
        # and is 1.7 (fp32) to 2.4 (bf16) times slower at S = 2048.
        v_BSHC = F.pad(v_BSHC, (0, q_BSHC.size(-1) - v_channels))
    if isinstance(mask, BlockMask):
        # Flex attention has no kernel below 16 channels; zeros change no score.
        q_BSHC, k_BSHC, v_BSHC = (_at_least(16, t) for t in (q_BSHC, k_BSHC, v_BSHC))
    q, k, v = (t.transpose(1, 2) for t in (q_BSHC, k_BSHC, v_BSHC))
    if isinstance(mask, BlockMask):
        # A compiled layer includes it in its own graph.
        in_layer = torch.compiler.is_compiling()
        flex = flex_attention if in_layer else _compiled(flex_attention)
        out = flex(q, k, v, block_mask=mask, scale=scale)
    else:
        with sdpa_kernel(_BACKENDS, set_priority=True):
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale
            )
    return out.transpose(1, 2)[..., :v_channels]


def _at_least(channels: int, x_BSHC: Tensor) -> Tensor:
    return F.pad(x_BSHC, (0, max(0, channels - x_BSHC.size(-1))))


def _documents_of(documents: Documents, shape: torch.Size) -> Tensor:
    """Number the documents of the flattened batch; return the number of each token's (B, S)."""
    begins = documents.starts.new_zeros(shape.numel() + 1)  # the last: of places that are left
    begins.index_fill_(0, documents.starts[1:-1].long(), 1)
    return begins[:-1].cumsum(0).view(shape)
