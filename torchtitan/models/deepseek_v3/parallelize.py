"""Tensor parallelism of latent attention and multi-token prediction; the rest is the decoder's."""

from functools import partial

from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.tensor_parallel import (
    TensorParallel,
    vocab_parallel_cross_entropy_sum,
)
from torchtitan.models.decoder.parallelize import parallelize_decoder
from torchtitan.models.deepseek_v3.model import Attention, DeepSeekV3Model
from torchtitan.models.deepseek_v3.mtp import MTPLayers
from torchtitan.ops.cross_entropy import IGNORE_INDEX


def parallelize_deepseekv3(
    model: DeepSeekV3Model, parallel_dims: ParallelDims, job_config: JobConfig
) -> DeepSeekV3Model:
    """Change the model in place, on any device; see `parallelize_decoder`."""
    whole_logits = job_config.parallelism.disable_loss_parallel

    def split_beside(model: DeepSeekV3Model, tp: TensorParallel) -> None:
        if model.mtp is not None:
            _split_mtp(model.mtp, tp, whole_logits=whole_logits)

    return parallelize_decoder(
        model,
        parallel_dims,
        job_config,
        split_attention=_split_attention,
        split_beside=split_beside,
    )


def _split_attention(attention: Attention, tp: TensorParallel) -> None:
    """Split the heads.

    The compressing matrices work on this rank's part of the sequence, and their narrow output is
    gathered: in V3 1536 + 576 channels a token instead of 7168, and no rank repeats their work.
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


def _split_mtp(mtp: MTPLayers, tp: TensorParallel, *, whole_logits: bool) -> None:
    """Replicate the modules around the blocks: they work token by token, on this rank's part of the
    sequence."""
    for _, layer in mtp.numbered():
        tp.replicate(layer.enorm, layer.hnorm, layer.eh_proj, layer.norm)
    if not whole_logits:
        mtp.loss_fn = partial(
            vocab_parallel_cross_entropy_sum, group=tp.group, ignore_index=IGNORE_INDEX
        )
