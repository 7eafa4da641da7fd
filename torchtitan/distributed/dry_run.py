"""Dry run (comm.mode "fake_backend"): one process is rank 0 of a large world and sends nothing.

Every other rank is assumed to do what this rank does, so collectives return what it has:

    all-gather, gather    this rank's tensor, once for each rank
    sums                  this rank's value times the size of the group
    all-to-all            what was sent to rank r comes back from rank r
    receive               noise, since another pipeline stage computes something else

So the sizes of all collectives agree, those of the experts' exchange too (counts and rows): each
rank receives as many rows as it sends, which is the mean over ranks. torch's own "fake" backend
makes up sizes and contents of each collective alone, and they don't fit together there.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import (
    _create_work_from_future,  # pyright: ignore[reportAttributeAccessIssue]  # not in the stub
)

from torchtitan.ops.grouped_mm import local_part
from torchtitan.tools.errors import UserError

BACKEND = "dry_run"


def init_dry_run(world_size: int, rank: int = 0) -> None:
    """Make the default group, with this process as `rank`; groups made later are dry-run, too."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if BACKEND.upper() not in dist.Backend._plugins:
        make: Any = DryRunGroup  # the stub lacks the constructor that needs no store
        dist.Backend.register_backend(
            BACKEND, lambda _, rank, size, __: make(rank, size), devices=["cpu", "cuda"]
        )
    dist.init_process_group(BACKEND, store=FakeStore(), rank=rank, world_size=world_size)


def check_room(model: nn.Module, device: torch.device) -> None:
    """Raise `UserError` where rank 0's weights, gradients and optimizer state exceed the memory.

    model: sharded, still on the meta device. The optimizer has two running means a weight.
    device: its whole memory counts, the machine's for "cpu".
    """
    weights = sum(local_part(p).numel() * p.element_size() for p in model.parameters())
    if device.type == "cuda":
        memory = torch.cuda.mem_get_info(device)[1]
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 4 * weights > memory:
        raise UserError(
            f"rank 0 of {dist.get_world_size()} needs {4 * weights / 2**30:,.0f} GiB for weights, "
            f"gradients and optimizer states alone, but the memory is {memory / 2**30:,.0f} GiB; "
            "set NGPU or the degrees in [parallelism] higher, or model.args.n_layers lower, or "
            "plan the run without its memory: python scripts/plan.py."
        )


class DryRunGroup(dist.ProcessGroup):
    """Process group of a dry run. torch calls its methods by the names and arguments here.

    torch 2.13 renamed some (all_gather_single for _allgather_base, …): its C++ code calls the old
    names, its Python code both.
    """

    @property
    def group_name(self) -> str:
        return dist.distributed_c10d._world.pg_names[self]

    def getBackendName(self) -> str:
        return BACKEND

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None):
        for copies, tensor in zip(outputs, inputs, strict=True):
            for copy in copies:
                _fill(copy, tensor)
        return _done()

    def allgather_into_tensor_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ):
        for output, tensor in zip(outputs, inputs, strict=True):
            for copy in output.detach().view(self.size(), -1):
                _fill(copy, tensor.flatten())
        return _done()

    def _allgather_base(self, output: Tensor, tensor: Tensor, opts: Any = None):
        return self.allgather_into_tensor_coalesced([output], [tensor])

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None):
        return self.allgather(outputs, inputs if outputs else [])

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None):
        for output, parts in zip(outputs, inputs, strict=False):
            _fill(output, parts[self.rank()])
        return _done()

    def allreduce(self, tensors: list[Tensor], opts: Any = None):
        for tensor in tensors:
            self._sum(tensor, opts)
        return _done()

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None):
        for output, parts in zip(outputs, inputs, strict=True):
            _fill(output, parts[self.rank()])
            self._sum(output, opts)
        return _done()

    def reduce_scatter_tensor_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ):
        parts = [list(tensor.detach().view(self.size(), -1)) for tensor in inputs]
        return self.reduce_scatter([output.view(-1) for output in outputs], parts, opts)

    def _reduce_scatter_base(self, output: Tensor, tensor: Tensor, opts: Any = None):
        return self.reduce_scatter_tensor_coalesced([output], [tensor], opts)

    def alltoall(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None):
        for output, tensor in zip(outputs, inputs, strict=True):
            n = min(len(output), len(tensor))
            _fill(output[:n], tensor[:n])
            output[n:].zero_()
        return _done()

    def alltoall_base(
        self,
        output: Tensor,
        tensor: Tensor,
        output_sizes: list[int] | None,
        sizes: list[int] | None,
        opts: Any = None,
    ):
        output, tensor = output.detach(), tensor.detach()
        equal = len(output) // self.size(), len(tensor) // self.size()
        return self.alltoall(
            output.split(output_sizes or equal[0]), tensor.split(sizes or equal[1])
        )

    def broadcast(self, tensors: list[Tensor], opts: Any = None):
        return _done()

    def send(self, tensors: list[Tensor], to: int, tag: int):
        return _done()

    def recv(self, tensors: list[Tensor], source: int, tag: int):
        for tensor in tensors:
            if tensor.is_floating_point():
                tensor.detach().normal_()
            else:  # torch 2.13: a stage's agreement with the shapes announced to it
                tensor.fill_(1)
        return _done()

    def barrier(self, opts: Any = None):
        return _done()

    def _sum(self, tensor: Tensor, opts: Any) -> None:
        if opts is None or opts.reduceOp == dist.ReduceOp.SUM:
            tensor.detach().mul_(self.size())


_SAME = {
    "allreduce_coalesced": "allreduce",
    "reduce": "allreduce",
    "all_gather_single": "_allgather_base",
    "all_gather_single_coalesced": "allgather_into_tensor_coalesced",
    "reduce_scatter_single": "_reduce_scatter_base",
    "reduce_scatter_single_coalesced": "reduce_scatter_tensor_coalesced",
    "all_to_all_single": "alltoall_base",
}
for _name, _method in _SAME.items():
    setattr(DryRunGroup, _name, getattr(DryRunGroup, _method))


def _fill(output: Tensor, tensor: Tensor) -> None:
    output.detach().copy_(tensor.detach())


def _done() -> dist.Work:
    future: torch.futures.Future = torch.futures.Future()
    future.set_result(None)
    return _create_work_from_future(future)
