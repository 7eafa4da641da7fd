"""Parallelism of a decoder, in this order: tensor → expert → context → activation checkpointing →
compile → data. A family defines how its attention is split; the rest is the same for all."""

from collections.abc import Callable
from typing import Any, TypeVar

from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import apply_activation_checkpoint
from torchtitan.distributed.compile import apply_compile
from torchtitan.distributed.context_parallel import apply_context_parallel
from torchtitan.distributed.expert_parallel import apply_expert_parallel
from torchtitan.distributed.fsdp import apply_data_parallel
from torchtitan.distributed.tensor_parallel import TensorParallel, keep_odd_parts_out_of_fp8
from torchtitan.models.decoder.model import Decoder, TransformerBlock
from torchtitan.models.moe import MoE
from torchtitan.models.moe.layout import log_expert_layout
from torchtitan.ops import cudnn_documents
from torchtitan.ops.grouped_mm import why_loop
from torchtitan.ops.lora import is_adapter
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import TORCH_DTYPES, device_type

# Splits an attention module, or a whole model, of the family's own class.
Split = Callable[[Any, TensorParallel], None]
Model = TypeVar("Model", bound=Decoder)


def parallelize_decoder(
    model: Model,
    dims: ParallelDims,
    config: JobConfig,
    *,
    split_attention: Split,
    split_beside: Split | None = None,
) -> Model:
    """Change the model in place, in this order, on any device; each step logs one line.

    split_attention: for attention whose input and output are this rank's part of the sequence.
    split_beside: for the modules beside embedding, blocks, norm and output.
    """
    blocks = [module for module in model.modules() if isinstance(module, TransformerBlock)]
    moes = model.moe_layers()
    loops = _log_expert_gemm(moes, config)
    log_expert_layout(model.model_args.moe_args, ep=dims.ep, nodes=dims.nodes_per_ep_group)
    if dims.tp > 1:
        tp = TensorParallel(dims.mesh["tp"])
        if config.parallelism.enable_async_tensor_parallel:
            tp.overlap_communication()
        for block in blocks:
            _split_block(block, tp, split_attention)
        _split_ends(model, tp, whole_logits=config.parallelism.disable_loss_parallel)
        if split_beside is not None:
            split_beside(model, tp)
        keep_odd_parts_out_of_fp8(model)
        logger.info("Tensor parallel: heads, hidden channels, vocabulary over %d ranks", tp.degree)
    graphed = config.compile.cuda_graph
    apply_expert_parallel(moes, dims, config.parallelism, fixed_sizes=graphed)
    if dims.cp > 1:
        apply_context_parallel(
            [block.attention for block in blocks],
            dims.data_mesh["cp"].get_group(),
            config.parallelism.context_parallel_rotate_method,
        )
    if dims.cp * dims.tp > 1:
        for moe in moes.values():
            moe.sequence_group = dims.sequence_group
    _log_packed_documents(model, dims, config)
    _recompute_and_compile(model, config, in_pieces=loops or dims.ep * dims.etp > 1)
    apply_data_parallel(model, dims, config.training, config.parallelism)
    return model


def _split_block(block: TransformerBlock, tp: TensorParallel, split_attention: Split) -> None:
    tp.replicate(block.attention_norm, block.ffn_norm)
    split_attention(block.attention, tp)
    if block.moe_enabled:
        # Each rank routes its part of the sequence; experts are spread by expert parallelism
        # (etp = 1 or tp) and FSDP, whose mesh includes the tp axis.
        tp.split_mask(block.moe)
        tp.replicate(block.moe.router.gate)
    feed_forward = block.moe.shared_experts if block.moe_enabled else block.feed_forward
    if feed_forward is not None:
        tp.gather_input(feed_forward)
        tp.column(feed_forward.w1, feed_forward.w3)
        tp.row(feed_forward.w2)
        tp.scatter_output(feed_forward)


def _split_ends(model: Decoder, tp: TensorParallel, *, whole_logits: bool) -> None:
    if model.tok_embeddings is not None:  # None: it is on another pipeline stage
        tp.embedding(model.tok_embeddings)
    if model.output is not None and model.norm is not None:
        tp.replicate(model.norm)
        tp.output(model.output, whole_logits=whole_logits)


def _recompute_and_compile(model: Decoder, config: JobConfig, *, in_pieces: bool) -> None:
    """Apply activation checkpointing and torch.compile, in the order that the layers allow.

    A layer that is a single graph is compiled together with its recomputation. One that is not (its
    experts loop, or tokens are sent between ranks) is compiled in pieces, inside of the recomputed
    region: torch compiles nothing in a recomputed region that is not a single graph.
    """
    if in_pieces:
        apply_compile(model.blocks(), config.compile)
        for moe in model.moe_layers().values():
            # Recomputation must see the choice of experts, to keep it.
            moe.router.choose_outside_graphs = True
    apply_activation_checkpoint(
        model.blocks(), config.activation_checkpoint, config.job.dump_folder
    )
    if not in_pieces:
        apply_compile(model.blocks(), config.compile)


def _log_expert_gemm(moes: dict[int, MoE], config: JobConfig) -> bool:
    """Log whether experts use grouped GEMM or a loop; return whether they loop."""
    if not moes:
        return False
    experts = next(iter(moes.values())).experts
    reason = "moe_args.use_grouped_mm is off"
    if experts.use_grouped_mm:
        _, hidden_dim, dim = experts.w1.shape
        adapters = [tuple(p.shape[1:]) for n, p in experts.named_parameters() if is_adapter(n)]
        reasons = [
            why_loop(
                TORCH_DTYPES[config.training.mixed_precision_param],
                sizes,
                on_cpu=device_type() == "cpu",
                compiling=config.compile.enable,
            )
            for sizes in [(dim, hidden_dim), *adapters]
        ]
        reason = next(filter(None, reasons), None)
    if reason and config.compile.cuda_graph:
        raise UserError(
            f"compile.cuda_graph = true needs grouped GEMM for experts, but {reason}; set it to "
            'false, or training.mixed_precision_param to "bfloat16".'
        )
    logger.info("Experts: %s", f"a loop, because {reason}" if reason else "grouped GEMM")
    return reason is not None


def _log_packed_documents(model: Decoder, dims: ParallelDims, config: JobConfig) -> None:
    """Log the kernels of packed documents where several are to be had."""
    by_flex = dims.cp > 1 and config.parallelism.context_parallel_rotate_method == "allgather"
    apart = model.model_args.keeps_documents_apart
    if apart and device_type() == "cuda" and not by_flex:
        logger.info("Packed documents: %s", cudnn_documents.way(*model.model_args.head_channels))
