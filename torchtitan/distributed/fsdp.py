"""DDP, FSDP and HSDP, all three through FSDP2's `fully_shard`.

On a mesh (dp_replicate, fsdp), FSDP is (1, n), DDP is (n, 1) and HSDP anything between, so all of
them share one mixed-precision policy and give the same numbers. Gradients are *summed* over
ranks, never averaged: the loss is already divided by the tokens of the whole step
(components/loss.py).
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import Shard

from torchtitan.config import Parallelism, Training
from torchtitan.distributed.float8_gather import attach_float8_gathers, choose_float8_gathers
from torchtitan.distributed.gathered_weight import split_first_dim
from torchtitan.distributed.outside_fsdp import (
    axes_of,
    log_outside_fsdp,
    modules_outside_fsdp,
    ranks_that_share,
)
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.ops.lora import has_dim
from torchtitan.protocols.layers import ExpertWeights
from torchtitan.protocols.model import BaseModel
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import TORCH_DTYPES


def apply_data_parallel(
    model: BaseModel,
    dims: ParallelDims,
    training: Training,
    parallelism: Parallelism,
) -> None:
    """Shard the weights of `model` in place, one communication unit per layer; logs one line.

    Weights and gradients are kept in `training.dtype`, the model computes in
    `mixed_precision_param`, and gradients are summed over ranks in `mixed_precision_reduce`. With
    one process the model is left as it is: see components/optimizer/compute_weights.py.
    """
    param_dtype = TORCH_DTYPES[training.mixed_precision_param]
    choose_float8_gathers(model, dims)
    if dims.world_size == 1:
        logger.info("Data parallel: %s, %s", dims.describe(), training.mixed_precision_param)
        return
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype,
        reduce_dtype=TORCH_DTYPES[training.mixed_precision_reduce],
        cast_forward_inputs=False,  # positions, masks and the rotary table keep their dtypes
    )
    # With offload, weights, gradients and optimizer state live in the host's memory.
    offload = CPUOffloadPolicy() if training.enable_cpu_offload else OffloadPolicy()
    options = {"mp_policy": policy, "offload_policy": offload}
    reshard = reshards(dims, parallelism)
    alone = modules_outside_fsdp(model, dims, training)
    for module in alone:
        if max(ranks_that_share(module, dims)) > 1:
            split_first_dim(module, _data_parallel_axes(axes_of(module, dims)))
    log_outside_fsdp(model, alone, dims, reshard)
    if dims.expert_mesh is not None and not any(isinstance(m, ExpertWeights) for m in alone):
        _shard_experts(model, dims.expert_mesh, reshard, options)
    options["ignored_params"] = {param for module in alone for param in module.parameters()}
    _shard_layers(model, alone, reshard, options | {"mesh": _data_parallel_axes(dims.mesh)})
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Both lines together: a factor without the forced sum needs PREMUL_SUM, which gloo
            # lacks, and any factor but 1 is applied twice on a shard axis of size 1 (torch
            # 2.11-2.13).
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    logger.info(
        "Data parallel: %s, compute in %s, reduce in %s",
        dims.describe(),
        training.mixed_precision_param,
        training.mixed_precision_reduce,
    )


def materialize(model: nn.Module, device: torch.device, *, offload: bool) -> None:
    """Allocate a meta-device model: on the device; with offload, its weights on the host."""
    model.to_empty(device="cpu" if offload else device)
    attach_float8_gathers(model)
    if offload:  # buffers are read where the layers compute
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))


def sync_replicas_on_last_microbatch(model: nn.Module, *, is_last: bool) -> None:
    """Sum gradients over replicas once a step instead of once a micro-batch.

    Within a replica they are still reduced each time, because whole gradients of all layers may not
    fit in memory. A model that isn't data parallel is left as it is.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(is_last)
        model.set_is_last_backward(is_last)


def _data_parallel_axes(mesh: DeviceMesh) -> DeviceMesh:
    return mesh["dp_replicate", "fsdp"] if mesh["dp_replicate"].size() > 1 else mesh["fsdp"]


def reshards(dims: ParallelDims, parallelism: Parallelism) -> bool:
    """Tell whether gathered weights are freed after the forward pass."""
    # "default": free the gathered weights after the forward pass, with two exceptions. Where
    # nothing is sharded, keeping them costs no communication and saves a copy; in a pipeline they
    # would be gathered again for each micro-batch.
    if parallelism.fsdp_reshard_after_forward == "default":
        return dims.fsdp > 1 and dims.pp == 1
    return parallelism.fsdp_reshard_after_forward == "always"


def _shard_experts(
    model: BaseModel, mesh: DeviceMesh, reshard: bool, options: dict[str, Any]
) -> None:
    """Shard experts over the ranks that hold the same ones, as a unit of their own per layer."""
    for moe in model.moe_layers().values():
        num_experts = moe.experts.w1.size(0)
        # With fewer experts than ranks, shard inside of the experts, where the size is divisible:
        # their hidden channels, or with etp, which splits those already, their model channels.
        split, etp = mesh["fsdp"].size(), mesh["etp"].size()
        dims = {
            param: _dim_inside(name, param, etp) for name, param in moe.experts.named_parameters()
        }
        inside = split * mesh["ep"].size() > num_experts and all(
            param.size(dim) % split == 0 for param, dim in dims.items()
        )
        fully_shard(
            moe.experts,
            mesh=_data_parallel_axes(mesh),
            reshard_after_forward=reshard,
            **options,
            shard_placement_fn=(lambda p, dims=dims: Shard(dims[p])) if inside else None,
        )


def _dim_inside(name: str, param: nn.Parameter, etp: int) -> int:
    """Dim along which FSDP splits a stack of experts inside of them; etp splits the other one."""
    dim = (2 if name != "w2" else 1) if etp > 1 else 1
    return dim if has_dim(name, dim, param.ndim) else 3 - dim


def _shard_layers(
    model: BaseModel, alone: list[nn.Module], reshard: bool, options: dict[str, Any]
) -> None:
    """Shard all layers and ends but those that are left alone."""
    if model.tok_embeddings is not None and model.tok_embeddings not in alone:
        fully_shard(model.tok_embeddings, reshard_after_forward=reshard, **options)
    for layer in model.blocks().values():
        fully_shard(layer, reshard_after_forward=reshard, **options)
    # The backward pass starts with these two: freeing them in between isn't worth it.
    if model.output is not None:
        last: list[nn.Module] = [
            end for end in (model.norm, model.output) if end is not None and end not in alone
        ]
        fully_shard(last, reshard_after_forward=False, **options)
    fully_shard(model, reshard_after_forward=reshard, **options)
