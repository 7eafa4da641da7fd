"""Settings of the training recipe that torchtitan has not: tables that come in lists.

Frozen dataclasses with a sentence per key, as in `job_config.py`, which takes them in.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

# Why a key that one might look for in a phase is not there, and what to do instead.
_ONE_LENGTH = (
    "a run has one sequence length, because its memory and its compiled code depend on it; extend "
    "the context in a run of its own, with training.seq_len and model.args.yarn in its file and "
    "checkpoint.initial_load_path set to the last checkpoint of this one (docs/recipe.md)."
)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of the run, counted in tokens. What a phase leaves out stays as it was."""

    REFUSED: ClassVar[dict[str, str]] = {"seq_len": _ONE_LENGTH, "yarn": _ONE_LENGTH}

    name: str = ""
    """What the log calls the phase."""
    tokens: float
    """Length of the phase: tokens over all ranks, padding included."""
    lr: float | None = None
    """Learning rate, reached as lr_shape says."""
    lr_shape: Literal["constant", "linear", "cosine"] = "constant"
    """constant: lr from the start of the phase on; else a curve from the rate before to lr."""
    batch_size: int | None = None
    """Sequences per optimizer step, reached as batch_size_shape says."""
    batch_size_shape: Literal["constant", "linear"] = "constant"
    """constant: batch_size from the start of the phase on; linear: stairs from the size before."""
    batch_size_step: int | None = None
    """With batch_size_shape "linear": height of a stair, in sequences."""
    load_balance_coeff: float | None = None
    """Speed of the expert bias (the report's gamma)."""
    sequence_balance_coeff: float | None = None
    """Weight of the sequence-wise balance loss (the report's alpha)."""
    mtp_loss_weight: float | None = None
    """Weight of the multi-token prediction loss (the report's lambda)."""


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """A number of the log that must stay within bounds, looked at on every logged step."""

    watch: str
    """Which number, such as max_violation (all of them: docs/recipe.md)."""
    above: float | None = None
    """The alarm rings above this."""
    below: float | None = None
    """The alarm rings below this."""
    times: int = 1
    """Logged steps in a row that must be out of bounds before it rings."""
    action: Literal["warn", "checkpoint", "stop"] = "warn"
    """Warn only, save a checkpoint too, or (saved where checkpoints are enabled) end the run."""


@dataclass(frozen=True)
class Schedule:
    """What changes during the run: [[schedule.phase]], one table a phase, in order (ours)."""

    phase: list[Phase] = field(default_factory=list)
    """Phases, which replace lr_scheduler's decay; keys of each: docs/recipe.md (ours)."""
