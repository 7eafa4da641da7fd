"""torch.compile, layer by layer: equal layers share one compiled graph."""

import types
from collections.abc import Callable, Mapping

import torch
import torch._dynamo
from torch import nn

from torchtitan.config import Compile
from torchtitan.tools.errors import UserError, suggest
from torchtitan.tools.logging import logger


def check_compile_backend(config: Compile) -> None:
    """Raise `UserError` where `compile.backend` is not one of torch's."""
    if not config.enable:
        return
    known = torch._dynamo.list_backends(exclude_tags=())
    if config.backend not in known:
        raise UserError(
            f"compile.backend '{config.backend}' is not a backend of this torch"
            f"{suggest(config.backend, known)}"
        )


def apply_compile(layers: Mapping[str, nn.Module], config: Compile) -> None:
    """Compile each layer's forward in place, inside of FSDP's hooks; parameter names stay."""
    if not config.enable or "model" not in config.components:
        return
    compiled: dict[Callable, Callable] = {}
    for layer in layers.values():
        forward = layer.forward.__func__
        if forward not in compiled:
            compiled[forward] = torch.compile(forward, backend=config.backend)
        layer.forward = types.MethodType(compiled[forward], layer)
    logger.info("Compile: %d layers, backend %s", len(layers), config.backend)
