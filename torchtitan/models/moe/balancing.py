"""Expert bias: evens out the load without an auxiliary loss, from counts of each step's tokens.

After each optimizer step an expert that got more than the mean loses a little bias, one that got
less gains it (arXiv 2408.15664; DeepSeek-V3 report, section 2.1.2). The step's counts add up in
`MoE.tokens_per_expert` as exact integers, outside of the layers' forward pass, so that recomputing
activations cannot count a token twice.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from torchtitan.models.moe.load import RoutingLoad
from torchtitan.protocols.layers import MoELayer


def record_load(moe: MoELayer, load: RoutingLoad) -> None:
    """Add one micro-batch's load to the optimizer step's."""
    moe.tokens_per_expert += load.tokens_E
    if load.traffic is not None:
        moe.traffic += load.traffic
    if load.stats is not None:
        moe.router_stats += load.stats
    if load.overflow is not None:
        torch.maximum(moe.overflow, load.overflow, out=moe.overflow)


@torch.no_grad()
def step_loads(moes: Sequence[MoELayer], group: dist.ProcessGroup | None = None) -> RoutingLoad:
    """Sum the optimizer step's load over all ranks of `group`: (layers, E) and (layers, 2, 3)
    int64; with router statistics, also (layers, N) fp32. `overflow` is the largest of this rank.

    Takes the counts: they start again from zero. One all-reduce for all layers.

    group: all ranks that hold these layers, each of which routes tokens of its own; None = this
        process alone.
    """
    num_experts, traffic = moes[0].tokens_per_expert.numel(), moes[0].traffic
    counts = torch.cat([t.flatten() for moe in moes for t in (moe.tokens_per_expert, moe.traffic)])
    overflow = torch.stack([moe.overflow for moe in moes]).amax()
    if group is not None:
        dist.all_reduce(counts, group=group)
    for name in ("tokens_per_expert", "traffic", "overflow"):
        torch._foreach_zero_([getattr(moe, name) for moe in moes])
    tokens_LE, traffic_LN = counts.view(len(moes), -1).split([num_experts, traffic.numel()], dim=1)
    stats = step_router_stats(moes, group) if moes[0].collect_router_stats else None
    return RoutingLoad(tokens_LE, traffic_LN.unflatten(1, traffic.shape), stats, overflow)


@torch.no_grad()
def update_expert_bias(moes: Sequence[MoELayer], load_LE: Tensor) -> None:
    """Move each layer's bias: bias += coeff · sign(mean load − load), minus that step's mean.

    Centring each step changes no choice (a constant shifts all experts alike) and keeps the bias
    near zero, where low-precision exports still resolve it.

    load_LE: int64, from `step_loads`; also kept for the next step's loss over the global batch
        (aux_loss.py).
    """
    torch._foreach_copy_([moe.global_tokens_per_expert for moe in moes], list(load_LE))
    # sign(mean − load) in exact integers: mean − load = (sum − load · E) / E.
    direction_LE = torch.sign(load_LE.sum(dim=1, keepdim=True) - load_LE * load_LE.size(1))
    balanced = [
        (moe.expert_bias, moe.load_balance_coeff, direction_E)
        for moe, direction_E in zip(moes, direction_LE.unbind(), strict=True)
        if moe.expert_bias is not None and moe.load_balance_coeff  # 0 leaves the bias alone
    ]
    if balanced:  # a few kernels for all layers: the GPU is idle between such short ones
        biases, coeffs, directions = map(list, zip(*balanced, strict=True))
        steps_LE = torch.stack(directions).to(biases[0].dtype)
        steps_LE = steps_LE - steps_LE.mean(dim=1, keepdim=True)
        torch._foreach_add_(biases, torch._foreach_mul(steps_LE.unbind(), coeffs))


@torch.no_grad()
def step_router_stats(moes: Sequence[MoELayer], group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum the optimizer step's router statistics over all ranks of `group`: (layers, N) fp32.

    Takes the sums: they start again from zero.
    """
    sums_LN = torch.stack([moe.router_stats for moe in moes])
    if group is not None:
        dist.all_reduce(sums_LN, group=group)
    for moe in moes:
        moe.router_stats.zero_()
    return sums_LN
