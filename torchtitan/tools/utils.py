"""The device of this process, and names for dtypes."""

import os

import torch

TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def device_type() -> str:
    """ "cuda" where a GPU is visible, else "cpu" (hide GPUs with CUDA_VISIBLE_DEVICES="")."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def local_device() -> torch.device:
    """The device that torchrun gave this process."""
    if device_type() == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
