"""Tables that a config may repeat: [[schedule.phase]] and [[metrics.alarm]]."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal


def _coefficient(*, of_experts: bool = False) -> Any:
    """A field of `Phase` that sets a weight of a loss, or a speed, of the model.

    of_experts: `MoEArgs` and `MoE` have it under the same name.
    """
    return field(default=None, metadata={"coefficient": True, "of_experts": of_experts})


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of the run, counted in tokens. A key that is left out keeps its value."""

    name: str = ""
    """Name of the phase in the log."""
    tokens: float
    """Length of the phase: tokens over all ranks, padding included."""
    lr: float | None = None
    """Learning rate at the end of the phase; lr_shape sets the way to it."""
    lr_shape: Literal["constant", "linear", "cosine"] = "constant"
    """constant: lr from the start of the phase on; else a curve from the previous rate to lr."""
    batch_size: int | None = None
    """Sequences per optimizer step at the end of the phase; batch_size_shape sets the way to it."""
    batch_size_shape: Literal["constant", "linear"] = "constant"
    """constant: batch_size from the phase's start on; linear: stairs from the previous size."""
    batch_size_step: int | None = None
    """With batch_size_shape "linear": height of a stair, in sequences."""
    seq_len: int | None = None
    """Tokens per sequence."""
    local_batch_size: int | None = None
    """Sequences per forward pass of a data-parallel rank; set fewer where sequences are longer."""
    yarn: Literal["auto", "on", "off"] | None = None
    """Scaling of RoPE for longer contexts, as model.args.yarn."""
    load_balance_coeff: float | None = _coefficient(of_experts=True)
    """Speed of the expert bias (the report's gamma)."""
    sequence_balance_coeff: float | None = _coefficient(of_experts=True)
    """Weight of the sequence-wise balance loss (the report's alpha)."""
    global_balance_coeff: float | None = _coefficient(of_experts=True)
    """Weight of the balance loss over the global batch, with the loads of the previous step."""
    z_loss_coeff: float | None = _coefficient(of_experts=True)
    """Weight of the router's z-loss."""
    mtp_loss_weight: float | None = _coefficient()
    """Weight of the multi-token prediction loss (the report's lambda)."""
    blend: dict[str, float] | None = None
    """Weights of the datasets of [[training.blend]], by name; datasets not named are not read."""

    def title(self, number: int) -> str:
        """Name the phase for messages.

        number: from 1.
        """
        return f"schedule.phase {number}" + (f" ('{self.name}')" if self.name else "")


# Coefficients of the model that phases set, from the fields above.
COEFFICIENTS = tuple(f.name for f in fields(Phase) if f.metadata.get("coefficient"))
EXPERT_COEFFICIENTS = tuple(f.name for f in fields(Phase) if f.metadata.get("of_experts"))


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """A number of the log that must stay within bounds, checked on every logged step."""

    watch: str
    """Name of the number, such as max_violation (all of them: docs/recipe.md)."""
    above: float | None = None
    """The alarm goes off above this."""
    below: float | None = None
    """The alarm goes off below this."""
    times: int = 1
    """Logged steps in a row that must be out of bounds before the alarm goes off."""
    action: Literal["warn", "checkpoint", "stop"] = "warn"
    """Warn only, save a checkpoint too, or (saved where checkpoints are enabled) end the run."""


@dataclass(frozen=True)
class Schedule:
    """Settings that change during the run: [[schedule.phase]], a table a phase, in order (ours)."""

    phase: list[Phase] = field(default_factory=list)
    """Phases, which replace lr_scheduler's decay; keys of each: docs/config.md (ours)."""
