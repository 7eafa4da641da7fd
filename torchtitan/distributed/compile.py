"""torch.compile, layer by layer: equal layers share one compiled graph."""

import types
from collections.abc import Callable, Mapping

import torch
import torch._dynamo
from torch import nn

from torchtitan.config import Compile
from torchtitan.tools.errors import UserError, suggest
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_type


def check_compile_backend(config: Compile) -> None:
    """Raise `UserError` where `compile.backend` is none of torch's, or torch compiles wrongly."""
    if not config.enable:
        return
    # Seen with torch 2.11 on CPUs, backend "eager" included, by the tests of compiled layouts; on
    # GPUs the same version passes them, as 2.13 does on CPUs.
    if device_type() == "cpu" and torch.__version__ < (2, 13):
        raise UserError(
            "compile.enable = true on a CPU needs torch 2.13 or newer, but this is "
            f"{torch.__version__}, whose compiled layers have wrong gradients there; set it to "
            "false, or install torch 2.13."
        )
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
    compiled: dict[Callable, Callable] = {}
    for layer in layers.values():
        forward = layer.forward.__func__
        if forward not in compiled:
            compiled[forward] = torch.compile(forward, backend=config.backend)
        layer.forward = types.MethodType(compiled[forward], layer)
    logger.info("Compile: %d layers, backend %s", len(layers), config.backend)
