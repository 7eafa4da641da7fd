"""The interface of a model and of its arguments, on which the trainer relies."""

import dataclasses
from collections.abc import Iterator, Mapping, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import (
    Any,
    Literal,
    Self,
    get_args,
    get_origin,
    get_type_hints,
)

import torch
from torch import Tensor, nn

from torchtitan.config import Parallelism
from torchtitan.config.schema import as_float, as_text, matches
from torchtitan.protocols.layers import MoELayer
from torchtitan.tools.errors import UserError, suggest


@dataclass(frozen=True, kw_only=True)
class BaseModelArgs:
    """Sizes of a model. Frozen: a run gets its own copy with its overrides.

    vocab_size: entries of the vocabulary.
    max_seq_len: tokens of a sequence in this run.
    dim: channels of a hidden state.
    n_layers: layers.
    context_len: positions for which the weights are trained, whatever this run's length (of a
        published model, those that it was trained on); exports use it where it is longer.
    """

    vocab_size: int
    max_seq_len: int
    dim: int
    n_layers: int
    context_len: int | None = None

    def for_run(
        self,
        *,
        overrides: dict[str, Any],
        seq_len: int,
        force_load_balance: bool = False,
    ) -> Self:
        """Copy with the job's `[model.args]` and sequence length. Raises `UserError`.

        overrides: `[model.args]`.
        """
        args = override_fields(self, overrides, "model.args")
        if "max_seq_len" not in overrides:
            args = dataclasses.replace(args, max_seq_len=seq_len)
        elif args.max_seq_len < seq_len:
            raise UserError(
                f"model.args.max_seq_len ({args.max_seq_len}) must be at least seq_len "
                f"({seq_len}); leave it out to follow seq_len."
            )
        return args.with_forced_load_balance() if force_load_balance else args

    def as_flavor(self) -> Self:
        """Copy of the arguments of published weights for use as a flavor: their length becomes
        `context_len`."""
        return dataclasses.replace(self, context_len=self.max_seq_len)

    def weights_identity(self) -> dict[str, Any]:
        """Arguments that must be equal for weights to compute the same, in JSON's types.

        Not the sequence length: it may grow.
        """
        arguments = dataclasses.asdict(self)
        arguments.pop("max_seq_len")
        arguments.pop("context_len")
        return arguments

    @property
    def max_positions(self) -> int:
        """Positions for which the weights are trained, those of this run included."""
        return max(self.max_seq_len, self.context_len or 0)

    def keep_from(self, stored: Self) -> tuple[dict[str, Any], list[str]]:
        """Return arguments to keep from `stored`, which this run's length would change, and
        sentences about them.

        stored: arguments of the weights that are loaded.
        """
        return {"context_len": max(self.context_len or 0, stored.max_positions)}, []

    def context_changes(self, before: Self) -> list[str]:
        """Describe, in a sentence each, the changes in how positions are encoded since `before`."""
        return []

    def with_forced_load_balance(self) -> Self:
        """Copy that routes tokens evenly, for benchmarks. Raises `UserError` without experts."""
        raise UserError(
            "debug.moe_force_load_balance is true, but this model has no experts; set it to false."
        )

    @property
    def num_weights(self) -> int:
        """Elements of all matrices: norms and biases, one in thousands, are left out."""
        raise NotImplementedError

    @property
    def has_side_losses(self) -> bool:
        """Tell whether training has losses besides that of the logits, computed by the model."""
        return False

    @property
    def keeps_documents_apart(self) -> bool:
        """Tell whether tokens see tokens of their own document only."""
        return False

    @property
    def head_channels(self) -> tuple[int, int]:
        """Channels of an attention head's queries and of its values; 0 without attention."""
        return 0, 0

    @property
    def stage_channels(self) -> int:
        """Channels of the tensors (B, S, stage_channels) between the parts of a pipeline."""
        return self.dim

    def check_tokenizer(self, eos_id: int | None) -> None:
        """Raise `UserError` where the model needs a token that the tokenizer doesn't have."""

    def check_layout(self, parallelism: Parallelism) -> None:
        """Raise `UserError` where this model does not support the layout."""
        tp, cp = parallelism.tensor_parallel_degree, parallelism.context_parallel_degree
        method = parallelism.context_parallel_rotate_method
        self.check_expert_parallel(parallelism.expert_parallel_degree)
        self.check_tensor_parallel(tp, experts=parallelism.expert_tensor_parallel_degree)
        self.check_context_parallel(cp, method=method, tensor_parallel=tp)
        if parallelism.expert_parallel_dispatch == "all_gather":
            self.check_gathered_experts(split=parallelism.expert_tensor_parallel_degree)

    def without_effect(
        self, overrides: Mapping[str, Any], coefficients: Mapping[str, float]
    ) -> Iterator[str]:
        """Yield a sentence on each setting that is allowed, but has no effect.

        overrides: the job's `[model.args]`.
        coefficients: largest values that phases set.
        """
        yield from ()

    def check_expert_parallel(self, degree: int) -> None:
        """Raise `UserError` where the experts can't be spread over `degree` ranks."""
        if degree > 1:
            raise UserError(
                f"parallelism.expert_parallel_degree = {degree}, but this model has no experts; "
                "set it to 1."
            )

    def check_gathered_experts(self, *, split: int) -> None:
        """Raise `UserError` where experts, each over `split` ranks, can't compute on all tokens."""

    def check_coefficients(self, names: Set[str]) -> None:
        """Raise `UserError` for coefficients, set by a phase, that this model does not have."""
        if names:
            raise UserError(
                f"[[schedule.phase]] sets {min(names)}, which this model does not have; leave it "
                "out."
            )

    def check_tensor_parallel(self, degree: int, *, experts: int) -> None:
        """Raise `UserError` where the matrices can't be split over `degree` ranks, or those of each
        expert over `experts` ranks.
        """
        if degree > 1:
            raise UserError(
                f"parallelism.tensor_parallel_degree = {degree}, but this model has no plan for "
                "tensor parallelism; set it to 1."
            )

    def check_context_parallel(self, degree: int, *, method: str, tensor_parallel: int) -> None:
        """Raise `UserError` where attention can't work on sequences split over `degree` ranks."""
        if degree > 1:
            raise UserError(
                f"parallelism.context_parallel_degree = {degree}, but this model has no plan for "
                "context parallelism; set it to 1."
            )

    def train_flops_per_token(self, seq_len: int, *, causal: bool = True) -> float:
        """FLOPs of forward and backward pass per token, without recomputation (2 per
        multiply-add)."""
        raise NotImplementedError


