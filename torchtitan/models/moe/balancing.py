"""Even expert load without an auxiliary loss: count tokens, nudge the routing bias.

After each optimizer step an expert that got more than the mean loses a little bias, one that got
less gains it (arXiv 2408.15664; DeepSeek-V3 report, section 2.1.2). The step's counts add up in
`MoE.tokens_per_expert` as exact integers, outside of the layers' forward pass, so that recomputing
activations cannot count a token twice.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from torchtitan.models.moe.watch import step_watch
from torchtitan.ops import permute

if TYPE_CHECKING:
    from torchtitan.models.moe.moe import MoE


def count_tokens(ids_TK: Tensor, num_experts: int, token_mask_T: Tensor | None = None) -> Tensor:
    """Tokens routed to each expert: (E,) int64. token_mask_T: bool, False = don't count. No host
    sync.

    (`torch.bincount` waits for the GPU, `torch.histc` has no integer kernel on CPU.)
    """
    if ids_TK.is_cuda:
        return permute.count_tokens(ids_TK, num_experts, token_mask_T)
    if token_mask_T is None:
        ones_N = torch.ones_like(ids_TK.flatten())
    else:
        ones_N = token_mask_T.to(ids_TK.dtype).unsqueeze(1).expand_as(ids_TK).flatten()
    return ones_N.new_zeros(num_experts).scatter_add_(0, ids_TK.flatten(), ones_N)


class Load(NamedTuple):
    """tokens_E: int64 tokens per expert, padding left out. traffic: what travelled for them, see
    `TokenDispatcher.dispatch`; None where nothing did. watched: see watch.py; None where nobody
    watches.
    """

    tokens_E: Tensor
    traffic: Tensor | None
    watched: Tensor | None = None


def record_load(moe: "MoE", load: Load) -> None:
    """Add one micro-batch's load to the optimizer step's."""
    moe.tokens_per_expert += load.tokens_E
    if load.traffic is not None:
        moe.traffic += load.traffic
    if load.watched is not None:
        moe.watched += load.watched


@torch.no_grad()
def step_loads(moes: Sequence["MoE"], group: dist.ProcessGroup | None = None) -> Load:
    """The optimizer step's load over all ranks of `group`: (layers, E) and (layers, 2, 3) int64;
    where routers are watched, also (layers, 5) fp32.

    Takes the counts: they start again from zero. group: all ranks that hold these layers, each of
    which routes tokens of its own; None = this process alone. One all-reduce for all layers.
    """
    both = torch.stack([torch.cat((moe.tokens_per_expert, moe.traffic.flatten())) for moe in moes])
    if group is not None:
        dist.all_reduce(both, group=group)
    for moe in moes:
        moe.tokens_per_expert.zero_()
        moe.traffic.zero_()
    num_experts = moes[0].tokens_per_expert.numel()
    traffic = both[:, num_experts:].unflatten(1, moes[0].traffic.shape)
    watched = step_watch(moes, group) if moes[0].watch_routing else None
    return Load(both[:, :num_experts], traffic, watched)


@torch.no_grad()
def update_expert_bias(moes: Sequence["MoE"], load_LE: Tensor) -> None:
    """bias += coeff · sign(mean load − load), minus that step's mean, layer by layer.

    load_LE: from `step_loads`; also kept for the next step's loss over the global batch
    (aux_loss.py). Centring each step changes no choice (a constant shifts all experts
    alike) and keeps the bias near zero, where low-precision exports still resolve it.
    """
    for moe, load_E in zip(moes, load_LE, strict=True):
        moe.global_tokens_per_expert.copy_(load_E)
        if moe.expert_bias is None:
            continue
        # sign(mean − load) in exact integers: mean − load = (sum − load · E) / E.
        direction_E = torch.sign(load_E.sum() - load_E * load_E.numel()).to(moe.expert_bias.dtype)
        step_E = moe.load_balance_coeff * direction_E
        moe.expert_bias += step_E - step_E.mean()
