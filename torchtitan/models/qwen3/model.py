"""The Qwen3 model: grouped-query attention with normalised queries and keys; dense or with experts.

Report: arXiv 2505.09388. Single-device code: where tensors live is decided in parallelize.py.

Letters: B batch, S sequence, D model dim, H heads, C channels.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from torchtitan.models.moe import FeedForward, MoE
from torchtitan.models.moe.balancing import Load, record_load
from torchtitan.models.qwen3.args import Qwen3ModelArgs
from torchtitan.ops.attention import AttentionMask, attention, causal_mask, document_mask
from torchtitan.ops.init import init_parameters
from torchtitan.ops.rope import apply_rope, rope_table
from torchtitan.protocols.model import BaseModel


class Attention(nn.Module):
    """Grouped-query attention; RMSNorm over the channels of each query and key head.

    The published weights rotate channel i with channel i + C/2. Scores don't depend on the order of
    channels as long as queries and keys have the same, so both are put into ours, neighbours in
    pairs, on the way: weights stay as they were published.
    """

    def __init__(self, args: Qwen3ModelArgs):
        super().__init__()
        self.head_dim = args.head_dim
        self.queries_per_key = args.n_heads // args.n_kv_heads
        kv_dim = args.n_kv_heads * args.head_dim
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, kv_dim, bias=False)
        self.wv = nn.Linear(args.dim, kv_dim, bias=False)
        self.q_norm = nn.RMSNorm(args.head_dim, eps=args.norm_eps)
        self.k_norm = nn.RMSNorm(args.head_dim, eps=args.norm_eps)
        self.wo = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)

    def forward(
        self,
        x_BSD: Tensor,
        rope: Tensor,
        mask: AttentionMask = None,
        positions_BS: Tensor | None = None,
    ) -> Tensor:
        """rope: table of `rope_table`. mask, positions_BS: see `Qwen3Model.forward`."""
        q, k, v = (
            project(x_BSD).unflatten(-1, (-1, self.head_dim))
            for project in (self.wq, self.wk, self.wv)
        )
        q = apply_rope(_halves_to_pairs(self.q_norm(q)), rope, positions_BS)
        k = apply_rope(_halves_to_pairs(self.k_norm(k)), rope, positions_BS)
        k, v = (t.repeat_interleave(self.queries_per_key, dim=2) for t in (k, v))
        out_BSHC = attention(q, k, v, scale=self.head_dim**-0.5, mask=mask)
        return self.wo(out_BSHC.flatten(-2))


def _halves_to_pairs(x: Tensor) -> Tensor:
    """Channels 0, 1, …, C/2, C/2 + 1, … as 0, C/2, 1, C/2 + 1, …"""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


class TransformerBlock(nn.Module):
    """Attention, then a dense feed-forward or experts, on normalised inputs."""

    def __init__(self, args: Qwen3ModelArgs):
        super().__init__()
        self.attention_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.attention = Attention(args)
        self.ffn_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.moe_enabled = args.moe_enabled
        if args.moe_enabled:
            self.moe = MoE(args.moe_args, dim=args.dim, hidden_dim=args.moe_inter_dim)
        else:
            self.feed_forward = FeedForward(args.dim, args.hidden_dim)

    def forward(
        self,
        x_BSD: Tensor,
        rope: Tensor,
        mask: AttentionMask = None,
        positions_BS: Tensor | None = None,
        token_mask_BS: Tensor | None = None,
    ) -> tuple[Tensor, Load | None]:
        """The new hidden state and, with experts, this batch's load: returned, not kept, because a
        block may be recomputed in the backward pass."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rope, mask, positions_BS)
        normed = self.ffn_norm(x_BSD)
        if not self.moe_enabled:
            return x_BSD + self.feed_forward(normed), None
        out, load = self.moe(normed, token_mask_BS, return_load=True)
        return x_BSD + out, load


class Qwen3Model(BaseModel):
    """Tokens to logits."""

    def __init__(self, model_args: Qwen3ModelArgs):
        super().__init__()
        self.model_args = model_args
        self.tok_embeddings = nn.Embedding(model_args.vocab_size, model_args.dim)
        self.layers = nn.ModuleDict(
            {str(i): TransformerBlock(model_args) for i in range(model_args.n_layers)}
        )
        self.norm = nn.RMSNorm(model_args.dim, eps=model_args.norm_eps)
        self.output = nn.Linear(model_args.dim, model_args.vocab_size, bias=False)
        self.register_buffer("rope", self._make_rope_table(), persistent=False)

    def forward(
        self,
        tokens: Tensor,
        attention_masks: AttentionMask = None,
        positions: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, S, V) of int64 tokens (B, S).

        attention_masks: from `get_attention_masks`, None = causal. positions: (B, S) int64, None =
        0, 1, …. token_mask: (B, S) bool, False = padding, left out of the expert load.
        """
        x_BSD = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            x_BSD, load = layer(x_BSD, self.rope, attention_masks, positions, token_mask)
            if load is not None and self.training and torch.is_grad_enabled():
                record_load(layer.moe, load)
        return self.output(self.norm(x_BSD))

    def get_attention_masks(
        self,
        tokens_BS: Tensor,
        eos_id: int | None,
        queries_Q: Tensor | None = None,
        device: torch.device | None = None,
    ) -> AttentionMask:
        if self.model_args.attn_mask_type == "causal":
            return None if queries_Q is None else causal_mask(queries_Q)
        self.model_args.check_tokenizer(eos_id)
        return document_mask(tokens_BS, eos_id, queries_Q, device)

    def moe_layers(self) -> dict[int, nn.Module]:
        return {int(i): layer.moe for i, layer in self.layers.items() if layer.moe_enabled}

    def set_tokens_in_step(self, tokens: Tensor) -> None:
        for moe in self.moe_layers().values():
            moe.tokens_in_step.copy_(tokens)

    def set_coefficients(self, values: Mapping[str, float]) -> None:
        for moe in self.moe_layers().values():
            moe.set_coefficients(values)

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Matrices normal with `init_std`, norms one.

        buffer_device: where the rotary table goes; absent = where the model is.
        """
        init_parameters(self, self.model_args.init_std)
        for moe in self.moe_layers().values():
            moe.init_buffers()
        self.rope = self._make_rope_table().to(buffer_device or self.rope.device)

    def _apply(self, fn, recurse: bool = True):
        # As in DeepSeekV3Model: `model.bfloat16()` must not round the rotary table.
        table = self.rope
        super()._apply(fn, recurse)
        if self.rope.dtype != table.dtype:
            self.rope = table.to(self.rope.device)
        return self

    def _make_rope_table(self) -> Tensor:
        args = self.model_args
        return rope_table(args.head_dim, args.max_seq_len, args.rope_theta)