def override_fields(args: Any, overrides: dict[str, Any], path: str) -> Any:
    """Copy the dataclass `args` with fields replaced, nested ones by nested tables.

    "none" unsets an optional field. Raises `UserError` for an unknown name, a wrong type, or values
    that the dataclass itself refuses.

    path: name of `args` in messages, such as "model.args".
    """
    fields = {field.name: field for field in dataclasses.fields(args)}
    hints = get_type_hints(type(args))
    changes = {}
    for name, value in overrides.items():
        key = f"{path}.{name}"
        if name not in fields:
            raise UserError(f"{key} is not a model argument{suggest(name, fields)}")
        current = getattr(args, name)
        if dataclasses.is_dataclass(current) and isinstance(value, dict):
            changes[name] = override_fields(current, value, key)
        else:
            changes[name] = _checked(value, hints[name], key, current)
    try:
        return dataclasses.replace(args, **changes)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _checked(value: Any, kind: Any, key: str, current: Any) -> Any:
    if value == "none" and matches(None, kind):
        return None  # TOML has no null
    if get_origin(kind) is Literal and not matches(value, kind):
        raise UserError(
            f"{key} = {as_text(value)} is not an allowed value{suggest(str(value), get_args(kind))}"
        )
    if not matches(value, kind):
        raise UserError(
            f"{key} = {as_text(value)} is of the wrong type: this model has {as_text(current)}; "
            "write a value of that type."
        )
    return as_float(value, kind)


