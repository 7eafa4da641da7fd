"""torch.compile, layer by layer: equal layers share one compiled graph."""

import hashlib
import types
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch._dynamo
from torch import nn

from torchtitan import ops
from torchtitan.config import Compile
from torchtitan.tools.errors import UserError, suggest
from torchtitan.tools.logging import logger

# Inductor keeps compiled code from run to run, by the names of operators: it would call those of
# another version, whose results may be others.
OPERATORS = Path(ops.__file__).parent


def digest_of(folder: Path) -> str:
    """Return a digest of the Python files in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


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
    if not config.enable:
        return
    tag = f"torchtitan {digest_of(OPERATORS)}"
    if tag not in (others := torch.compiler.config.cache_key_tag):
        torch.compiler.config.cache_key_tag = f"{others} {tag}".strip()
    if "model" not in config.components:
        return
    compiled: dict[Callable, Callable] = {}
    for layer in layers.values():
        forward = layer.forward.__func__
        if forward not in compiled:
            compiled[forward] = torch.compile(forward, backend=config.backend)
        layer.forward = types.MethodType(compiled[forward], layer)
    logger.info("Compile: %d layers, backend %s", len(layers), config.backend)
