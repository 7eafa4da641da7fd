"""Building the copies of weights in the compute dtype that a run's layout needs."""

import torch
from torch import nn

from torchtitan.components.optimizer.compute_weights import ComputeWeights
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.fsdp import reshards
from torchtitan.distributed.gathered_weight import (
    GatheringModule,
    Sharing,
    gather_ahead,
    parts_travel,
)
from torchtitan.distributed.outside_fsdp import axes_of, modules_outside_fsdp, ranks_that_share
from torchtitan.protocols.model import BaseModel
from torchtitan.tools.utils import TORCH_DTYPES


def dtype_of_gradients(config: JobConfig, *, in_fp32: bool) -> torch.dtype | None:
    """Return the dtype of gradients that the optimizer takes; None = each parameter's own.

    in_fp32: whether gradients are added up, which is done in fp32 where the optimizer allows it.
    """
    training, optimizer = config.training, config.optimizer
    if optimizer.name == "AdamW" and optimizer.state_dtype == "bfloat16":
        return torch.float32
    if optimizer.name == "Muon" or optimizer.implementation != "fused":
        return None  # torch's optimizers take no other
    return torch.float32 if in_fp32 else TORCH_DTYPES[training.mixed_precision_param]


def build_compute_weights(
    model: BaseModel,
    config: JobConfig,
    dims: ParallelDims,
    *,
    several_passes: bool,
    split: bool = True,
) -> ComputeWeights | None:
    """Build the copies of a model's weights; None where none are needed.

    several_passes: whether a step may add up the gradients of several micro-batches.
    split: whether weights are split over the ranks that share them; a plan's aren't.
    """
    training, optimizer = config.training, config.optimizer
    keeps, computes = training.dtype, training.mixed_precision_param
    if keeps == computes and (keeps == "float32" or dims.world_size > 1):
        if not optimizer.early_step_in_backward:
            return None
    shared = {}
    if dims.world_size == 1:
        modules: list[nn.Module] = list(model.modules())
    else:
        modules = modules_outside_fsdp(model, dims, training)
        shared = {
            module: _sharing_of(module, config, dims, several_passes=several_passes, split=split)
            for module in modules
            if max(ranks_that_share(module, dims)) > 1
        }
    if not modules:
        return None
    weights = ComputeWeights(
        modules,
        TORCH_DTYPES[computes],
        root=model,
        grad_dtype=dtype_of_gradients(config, in_fp32=several_passes),
        sharing=shared,
    )
    in_order = [
        GatheringModule(
            module,
            weights.gathered_in(module),
            reads_again=module is not model.tok_embeddings,
        )
        for module in (model.tok_embeddings, *model.blocks().values(), model.output)
        if module is not None
    ]
    gather_ahead(model, in_order, weights.begin_backward)
    return weights


def _sharing_of(
    module: nn.Module, config: JobConfig, dims: ParallelDims, *, several_passes: bool, split: bool
) -> Sharing:
    """Return how several ranks share the weights of a module.

    several_passes, split: see `build_compute_weights`.
    """
    axes, (replicas, shards) = axes_of(module, dims), ranks_that_share(module, dims)
    reduce_dtype = TORCH_DTYPES[config.training.mixed_precision_reduce]
    in_fp32 = several_passes or reduce_dtype == torch.float32
    stride = dims.stage_size // (replicas * shards)
    grad_dtype = dtype_of_gradients(config, in_fp32=in_fp32)
    if not split and shards > 1:  # a plan: a run widens its own slice of the gradient only
        grad_dtype = TORCH_DTYPES[config.training.mixed_precision_param]
    return Sharing(
        shards=axes.get_group("fsdp") if split and shards > 1 else None,
        replicas=axes.get_group("dp_replicate") if split and replicas > 1 else None,
        grad_dtype=grad_dtype,
        reduce_dtype=reduce_dtype,
        parts_travel=parts_travel(shards, stride, dims.node_size),
        is_freed=reshards(dims, config.parallelism),
    )
