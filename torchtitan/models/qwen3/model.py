"""The Qwen3 model: grouped-query attention with normalised queries and keys; dense or with experts.

Report: arXiv 2505.09388. The parts that it shares with other families are in
models/decoder/model.py. Single-device code: parallelize.py decides where tensors live.

Letters: B batch, S sequence, D model dim, H heads, C channels.
"""

from torch import Tensor, nn

from torchtitan.models.decoder import Decoder, SelfAttention, TransformerBlock
from torchtitan.models.decoder.attention import Narrow
from torchtitan.models.qwen3.args import Qwen3ModelArgs
from torchtitan.ops.attention import AttentionMask
from torchtitan.ops.linear import Linear
from torchtitan.ops.rope import apply_rope, rope_table


class Attention(SelfAttention):
    """Grouped-query attention; RMSNorm over the channels of each query and key head.

    The published weights rotate channel i with channel i + C/2. Scores don't depend on the order of
    channels if queries and keys have the same one, so both are put into our order, with neighbours
    in pairs, in the forward pass: weights stay as published.
    """

    def __init__(self, args: Qwen3ModelArgs):
        super().__init__()
        self.head_dim = args.head_dim
        self.softmax_scale = args.head_dim**-0.5
        kv_dim = args.n_kv_heads * args.head_dim
        self.wq = Linear(args.dim, args.n_heads * args.head_dim)
        self.wk = Linear(args.dim, kv_dim)
        self.wv = Linear(args.dim, kv_dim)
        self.q_norm = nn.RMSNorm(args.head_dim, eps=args.norm_eps)
        self.k_norm = nn.RMSNorm(args.head_dim, eps=args.norm_eps)
        self.wo = Linear(args.n_heads * args.head_dim, args.dim)

    def forward(
        self,
        x_BSD: Tensor,
        rope: Tensor,
        mask: AttentionMask = None,
        positions_BS: Tensor | None = None,
    ) -> Tensor:
        """Attend: (B, S, D).

        rope: table from `rope_table`.
        mask, positions_BS: see `Decoder.forward`.
        """
        q, k, v = (
            project(x_BSD).unflatten(-1, (-1, self.head_dim))
            for project in (self.wq, self.wk, self.wv)
        )
        q = apply_rope(_halves_to_pairs(self.q_norm(q)), rope, positions_BS)
        k = apply_rope(_halves_to_pairs(self.k_norm(k)), rope, positions_BS)
        return self.wo(self.attend(q, (k, v), mask).flatten(-2))

    def expand(self, narrow: Narrow) -> tuple[Tensor, Tensor]:
        """Return keys and values with their own, fewer heads, which several queries share."""
        k_BSHC, v_BSHC = narrow
        return k_BSHC, v_BSHC


def _halves_to_pairs(x: Tensor) -> Tensor:
    """Reorder channels 0, 1, …, C/2, C/2 + 1, … to 0, C/2, 1, C/2 + 1, …"""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


class Qwen3Model(Decoder):
    """Tokens to logits, or to the loss."""

    model_args: Qwen3ModelArgs

    def make_block(self, layer_id: int) -> TransformerBlock:
        args = self.model_args
        hidden_dim = None if args.moe_enabled else args.hidden_dim
        return TransformerBlock(args, Attention(args), hidden_dim)

    def make_rope_table(self) -> Tensor:
        args = self.model_args
        return rope_table(args.head_dim, args.max_seq_len, args.rope_theta)
