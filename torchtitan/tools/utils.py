"""The device of this process, names of dtypes, and functions that torch.compile leaves alone."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from torchtitan.tools.errors import UserError
from torchtitan.tools.launcher import local_rank

TORCH_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}

F = TypeVar("F", bound=Callable[..., Any])


def eager(function: F, *, recursive: bool = True) -> F:
    """Apply `torch.compiler.disable` and keep the function's type, which its annotations lose."""
    return cast(F, torch.compiler.disable(function, recursive=recursive))


def device_type() -> str:
    """Return "cuda" where a GPU is visible, else "cpu" (hide GPUs with CUDA_VISIBLE_DEVICES="")."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_local_processes(count: int) -> None:
    """Raise `UserError` for more processes on this machine than it has GPUs, if it has any."""
    gpus = torch.cuda.device_count()
    if device_type() == "cuda" and count > gpus:
        raise UserError(
            f"{count} processes on this machine need a GPU each, but torch sees {gpus}: set NGPU "
            f'(torchrun: --nproc-per-node) to at most {gpus}, or CUDA_VISIBLE_DEVICES="" for CPU.'
        )


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to the device, without waiting for the work that the device still has."""
    if device.type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def local_device() -> torch.device:
    """Device of this process: with GPUs, that of LOCAL_RANK."""
    if device_type() == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", local_rank())
