"""Bytes that a rank keeps from step to step: parameters, gradients, optimizer state, copies.

Exact: the model is the real one, spread by the real code, and so is the optimizer, which takes a
step on tensors without memory.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchtitan.components.optimizer import build_optimizer
from torchtitan.components.optimizer.build_compute_weights import build_compute_weights
from torchtitan.components.optimizer.compute_weights import ComputeWeights
from torchtitan.components.optimizer.fused_adam import FusedAdam
from torchtitan.components.optimizer.muon import Muon
from torchtitan.distributed.outside_fsdp import (
    SharingRanks,
    modules_outside_fsdp,
    ranks_that_share,
)
from torchtitan.ops.fp8.weight import parts_of
from torchtitan.ops.grouped_mm import local_part
from torchtitan.planning.ledger import Ledger
from torchtitan.planning.ranks import BuiltRank, PlannedRun


@dataclass(frozen=True)
class State:
    """Bytes of a rank.

    trained: of the parameters, those that are trained.
    step_peak: allocated by the optimizer beside the rest while it steps.
    """

    parameters: int
    trained: int
    gradients: int
    optimizer: int
    copies: int
    buffers: int
    step_peak: int


def state_of(run: PlannedRun, rank: BuiltRank) -> State:
    """Count the bytes of a rank. Gives the model its copies of weights, as a run does."""
    model = rank.model
    weights = make_compute_weights(run, rank)
    _hold_local_parts(model)
    optimizer = _build_optimizer(run, model, weights)
    gradients = bytes_of(p.grad for p in model.parameters() if p.grad is not None)
    step_peak = _take_step(optimizer)
    model.zero_grad()
    return State(
        parameters=bytes_of(model.parameters()),
        trained=bytes_of(p for p in model.parameters() if p.requires_grad),
        gradients=0 if run.config.optimizer.early_step_in_backward else gradients,
        optimizer=bytes_of(_tensors(optimizer.state)),
        copies=_bytes_of_copies(weights),
        buffers=bytes_of(model.buffers()),
        step_peak=step_peak,
    )


def make_compute_weights(
    run: PlannedRun, rank: BuiltRank, *, split: bool = True
) -> ComputeWeights | None:
    """Make the copies of a rank's weights.

    split: whether its model is split by FSDP, too.
    """
    return build_compute_weights(
        rank.model, run.config, rank.dims, several_passes=run.sums_gradients, split=split
    )


def weights_outside_fsdp(run: PlannedRun, rank: BuiltRank) -> dict[nn.Parameter, SharingRanks]:
    """Return the parameters that FSDP leaves alone, and how many ranks share them."""
    if run.world_size == 1:
        return dict.fromkeys(rank.model.parameters(), SharingRanks(1, 1))
    modules = modules_outside_fsdp(rank.model, rank.dims, run.config.training)
    return {p: ranks_that_share(each, rank.dims) for each in modules for p in each.parameters()}


def weights_under_fsdp(run: PlannedRun, rank: BuiltRank, module: nn.Module) -> list[nn.Parameter]:
    """List the parameters of a module that FSDP shards."""
    left_out = weights_outside_fsdp(run, rank)
    return [p for p in module.parameters() if p not in left_out]


def weights_that_travel(run: PlannedRun, rank: BuiltRank, module: nn.Module) -> list[nn.Parameter]:
    """List the parameters of a module that other ranks have, too, by FSDP or not."""
    alone = {p for p, ranks in weights_outside_fsdp(run, rank).items() if max(ranks) == 1}
    return [p for p in module.parameters() if p not in alone]


def _build_optimizer(
    run: PlannedRun, model: nn.Module, weights: ComputeWeights | None
) -> Optimizer:
    settings = dict(vars(run.config.optimizer))
    if settings["implementation"] == "fused":
        # A GPU takes our own kernel, which "fused" with weights to write stands for; torch's CPU
        # kernel has no form for tensors without memory, and keeps the same state as the loop.
        if run.device_type == "cuda" and weights is None:
            weights = ComputeWeights([], torch.bfloat16, root=model, grad_dtype=torch.float32)
        if run.device_type == "cpu" and weights is None:
            settings["implementation"] = "for-loop"
    if settings["name"] == "Muon":
        settings["implementation"] = "for-loop"
    return build_optimizer([model], compute_weights=weights, **settings)


def _hold_local_parts(model: nn.Module) -> None:
    """Replace DTensors, whose every operation costs milliseconds, by this rank's parts, and give
    each that is trained its gradient. Good for an optimizer, not for a pass."""
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            local = nn.Parameter(local_part(param.detach()), requires_grad=param.requires_grad)
            module.register_parameter(name, local)
            if not param.requires_grad:
                continue
            dtype = getattr(param, "grad_dtype", None) or param.dtype
            if dtype != param.dtype:
                local.grad_dtype = dtype
            local.grad = torch.empty_like(local, dtype=dtype, requires_grad=False)


def _take_step(optimizer: Optimizer) -> int:
    """Fill the optimizer's state; return the bytes that a step needs besides."""
    if isinstance(optimizer, FusedAdam):
        return 0  # state is there from the start, and the kernel works in place
    if isinstance(optimizer, Muon):
        return _fill_muon(optimizer)
    with Ledger() as ledger:
        optimizer.step()
        kept = bytes_of(_tensors(optimizer.state))
    return max(0, ledger.peak - kept)


def _fill_muon(optimizer: Any) -> int:
    """Fill Muon's state: momenta of matrices, means of the others; return the bytes of its step.

    Its step gathers matrices over ranks, which needs values, so its buffers are counted:
    Newton-Schulz holds five bf16 forms of the largest matrix beside an fp32 update of every matrix.
    """
    largest = updates = 0
    for group in optimizer.param_groups:
        names = ("momentum",) if group["muon"] else ("exp_avg", "exp_avg_sq")
        for p in group["params"]:
            optimizer.state[p] = {name: torch.empty_like(p) for name in names}
            if group["muon"]:
                updates += local_part(p).nbytes
                largest = max(largest, p.numel())
            else:
                optimizer.state[p]["step"] = torch.tensor(0.0)
    return updates + 5 * 2 * largest


def _bytes_of_copies(weights: ComputeWeights | None) -> int:
    if weights is None:
        return 0
    return sum(
        part.nbytes
        for fused in weights._fused
        if fused.params[0].dtype != fused.tensor.dtype  # otherwise they are the parameters
        for part in parts_of(fused.gathered.kept if fused.gathered else fused.tensor)
    )


def _tensors(state: Any) -> list[Tensor]:
    return [t for one in state.values() for t in one.values() if isinstance(t, Tensor)]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(local_part(t).numel() * t.element_size() for t in tensors)
