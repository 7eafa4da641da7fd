"""Where a DeepSeek model lives: activation checkpointing → compile → data parallel."""

from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import apply_activation_checkpoint
from torchtitan.distributed.compile import apply_compile
from torchtitan.distributed.fsdp import apply_data_parallel
from torchtitan.protocols.model import BaseModel


def parallelize_deepseekv3(
    model: BaseModel, parallel_dims: ParallelDims, job_config: JobConfig
) -> BaseModel:
    """Change the model in place, in this order, on any device; each step logs one line."""
    apply_activation_checkpoint(model.layers, job_config.activation_checkpoint)
    apply_compile(model.layers, job_config.compile)
    apply_data_parallel(model, parallel_dims, job_config.training, job_config.parallelism)
    return model
