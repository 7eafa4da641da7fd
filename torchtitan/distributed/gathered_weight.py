"""Weights that each rank keeps whole and updates in part: gathered once a step, where they lie.

FSDP copies weights before a gather and after it, and gradients before their sum, several times the
bytes that travel. Here a rank's part is a slice of the whole weight, the optimizer writes it there,
and gradients are summed from the tensor that the backward pass makes.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from torchtitan.ops.grouped_mm import local_part

# torch 2.13 warns of the name that 2.11 has.
_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def split_first_dim(module: nn.Module, mesh: DeviceMesh) -> None:
    """Replace a module's parameters by DTensors that are also split along dim 0 over `mesh`, laid
    out as FSDP does it. Their first dim must be a multiple of the ranks."""
    for name, param in list(module.named_parameters()):
        local = local_part(param.detach())
        part = local.chunk(mesh.size())[mesh.get_local_rank()].clone()
        placements, whole_mesh = [Shard(0)], mesh
        if isinstance(param, DTensor):
            factor = param._spec.num_shards_map[0]
            outer = _StridedShard(0, split_factor=factor) if factor > 1 else Shard(0)
            placements = [outer, *param.placements]
            whole_mesh = DeviceMesh._concatenate([mesh, param.device_mesh])
        split = DTensor.from_local(
            part,
            whole_mesh,
            placements,
            run_check=False,
            shape=param.shape,
            stride=param.stride(),
        )
        module.register_parameter(name, nn.Parameter(split, param.requires_grad))


class GatheredWeight:
    """A weight of which each rank of a group keeps a slice along dim 0 up to date.

    part: this rank's slice, copied.
    reduce_dtype: dtype in which gradients are summed over the ranks.

    whole: what layers compute with; slices of other ranks are right after `wait`.
    part: view of this rank's slice of it, to which new values are written.
    """

    def __init__(self, part: Tensor, group: dist.ProcessGroup, reduce_dtype: torch.dtype):
        ranks, rank = group.size(), group.rank()
        self.whole = part.new_empty(ranks * part.size(0), *part.shape[1:])
        self.part = self.whole.detach().narrow(0, rank * part.size(0), part.size(0))
        self.part.copy_(part)
        self._reduce_dtype = reduce_dtype
        self._group = group
        self._outdated = True
        self._arriving: dist.Work | None = None

    def outdate(self) -> None:
        """Have it gathered again before the next use: some rank's part has changed."""
        self._outdated = True

    @torch.no_grad()
    def start(self) -> None:
        """Start to gather it, where it is outdated."""
        if self._outdated:
            self._outdated = False
            # By `data` autograd doesn't count it as a change of what a forward pass has saved.
            whole = self.whole.data
            self._arriving = _gather(whole, self.part, group=self._group, async_op=True)

    def wait(self) -> None:
        """Let this stream wait for the slices of other ranks."""
        if self._arriving is not None:
            self._arriving.wait()
            self._arriving = None

    def start_sum(self, grad: Tensor) -> "GradientSum":
        """Start to sum gradients of the whole weight over the ranks."""
        return GradientSum(grad.contiguous(), self._group, self._reduce_dtype)


class GradientSum:
    """A sum over ranks on its way, of which each rank gets its slice along dim 0.

    A sum in a wider dtype than the gradients' is done by the rank that gets it, which receives all
    slices as they are: half the bytes of fp32, and nothing is rounded on the way.
    """

    def __init__(self, grad: Tensor, group: dist.ProcessGroup, dtype: torch.dtype):
        self._grad, self._dtype, self._ranks = grad, dtype, group.size()  # read until it is there
        self._sums_here = dtype.itemsize > grad.dtype.itemsize
        if self._sums_here:
            sizes = [grad.size(0) // group.size()] * group.size()
            exchange = torch.ops._c10d_functional.all_to_all_single
            self._travelling = exchange(grad, sizes, sizes, group.group_name)
        else:
            reduce = torch.ops._c10d_functional.reduce_scatter_tensor
            self._travelling = reduce(grad.to(dtype), "sum", group.size(), group.group_name)

    def wait(self) -> Tensor:
        """Let this stream wait for the ranks; return this rank's slice of the sum."""
        arrived = torch.ops._c10d_functional.wait_tensor(self._travelling)
        if not self._sums_here:
            return arrived
        return arrived.unflatten(0, (self._ranks, -1)).sum(0, dtype=self._dtype)


def gather_ahead(
    root: nn.Module, blocks: Sequence[tuple[nn.Module, Sequence[GatheredWeight]]]
) -> None:
    """Have each block wait for its weights, and those of the next one gathered while it computes.

    root: module whose forward pass runs the blocks.
    blocks: in order, those with such weights or without, and the weights of each.
    """
    blocks = [(block, weights) for block, weights in blocks if weights]
    if not blocks:
        return
    first = blocks[0][1]
    root.register_forward_pre_hook(lambda *_: _take((), first))
    for i, (block, weights) in enumerate(blocks):
        following = blocks[i + 1][1] if i + 1 < len(blocks) else ()
        block.register_forward_pre_hook(
            lambda *_, weights=weights, following=following: _take(weights, following)
        )


def _take(weights: Sequence[GatheredWeight], following: Sequence[GatheredWeight]) -> None:
    """Wait for weights, and start to gather the following ones."""
    for weight in (*weights, *following):
        weight.start()
    for weight in weights:
        weight.wait()
