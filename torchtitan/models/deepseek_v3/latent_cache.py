"""Attention on cached latents: the compressed key-value cache of MLA.

For every earlier token a layer keeps kv_lora_rank + qk_rope_head_dim numbers (576 in V3, instead of
H · (192 + 128)), and never computes keys and values from them: the up-projection of keys is applied
to the query, that of values to the sum (DeepSeek-V2 report, arXiv 2405.04434, section 2.1.2).
"""

from typing import Any

import torch
from torch import Tensor

from torchtitan.models.decoder.attention import Narrow
from torchtitan.models.decoder.cache import CachedAttend


class LatentAttend(CachedAttend):
    """Cache of `deepseek_v3.model.Attention`; its narrow tensors stay compressed."""

    attention: Any  # `Attention`, whose file imports this one

    def attend(self, q_BSHC: Tensor, narrow: Narrow, mask: Any) -> Tensor:
        latent_BTC, k_rope_BT1C = narrow
        heads, nope = q_BSHC.size(2), self.attention.qk_nope_head_dim
        q_nope, q_rope = q_BSHC[..., :nope], q_BSHC[..., nope:]
        up_HCL = self.attention.wkv_b.dense_weight(q_nope.dtype).unflatten(0, (heads, -1))
        q_latent = torch.einsum("bshc,hcl->bshl", q_nope, up_HCL[:, :nope])
        scores = torch.einsum("bshl,btl->bhst", q_latent, latent_BTC)
        scores = scores + torch.einsum("bshr,btr->bhst", q_rope, k_rope_BT1C.squeeze(2))
        scores = (scores.float() * self.attention.softmax_scale).masked_fill(~mask, -torch.inf)
        weights = scores.softmax(dim=-1).to(latent_BTC.dtype)
        summed = torch.einsum("bhst,btl->bshl", weights, latent_BTC)
        return torch.einsum("bshl,hcl->bshc", summed, up_HCL[:, nope:])
