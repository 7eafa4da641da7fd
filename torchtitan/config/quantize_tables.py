"""The tables [quantize.*]: training in lower precision, for the names in model.converters."""

from dataclasses import dataclass, field
from typing import Literal

LINEAR = "quantize.linear.float8"
EXPERTS = "quantize.grouped_mm.float8"
# Names in model.converters; "float8" is both.
FLOAT8 = ("float8", LINEAR, EXPERTS)


@dataclass(frozen=True)
class Float8Linear:
    """FP8 for linear layers; takes effect through model.converters only."""

    enable_fsdp_float8_all_gather: bool = False
    """Quantise weights before FSDP gathers them, experts' too: half the bytes."""
    precompute_float8_dynamic_scale_for_fsdp: bool = False
    """Compute all scales for FSDP in one go after the optimizer step."""
    recipe_name: Literal["blockwise", "tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = None
    """Granularity of the scales; unset: blockwise, DeepSeek-V3's recipe. Experts are blockwise."""
    filter_fqns: list[str] = field(default_factory=list)
    """Modules that stay in high precision, by parts of their names."""
    emulate: bool = False
    """Compute in plain torch with FP8's rounding, for machines without FP8; experts, too."""
    gradient_dtype: Literal["e4m3", "e5m2"] | None = None
    """FP8 format of gradients, experts' too; unset: e4m3, tensor-wise e5m2 (ours)."""
    head: bool = False
    """Convert the output layer, too; blockwise, like experts (ours)."""


@dataclass(frozen=True)
class QuantizeLinear:
    """Quantisation of linear layers."""

    float8: Float8Linear = field(default_factory=Float8Linear)
    """FP8 for linear layers."""


@dataclass(frozen=True)
class Float8GroupedMM:
    """FP8 for the grouped matrix multiplications of experts; through model.converters only."""

    fqns: list[str] | str = field(default_factory=list)
    """Modules to convert, by parts of their names; empty with the converter "float8": all."""
    dispatch: bool = False
    """Send tokens to their experts, and gradients back to them, in FP8: the same results (ours)."""


@dataclass(frozen=True)
class QuantizeGroupedMM:
    """Quantisation of the experts' grouped matrix multiplications."""

    float8: Float8GroupedMM = field(default_factory=Float8GroupedMM)
    """FP8 for experts."""


@dataclass(frozen=True)
class Quantize:
    """Lower-precision training; takes effect through model.converters only."""

    linear: QuantizeLinear = field(default_factory=QuantizeLinear)
    """Linear layers."""
    grouped_mm: QuantizeGroupedMM = field(default_factory=QuantizeGroupedMM)
    """Experts."""
