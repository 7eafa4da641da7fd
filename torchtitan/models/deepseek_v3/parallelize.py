"""Where a DeepSeek model lives: tensors → experts → context → activation checkpointing →
compile → data parallel."""

import torch
from torch import nn

from torchtitan.config import JobConfig, Parallelism
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import apply_activation_checkpoint
from torchtitan.distributed.compile import apply_compile
from torchtitan.distributed.context_parallel import apply_context_parallel
from torchtitan.distributed.expert_parallel import apply_expert_parallel
from torchtitan.distributed.fsdp import apply_data_parallel
from torchtitan.distributed.tensor_parallel import TensorParallel
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
    loops = _say_how_experts_compute(model.model_args, job_config)
    say_expert_layout(
        model.model_args.moe_args,
        ep=parallel_dims.ep,
        nodes=parallel_dims.nodes_per_ep_group,
    )
    if parallel_dims.tp > 1:
        _apply_tensor_parallel(model, parallel_dims, job_config.parallelism)
    apply_expert_parallel(
        model.moe_layers(),
        parallel_dims,
        job_config.parallelism.expert_parallel_dispatch,
    )
    if parallel_dims.cp > 1:
        apply_context_parallel(
            [layer.attention for layer in model.layers.values()],
            parallel_dims.data_mesh["cp"].get_group(),
            job_config.parallelism.context_parallel_rotate_method,
        )
    if parallel_dims.cp * parallel_dims.tp > 1:
        for moe in model.moe_layers().values():
            moe.sequence_group = parallel_dims.sequence_group
    # A layer that can be one graph is compiled together with its recomputation. One that can't (its
    # experts loop, or tokens travel) is compiled piece by piece, inside of it: torch doesn't
    # compile anything in a recomputed region that is not one graph.
    in_pieces = loops or parallel_dims.ep * parallel_dims.etp > 1
    if in_pieces:
        apply_compile(model.blocks(), job_config.compile)
        for moe in model.moe_layers().values():
            # Recomputation must see the choice of experts, to keep it.
            moe.router._choose = torch.compiler.disable(moe.router._choose)
    if in_pieces or job_config.activation_checkpoint.mode == "memory_budget":
        for moe in model.moe_layers().values():
            # Seen by recomputation for the same reason, and out of reach of the compiler's own.
            moe._count_so_far = torch.compiler.disable(moe._count_so_far)
    apply_activation_checkpoint(
        model.blocks(), job_config.activation_checkpoint, job_config.job.dump_folder
    )
    if not in_pieces:
        apply_compile(model.blocks(), job_config.compile)
    apply_data_parallel(model, parallel_dims, job_config.training, job_config.parallelism)
    return model


def _apply_tensor_parallel(model: BaseModel, dims: ParallelDims, parallelism: Parallelism) -> None:
    tp = TensorParallel(dims.mesh["tp"])
    if parallelism.enable_async_tensor_parallel:
        tp.overlap_communication()
    if model.tok_embeddings is not None:  # None: it lies on another pipeline stage
        tp.embedding(model.tok_embeddings)
    for layer in model.layers.values():
        tp.replicate(layer.attention_norm, layer.ffn_norm)
        _split_attention(layer.attention, tp)
        if layer.moe_enabled:
            # Each rank routes its part of the sequence; experts are spread by expert parallelism
            # (etp = 1 or tp) and FSDP, whose mesh takes in the tp axis.
            tp.split_mask(layer.moe)
            tp.replicate(layer.moe.router.gate)
        feed_forward = layer.moe.shared_experts if layer.moe_enabled else layer.feed_forward
        if feed_forward is not None:
            tp.gather_input(feed_forward)
            tp.column(feed_forward.w1, feed_forward.w3)
            tp.row(feed_forward.w2)
            tp.scatter_output(feed_forward)
    if model.output is not None:
        tp.replicate(model.norm)
        tp.output(model.output, whole_logits=parallelism.disable_loss_parallel)
    logger.info("Tensor parallel: heads, hidden channels and vocabulary over %d ranks", tp.degree)


def _split_attention(attention: nn.Module, tp: TensorParallel) -> None:
    """Heads are split. The matrices that compress work on this rank's part of the sequence, and
    what is gathered is their narrow output: in V3 1536 + 576 channels a token instead of 7168, and
    no rank repeats their work.
    """
    attention.n_heads //= tp.degree
    if attention.compress_q:
        tp.replicate(attention.wq_a, attention.q_norm)
    wq = attention.wq_b if attention.compress_q else attention.wq
    tp.gather_input(wq)
    tp.column(wq)
    # Gathered before the norm, together with the rotary key that all heads share.
    tp.replicate(attention.wkv_a, attention.kv_norm)
    tp.gather_output(attention.wkv_a)
    tp.column(attention.wkv_b)
    tp.row(attention.wo)
    tp.scatter_output(attention.wo)


def _say_how_experts_compute(args: DeepSeekV3ModelArgs, job_config: JobConfig) -> bool:
    """True where they loop."""
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
    return reason is not None
