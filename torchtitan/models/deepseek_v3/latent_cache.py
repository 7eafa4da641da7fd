"""Attention over remembered latents: the compressed key-value cache of MLA.

Of every earlier token a layer keeps kv_lora_rank + qk_rope_head_dim numbers (576 in V3, instead of
H · (192 + 128)), and never makes keys and values of them: the up-projection of keys is applied to
the query, that of values to the sum (DeepSeek-V2 report, arXiv 2405.04434, section 2.1.2).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchtitan.models.deepseek_v3.model import Attention


@contextmanager
def latent_caches(
    attentions: Sequence["Attention"], batch_size: int, length: int
) -> Iterator[None]:
    """Inside, these layers remember; see `BaseModel.caching`."""
    for attention in attentions:
        attention.attend = _CachedAttend(attention, batch_size, length)
    try:
        yield
    finally:
        for attention in attentions:
            del attention.attend  # the class's own again


class _CachedAttend:
    """Takes the place of `Attention.attend`."""

    def __init__(self, attention: "Attention", batch_size: int, length: int) -> None:
        self.attention = attention
        self.shape = batch_size, length
        self.latents: Tensor | None = None  # (B, length, kv_lora_rank)
        self.ropes: Tensor | None = None  # (B, length, qk_rope_head_dim)
        self.filled = 0

    def __call__(
        self, q_BSHC: Tensor, latent_BSC: Tensor, k_rope_BS1C: Tensor, mask: Tensor
    ) -> Tensor:
        """mask: bool (B, 1, S, tokens remembered with these)."""
        latents, ropes = self._remember(latent_BSC, k_rope_BS1C.squeeze(2))
        heads, nope = q_BSHC.size(2), self.attention.qk_nope_head_dim
        q_nope, q_rope = q_BSHC[..., :nope], q_BSHC[..., nope:]
        # Read here, inside of the layer's forward pass, where FSDP has gathered it.
        up_HCL = self.attention.wkv_b.weight.to(q_nope.dtype).unflatten(0, (heads, -1))
        q_latent = torch.einsum("bshc,hcl->bshl", q_nope, up_HCL[:, :nope])
        scores = torch.einsum("bshl,btl->bhst", q_latent, latents)
        scores = scores + torch.einsum("bshr,btr->bhst", q_rope, ropes)
        scores = (scores.float() * self.attention.softmax_scale).masked_fill(~mask, -torch.inf)
        weights = scores.softmax(dim=-1).to(latents.dtype)
        summed = torch.einsum("bhst,btl->bshl", weights, latents)
        return torch.einsum("bshl,hcl->bshc", summed, up_HCL[:, nope:])

    def _remember(self, latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        if self.latents is None:
            self.latents = latent.new_empty(*self.shape, latent.size(-1))
            self.ropes = rope.new_empty(*self.shape, rope.size(-1))
        end = self.filled + latent.size(1)
        self.latents[:, self.filled : end] = latent
        self.ropes[:, self.filled : end] = rope
        self.filled = end
        return self.latents[:, :end], self.ropes[:, :end]
