"""Weights of which each rank updates a part, and which layers compute with as a whole.

FSDP copies weights before a gather and after it, and gradients before their sum, several times the
bytes that travel. Here parts are gathered into their places of the whole weight, and gradients are
summed from the tensor that the backward pass makes.

A weight that is kept is gathered once a step; its part is a slice of it, which the optimizer
writes. One that is freed is gathered for each pass of its layer, but for the head and the last
block, which stay from the forward to the backward pass, and the embedding, whose backward pass
doesn't read it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from torchtitan.ops.grouped_mm import local_part

# torch 2.13 warns of the name that 2.11 has.
_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def split_first_dim(module: nn.Module, mesh: DeviceMesh) -> None:
    """Replace a module's parameters by DTensors that are also split along dim 0 over "fsdp", and
    equal over "dp_replicate", laid out as FSDP does it.

    mesh: ("fsdp",) or ("dp_replicate", "fsdp"); the parameters' first dim is a multiple of fsdp.
    """
    shards = mesh["fsdp"]
    for name, param in list(module.named_parameters()):
        local = local_part(param.detach())
        part = local.chunk(shards.size())[shards.get_local_rank()].clone()
        placements, whole_mesh = [*[Replicate()] * (mesh.ndim - 1), Shard(0)], mesh
        if isinstance(param, DTensor):
            factor = param._spec.num_shards_map[0]
            if factor > 1:
                placements[-1] = _StridedShard(0, split_factor=factor)
            placements += param.placements
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


def parts_travel(ranks: int, stride: int, node_size: int) -> bool:
    """Tell whether gradients travel to the rank that adds them up, in bf16, instead of being summed
    on their way, in fp32: half the bytes. Where several nodes have several of the ranks each it is
    more: what is summed inside of a node leaves it once.

    ranks: that share a weight.
    stride: from one of them to the next in the numbering of all.
    node_size: consecutive ranks of a node.
    """
    in_node = max(1, min(ranks, node_size // stride))
    return in_node in (1, ranks)


@dataclass(frozen=True)
class Sharing:
    """How ranks share weights.

    shards: ranks between which they are split along dim 0; None = they aren't.
    replicas: ranks that have the same ones; None = this one only.
    grad_dtype: dtype in which parameters get their gradients, and micro-batches are added up; None
        = their own.
    reduce_dtype: dtype in which gradients are summed over ranks.
    parts_travel: see the function.
    is_freed: whether whole weights are freed between passes.
    """

    shards: dist.ProcessGroup | None = None
    replicas: dist.ProcessGroup | None = None
    grad_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype = torch.float32
    parts_travel: bool = False
    is_freed: bool = False


class GatheredWeight:
    """A weight of which each rank keeps a slice along dim 0 up to date.

    new: values of this rank's slice; the tensor is kept, or copied.
    sharing: its `shards` are the ranks.

    whole: what layers compute with; right between `wait` and `free`.
    part: this rank's slice of it, to which new values are written.
    """

    def __init__(self, new: Tensor, sharing: Sharing):
        assert sharing.shards is not None
        ranks, rank, rows = sharing.shards.size(), sharing.shards.rank(), new.size(0)
        self.whole = new.new_empty(ranks * rows, *new.shape[1:])
        if sharing.is_freed:
            self.part = new
        else:
            self.part = self.whole.detach().narrow(0, rank * rows, rows).copy_(new)
        self._sharing = sharing
        self._outdated = True
        self._arriving: dist.Work | None = None
        self.free()

    @property
    def is_freed(self) -> bool:
        return self._sharing.is_freed

    @property
    def kept(self) -> Tensor:
        """Tensor that stays from pass to pass."""
        return self.part if self.is_freed else self.whole

    def outdate(self) -> None:
        """Have it gathered again before the next use: some rank's part has changed."""
        self._outdated = True

    @torch.no_grad()
    def start(self) -> None:
        """Start to gather it, where it is outdated."""
        if not self._outdated:
            return
        self._outdated = False
        if self.is_freed:
            self.whole.untyped_storage().resize_(self.whole.nbytes)
        # By `data` autograd doesn't see that a weight is filled anew, with the values it has saved.
        whole = self.whole.data
        self._arriving = _gather(whole, self.part, group=self._sharing.shards, async_op=True)

    def wait(self) -> None:
        """Let this stream wait for the slices of other ranks."""
        if self._arriving is not None:
            self._arriving.wait()
            self._arriving = None

    def free(self) -> None:
        """Free the whole weight until the next `start`, if that is how it is used.

        No gather is on its way afterwards, which would write older values over new ones.
        """
        self.wait()
        if self.is_freed:
            self.whole.untyped_storage().resize_(0)
            self._outdated = True

    def start_sum(self, grad: Tensor) -> "GradientSum":
        """Start to sum gradients of the whole weight over the ranks."""
        return GradientSum(grad.contiguous(), self._sharing)


