"""Weights that are already in FP8, in the place of the weights that a layer computes with.

A layer's products take one as they take a bf16 tensor: autograd sees a tensor of the compute dtype
whose gradient is one, and the operators of linear.py find the values and scales in it. So weights
are quantised where they are written or sent, and not in every pass.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchtitan.ops.fp8 import quantize
from torchtitan.ops.fp8.choice import functions
from torchtitan.ops.fp8.quantize import BLOCK, E4M3, Fp8

Handler = Callable[..., Any]
_HANDLERS: dict[Any, Handler] = {}


class Fp8Weight(Tensor):
    """A weight (N, K), or a stack (E, N, K), by blocks (quantize.py).

    values, scales: e4m3 (…, N, K), and fp32 (…, ⌈N/128⌉, ⌈K/128⌉).
    dtype: of the gradient.
    """

    values: Tensor
    scales: Tensor

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor, scales: Tensor, *, dtype: torch.dtype):
        like = {"dtype": dtype, "device": values.device}
        return Tensor._make_wrapper_subclass(cls, values.shape, **like)

    def __init__(self, values: Tensor, scales: Tensor, *, dtype: torch.dtype):
        self.values, self.scales = values, scales

    def __repr__(self) -> str:
        return f"Fp8Weight{tuple(self.shape)}"

    def parts(self) -> list[Tensor]:
        """The tensors that it consists of."""
        return [self.values, self.scales]

    def by_blocks(self) -> Fp8:
        return Fp8(self.values.contiguous(), self.scales.contiguous())

    def dense(self) -> Tensor:
        """Return the numbers that it stands for, fp32."""
        values, scales = self.values, self.scales
        if self.ndim == 3:
            return quantize.blocks_to_float(Fp8(values, scales))
        return quantize.blocks_to_float(Fp8(values.unsqueeze(0), scales.unsqueeze(0)))[0]

    def each(self, function: Callable[[Tensor], Tensor]) -> "Fp8Weight":
        """Return the weight of which each part went through `function`."""
        return Fp8Weight(*map(function, self.parts()), dtype=self.dtype)

    # What torch.compile needs to take it apart and to put it together.

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["values", "scales"], self.dtype

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], dtype: torch.dtype, *_: Any) -> "Fp8Weight":
        return Fp8Weight(**inner, dtype=dtype)

    def _stable_hash_for_caching(self) -> str:
        return f"{self.__tensor_flatten__()} {tuple(self.shape)} {self.device}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = _HANDLERS.get(func)
        if handler is None:
            raise NotImplementedError(f"{func} of a weight in FP8")
        return handler(*args, **(kwargs or {}))


def quantised(weight: Tensor, dtype: torch.dtype, *, emulate: bool) -> Fp8Weight:
    """Quantise a weight (N, K) or a stack (E, N, K).

    dtype: of its gradient.
    """
    stack = weight if weight.ndim == 3 else weight.unsqueeze(0)
    parts = _quantise(stack, emulate)
    if weight.ndim == 2:
        parts = [part.squeeze(0) for part in parts]
    return Fp8Weight(*parts, dtype=dtype)


@torch.library.custom_op("torchtitan::fp8_by_blocks", mutates_args=())
def _quantise(w_ENK: Tensor, emulate: bool) -> tuple[Tensor, Tensor]:
    values, scales = functions(w_ENK, emulate).by_blocks(w_ENK)
    return values, scales


@_quantise.register_fake
def _(w_ENK, emulate):
    E, N, K = w_ENK.shape
    scales = w_ENK.new_empty(E, -(-N // BLOCK), -(-K // BLOCK), dtype=torch.float32)
    return torch.empty_like(w_ENK, dtype=E4M3), scales


def transposed(weight: Fp8Weight, *, emulate: bool) -> Fp8:
    """Return the numbers of a weight (N, K) as a stack (1, K, N), for the gradient of inputs."""
    return Fp8(*_transpose(*(part.unsqueeze(0) for part in weight.by_blocks()), emulate))


@torch.library.custom_op("torchtitan::fp8_transposed_blocks", mutates_args=())
def _transpose(values: Tensor, scales: Tensor, emulate: bool) -> tuple[Tensor, Tensor]:
    turned = functions(values, emulate).transposed_blocks(Fp8(values, scales))
    return turned.values, turned.scales


@_transpose.register_fake
def _(values, scales, emulate):
    (E, N, K), (_, n, k) = values.shape, scales.shape
    return values.new_empty(E, K, N), scales.new_empty(E, k, n)


def parts_of(tensor: Tensor) -> list[Tensor]:
    """Return the tensors that have memory: a weight's parts, or a plain tensor."""
    return tensor.parts() if isinstance(tensor, Fp8Weight) else [tensor]


