"""FSDP's all-gathers in FP8: a rank quantises its shard, and values and scales travel.

Half the bytes of bf16, and the layer takes what has arrived without quantising it again. The shard
is quantised as it is kept, so that with fp32 masters every rank computes with the numbers of
DeepSeek's published format; bf16 shards give the bits of a run that gathers bf16.

A shard has blocks of its own where these are whole ones of the weight: 128 rows each, or whole
experts. Other weights are gathered in bf16.
"""

import weakref
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.ops.fp8.quantize import BLOCK
from torchtitan.ops.fp8.weight import Fp8Weight, quantised
from torchtitan.ops.grouped_mm import local_part
from torchtitan.ops.linear import fp8_weights
from torchtitan.protocols.layers import ExpertWeights
from torchtitan.tools.logging import logger
from torchtitan.tools.names import listed


def choose_float8_gathers(model: nn.Module, dims: ParallelDims) -> None:
    """Keep `gather` in the recipes of those layers whose weights FSDP can gather in FP8; log one
    line for each kind. Call it before FSDP shards the model."""
    gathered: list[str] = []
    kept: dict[str, list[str]] = {}
    for name, layer in _asked(model):
        reason = why_not_gathered(layer, dims)
        layer.fp8 = layer.fp8._replace(gather=reason is None)
        (gathered if reason is None else kept.setdefault(reason, [])).append(name)
    if gathered:
        logger.info("FSDP gathers in FP8: %s", listed(gathered))
    for reason, names in kept.items() if dims.world_size > 1 else ():
        logger.info("FSDP gathers in full (%s): %s", reason, listed(names))


def why_not_gathered(layer: nn.Module, dims: ParallelDims) -> str | None:
    """Reason for which FSDP can't gather a layer's weights in FP8, None where it can."""
    experts = isinstance(layer, ExpertWeights)
    ranks = dims.expert_fsdp if experts else dims.fsdp
    if ranks == 1:
        return "no two ranks share them"
    if experts:
        held = local_part(layer.w1).size(0)
        return f"{held} experts are no multiple of {ranks} ranks" if held % ranks else None
    rows = local_part(cast(Tensor, layer.weight)).size(0)
    if rows % (ranks * BLOCK):
        return f"{rows} rows are no multiple of {ranks} ranks x {BLOCK}"
    return None


def attach_float8_gathers(model: nn.Module) -> None:
    """Give the shards of these layers FSDP's extension points, which it looks for at the first
    forward pass. Call it once memory is allocated for the shards."""
    for _, layer in _asked(model):
        for name in fp8_weights(layer):
            shard = cast(DTensor, layer.get_parameter(name))._local_tensor
            gather = _Gather(shard, layer.fp8.emulate)
            shard.fsdp_pre_all_gather = gather.before  # type: ignore[attr-defined]
            shard.fsdp_post_all_gather = gather.after  # type: ignore[attr-defined]


def _asked(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers whose recipe asks for it, by name."""
    for name, module in model.named_modules():
        if fp8_weights(module) and cast(Any, module).fp8.gather:
            yield name, module


class _Gather:
    """FSDP's extension points for one shard."""

    def __init__(self, shard: Tensor, emulate: bool):
        self._shard = weakref.ref(shard)  # which holds this object
        self._emulate = emulate

    def before(
        self, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], None]:
        """Return the parts that travel. FSDP looks at the number of arguments."""
        shard = self._shard()
        assert shard is not None
        return tuple(quantised(shard, shard.dtype, emulate=self._emulate).parts()), None

    def after(
        self,
        outputs: tuple[Tensor, ...],
        metadata: None,
        param_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """Return the weight made of what has arrived, and what else is to be freed: nothing.

        out: the weight of an earlier gather; its parts are `outputs`, filled anew.
        """
        return None if out is not None else (Fp8Weight(*outputs, dtype=param_dtype), ())
