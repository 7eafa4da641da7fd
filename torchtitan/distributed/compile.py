"""torch.compile, layer by layer: equal layers share one compiled graph."""

import torch
from torch import nn

from torchtitan.config import Compile
from torchtitan.tools.logging import logger


def apply_compile(layers: nn.ModuleDict, config: Compile) -> None:
    """Compile each layer's forward in place, inside of FSDP's hooks; parameter names stay."""
    if not config.enable or "model" not in config.components:
        return
    for layer in layers.values():
        layer.forward = torch.compile(layer.forward, backend=config.backend)
    logger.info("Compile: %d layers, backend %s", len(layers), config.backend)
