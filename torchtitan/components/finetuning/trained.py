"""The choice of trained parameters; all others are frozen: no gradient, no optimizer state.

Names are those of the whole model, before a pipeline cuts it, so that the choice is the same on
every rank.
"""

import re
from collections import Counter

import torch
from torch import nn

from torchtitan.components.finetuning.lora import adapter_sizes, add_adapters, sizes_as_text
from torchtitan.components.finetuning.patterns import check_patterns, matches_any
from torchtitan.components.quantize.float8 import convert_to_float8, uses_float8
from torchtitan.config import JobConfig, Training
from torchtitan.config.schema import as_text
from torchtitan.ops.lora import is_adapter
from torchtitan.protocols.model import BaseModel, BaseModelArgs
from torchtitan.protocols.train_spec import TrainSpec
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger

_EVERYTHING = ["*"]


def is_finetuning(config: JobConfig) -> bool:
    """Tell whether a part of the model is frozen."""
    training = config.training
    everything = training.trainable_fqns == _EVERYTHING and not training.frozen_fqns
    return "lora" in config.model.converters or not everything


def make_whole_model(spec: TrainSpec, model_args: BaseModelArgs, config: JobConfig) -> BaseModel:
    """Make the run's whole model on the meta device, with its adapters, its layers in FP8 and its
    frozen parameters.

    Raises `UserError` for patterns of names that don't fit the model.
    """
    with torch.device("meta"):
        model = spec.model_cls(model_args)
    if "lora" in config.model.converters:
        add_adapters(model, config.lora)
        _refuse_split_experts(model, config.parallelism.expert_tensor_parallel_degree)
    if uses_float8(config):
        convert_to_float8(model, config)
    freeze(model, config.training)
    return model


def _refuse_split_experts(model: BaseModel, degree: int) -> None:
    if degree > 1 and any(moe.experts.lora_scales for moe in model.moe_layers().values()):
        raise UserError(
            f"parallelism.expert_tensor_parallel_degree = {degree} splits each expert, and "
            "experts with adapters can't be split; set it to 1, or leave the experts out of "
            "lora.fqns."
        )


def freeze(model: nn.Module, training: Training) -> None:
    """Freeze all parameters that are not to be trained. With adapters these are trained, and beside
    them what trainable_fqns names; by default nothing. Raises `UserError`."""
    params = dict(model.named_parameters())
    names = set(params)
    for key in ("trainable_fqns", "frozen_fqns"):
        check_patterns(f"training.{key}", getattr(training, key), names, "parameter")
    trained = {name for name in names if is_adapter(name)}
    if not trained or training.trainable_fqns != _EVERYTHING:
        trained |= {name for name in names if matches_any(name, training.trainable_fqns)}
    trained -= {name for name in names if matches_any(name, training.frozen_fqns)}
    if not trained:
        raise UserError(
            f"training.frozen_fqns = {as_text(training.frozen_fqns)} freezes all parameters that "
            f"training.trainable_fqns = {as_text(training.trainable_fqns)} names; name fewer, so "
            "that some are trained."
        )
    for name, param in params.items():
        param.requires_grad_(name in trained)


def log_trained(model: BaseModel, config: JobConfig) -> None:
    """Log how many parameters of the whole model are trained, and which; nothing where all are."""
    elements: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for name, param in model.named_parameters():
        elements[param.requires_grad][_top(name)] += param.numel()
    counts = {trained: sum(parts.values()) for trained, parts in elements.items()}
    if not counts[False]:
        return
    total = sum(counts.values())
    logger.info(
        "Trained: %s of %s parameters (%.2f %%), in %s; frozen: %s",
        f"{counts[True]:,}",
        f"{total:,}",
        100 * counts[True] / total,
        ", ".join(elements[True]),
        ", ".join(part for part in elements[False] if part not in elements[True]) or "the rest",
    )
    if "lora" in config.model.converters:
        logger.info("LoRA: %s", sizes_as_text(adapter_sizes(model, config.lora)))
    _warn_of_moving_bias(model)


def _top(name: str) -> str:
    """First parts of a name, numbers as *: layers.*.attention."""
    parts = re.sub(r"(?<=\.)\d+(?=\.)", "*", name).split(".")
    return ".".join(parts[:3] if parts[0] in ("layers", "mtp") else parts[:1])


def _warn_of_moving_bias(model: BaseModel) -> None:
    moving = [
        moe.load_balance_coeff
        for moe in model.moe_layers().values()
        if not any(p.requires_grad for p in moe.router.parameters()) and moe.load_balance_coeff
    ]
    if moving:
        logger.warning(
            "The router is frozen, but its expert bias moves by load_balance_coeff = %g a step; "
            "set model.args.moe_args.load_balance_coeff to 0 to hold it",
            moving[0],
        )
