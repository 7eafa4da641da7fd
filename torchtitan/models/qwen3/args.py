"""Sizes of the Qwen3 architecture, dense and with experts, its rules, and its FLOPs."""

import dataclasses
from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from torchtitan.models.moe import MoEArgs
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.tools.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Qwen3ModelArgs(BaseModelArgs):
    """Names as in torchtitan. Technical report: arXiv 2505.09388.

    vocab_size, dim, n_layers, n_heads; n_kv_heads: of keys and values, each shared by as many query
    heads; head_dim: channels of a head (n_heads · head_dim need not be dim); hidden_dim: of the
    dense feed-forward; norm_eps: of every RMSNorm; rope_theta: base of RoPE.

    moe_enabled: all layers have experts instead, of hidden width moe_inter_dim.
    attn_mask_type: causal, or block_causal (a token sees its own document only).
    init_std: of all matrices, normal.
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
    attn_mask_type: Literal["causal", "block_causal"] = "causal"

    moe_enabled: bool = False
    moe_inter_dim: int = 768
    moe_args: MoEArgs = field(default_factory=MoEArgs)

    def __post_init__(self) -> None:
        positive = (
            "vocab_size max_seq_len dim n_layers n_heads n_kv_heads head_dim hidden_dim "
            "moe_inter_dim norm_eps rope_theta init_std"
        )
        for name in positive.split():
            if getattr(self, name) <= 0:
                raise UserError(f"{name} ({getattr(self, name)}) must be above 0.")
        if self.n_heads % self.n_kv_heads:
            raise UserError(
                f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})."
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim ({self.head_dim}) must be even: RoPE turns pairs.")

    def weights_identity(self) -> dict[str, Any]:
        arguments = super().weights_identity()
        for name in ("init_std", "attn_mask_type"):
            arguments.pop(name)
        free = (
            "use_grouped_mm _debug_force_load_balance load_balance_coeff sequence_balance_coeff "
            "global_balance_coeff z_loss_coeff"
        )
        for name in free.split():
            arguments["moe_args"].pop(name)
        return arguments

    def with_forced_load_balance(self) -> Self:
        if not self.moe_enabled:
            return super().with_forced_load_balance()
        moe_args = dataclasses.replace(self.moe_args, _debug_force_load_balance=True)
        return dataclasses.replace(self, moe_args=moe_args)

    def check_tokenizer(self, eos_id: int | None) -> None:
        if self.attn_mask_type == "block_causal" and eos_id is None:
            raise UserError(
                "model.args.attn_mask_type 'block_causal' needs a tokenizer with an end-of-text "
                "token, which tells documents apart; name one in its tokenizer_config.json, or use "
                "'causal'."
            )

    def check_coefficients(self, names: Set[str]) -> None:
        if not self.moe_enabled:
            return super().check_coefficients(names)
        if "load_balance_coeff" in names and self.moe_args.load_balance_coeff is None:
            raise UserError(
                "[[schedule.phase]] sets load_balance_coeff, but the model has no expert bias: set "
                "model.args.moe_args.load_balance_coeff to the speed of the start (0 is one)."
            )
        of_experts = {"load_balance_coeff", "sequence_balance_coeff", "global_balance_coeff"}
        super().check_coefficients(names - of_experts)

    def check_expert_parallel(self, degree: int) -> None:
        if not self.moe_enabled:
            return super().check_expert_parallel(degree)
        num_experts = self.moe_args.num_experts
        if num_experts % degree:
            divisors = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
            raise UserError(
                f"parallelism.expert_parallel_degree = {degree} must divide the number of experts, "
                f"model.args.moe_args.num_experts ({num_experts}); the nearest that does is "
                f"{min(divisors, key=lambda n: abs(n - degree))}."
            )

    def train_flops_per_token(self, seq_len: int, *, causal: bool = True) -> float:
        """Forward 2 FLOPs per weight that a token meets, plus attention's scores and sums; train =
        3 ×. causal: count the half of the S × S scores that causal attention needs."""
        attention = self.dim * self.head_dim * 2 * (self.n_heads + self.n_kv_heads)
        feed_forward = 3 * self.dim * self.hidden_dim
        if self.moe_enabled:
            moe = self.moe_args
            experts = moe.top_k + moe.num_shared_experts
            feed_forward = self.dim * (3 * self.moe_inter_dim * experts + moe.num_experts)
        weights = self.n_layers * (attention + feed_forward) + self.dim * self.vocab_size
        core = 4 * self.n_heads * self.head_dim * (seq_len / 2 if causal else seq_len)
        return 3 * (2 * weights + self.n_layers * core)
