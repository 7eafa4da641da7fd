"""One door to the attention kernels, and the masks that they take.

A mask is made once a step, outside of the layers, in the form that the device's kernel wants:
`None` is causal attention, anything else comes from `document_mask`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchtitan.ops.document_attention import document_attention


class Documents(NamedTuple):
    """Packed documents: int32 positions in the flattened batch where each begins, and the end of
    the last one; and the length of the longest (at least).
    """

    starts: Tensor
    longest: int


AttentionMask = Tensor | Documents | None

# Fastest first. cuDNN leads: on an H200 at qk 192 / v 128 it runs 540 / 400 TFLOP/s forward /
# backward, flash (V padded) 290 / 235, memory-efficient 139 / 50 (docs/performance.md).
_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def document_mask(
    tokens_BS: Tensor, eos_id: int, device: torch.device | None = None
) -> AttentionMask:
    """Block-causal mask of packed text: a token sees the earlier tokens of its own document.

    A document ends with (and includes) `eos_id`. device: where the mask is wanted; absent = where
    the tokens are. Tokens on the CPU are best: their documents are counted there, and the GPU is
    not waited for.

    CPU: bool (B, 1, S, S), True = may be seen. GPU: `Documents`, or None where every sequence is
    one document.
    """
    device = device or tokens_BS.device
    ends_BS = tokens_BS == eos_id
    B, S = tokens_BS.shape
    if device.type == "cpu":
        return _may_see(ends_BS)
    ends_BS[:, -1] = True
    ends_BS = ends_BS.cpu()  # host sync for tokens on the GPU: how many documents there are
    ends = ends_BS.flatten().nonzero().flatten().int() + 1
    if ends.numel() == B:
        return None
    starts = F.pad(ends, (1, 0))
    # Rounded up, so that compiled graphs meet few lengths; the kernel skips what isn't there.
    longest = min(S, 1 << (int(starts.diff().max()) - 1).bit_length())
    return Documents(starts.to(device, non_blocking=True), longest)


def _may_see(ends_BS: Tensor) -> Tensor:
    document_BS = ends_BS.cumsum(dim=1) - ends_BS.int()
    same_document = document_BS[:, None, :, None] == document_BS[:, None, None, :]
    S = ends_BS.size(1)
    return same_document & torch.ones(S, S, dtype=torch.bool, device=ends_BS.device).tril()


def attention(
    q_BSHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, *, scale: float, mask: AttentionMask = None
) -> Tensor:
    """softmax(scale · q kᵀ + mask) v for every head: (B, S, H, channels of v).

    q and k share their number of channels; v may have fewer (MLA: 192 and 128).
    """
    v_channels = v_BSHC.size(-1)
    if isinstance(mask, Documents):
        if q_BSHC.dtype in (torch.bfloat16, torch.float16):
            return document_attention(q_BSHC, k_BSHC, v_BSHC, *mask, scale)
        mask = _may_see(_ends(mask, q_BSHC.shape[:2]))  # fp32 on a GPU: for small sizes
    if q_BSHC.device.type == "cpu" and v_channels < q_BSHC.size(-1):
        # The CPU's flash kernel wants equal channels; without it SDPA holds S × S scores and is
        # 1.7 (fp32) to 2.4 (bf16) times slower at S = 2048.
        v_BSHC = F.pad(v_BSHC, (0, q_BSHC.size(-1) - v_channels))
    q, k, v = (t.transpose(1, 2) for t in (q_BSHC, k_BSHC, v_BSHC))
    with sdpa_kernel(_BACKENDS, set_priority=True):
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale
        )
    return out.transpose(1, 2)[..., :v_channels]


def _ends(documents: Documents, shape: torch.Size) -> Tensor:
    """Which tokens (B, S) are the last of their document."""
    ends_T = torch.zeros(shape.numel(), dtype=torch.bool, device=documents.starts.device)
    return ends_T.index_fill_(0, documents.starts[1:].long() - 1, True).view(shape)
