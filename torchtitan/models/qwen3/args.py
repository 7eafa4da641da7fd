"""Arguments of the Qwen3 architecture, dense and with experts, its rules, and its FLOPs."""

from dataclasses import dataclass

from torchtitan.models.decoder import DecoderArgs
from torchtitan.tools.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Qwen3ModelArgs(DecoderArgs):
    """Arguments of Qwen3, named as in torchtitan. Technical report: arXiv 2505.09388.

    n_heads: heads of queries.
    n_kv_heads: heads of keys and values, each shared by equally many query heads.
    head_dim: channels of a head (n_heads · head_dim may differ from dim).
    hidden_dim: hidden channels of the dense feed-forward.
    norm_eps: of every RMSNorm.
    rope_theta: base of RoPE.
    init_std: of all matrices, normal.
    moe_enabled: all layers have experts instead of a dense feed-forward.
    moe_inter_dim: hidden channels of one expert.
    attn_mask_type: causal, or block_causal (a token sees its own document only).
    """

    vocab_size: int = 151936
    max_seq_len: int = 4096
    dim: int = 1024
    n_layers: int = 28
    n_heads: int = 16
    n_kv_heads: int = 8
    head_dim: int = 128
    hidden_dim: int = 3072
    norm_eps: float = 1e-6
    rope_theta: float = 1000000.0
    init_std: float = 0.02

    moe_enabled: bool = False
    moe_inter_dim: int = 768

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive(
            "vocab_size max_seq_len dim n_layers n_heads n_kv_heads head_dim hidden_dim "
            "moe_inter_dim norm_eps rope_theta init_std"
        )
        if self.n_heads % self.n_kv_heads:
            raise UserError(
                f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})."
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim ({self.head_dim}) must be even: RoPE rotates pairs.")
        self.check_weights()

    @property
    def head_channels(self) -> tuple[int, int]:
        return self.head_dim, self.head_dim

    @property
    def has_experts(self) -> bool:
        return self.moe_enabled

    @property
    def split_heads(self) -> tuple[str, int]:
        return "n_kv_heads", self.n_kv_heads

    @property
    def dense_widths(self) -> dict[str, int]:
        return {} if self.moe_enabled else {"hidden_dim": self.hidden_dim}

    @property
    def num_weights(self) -> int:
        return self._layer_weights(self.moe_args.num_experts) + 2 * self.dim * self.vocab_size

    def _layer_weights(self, routed_experts: int) -> int:
        """Count the weights of all layers.

        routed_experts: per layer with experts.
        """
        attention = self.dim * self.head_dim * 2 * (self.n_heads + self.n_kv_heads)
        feed_forward = 3 * self.dim * self.hidden_dim
        if self.moe_enabled:
            experts = routed_experts + self.moe_args.num_shared_experts
            feed_forward = self.dim * (3 * self.moe_inter_dim * experts + self.moe_args.num_experts)
        return self.n_layers * (attention + feed_forward)

    def train_flops_per_token(self, seq_len: int, *, causal: bool = True) -> float:
        """FLOPs of a training step per token: 3 × those of the forward pass.

        Forward: 2 FLOPs per weight that a token uses, plus attention's scores and sums.

        causal: count the half of the S × S scores that causal attention needs.
        """
        weights = self._layer_weights(self.moe_args.top_k) + self.dim * self.vocab_size
        core = 4 * self.n_heads * self.head_dim * (seq_len / 2 if causal else seq_len)
        return 3 * (2 * weights + self.n_layers * core)
