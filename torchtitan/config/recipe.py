"""Settings of the training recipe: update rule, learning rate, phases, blend of data, alarms.

Frozen dataclasses with a sentence per key, as in `job_config.py`, which takes them in.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ParamGroup:
    """Parameters with a weight decay or a learning rate of their own; the first table holds."""

    match: list[str]
    """Their whole names, * stands for anything: "tok_embeddings.*", "*norm.weight"."""
    weight_decay: float | None = None
    """Strength of their weight decay; unset: as for others of their kind."""
    lr_factor: float = 1.0
    """Factor on their learning rate."""


@dataclass(frozen=True)
class Optimizer:
    """The update rule."""

    name: Literal["Adam", "AdamW", "Muon"] = "AdamW"
    """Adam adds weight_decay to the gradient, AdamW takes it off; Muon: for matrices (ours)."""
    lr: float = 8e-4
    """Peak learning rate, before the factor of lr_scheduler."""
    beta1: float = 0.9
    """Decay of the running mean of gradients, in [0, 1)."""
    beta2: float = 0.95
    """Decay of the running mean of squared gradients, in [0, 1)."""
    eps: float = 1e-8
    """Added to the denominator of the update."""
    weight_decay: float = 0.1
    """Strength of the weight decay."""
    weight_decay_on: Literal["matrices", "all"] = "matrices"
    """Decay only parameters with two or more dimensions, or all of them (ours)."""
    group: list[ParamGroup] = field(default_factory=list)
    """Exceptions by name, [[optimizer.group]]; keys of each: docs/recipe.md (ours)."""
    implementation: Literal["for-loop", "foreach", "fused"] = "fused"
    """How the update is computed; the result is the same up to rounding."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """With AdamW: type in which its running means are kept (ours)."""
    muon_momentum: float = 0.95
    """With Muon: decay of the running mean of a matrix's gradients, in [0, 1) (ours)."""
    muon_adjust: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """With Muon: scale a matrix's update to the size of AdamW's, or as first published (ours)."""
    early_step_in_backward: bool = False
    """Update each parameter as soon as its gradient is there (one process, max_norm = inf)."""


@dataclass(frozen=True)
class LRScheduler:
    """The learning rate over the run: warm-up, stable, decay."""

    warmup_steps: int = 200
    """Steps of linear warm-up."""
    decay_ratio: float | None = None
    """Share of training.steps that decays, in [0, 1]; unset: all steps after the warm-up decay."""
    decay_type: Literal["linear", "sqrt", "cosine"] = "linear"
    """Shape of the decay."""
    min_lr_factor: float = 0.0
    """Where the decay ends, as a share of the peak learning rate, in [0, 1]."""


@dataclass(frozen=True)
class EMA:
    """A moving average of the weights, in CPU memory and in checkpoints (ours)."""

    enable: bool = False
    """Keep it (ours)."""
    decay: float = 0.999
    """Share of the average that a step leaves, in [0, 1) (ours)."""
    start_step: int = 0
    """Step whose weights it begins with; 0: those that the run begins with (ours)."""
    interval: int = 1
    """Steps from one update to the next; each then moves it by 1 - decay ** interval (ours)."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of the run, counted in tokens. What a phase leaves out stays as it was."""

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
    seq_len: int | None = None
    """Tokens per sequence."""
    local_batch_size: int | None = None
    """Sequences per forward pass of a data-parallel rank: fewer where they are longer."""
    yarn: Literal["auto", "on", "off"] | None = None
    """RoPE scaled for longer contexts, as model.args.yarn."""
    load_balance_coeff: float | None = None
    """Speed of the expert bias (the report's gamma)."""
    sequence_balance_coeff: float | None = None
    """Weight of the sequence-wise balance loss (the report's alpha)."""
    global_balance_coeff: float | None = None
    """Weight of the balance loss over the global batch, with the loads of the step before."""
    mtp_loss_weight: float | None = None
    """Weight of the multi-token prediction loss (the report's lambda)."""
    blend: dict[str, float] | None = None
    """Weights of the datasets of [[training.blend]] by name; from those not named, nothing."""

    def title(self, number: int) -> str:
        """What sentences call the phase; number: from 1."""
        return f"schedule.phase {number}" + (f" ('{self.name}')" if self.name else "")


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A dataset of a blend. The keys are those of [training]."""

    name: str
    """What phases and the log call it."""
    weight: float | None = None
    """Its share of the sequences, over the sum of weights; unset: none until a phase names it."""
    dataset: str = "text"
    """Name of the dataset."""
    dataset_path: str | None = None
    """File, folder or glob to read the dataset from, for local data."""
    dataset_text_key: str = "text"
    """Field of jsonl and parquet records that holds the text."""


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
