"""Arguments that all decoders have, and their rules."""

import dataclasses
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

from torchtitan.config.degrees import divisors, nearest
from torchtitan.config.rules.numbers import check_argument_numbers
from torchtitan.config.schedule_tables import EXPERT_COEFFICIENTS
from torchtitan.models.moe import MoEArgs
from torchtitan.models.moe.without_effect import without_effect
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.tools.errors import UserError

# Limits. Each layer is a module of its own, and checks and log lines go through all of them.
MOST_LAYERS = 1_024
# 400 TB in fp32; the largest models have a hundredth of it.
MOST_WEIGHTS = 10**14


@dataclass(frozen=True, kw_only=True)
class DecoderArgs(BaseModelArgs):
    """Arguments of a decoder.

    n_heads: heads of the queries.
    norm_eps: of every RMSNorm.
    init_std: of all matrices, normal.
    attn_mask_type: causal, or block_causal (a token sees its own document only).
    moe_args: layers with experts, if any.
    moe_inter_dim: hidden channels of one expert.
    """

    n_heads: int
    norm_eps: float
    init_std: float
    attn_mask_type: Literal["causal", "block_causal"] = "causal"
    moe_args: MoEArgs = field(default_factory=MoEArgs)
    moe_inter_dim: int

    # Fields that weights don't depend on, here and in moe_args.
    not_of_weights: ClassVar[tuple[str, ...]] = ("init_std", "attn_mask_type")
    not_of_experts: ClassVar[tuple[str, ...]] = (
        "use_grouped_mm",
        "_debug_force_load_balance",
        *EXPERT_COEFFICIENTS,
    )

    def __post_init__(self) -> None:
        """Check numbers before the rules of a family, so that no comparison there sees NaN."""
        check_argument_numbers(self, {"n_layers": MOST_LAYERS, "n_mtp_layers": MOST_LAYERS})
        if self.context_len is not None:
            self.check_positive("context_len")

    def check_weights(self) -> None:
        """Raise `UserError` for a model too large for any machine."""
        if self.num_weights > MOST_WEIGHTS:
            raise UserError(
                f"these arguments make a model of {self.num_weights:.2g} weights, but at most "
                f"{MOST_WEIGHTS:.0e} are allowed; lower the largest of {self._sizes()}."
            )

    def _sizes(self) -> str:
        names = [f.name for f in dataclasses.fields(self) if f.type in (int, "int")]
        largest = sorted(names, key=lambda name: -getattr(self, name))[:3]
        return ", ".join(f"{name} ({getattr(self, name)})" for name in largest)

    @property
    def has_experts(self) -> bool:
        raise NotImplementedError

    @property
    def split_heads(self) -> tuple[str, int]:
        """Name and value of the argument that counts the heads that layouts distribute."""
        return "n_heads", self.n_heads

    @property
    def dense_widths(self) -> dict[str, int]:
        """Hidden channels of the dense layers, if the model has any, by argument."""
        return {}

    def check_positive(self, names: str) -> None:
        """Raise `UserError` for a field that is not above 0.

        names: of fields, separated by blanks.
        """
        for name in names.split():
            if getattr(self, name) <= 0:
                raise UserError(f"{name} ({getattr(self, name)}) must be above 0.")

    def weights_identity(self) -> dict[str, Any]:
        arguments = super().weights_identity()
        for name in self.not_of_weights:
            arguments.pop(name)
        for name in self.not_of_experts:
            arguments["moe_args"].pop(name)
        return arguments

    def with_forced_load_balance(self) -> Self:
        if not self.has_experts:
            return super().with_forced_load_balance()
        moe_args = dataclasses.replace(self.moe_args, _debug_force_load_balance=True)
        return dataclasses.replace(self, moe_args=moe_args)

    @property
    def keeps_documents_apart(self) -> bool:
        return self.attn_mask_type == "block_causal"

    def check_tokenizer(self, eos_id: int | None) -> None:
        if self.attn_mask_type == "block_causal" and eos_id is None:
            raise UserError(
                "model.args.attn_mask_type 'block_causal' needs a tokenizer with an end-of-text "
                "token, which separates documents; name one in its tokenizer_config.json, or use "
                "'causal'."
            )

    def check_coefficients(self, names: Set[str]) -> None:
        if not self.has_experts:
            return super().check_coefficients(names)
        if "load_balance_coeff" in names and self.moe_args.load_balance_coeff is None:
            raise UserError(
                "[[schedule.phase]] sets load_balance_coeff, but the model has no expert bias: set "
                "model.args.moe_args.load_balance_coeff to the initial speed (may be 0)."
            )
        super().check_coefficients(names - set(EXPERT_COEFFICIENTS))

    def without_effect(
        self, overrides: Mapping[str, Any], coefficients: Mapping[str, float]
    ) -> Iterator[str]:
        if self.has_experts:
            of_experts = {n: coefficients[n] for n in EXPERT_COEFFICIENTS if n in coefficients}
            yield from without_effect(self.moe_args, of_experts)
        elif "moe_args" in overrides:
            yield "model.args.moe_args is set, but no layer of this model has experts; leave it out"

    def check_expert_parallel(self, degree: int) -> None:
        if not self.has_experts:
            return super().check_expert_parallel(degree)
        num_experts = self.moe_args.num_experts
        if num_experts % degree:
            raise UserError(
                f"parallelism.expert_parallel_degree = {degree} must divide the number of experts, "
                f"model.args.moe_args.num_experts ({num_experts}); the nearest that does is "
                f"{min(divisors(num_experts), key=lambda n: abs(n - degree))}."
            )

    def check_gathered_experts(self, *, split: int) -> None:
        reason = None
        if split > 1:
            reason = f"parallelism.expert_tensor_parallel_degree = {split} splits each of them"
        elif self.moe_args.score_before_experts:
            reason = "model.args.moe_args.score_before_experts = true weights their inputs"
        elif not self.moe_args.use_grouped_mm:
            reason = "model.args.moe_args.use_grouped_mm = false computes one after the other"
        if self.has_experts and reason is not None:
            raise UserError(
                'parallelism.expert_parallel_dispatch = "all_gather" makes one operator of the '
                f'experts, but {reason}; set it to "auto".'
            )

    def check_tensor_parallel(self, degree: int, *, experts: int) -> None:
        sizes = dict([self.split_heads]) | {"vocab_size": self.vocab_size} | self.dense_widths
        shared = self.moe_args.num_shared_experts
        if self.has_experts and shared:
            name = "moe_inter_dim x model.args.moe_args.num_shared_experts"
            sizes[name] = self.moe_inter_dim * shared
        _check_divides("tensor_parallel_degree", degree, sizes)
        if self.has_experts:
            hidden = {"moe_inter_dim": self.moe_inter_dim}
            _check_divides("expert_tensor_parallel_degree", experts, hidden)

    def check_context_parallel(self, degree: int, *, method: str, tensor_parallel: int) -> None:
        name, heads = self.split_heads
        heads //= tensor_parallel
        if method == "alltoall" and heads % degree:
            shared = " over parallelism.tensor_parallel_degree" if tensor_parallel > 1 else ""
            raise UserError(
                'parallelism.context_parallel_rotate_method = "alltoall" distributes whole heads: '
                f"parallelism.context_parallel_degree = {degree} must divide model.args.{name}"
                f'{shared} ({heads}); use "allgather", which distributes positions only.'
            )


def _check_divides(key: str, degree: int, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        if size % degree:
            raise UserError(
                f"parallelism.{key} = {degree} must divide model.args.{name} ({size}); set it to "
                f"{nearest(degree, divisors(size))}."
            )