class BaseModel(nn.Module):
    """A decoder: embedding, blocks by number, norm, output. Runs on one CPU without process groups.

    Modules on another pipeline stage are missing (blocks) or None (the others).

    `forward(tokens, attention_masks=None, positions=None, token_mask=None, labels=None) -> logits`,
    with labels the summed loss: see `models.decoder.Decoder.forward`.
    """

    # Whether `forward` takes labels and then returns the sum of their losses.
    computes_loss = False

    model_args: BaseModelArgs
    tok_embeddings: nn.Embedding | None
    layers: nn.ModuleDict
    norm: nn.RMSNorm | None
    output: nn.Linear | None

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Fill all parameters and buffers; call after moving a meta-device model to its device."""
        raise NotImplementedError

    def set_coefficients(self, values: Mapping[str, float]) -> None:
        """Set weights of losses, and speeds, of a phase; `check_coefficients` has checked the
        names."""

    def set_context(self, model_args: BaseModelArgs) -> None:
        """Encode positions according to `model_args`, which may differ from the model's own
        arguments only in max_seq_len and in the scaling of positions."""
        raise NotImplementedError

    def blocks(self) -> dict[str, nn.Module]:
        """List all layers by name, those beside the main path included: the units in which weights
        are gathered, activations recomputed, and code compiled."""
        return dict(self.layers.items())

    def extra_inputs(
        self,
        tokens_BS: Tensor,
        labels_BS: Tensor,
        documents_BS: Tensor,
        queries_Q: Tensor | None = None,
        weights_BS: Tensor | None = None,
    ) -> dict[str, Any]:
        """Make the further arguments of `forward` in training, by name: tensors (B, …) made from
        whole sequences, or tuples of such.

        tokens_BS, labels_BS: int64, of whole sequences.
        documents_BS: int64, the document of each token; −1 = padding.
        queries_Q: positions for which to make them, as in `get_attention_masks`.
        weights_BS: fp32, of the labels; None = 1.
        """
        return {}

    def take_side_losses(self) -> dict[str, Tensor]:
        """Return the losses beside the main one, by name, and reset them.

        They are summed over this rank's tokens since the last call, without their weights.
        """
        return {}

    def set_tokens_in_step(self, tokens: Tensor, labels: Tensor) -> None:
        """Set the divisors of losses that arise inside of layers; call before each forward pass.

        tokens: scalar, tokens of the optimizer step over all ranks, without padding.
        labels: scalar, labels that count in the loss, or the sum of their weights.
        """

    def moe_layers(self) -> Mapping[int, MoELayer]:
        """List the `MoE` module of every layer that has one, by layer number."""
        raise NotImplementedError

    def caching(self, batch_size: int, length: int) -> AbstractContextManager[None]:
        """Cache earlier tokens inside of this context, for generation.

        `forward` then takes only new tokens; attention_masks is bool (B, 1, S, earlier + S), True =
        may be seen. Raises `UserError` where the model does not support it.

        length: tokens of a sequence at most.
        """
        raise UserError(f"{type(self).__name__} can't generate text yet; use transformers or vLLM.")

    def get_attention_masks(
        self,
        documents_BS: Tensor,
        queries_Q: Tensor | None = None,
        device: torch.device | None = None,
    ) -> Any:
        """Make masks for `forward`, or None for causal attention.

        documents_BS: int64, the document of each token of whole sequences; cheapest on the CPU.
        queries_Q: with context parallelism, the positions in the sequence that this rank computes;
            the mask is for these positions and all tokens up to the last of them.
        device: of the masks; None = that of `documents_BS`.
        """
        raise NotImplementedError
