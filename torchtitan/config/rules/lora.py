"""Rules for [lora] and for the names of trained parameters.

Patterns that match nothing are found later, with the model (components/finetuning).
"""

import math
from collections.abc import Iterator
from typing import Any

from torchtitan.config.job_config import JobConfig
from torchtitan.config.lora_tables import LoRA
from torchtitan.config.schema import as_text
from torchtitan.tools.errors import UserError


def check_finetuning(config: JobConfig) -> None:
    """Raise `UserError` for the first setting that is impossible, or would change nothing."""
    for key in ("trainable_fqns", "frozen_fqns"):
        patterns = getattr(config.training, key)
        if "" in patterns or (key == "trainable_fqns" and not patterns):
            raise UserError(
                f"training.{key} = {as_text(patterns)} must name parameters, for example "
                '["layers.*.attention.*"].'
            )
    if "lora" in config.model.converters:
        _check_lora(config)
    elif config.lora != LoRA():
        raise UserError(
            '[lora] is set, but model.converters does not name "lora", so that no adapter is '
            'added; set model.converters to ["lora"], or leave [lora] out.'
        )


def _check_lora(config: JobConfig) -> None:
    for title, rank, alpha in _sizes(config.lora):
        if rank is not None and rank < 1:
            raise UserError(f"{title}rank = {rank} must be 1 or more.")
        if alpha is not None and not 0 < alpha < math.inf:
            raise UserError(f"{title}alpha = {as_text(alpha)} must be a finite number above 0.")
    for n, table in enumerate(config.lora.override, start=1):
        if table.rank is None and table.alpha is None:
            raise UserError(
                f"lora.override {n} changes nothing; set rank, alpha or both, or leave the table "
                "out."
            )
    for title, fqns in _patterns(config.lora):
        if not fqns or "" in fqns:
            raise UserError(
                f"{title}fqns = {as_text(fqns)} must name matrices, for example "
                '["layers.*.attention.*"].'
            )
    _check_together(config)


def _check_together(config: JobConfig) -> None:
    training, added = config.training, config.training.trainable_fqns
    if config.optimizer.name == "Muon":
        raise UserError(
            'optimizer.name = "Muon" with model.converters ["lora"]: Muon makes the singular '
            "values of an update equal, which says nothing about the product B x A of an adapter; "
            'set it to "AdamW".'
        )
    if added != ["*"] and training.dtype != "float32":
        raise UserError(
            f'training.trainable_fqns = {as_text(added)} with model.converters ["lora"] and '
            f'training.dtype = "{training.dtype}": adapters are trained in float32, and all '
            'trained parameters need one type; set training.dtype to "float32", or leave '
            "trainable_fqns out."
        )
    if config.compile.cuda_graph:
        raise UserError(
            'compile.cuda_graph = true is not supported yet with model.converters ["lora"]; set it '
            "to false."
        )


def _sizes(lora: LoRA) -> Iterator[tuple[str, Any, Any]]:
    yield "lora.", lora.rank, lora.alpha
    for n, table in enumerate(lora.override, start=1):
        yield f"lora.override {n}: ", table.rank, table.alpha


def _patterns(lora: LoRA) -> Iterator[tuple[str, list[str]]]:
    yield "lora.", lora.fqns
    for n, table in enumerate(lora.override, start=1):
        yield f"lora.override {n}: ", table.fqns
