"""Tensor parallelism of grouped-query attention; the rest is the decoder's."""

from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.tensor_parallel import TensorParallel
from torchtitan.models.decoder.parallelize import parallelize_decoder
from torchtitan.models.qwen3.model import Attention, Qwen3Model


def parallelize_qwen3(
    model: Qwen3Model, parallel_dims: ParallelDims, job_config: JobConfig
) -> Qwen3Model:
    """Change the model in place, on any device; see `parallelize_decoder`."""
    return parallelize_decoder(model, parallel_dims, job_config, split_attention=_split_attention)


def _split_attention(attention: Attention, tp: TensorParallel) -> None:
    """Split the heads of keys and values, and with each the queries that share it.

    The norms are those of one head, the same for all heads.
    """
    tp.gather_input(attention)
    tp.column(attention.wq, attention.wk, attention.wv)
    tp.replicate(attention.q_norm, attention.k_norm)
    tp.row(attention.wo)
    tp.scatter_output(attention.wo)
