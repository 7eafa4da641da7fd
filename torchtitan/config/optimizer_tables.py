"""Tables about what changes the weights: [optimizer], [lr_scheduler], [ema]."""

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
    """Adam adds weight_decay to the gradient, AdamW takes it off; Muon (ours): for matrices."""
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
