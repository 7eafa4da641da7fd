"""A decoder: embedding, blocks of attention and feed-forward (dense or experts), norm, output.

Single-device code: parallelize.py decides where tensors live. A family defines its attention and
the layers with experts, and may add modules beside the main path.

Letters: B batch, S sequence, D model dim.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from torchtitan.models.decoder.args import DecoderArgs
from torchtitan.models.decoder.attention import SelfAttention
from torchtitan.models.decoder.cache import CachedAttend, caching
from torchtitan.models.moe import FeedForward, MoE
from torchtitan.models.moe.balancing import record_load
from torchtitan.models.moe.load import RoutingLoad
from torchtitan.ops.attention import AttentionMask, causal_mask, document_mask
from torchtitan.ops.buffers import KeepsBufferDtypes
from torchtitan.ops.init import init_parameters
from torchtitan.ops.linear import Output
from torchtitan.protocols.model import BaseModel


class TransformerBlock(nn.Module):
    """Attention, then a dense feed-forward of `hidden_dim` or (None) experts, on normalised inputs.

    attention: called with (x_BSD, rope, mask, positions_BS).
    """

    moe: MoE  # with experts
    feed_forward: FeedForward  # without

    def __init__(self, args: DecoderArgs, attention: SelfAttention, hidden_dim: int | None):
        super().__init__()
        self.attention_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.attention = attention
        self.ffn_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.moe_enabled = hidden_dim is None
        if hidden_dim is None:
            self.moe = MoE(args.moe_args, dim=args.dim, hidden_dim=args.moe_inter_dim)
        else:
            self.feed_forward = FeedForward(args.dim, hidden_dim)

    def forward(
        self,
        x_BSD: Tensor,
        rope: Tensor,
        mask: AttentionMask = None,
        positions_BS: Tensor | None = None,
        token_mask_BS: Tensor | None = None,
    ) -> tuple[Tensor, RoutingLoad | None]:
        """Return the new hidden state (B, S, D) and, with experts, this batch's load.

        The load is returned, not stored: a block may run again in the backward pass, and only its
        outputs are used exactly once.
        """
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rope, mask, positions_BS)
        normed = self.ffn_norm(x_BSD)
        if not self.moe_enabled:
            return x_BSD + self.feed_forward(normed), None
        out, load = self.moe(normed, token_mask_BS, return_load=True)
        return x_BSD + out, load


class Decoder(KeepsBufferDtypes, BaseModel):
    """Tokens to logits, or to the loss. A family defines `make_block` and `make_rope_table`."""

    computes_loss = True
    cached_attend: ClassVar[type[CachedAttend]] = CachedAttend
    model_args: DecoderArgs

    def __init__(self, model_args: DecoderArgs):
        super().__init__()
        self.model_args = model_args
        self.tok_embeddings = nn.Embedding(model_args.vocab_size, model_args.dim)
        self.layers = nn.ModuleDict(
            {str(i): self.make_block(i) for i in range(model_args.n_layers)}
        )
        self.norm = nn.RMSNorm(model_args.dim, eps=model_args.norm_eps)
        self.output = Output(model_args.dim, model_args.vocab_size)
        self.register_buffer("rope", self.make_rope_table(), persistent=False)

    def make_block(self, layer_id: int) -> TransformerBlock:
        raise NotImplementedError

    def make_rope_table(self) -> Tensor:
        """Make the rotary table, see `rope_table`."""
        raise NotImplementedError

    def forward(
        self,
        tokens: Tensor,
        attention_masks: AttentionMask = None,
        positions: Tensor | None = None,
        token_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Compute logits (B, S, V), or with labels the sum of their losses (scalar).

        A pipeline's part without `tok_embeddings` takes the hidden states (B, S, D) of the previous
        part as `tokens`; one without `output` returns hidden states.

        tokens: (B, S) int64.
        attention_masks: from `get_attention_masks`; None = causal.
        positions: (B, S) int64; None = 0, 1, ….
        token_mask: (B, S) bool, False = padding, left out of the expert load.
        labels: (B, S) int64, see `linear_cross_entropy`.
        """
        x_BSD = tokens if self.tok_embeddings is None else self.tok_embeddings(tokens)
        x_BSD = self.run_layers(x_BSD, attention_masks, positions, token_mask)
        if self.output is None or self.norm is None:
            return x_BSD
        return self.output(self.norm(x_BSD), labels)

    def run_layers(
        self,
        x_BSD: Tensor,
        mask: AttentionMask,
        positions_BS: Tensor | None,
        token_mask_BS: Tensor | None,
    ) -> Tensor:
        """Run all layers; return the hidden states. In training the expert loads are recorded."""
        for layer in self._blocks().values():
            x_BSD, load = layer(x_BSD, self.rope, mask, positions_BS, token_mask_BS)
            if load is not None and self.training and torch.is_grad_enabled():
                record_load(layer.moe, load)
        return x_BSD

    def get_attention_masks(
        self,
        documents_BS: Tensor,
        queries_Q: Tensor | None = None,
        device: torch.device | None = None,
    ) -> AttentionMask:
        if self.model_args.attn_mask_type == "causal":
            return None if queries_Q is None else causal_mask(queries_Q)
        return document_mask(documents_BS, queries_Q, device)

    def _blocks(self) -> dict[str, TransformerBlock]:
        return cast(dict[str, TransformerBlock], dict(self.layers.items()))  # by `make_block`

    def moe_layers(self) -> dict[int, MoE]:
        return {int(i): layer.moe for i, layer in self._blocks().items() if layer.moe_enabled}

    def set_tokens_in_step(self, tokens: Tensor, labels: Tensor) -> None:
        buffers = [moe.tokens_in_step for moe in self.moe_layers().values()]
        if buffers:
            torch._foreach_copy_(buffers, [tokens.to(torch.float32)] * len(buffers))

    def set_coefficients(self, values: Mapping[str, float]) -> None:
        for moe in self.moe_layers().values():
            moe.set_coefficients(values)

    def set_context(self, model_args: DecoderArgs) -> None:
        self.model_args = model_args
        self.rope = self.make_rope_table().to(self.rope.device)

    def caching(self, batch_size: int, length: int) -> AbstractContextManager[None]:
        attentions = [layer.attention for layer in self._blocks().values()]
        return caching(attentions, lambda each: self.cached_attend(each, batch_size, length))

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Set matrices to normal with `init_std`, norms to one, expert bias to zero.

        buffer_device: of the rotary table; None = that of the model.
        """
        init_parameters(self, self.model_args.init_std)
        for moe in self.moe_layers().values():
            moe.init_buffers()
        self.rope = self.make_rope_table().to(buffer_device or self.rope.device)
