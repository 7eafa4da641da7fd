"""The Qwen3 model: grouped-query attention with normalised queries and keys; dense or with experts.

Report: arXiv 2505.09388. What it shares with other families is models/decoder/model.py.
Single-device code: where tensors live is decided in parallelize.py.

Letters: B batch, S sequence, D model dim, H heads, C channels.
"""

from torch import Tensor, nn

from torchtitan.models.decoder import Decoder, TransformerBlock
from torchtitan.models.qwen3.args import Qwen3ModelArgs
from torchtitan.ops.attention import AttentionMask, attention
from torchtitan.ops.rope import apply_rope, rope_table
from torchtitan.protocols.layers import AttentionLayer


class Attention(AttentionLayer):
    """Grouped-query attention; RMSNorm over the channels of each query and key head.

    The published weights rotate channel i with channel i + C/2. Scores don't depend on the order of
    channels as long as queries and keys have the same, so both are put into ours, neighbours in
    pairs, on the way: weights stay as they were published.
    """

    def __init__(self, args: Qwen3ModelArgs):
        super().__init__()
        self.head_dim = args.head_dim
        self.softmax_scale = args.head_dim**-0.5
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
        """rope: table of `rope_table`. mask, positions_BS: see `Decoder.forward`."""
        q, k, v = (
            project(x_BSD).unflatten(-1, (-1, self.head_dim))
            for project in (self.wq, self.wk, self.wv)
        )
        q = apply_rope(_halves_to_pairs(self.q_norm(q)), rope, positions_BS)
        k = apply_rope(_halves_to_pairs(self.k_norm(k)), rope, positions_BS)
        return self.wo(self.attend(q, k, v, mask).flatten(-2))

    def attend(self, q_BSHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, mask: AttentionMask) -> Tensor:
        """k and v have their own, fewer heads (context parallelism and the cache
        step in here)."""
        return attention(q_BSHC, k_BSHC, v_BSHC, scale=self.softmax_scale, mask=mask)

    def expand(self, k_BSHC: Tensor, v_BSHC: Tensor) -> tuple[Tensor, Tensor]:
        """What `ops.attention.attention` takes: it lets several queries share a key."""
        return k_BSHC, v_BSHC


def _halves_to_pairs(x: Tensor) -> Tensor:
    """Channels 0, 1, …, C/2, C/2 + 1, … as 0, C/2, 1, C/2 + 1, …"""
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
