"""Context parallelism: sequences split over ranks.

A sequence is cut into 2·cp chunks, and rank r holds chunks r and 2·cp − 1 − r, an early and a late
one: causal attention then costs every rank the same. Everything but attention works token by token;
attention's queries need keys and values of other ranks, which are sent in one of two ways:

    allgather   the *narrow* form from which keys and values are computed is gathered; each rank
                expands the part that its queries may see. In latent attention (MLA) that is the
                normalised latent and the rotary key: in DeepSeek-V3 512 + 64 channels a token and
                layer instead of 128 · (192 + 128) = 40960, 71 times less (16B: 9 times). In
                grouped-query attention it is the keys and values, before queries share them.
    alltoall    (Ulysses, arXiv 2309.14509) queries, keys and values are exchanged so that each rank
                has whole sequences of some heads. No expansion is repeated, but all heads travel:
                in V3 128 · 2 · (192 + 128) channels of each token, 142/cp times the above.

Letters: B batch, S sequence, P = S/cp positions of this rank, H heads, C channels.
"""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.tensor_parallel import gather
from torchtitan.ops.attention import AttentionMask, attention
from torchtitan.protocols.layers import AttentionLayer
from torchtitan.tools.logging import logger

Method = Literal["allgather", "alltoall"]


def positions_of(rank: int, degree: int, seq_len: int) -> Tensor:
    """Positions (S/cp,), int64, that `rank` holds of a sequence: its early chunk, its late one."""
    chunks = torch.arange(seq_len).chunk(2 * degree)
    return torch.cat((chunks[rank], chunks[2 * degree - 1 - rank]))


def positions_of_this_rank(dims: ParallelDims, seq_len: int, device: torch.device) -> Tensor | None:
    """Positions (S/cp,), int64, that this rank holds of a sequence; None without context
    parallelism."""
    if dims.cp == 1:
        return None
    return positions_of(dims.data_mesh["cp"].get_local_rank(), dims.cp, seq_len).to(device)


def apply_context_parallel(
    attentions: Iterable[AttentionLayer], group: dist.ProcessGroup, method: Method
) -> None:
    """Let these layers attend over `group`'s parts of the sequence, in place; logs one line.

    The caller of the layers gives them their positions (`positions_of`) and masks: with "allgather"
    masks for this rank's queries, with "alltoall" masks for whole sequences.

    attentions: see models/decoder/attention.py; their narrow tensors are, for example, latent and
        rotary key in models/deepseek_v3/model.py.
    """
    make = _attend_to_gathered if method == "allgather" else _attend_by_heads
    for module in attentions:
        module.attend_with = make(module, group)
    how = {
        "allgather": "the tensors that keys and values are computed from are gathered",
        "alltoall": "heads are exchanged for positions",
    }
    logger.info("Context parallel: sequences over %d ranks, %s", group.size(), how[method])


def _attend_to_gathered(module: AttentionLayer, group: dist.ProcessGroup) -> Callable[..., Tensor]:
    rank, degree = group.rank(), group.size()

    def attend_to_gathered(
        q_BPHC: Tensor, narrow: tuple[Tensor, ...], mask: AttentionMask
    ) -> Tensor:
        """Attend to gathered keys; mask: for this rank's queries and the keys that they may see."""
        parts = [each.flatten(2) for each in narrow]
        joined = torch.cat(parts, dim=-1)
        # Late queries of rank r see all but the last r chunks. What is cut off here is cut off
        # before the expansion, which all ranks do for the keys that they need.
        joined = _in_order(gather(joined, 1, group), degree, keep=2 * degree - rank)
        wholes = joined.split([part.size(-1) for part in parts], dim=-1)
        pairs = zip(wholes, narrow, strict=True)
        return module.attend_here(
            q_BPHC, tuple(whole.unflatten(2, part.shape[2:]) for whole, part in pairs), mask
        )

    return attend_to_gathered


def _attend_by_heads(module: AttentionLayer, group: dist.ProcessGroup) -> Callable[..., Tensor]:
    degree = group.size()

    def attend_by_heads(q_BPHC: Tensor, narrow: tuple[Tensor, ...], mask: AttentionMask) -> Tensor:
        """Attend over whole sequences for some of the heads; the mask is for whole sequences."""
        k_BPHC, v_BPHC = module.expand(narrow)
        whole = [_to_heads(t, group, degree) for t in (q_BPHC, k_BPHC, v_BPHC)]
        out_BSHC = attention(*whole, scale=module.softmax_scale, mask=mask)
        return _to_positions(out_BSHC, group, degree)

    return attend_by_heads


def _in_order(gathered: Tensor, degree: int, keep: int) -> Tensor:
    """Put the ranks' parts, concatenated along dim 1, into the order of the sequence; return the
    first `keep` chunks."""
    chunks = gathered.chunk(2 * degree, dim=1)  # early of 0, late of 0, early of 1, …
    return torch.cat((*chunks[::2], *chunks[::-2])[:keep], dim=1)


def _out_of_order(whole: Tensor, degree: int) -> Tensor:
    """Inverse of `_in_order` of all chunks."""
    chunks = whole.chunk(2 * degree, dim=1)
    pairs = zip(chunks[:degree], reversed(chunks[degree:]), strict=True)
    return torch.cat([chunk for pair in pairs for chunk in pair], dim=1)


def _to_heads(x_BPHC: Tensor, group: dist.ProcessGroup, degree: int) -> Tensor:
    """Exchange (B, S/cp, H, C), this rank's positions, for (B, S, H/cp, C), its heads."""
    parts = torch.stack(x_BPHC.chunk(degree, dim=2))
    return _in_order(torch.cat(_exchange(parts, group).unbind(), dim=1), degree, keep=2 * degree)


def _to_positions(x_BSHC: Tensor, group: dist.ProcessGroup, degree: int) -> Tensor:
    parts = torch.stack(_out_of_order(x_BSHC, degree).chunk(degree, dim=1))
    return torch.cat(_exchange(parts, group).unbind(), dim=2)


def _exchange(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send part i (dim 0) to rank i; return the parts received, by sender."""
    flat = parts.flatten(0, 1)
    sizes = [parts.size(1)] * parts.size(0)
    return all_to_all_single_autograd(flat, sizes, sizes, group).unflatten(0, parts.shape[:2])
