"""Stand-ins for GPU code while a pass runs over tensors without memory.

Everything else that runs is the model's own code. Each stand-in keeps for the backward pass what
the GPU's kernel keeps, and allocates what it allocates.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan.distributed import token_dispatch
from torchtitan.distributed.side_stream import SideStream
from torchtitan.models.decoder import parallelize
from torchtitan.models.deepseek_v3 import model as latent_attention
from torchtitan.ops import grouped_mm, linear_cross_entropy


@contextmanager
def _replaced(stand_ins: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    """Replace attributes inside the block; each entry: (owner, attribute, stand-in)."""
    before = [(owner, name, vars(owner).get(name)) for owner, name, _ in stand_ins]
    for owner, name, stand_in in stand_ins:
        setattr(owner, name, stand_in)
    try:
        yield
    finally:
        for owner, name, own in before:
            if own is None:  # inherited
                delattr(owner, name)
            else:
                setattr(owner, name, own)


@contextmanager
def without_filling() -> Iterator[None]:
    """Build models on the meta device without drawing random numbers: a third of the time."""
    with _replaced(
        [(kind, "reset_parameters", lambda _: None) for kind in (nn.Linear, nn.Embedding)]
    ):
        yield


@contextmanager
def without_data_parallel() -> Iterator[None]:
    """Spread a model over all axes but FSDP's: a layer has the weights that FSDP would gather."""
    with _replaced([(parallelize, "apply_data_parallel", lambda *_: None)]):
        yield


@contextmanager
def gpu_kernels(split_sizes: Sequence[int]) -> Iterator[None]:
    """Run passes of a model on meta tensors as they would run on a GPU.

    split_sizes: what the experts' dispatcher would hear from the device.
    """
    stand_ins = [
        (torch.Tensor, "is_cuda", property(lambda _: True)),
        (F, "rms_norm", _rms_norm),
        (F, "scaled_dot_product_attention", _attention),
        (latent_attention, "can_fuse", lambda *_: True),
        (linear_cross_entropy, "_cross_entropy_", _cross_entropy_in_place),
        (linear_cross_entropy, "_scale_", lambda x, factor: x.mul_(factor)),
        (grouped_mm, "grouped_mm_loop", lambda x_RK, w_EKN, _: x_RK @ w_EKN[0]),
        (token_dispatch, "on_host", lambda _: list(split_sizes)),
        # One stream more changes no size.
        (SideStream, "begin", lambda _, layer, x: layer(x)),
        (SideStream, "end", lambda _, layer, begun: begun),
        # A few numbers for each sequence, for the router's losses.
        (dist, "all_reduce", lambda *_, **__: None),
    ]
    with _replaced(stand_ins):
        yield


def _rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: Any = None) -> Tensor:
    return _RMSNorm.apply(x, weight)


class _RMSNorm(torch.autograd.Function):
    """torch's fused kernel keeps its input and a number for each row."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return x.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        return grad + x, torch.empty_like(weight)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Any = None,
    is_causal: bool = False,
    scale: Any = None,
) -> Tensor:
    """cuDNN's kernel; others keep the same."""
    return torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, True, False, scale=scale
    )[0]


def _cross_entropy_in_place(logits: Tensor, labels: Tensor, *, with_grad: bool) -> Tensor:
    logits.zero_()  # read and written once, as the kernel does
    return logits.new_empty((), dtype=torch.float32)


def compiled_loss(logits: Tensor) -> Tensor:
    """Loss of logits that are held, fused by the compiler: they are kept, their gradient is written
    once."""
    return _CompiledLoss.apply(logits)


class _CompiledLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits)
        return logits.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad):
        (logits,) = ctx.saved_tensors
        return logits.clone()
