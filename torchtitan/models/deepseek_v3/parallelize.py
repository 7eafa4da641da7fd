"""Where a DeepSeek model lives: experts → activation checkpointing → compile → data parallel."""

from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import apply_activation_checkpoint
from torchtitan.distributed.compile import apply_compile
from torchtitan.distributed.expert_parallel import apply_expert_parallel
from torchtitan.distributed.fsdp import apply_data_parallel
from torchtitan.models.deepseek_v3.args import DeepSeekV3ModelArgs
from torchtitan.models.moe.layout import say_expert_layout
from torchtitan.ops.grouped_mm import why_loop
from torchtitan.protocols.model import BaseModel
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import TORCH_DTYPES, device_type


def parallelize_deepseekv3(
    model: BaseModel, parallel_dims: ParallelDims, job_config: JobConfig
) -> BaseModel:
    """Change the model in place, in this order, on any device; each step logs one line."""
    _say_how_experts_compute(model.model_args, job_config)
    say_expert_layout(
        model.model_args.moe_args,
        ep=parallel_dims.ep,
        nodes=parallel_dims.nodes_per_ep_group,
    )
    apply_expert_parallel(
        model.moe_layers(),
        parallel_dims,
        job_config.parallelism.expert_parallel_dispatch,
    )
    apply_activation_checkpoint(model.layers, job_config.activation_checkpoint)
    apply_compile(model.layers, job_config.compile)
    apply_data_parallel(model, parallel_dims, job_config.training, job_config.parallelism)
    return model


def _say_how_experts_compute(args: DeepSeekV3ModelArgs, job_config: JobConfig) -> None:
    reason = "moe_args.use_grouped_mm is off"
    if args.moe_args.use_grouped_mm:
        reason = why_loop(
            TORCH_DTYPES[job_config.training.mixed_precision_param],
            (args.dim, args.moe_inter_dim),
            on_cpu=device_type() == "cpu",
            compiling=job_config.compile.enable,
        )
    if args.n_dense_layers < args.n_layers:
        logger.info("Experts: %s", f"a loop, because {reason}" if reason else "grouped GEMM")