def takes_fp8_weights(*operators: Any) -> Callable[[Handler], Handler]:
    """Decorate what computes `operators` for arguments of which one is an `Fp8Weight`."""

    def register(handler: Handler) -> Handler:
        _HANDLERS.update(dict.fromkeys(operators, handler))
        return handler

    return register


_aten = torch.ops.aten


@takes_fp8_weights(_aten.detach.default, _aten.alias.default)
def _alias(weight: Fp8Weight) -> Fp8Weight:
    return weight.each(lambda part: part)


@takes_fp8_weights(_aten.view.default, _aten.as_strided.default, _aten._unsafe_view.default)
def _same_view(weight: Fp8Weight, size: Any, *_: Any) -> Fp8Weight:
    assert tuple(size) == tuple(weight.shape), "blocks have no other shape"
    return _alias(weight)


@takes_fp8_weights(_aten.unsqueeze.default)
def _unsqueeze(weight: Fp8Weight, dim: int) -> Fp8Weight:
    assert dim == 0, "only a stack of one"
    return weight.each(lambda part: part.unsqueeze(0))


@takes_fp8_weights(_aten.split.Tensor)
def _split(weight: Fp8Weight, size: int, dim: int = 0) -> list[Fp8Weight]:
    """Split outputs, between blocks."""
    whole, rest = divmod(weight.size(dim), size)
    return _split_with_sizes(weight, [size] * whole + [rest] * (rest > 0), dim)


@takes_fp8_weights(_aten.split_with_sizes.default)
def _split_with_sizes(weight: Fp8Weight, sizes: list[int], dim: int = 0) -> list[Fp8Weight]:
    assert not any(size % BLOCK for size in sizes[:-1])
    outputs = _outputs(weight, dim)
    values = weight.values.split(sizes, outputs)
    scales = weight.scales.split([-(-size // BLOCK) for size in sizes], outputs)
    return [Fp8Weight(*each, dtype=weight.dtype) for each in zip(values, scales, strict=True)]


@takes_fp8_weights(_aten.cat.default)
def _cat(weights: list[Fp8Weight], dim: int = 0) -> Fp8Weight:
    """Concatenate outputs, between blocks."""
    first = weights[0]
    assert not any(weight.size(-2) % BLOCK for weight in weights[:-1])
    outputs = _outputs(first, dim)
    values = _cat_bytes([weight.values for weight in weights], outputs)
    scales = torch.cat([weight.scales for weight in weights], outputs)
    return Fp8Weight(values, scales, dtype=first.dtype)


def _outputs(weight: Fp8Weight, dim: int) -> int:
    """Return the dim of outputs, which alone is split and joined."""
    outputs = weight.ndim - 2
    assert dim % weight.ndim == outputs, "only outputs are split and joined"
    return outputs


def _cat_bytes(tensors: list[Tensor], dim: int) -> Tensor:
    """Concatenate FP8 as bytes, which every device and version of torch can."""
    return torch.cat([t.view(torch.uint8) for t in tensors], dim).view(tensors[0].dtype)


@takes_fp8_weights(_aten.copy_.default)
def _copy_(weight: Fp8Weight, source: Tensor, *_: Any) -> Fp8Weight:
    """Quantise another tensor's numbers into this weight."""
    new = quantised(source, weight.dtype, emulate=False)
    for part, its in zip(weight.parts(), new.parts(), strict=True):
        part.copy_(its)
    return weight


@takes_fp8_weights(_aten.zeros_like.default)
def _zeros_like(weight: Fp8Weight, **_: Any) -> Tensor:
    return torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