class GradientSum:
    """A sum over ranks on its way, of which each rank gets its slice along dim 0.

    Where parts travel, a sum in a wider dtype than the gradients' is done by the rank that gets it,
    which receives all slices as they are.
    """

    def __init__(self, grad: Tensor, sharing: Sharing):
        assert sharing.shards is not None
        group, dtype = sharing.shards, sharing.reduce_dtype
        self._grad, self._dtype, self._ranks = grad, dtype, group.size()  # read until it is there
        self._sums_here = sharing.parts_travel and dtype.itemsize > grad.dtype.itemsize
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


class GatheringModule(NamedTuple):
    """A module of the forward pass, and its weights that are gathered from several ranks.

    weights: none, where FSDP gathers them all.
    reads_again: whether its backward pass reads its weights.
    """

    module: nn.Module
    weights: Sequence[GatheredWeight]
    reads_again: bool = True


def gather_ahead(
    root: nn.Module, modules: Sequence[GatheringModule], begin_backward: Callable[[], None]
) -> None:
    """Have each module wait for its weights, and those of the next one gathered while it computes;
    in the backward pass, where weights are freed in between, those of the one before.

    root: module whose forward pass runs the others.
    modules: embedding, blocks, head, in this order.
    begin_backward: called as the backward pass of a module begins.
    """
    if not any(each.weights for each in modules):
        return
    in_order = [each.weights for each in modules]
    root.register_forward_pre_hook(lambda *_: _take((), in_order[0]))
    for i, each in enumerate(modules):
        before = in_order[i - 1] if i > 0 and modules[i - 1].reads_again else ()
        after = in_order[i + 1] if i + 1 < len(modules) else ()
        # The backward pass begins with the head and the last block.
        stays = i >= len(modules) - 2
        one = _ModulePass(each, before, after, begin_backward, stays=stays)
        each.module.register_forward_pre_hook(one.enter)
        each.module.register_forward_hook(one.leave)

    def free_all(*_: object) -> None:
        """Without a backward pass nothing else frees what no block has used: an evaluation skips
        multi-token prediction."""
        if not torch.is_grad_enabled():
            for weights in in_order:
                for weight in weights:
                    weight.free()

    root.register_forward_hook(free_all)


class _ModulePass:
    """Hooks around a module's forward pass.

    before, after: weights to gather while it computes: in its backward pass those of the module
        before it, in its forward pass those of the one after it.
    begin_backward: see `gather_ahead`.
    stays: whether its weights stay until its backward pass.
    """

    def __init__(
        self,
        of: GatheringModule,
        before: Sequence[GatheredWeight],
        after: Sequence[GatheredWeight],
        begin_backward: Callable[[], None],
        *,
        stays: bool,
    ):
        self.weights, self.reads_again = of.weights, of.reads_again
        self.before, self.after, self.stays = before, after, stays
        self.begin_backward = begin_backward

    def enter(self, *_: object) -> None:
        _take(self.weights, self.after)

    def leave(self, module: nn.Module, inputs: object, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        comes_back = hidden.requires_grad and self.reads_again
        if comes_back:
            hidden.register_hook(self._enter_backward)
        if not (comes_back and self.stays):
            for weight in self.weights:
                weight.free()

    def _enter_backward(self, grad: Tensor) -> None:
        self.begin_backward()
        _take(self.weights, self.before)


def _take(weights: Sequence[GatheredWeight], others: Sequence[GatheredWeight]) -> None:
    """Wait for weights, and start to gather others, whose turn is next."""
    for weight in (*weights, *others):
        weight.start()
    for weight in weights:
        weight.wait()
