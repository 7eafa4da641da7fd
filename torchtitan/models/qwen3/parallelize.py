"""Where a Qwen3 model lives: experts → activation checkpointing → compile → data parallel."""

import torch

from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import apply_activation_checkpoint
from torchtitan.distributed.compile import apply_compile
from torchtitan.distributed.expert_parallel import apply_expert_parallel
from torchtitan.distributed.fsdp import apply_data_parallel
from torchtitan.models.moe.layout import say_expert_layout
from torchtitan.protocols.model import BaseModel


def parallelize_qwen3(
    model: BaseModel, parallel_dims: ParallelDims, job_config: JobConfig
) -> BaseModel:
    """Change the model in place, in this order, on any device; each step logs one line."""
    ep, nodes = parallel_dims.ep, parallel_dims.nodes_per_ep_group
    say_expert_layout(model.model_args.moe_args, ep=ep, nodes=nodes)
    apply_expert_parallel(
        model.moe_layers(),
        parallel_dims,
        job_config.parallelism.expert_parallel_dispatch,
    )
    apply_activation_checkpoint(model.blocks(), job_config.activation_checkpoint)
    if job_config.activation_checkpoint.mode == "memory_budget":
        for moe in model.moe_layers().values():
            # The compiler might recompute it, and must not.
            moe._count_so_far = torch.compiler.disable(moe._count_so_far)
    apply_compile(model.blocks(), job_config.compile)
    apply_data_parallel(model, parallel_dims, job_config.training, job_config.parallelism)
    return model
