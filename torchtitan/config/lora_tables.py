"""The table [lora]: low-rank adapters, which model.converters = ["lora"] adds."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class LoRAOverride:
    """Matrices with a rank or an alpha of their own; the first table that matches applies."""

    fqns: list[str]
    """Their whole names, in which * stands for anything: "layers.*.moe.experts.*"."""
    rank: int | None = None
    """Rank of their adapters; unset: lora.rank."""
    alpha: float | None = None
    """Numerator of their adapters' factor; unset: lora.alpha."""


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters beside frozen weights; takes effect through model.converters (ours)."""

    rank: int = 16
    """Rank of an adapter, the inner size of B x A (ours)."""
    alpha: float = 32.0
    """Numerator of an adapter's factor, alpha / rank (ours)."""
    fqns: list[str] = field(default_factory=lambda: ["layers.*"])
    """Names of the adapted matrices; * stands for anything, norms and gates are left out (ours)."""
    override: list[LoRAOverride] = field(default_factory=list)
    """Exceptions by name, [[lora.override]]; keys of each: docs/config.md (ours)."""
    initial_load_path: str | None = None
    """Adapter folder in PEFT's format whose adapters a new run starts from (ours)."""
    save_merged: bool = False
    """With checkpoint.last_save_in_hf: write the merged weights, not the adapters alone (ours)."""
