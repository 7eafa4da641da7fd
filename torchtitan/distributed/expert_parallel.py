"""Expert parallelism: each rank holds some of the experts, and tokens travel to them.

Which way they travel, `parallelism.expert_parallel_dispatch` says:

    all_to_all     once to each rank that has experts of the token (token_dispatch.py)
    node_limited   once to each node that has experts of it, then to the ranks (token_dispatch.py)
    all_gather     to all ranks, in messages of fixed size: no host sync (all_gather_dispatch.py)
"""

from collections.abc import Mapping

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from torchtitan.config import Parallelism
from torchtitan.distributed.all_gather_dispatch import AllGatherDispatcher, RowCapacity
from torchtitan.distributed.exchange import Wire
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.token_dispatch import (
    NO_WIRES,
    AllToAllDispatcher,
    NodeLimitedDispatcher,
    SplitExpertsDispatcher,
    Wires,
)
from torchtitan.ops.fp8.quantize import E4M3
from torchtitan.protocols.layers import ExpertWeights, MoELayer
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import local_device


def apply_expert_parallel(
    moes: Mapping[int, MoELayer],
    dims: ParallelDims,
    parallelism: Parallelism,
    *,
    fixed_sizes: bool = False,
) -> None:
    """Spread the experts of each layer over `dims.ep` ranks, and set the dispatcher that brings
    tokens to them. In place, before FSDP; logs one line.

    With `dims.etp` > 1 the hidden channels of each expert are split, too.

    moes: MoE layers, by layer number.
    fixed_sizes: no message size may depend on the data. Raises `UserError` where one does.
    """
    mesh = dims.expert_mesh
    if mesh is None:
        return
    if dims.ep > 1:
        _give_dispatchers(moes, dims, mesh["ep"], parallelism, fixed_sizes=fixed_sizes)
    if dims.etp > 1:
        group = mesh["etp"].get_group()
        for moe in moes.values():
            moe.dispatcher = SplitExpertsDispatcher(moe.dispatcher, group)
        logger.info("Expert tensor parallel: each expert's hidden channels over %d ranks", dims.etp)
    for moe in moes.values():
        _split_experts(moe.experts, dims, mesh)


def _split_experts(experts: ExpertWeights, dims: ParallelDims, mesh: DeviceMesh) -> None:
    """Shard experts over ep, their hidden channels F (w1, w3 (E, F, D), w2 (E, D, F)) over etp."""
    degrees = {"ep": dims.ep, "etp": dims.etp}
    axes = tuple(axis for axis, degree in degrees.items() if degree > 1)
    if not axes:
        return
    for name, param in list(experts.named_parameters()):
        placements = {"ep": Shard(0), "etp": Shard(2 if name == "w2" else 1)}
        local = distribute_tensor(
            param.data,
            mesh[axes],
            [placements[axis] for axis in axes],
            src_data_rank=None,
        )
        experts.register_parameter(name, nn.Parameter(local, param.requires_grad))


def _give_dispatchers(
    moes: Mapping[int, MoELayer],
    dims: ParallelDims,
    mesh: DeviceMesh,
    parallelism: Parallelism,
    *,
    fixed_sizes: bool,
) -> None:
    dispatch = _resolve_dispatch(moes, dims, parallelism.expert_parallel_dispatch)
    if fixed_sizes and dispatch != "all_gather":
        raise UserError(
            "compile.cuda_graph = true needs message sizes that don't change, but experts' tokens "
            f'travel by "{dispatch}"; set parallelism.expert_parallel_dispatch to "all_gather", or '
            "compile.cuda_graph to false."
        )
    groups = dims.node_groups if dispatch == "node_limited" else None  # also without MoE layers
    if not moes:
        return
    num_experts = next(iter(moes.values())).experts.w1.size(0)
    group, capacity = mesh.get_group(), RowCapacity(parallelism.expert_parallel_capacity)
    in_fp8 = False
    for moe in moes.values():
        wires = _wires(moe)
        in_fp8 |= wires != NO_WIRES
        if groups is not None:
            moe.dispatcher = NodeLimitedDispatcher(*groups, num_experts, wires)
            continue
        ranks_per_node = dims.ep // dims.nodes_per_ep_group
        moe.dispatcher = AllToAllDispatcher(group, num_experts, ranks_per_node, wires)
        if dispatch == "all_gather":
            exact = moe.dispatcher
            moe.dispatcher = AllGatherDispatcher(exact, group, num_experts, capacity, wires)
    logger.info(
        "Expert parallel: %d ranks of %d experts each, %s%s",
        dims.ep,
        num_experts // dims.ep,
        _HOW[dispatch],
        ", in FP8" if in_fp8 else "",
    )


def _wires(moe: MoELayer) -> Wires:
    """How a layer's tokens, and the gradients of its outputs, travel."""
    fp8 = moe.experts.fp8
    if fp8 is None or not fp8.dispatch:
        return NO_WIRES
    if moe.score_before_experts:
        raise UserError(
            "quantize.grouped_mm.float8.dispatch = true sends tokens as the experts quantise them, "
            "but moe_args.score_before_experts = true multiplies them by their weights first; set "
            "either to false."
        )
    return Wire(E4M3, fp8.emulate), Wire(fp8.gradient_kind, fp8.emulate)


_HOW = {
    "all_to_all": "one copy of a token per destination rank",
    "node_limited": "one copy of a token per destination node, then per rank",
    "all_gather": "all tokens to all ranks, in messages of fixed size",
}
# Up to so many ranks, gathering all tokens costs less than waiting for exact sizes.
_MOST_GATHERED = 8


def _resolve_dispatch(moes: Mapping[int, MoELayer], dims: ParallelDims, dispatch: str) -> str:
    """Return the dispatch that "auto" stands for here."""
    if dispatch != "auto":
        return dispatch
    if dims.nodes_per_ep_group > 1:
        return "node_limited"
    one_operator = all(
        moe.experts.use_grouped_mm and not moe.score_before_experts for moe in moes.values()
    )
    on_gpu = local_device().type == "cuda"
    gathers = on_gpu and one_operator and gathers_by_default(dims.ep, dims.etp, dims.pp)
    return "all_gather" if gathers else "all_to_all"


def gathers_by_default(ep: int, etp: int, pp: int) -> bool:
    """Tell whether tokens are gathered inside a node, with these degrees and one operator for all
    products of the experts."""
    return etp == pp == 1 and ep <= _MOST_GATHERED
