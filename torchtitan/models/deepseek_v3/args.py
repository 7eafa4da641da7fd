"""Arguments of the DeepSeek-V2/V3 architecture, its rules, and its FLOPs."""

from collections.abc import Set
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

from torchtitan.models.decoder import DecoderArgs
from torchtitan.ops.rope import Yarn, yarn_softmax_factor
from torchtitan.tools.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DeepSeekV3ModelArgs(DecoderArgs):
    """Arguments of DeepSeek-V2/V3, named as in torchtitan and DeepSeek's inference code.

    Defaults are DeepSeek-V2-Lite's sizes.

    inter_dim: hidden channels of the dense feed-forward of the first layers.
    moe_inter_dim: hidden channels of one expert.
    n_dense_layers: first layers, which have a dense feed-forward instead of experts.
    norm_eps: of every RMSNorm.
    init_std: of all matrices, normal (the V3 report's 0.006).
    attn_mask_type: causal, or block_causal (a token sees its own document only; the V3 report
        trained without this mask).

    Multi-head latent attention (MLA):
    q_lora_rank: channels of the queries' latent; 0 = queries are not compressed.
    kv_lora_rank: channels of the latent of keys and values.
    qk_nope_head_dim: channels of queries and keys without position, per head.
    qk_rope_head_dim: their channels with rotary position.
    v_head_dim: channels of values, per head.

    RoPE and YaRN:
    max_seq_len: positions.
    rope_theta: base of RoPE.
    yarn: "on", "off", or "auto": on when max_seq_len exceeds original_seq_len, the rule of
        DeepSeek's code, or when the weights that a run begins from have it.
    original_seq_len, rope_factor, beta_fast, beta_slow: see `ops.rope.Yarn` (rope_factor is its
        factor).
    mscale: scales the softmax.
    attention_factor: multiplies the rotary channels of queries and keys.
    yarn_truncate: the ramp between beta_fast and beta_slow begins and ends at whole channels.

    Multi-token prediction (mtp.py):
    n_mtp_layers: its layers; 0 = off (the V3 report trained with 1).
    mtp_loss_weight: its lambda.
    """

    vocab_size: int = 102400
    max_seq_len: int = 4096 * 4
    dim: int = 2048
    inter_dim: int = 10944
    moe_inter_dim: int = 1408
    n_layers: int = 27
    n_dense_layers: int = 1
    n_heads: int = 16
    norm_eps: float = 1e-6
    init_std: float = 0.006

    q_lora_rank: int = 0
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128

    rope_theta: float = 10000.0
    yarn: Literal["auto", "on", "off"] = "auto"
    original_seq_len: int = 4096
    rope_factor: float = 40.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    attention_factor: float = 1.0
    yarn_truncate: bool = True

    n_mtp_layers: int = 0
    mtp_loss_weight: float = 0.3

    # Longer contexts change RoPE's scaling, fine-tuning may change the mask and the weight of
    # further tokens' losses.
    yarn_numbers: ClassVar[tuple[str, ...]] = (
        "original_seq_len",
        "rope_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "attention_factor",
        "yarn_truncate",
    )
    not_of_weights = (
        *DecoderArgs.not_of_weights,
        "yarn",
        *yarn_numbers,
        "mtp_loss_weight",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive(
            "vocab_size max_seq_len dim inter_dim moe_inter_dim n_layers n_heads kv_lora_rank "
            "qk_nope_head_dim qk_rope_head_dim v_head_dim original_seq_len rope_theta norm_eps "
            "init_std beta_fast beta_slow attention_factor"
        )
        if self.q_lora_rank < 0:
            raise UserError(f"q_lora_rank ({self.q_lora_rank}) must be 0 (no compression) or more.")
        if not 0 <= self.n_dense_layers <= self.n_layers:
            raise UserError(
                f"n_dense_layers ({self.n_dense_layers}) must lie between 0 and n_layers "
                f"({self.n_layers})."
            )
        if self.n_mtp_layers < 0 or self.mtp_loss_weight < 0:
            raise UserError(
                f"n_mtp_layers ({self.n_mtp_layers}) and mtp_loss_weight ({self.mtp_loss_weight}) "
                "must be 0 (no multi-token prediction) or more."
            )
        if self.qk_rope_head_dim % 2:
            raise UserError(
                f"qk_rope_head_dim ({self.qk_rope_head_dim}) must be even: RoPE rotates pairs."
            )
        if self.rope_factor < 1:
            raise UserError(f"rope_factor ({self.rope_factor}) must be 1 or more.")
        if self.mscale < 0:
            raise UserError(f"mscale ({self.mscale}) must be 0 (no scaling) or more.")
        self.check_weights()

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def head_channels(self) -> tuple[int, int]:
        return self.qk_head_dim, self.v_head_dim

    @property
    def use_yarn(self) -> bool:
        if self.yarn == "auto":
            return self.max_seq_len > self.original_seq_len
        return self.yarn == "on"

    @property
    def yarn_scaling(self) -> Yarn | None:
        if not self.use_yarn:
            return None
        return Yarn(self.rope_factor, self.original_seq_len, self.beta_fast, self.beta_slow)

    @property
    def softmax_scale(self) -> float:
        scale = self.qk_head_dim**-0.5
        if self.use_yarn:
            scale *= yarn_softmax_factor(self.rope_factor, self.mscale)
        return scale

    @property
    def max_positions(self) -> int:
        if self.use_yarn:
            return round(self.rope_factor * self.original_seq_len)
        return super().max_positions

    def as_flavor(self) -> Self:
        """With "auto" YaRN stays on in runs that load the weights, and is off in runs that begin
        anew at a length without need of it, as with the flavors."""
        if self.yarn == "off":
            return super().as_flavor()
        return replace(self, context_len=self.original_seq_len, yarn="auto")

    def keep_from(self, stored: Self) -> tuple[dict[str, Any], list[str]]:
        if not stored.use_yarn:
            return super().keep_from(stored)
        kept = {"context_len": stored.context_len} if stored.context_len else {}
        if self.use_yarn or self.yarn != "auto":
            return kept, []
        return kept | {"yarn": "on"}, [
            "YaRN stays on, because the weights were trained with it: model.args.yarn = "
            f'"auto" would turn it off for sequences of {self.max_seq_len} tokens, which are not '
            f"longer than original_seq_len ({self.original_seq_len}); set model.args.yarn = "
            '"on", or "off" to continue without it'
        ]

    def context_changes(self, before: Self) -> list[str]:
        if self.use_yarn != before.use_yarn:
            now, then = ("on", "without") if self.use_yarn else ("off", "with")
            return [
                f"YaRN is {now} from now on, but the weights were trained {then} it so far: yarn "
                f'is "{self.yarn}" now, with sequences of {self.max_seq_len} tokens and an '
                f"original_seq_len of {self.original_seq_len}"
            ]
        differing = [
            f"{name} {getattr(self, name)} ({getattr(before, name)} so far)"
            for name in self.yarn_numbers
            if self.use_yarn and getattr(self, name) != getattr(before, name)
        ]
        if not differing:
            return []
        return [f"YaRN differs from that of the weights' training: {', '.join(differing)}"]

    @property
    def has_experts(self) -> bool:
        return self.n_dense_layers < self.n_layers or self.n_mtp_layers > 0

    @property
    def dense_widths(self) -> dict[str, int]:
        return {"inter_dim": self.inter_dim} if self.n_dense_layers else {}

    def check_coefficients(self, names: Set[str]) -> None:
        if "mtp_loss_weight" in names and self.n_mtp_layers == 0:
            raise UserError(
                "[[schedule.phase]] sets mtp_loss_weight, but model.args.n_mtp_layers is 0: set it "
                "to 1, or leave mtp_loss_weight out."
            )
        super().check_coefficients(names - {"mtp_loss_weight"})

    @property
    def stage_channels(self) -> int:
        return self.dim * (1 + self.n_mtp_layers)

    @property
    def has_side_losses(self) -> bool:
        return self.n_mtp_layers > 0

    @property
    def num_weights(self) -> int:
        ends = 2 * self.dim * self.vocab_size  # MTP layers share them
        return self._layer_weights(self.moe_args.num_experts) + ends

    def _layer_weights(self, routed_experts: int) -> int:
        """Count the weights of all layers.

        routed_experts: per layer with experts.
        """
        moe = self._moe_weights(routed_experts)
        weights = self.n_layers * self._attention_weights()
        weights += self.n_dense_layers * 3 * self.dim * self.inter_dim
        weights += (self.n_layers - self.n_dense_layers) * moe
        return weights + self.n_mtp_layers * (self._attention_weights() + moe + 2 * self.dim**2)

    def train_flops_per_token(self, seq_len: int, *, causal: bool = True) -> float:
        """FLOPs of a training step per token: 3 × those of the forward pass.

        Forward: 2 FLOPs per weight that a token uses, plus attention's scores and sums. Norms, RoPE
        and the softmax are left out, as is usual.

        causal: count the half of the S × S scores that causal attention needs (as for MFU);
            otherwise all of them.
        """
        weights = self._layer_weights(self.moe_args.top_k)
        # The output, of each MTP layer too; the embedding is a look-up.
        weights += (1 + self.n_mtp_layers) * self.dim * self.vocab_size
        keys_per_query = seq_len / 2 if causal else seq_len
        core = 2 * self.n_heads * (self.qk_head_dim + self.v_head_dim) * keys_per_query
        return 3 * (2 * weights + (self.n_layers + self.n_mtp_layers) * core)

    def _attention_weights(self) -> int:
        q_out = self.n_heads * self.qk_head_dim
        if self.q_lora_rank:
            q = self.q_lora_rank * (self.dim + q_out)
        else:
            q = self.dim * q_out
        kv_down = self.dim * (self.kv_lora_rank + self.qk_rope_head_dim)
        kv_up = self.kv_lora_rank * self.n_heads * (self.qk_nope_head_dim + self.v_head_dim)
        return q + kv_down + kv_up + self.n_heads * self.v_head_dim * self.dim

    def _moe_weights(self, routed_experts: int) -> int:
        experts = routed_experts + self.moe_args.num_shared_experts
        return self.dim * (3 * self.moe_inter_dim * experts + self.moe_args.num_experts)
