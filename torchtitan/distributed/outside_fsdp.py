"""Modules whose weights are outside of FSDP, with compute weights instead, and the ranks that share
them: experts, the embedding, the head.

FSDP2 copies weights before a gather and after it, and gradients before their sum. Compute weights
(components/optimizer/compute_weights.py) are gathered and summed where they lie.
"""

from typing import Any, NamedTuple, cast

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from torchtitan.config import Training
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.protocols.layers import ExpertWeights
from torchtitan.protocols.model import BaseModel
from torchtitan.tools.logging import logger


def modules_outside_fsdp(
    model: BaseModel, dims: ParallelDims, training: Training
) -> list[nn.Module]:
    """List the modules that have compute weights instead of FSDP: the experts of all layers, or of
    none; the embedding; the head.

    Where no other rank holds the same weights, FSDP would copy weights and gradients to gather and
    reduce them over one rank. Where several do, it copies more bytes than it sends
    (gathered_weight.py).
    """
    # Only FSDP offloads. A pipeline's backward pass may come in two pieces, the second of which is
    # for parameters: it doesn't know of compute weights.
    if training.enable_cpu_offload or dims.pp > 1 or dims.world_size == 1:
        return []
    experts: list[nn.Module] = [moe.experts for moe in model.moe_layers().values()]
    has_copies = training.dtype == "float32" != training.mixed_precision_param
    if experts and max(ranks_that_share(experts[0], dims)) > 1:
        if not (has_copies and all(_can_be_gathered(each, dims) for each in experts)):
            experts = []
    # Tensor parallelism splits the vocabulary, and gathers hidden states by hooks on both.
    if not has_copies or dims.tp > 1:
        return experts
    ends = [model.tok_embeddings, model.output]
    return [*experts, *(end for end in ends if end is not None and _can_be_gathered(end, dims))]


def axes_of(module: nn.Module, dims: ParallelDims) -> DeviceMesh:
    """Mesh over which a module's weights are spread."""
    has_mesh = isinstance(module, ExpertWeights) and dims.expert_mesh is not None
    return cast(DeviceMesh, dims.expert_mesh) if has_mesh else dims.mesh


class SharingRanks(NamedTuple):
    """Number of replicas of a weight, and of the ranks between which a replica is split."""

    replicas: int
    shards: int


def ranks_that_share(module: nn.Module, dims: ParallelDims) -> SharingRanks:
    """Count the ranks that have a module's weights."""
    mesh = axes_of(module, dims)
    return SharingRanks(mesh["dp_replicate"].size(), mesh["fsdp"].size())


def _can_be_gathered(module: Any, dims: ParallelDims) -> bool:
    """Tell whether each rank gets as many whole experts, or rows of the vocabulary, all of them
    trained, without adapters, not in FP8."""
    in_fp8 = getattr(module, "fp8", None) is not None
    trained = all(param.requires_grad for param in module.parameters())
    if in_fp8 or not trained or getattr(module, "lora_scales", None):
        return False
    experts, shards = isinstance(module, ExpertWeights), ranks_that_share(module, dims).shards
    rows = module.w1.size(0) // dims.ep if experts else module.weight.size(0)
    return rows % shards == 0


def log_outside_fsdp(
    model: BaseModel, alone: list[nn.Module], dims: ParallelDims, reshard: bool
) -> None:
    """Log which modules that several ranks share are outside of FSDP: a line for each way of
    sharing.

    alone: from `modules_outside_fsdp`.
    reshard: whether gathered weights are freed after the forward pass.
    """
    ends = {model.tok_embeddings: "embedding", model.output: "head"}
    when = "for each pass" if reshard else "once a step"
    found: dict[str, dict[str, None]] = {}
    for module in alone:
        replicas, shards = ranks_that_share(module, dims)
        how = [f"gathered from {shards} ranks {when}"] * (shards > 1)
        how += [f"summed over {replicas} replicas"] * (replicas > 1)
        if how:
            found.setdefault(", ".join(how), {})[ends.get(module, "experts")] = None
    for how, names in found.items():
        logger.info("Without FSDP: %s (%s)", ", ".join(names), how)
