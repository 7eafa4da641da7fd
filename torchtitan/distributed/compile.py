"""torch.compile, layer by layer: equal layers share one compiled graph."""

from collections.abc import Mapping

import torch
import torch._dynamo
from torch import nn

from torchtitan.config import Compile
from torchtitan.tools.errors import UserError, suggest
from torchtitan.tools.logging import logger


def check_compile_backend(config: Compile) -> None:
    """Raise `UserError` where `compile.backend` is none of torch's."""
    if not config.enable:
        return
    known = torch._dynamo.list_backends(exclude_tags=())
    if config.backend not in known:
        raise UserError(
            f"compile.backend '{config.backend}' is not one of this torch"
            f"{suggest(config.backend, known)}"
        )


def apply_compile(layers: Mapping[str, nn.Module], config: Compile) -> None:
    """Compile each layer's forward in place, inside of FSDP's hooks; parameter names stay."""
    if not config.enable or "model" not in config.components:
        return
    for layer in layers.values():
        layer.forward = torch.compile(layer.forward, backend=config.backend)
    logger.info("Compile: %d layers, backend %s", len(layers), config.backend)
