"""Tables about updates of the weights: [optimizer], [lr_scheduler], [ema]."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ParamGroup:
    """Parameters with a weight decay or learning rate of their own; the first table that matches
    applies."""

    match: list[str]
    """Their whole names, in which * stands for anything: "tok_embeddings.*", "*norm.weight"."""
    weight_decay: float | None = None
    """Strength of their weight decay; unset: the default of their kind."""
    lr_factor: float = 1.0
    """Factor on their learning rate."""


@dataclass(frozen=True)
class Optimizer:
    """The update rule."""

    name: Literal["Adam", "AdamW", "Muon"] = "AdamW"
    """Adam adds the decay to the gradient, AdamW to the update; Muon (ours): for matrices."""
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
    """Exceptions by name, [[optimizer.group]]; keys of each: docs/config.md (ours)."""
    implementation: Literal["for-loop", "foreach", "fused"] = "fused"
    """Implementation of the update; the result is the same up to rounding."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """With AdamW: type in which its running means are kept (ours)."""
    muon_momentum: float = 0.95
    """With Muon: decay of the running mean of a matrix's gradients, in [0, 1) (ours)."""
    muon_adjust: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """With Muon: scale a matrix's update to the size of AdamW's, or as first published (ours)."""
    early_step_in_backward: bool = False
    """Update each parameter as soon as its gradient is computed (one process, max_norm = inf)."""


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
    """Learning rate at the end of the decay, as a share of the peak, in [0, 1]."""


@dataclass(frozen=True)
class EMA:
    """A moving average of the weights, in CPU memory and in checkpoints (ours)."""

    enable: bool = False
    """Keep the average (ours)."""
    decay: float = 0.999
    """Share of the average that a step keeps, in [0, 1) (ours)."""
    start_step: int = 0
    """Step with whose weights the average begins; 0: the initial weights of the run (ours)."""
    interval: int = 1
    """Steps between updates; each moves the average by 1 - decay ** interval (ours)."""
