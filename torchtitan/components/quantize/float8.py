"""The converters of FP8: they choose which layers compute in FP8 (ops/fp8), and say so.

In FP8 are products with the weights of attention, feed-forwards and experts, as in DeepSeek-V3. The
embedding, the router's gate, and the projection of multi-token prediction stay as they are, and so
does the head, unless it is asked for. Weights do not change: a checkpoint can be continued with and
without FP8.
"""

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import NamedTuple, cast

import torch
from torch import nn

from torchtitan.config import JobConfig
from torchtitan.config.quantize_tables import EXPERTS, FLOAT8, LINEAR
from torchtitan.config.schema import as_text
from torchtitan.ops.fp8.linear import Fp8Recipe, why_not_experts, why_not_linear
from torchtitan.ops.linear import Linear, Output
from torchtitan.protocols.layers import ExpertWeights
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger
from torchtitan.tools.names import listed

# DeepSeek's published weights hold it in bf16.
_NEVER = ("eh_proj",)


def uses_float8(config: JobConfig) -> bool:
    return any(name in FLOAT8 for name in config.model.converters)


def dispatches_float8(config: JobConfig) -> bool:
    """Tell whether tokens travel to their experts in FP8."""
    experts = {"float8", EXPERTS} & set(config.model.converters)
    return bool(experts) and config.quantize.grouped_mm.float8.dispatch


def check_float8_device(config: JobConfig, device: torch.device) -> None:
    """Raise `UserError` where FP8 is to run on a GPU that has no kernels for it."""
    float8 = config.quantize.linear.float8
    if not uses_float8(config) or float8.emulate or device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        raise UserError(
            f"model.converters = {as_text(config.model.converters)} needs a Hopper GPU (compute "
            f"capability 9.0), but this is a {torch.cuda.get_device_name(device)} "
            f"({capability[0]}.{capability[1]}); set quantize.linear.float8.emulate to true to "
            "compute the same numbers slowly, or model.converters to []."
        )
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        raise UserError(
            f"model.converters = {as_text(config.model.converters)} compiles its kernels through "
            "the package cuda-bindings, which is not installed; run: pip install cuda-bindings"
        )


class Conversion(NamedTuple):
    """The choice of layers.

    layers: in FP8, by name.
    kept: names of those that stay as they are, by reason.
    """

    layers: dict[str, Linear | ExpertWeights]
    kept: dict[str, list[str]]


def convert_to_float8(model: nn.Module, config: JobConfig) -> None:
    """Let layers of a whole model compute in FP8. Raises `UserError` where names in the config
    match nothing, or nothing can be converted."""
    for layer in _choose(model, config).layers.values():
        layer.fp8 = _recipe(config, layer)


def log_float8(model: nn.Module, config: JobConfig) -> None:
    """Log which layers of a whole model are converted; nothing without FP8."""
    if not uses_float8(config):
        return
    chosen = _choose(model, config)
    by_recipe: dict[Fp8Recipe, list[str]] = {}
    for name, layer in chosen.layers.items():
        by_recipe.setdefault(_recipe(config, layer), []).append(name)
    for recipe, names in by_recipe.items():
        gradients = "e5m2" if recipe.wide_gradients else "e4m3"
        logger.info("FP8 (%s, gradients %s): %s", recipe.scales, gradients, listed(names))
    for reason, names in chosen.kept.items():
        logger.info("Not in FP8 (%s): %s", reason, listed(names))
    if config.quantize.linear.float8.emulate:
        logger.warning(
            "FP8 is emulated in plain torch (quantize.linear.float8.emulate): the numbers of a "
            "Hopper GPU, several times slower than without FP8"
        )


def _recipe(config: JobConfig, layer: Linear | ExpertWeights) -> Fp8Recipe:
    float8 = config.quantize.linear.float8
    takes_others = isinstance(layer, Linear) and not isinstance(layer, Output)
    scales = (float8.recipe_name or "blockwise") if takes_others else "blockwise"
    # One scale for all gradients needs e5m2's range: torchao's choice, too.
    gradients = float8.gradient_dtype or ("e5m2" if scales == "tensorwise" else "e4m3")
    return Fp8Recipe(
        wide_gradients=gradients == "e5m2",
        emulate=float8.emulate,
        dispatch=config.quantize.grouped_mm.float8.dispatch,
        gather=float8.enable_fsdp_float8_all_gather,
        scales=scales,
    )


def _choose(model: nn.Module, config: JobConfig) -> Conversion:
    converters = config.model.converters
    float8, experts = config.quantize.linear.float8, config.quantize.grouped_mm.float8
    chosen = Conversion({}, {})
    if "float8" in converters or LINEAR in converters:
        _check_names("quantize.linear.float8.filter_fqns", float8.filter_fqns, model)
        for name, layer in _linears(model, with_head=float8.head):
            reason = why_not_linear(layer.in_features, layer.out_features)
            if _named(name, float8.filter_fqns):
                reason = "filter_fqns"
            _sort_in(chosen, name, layer, reason)
    if "float8" in converters or EXPERTS in converters:
        fqns = [experts.fqns] if isinstance(experts.fqns, str) else experts.fqns
        _check_names(f"{EXPERTS}.fqns", fqns, model)
        for name, layer in model.named_modules():
            if isinstance(layer, ExpertWeights) and (_named(name, fqns) or not fqns):
                reason = why_not_experts(layer.w1.size(2), layer.w1.size(1))
                _sort_in(chosen, name, layer, reason)
    if not chosen.layers:
        reasons = (f"{listed(names)}: {reason}" for reason, names in chosen.kept.items())
        raise UserError(
            f"model.converters = {as_text(converters)} converts no layer of this model "
            f"({'; '.join(reasons)}); correct the names, or set it to []."
        )
    return chosen


def _sort_in(
    chosen: Conversion, name: str, layer: Linear | ExpertWeights, reason: str | None
) -> None:
    if reason is None:
        chosen.layers[name] = layer
    else:
        chosen.kept.setdefault(reason, []).append(name)


def _linears(model: nn.Module, *, with_head: bool) -> Iterable[tuple[str, Linear]]:
    kinds = (Linear, Output) if with_head else (Linear,)
    for name, layer in model.named_modules():
        if type(layer) in kinds and not name.endswith(_NEVER):
            yield name, cast(Linear, layer)


def _named(name: str, parts: Sequence[str]) -> bool:
    return any(part in name for part in parts)


def _check_names(key: str, parts: Iterable[str], model: nn.Module) -> None:
    names = [name for name, _ in model.named_modules()]
    for part in parts:
        if not part or not any(part in name for name in names):
            raise UserError(
                f"{key}: {as_text(part)} is part of no module's name; correct it, or leave it out "
                '(names look like "layers.3.attention.wo", "layers.3.moe.experts").'
            )
