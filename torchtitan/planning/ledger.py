"""Record what operations on meta tensors would allocate, compute and send.

Meta tensors have shapes and storages without memory. A pass of the real model over them allocates
and frees, in the same order, what the pass on a GPU does. The ledger watches every operation.
"""

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchtitan.planning.kernels import flops_of, moved_by, workspace_of

# CUDA's caching allocator hands out multiples of this many bytes.
BLOCK = 512
# Operations that a compiler fuses; operations that allocate without reading or writing.
_ELEMENTWISE = ("aten::silu", "aten::mul", "aten::_to_copy", "aten::sigmoid", "aten::div")
_ONLY_ALLOCATE = ("aten::empty", "aten::new_empty")


@dataclass
class Work:
    """Work of a pass.

    flops: by kind (kernels.py).
    bytes_moved: read and written by all other operations.
    bytes_fused: by fused operators, beside their products.
    sent: bytes that this rank sends, by (name of the process group, kind of collective).
    """

    flops: Counter[str] = field(default_factory=Counter)
    bytes_moved: int = 0
    bytes_fused: int = 0
    sent: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.flops + other.flops,
            self.bytes_moved + other.bytes_moved,
            self.bytes_fused + other.bytes_fused,
            self.sent + other.sent,
        )

    def times(self, factor: float) -> "Work":
        return Work(
            Counter({kind: round(n * factor) for kind, n in self.flops.items()}),
            round(self.bytes_moved * factor),
            round(self.bytes_fused * factor),
            Counter({key: round(n * factor) for key, n in self.sent.items()}),
        )


class Ledger(TorchDispatchMode):
    """Watches operations inside of a `with` block.

    now: bytes of the living storages made here.
    peak: largest `now` since `start`, workspaces of kernels included.
    work: done since `start`.
    between: bytes by storage, of results of elementwise operations that only such operations have
        read: a compiler that fuses them doesn't keep them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.work = Work()
        self.between: dict[int, int] = {}
        self._size_of: dict[int, int] = {}  # by storage; 0: accounted for elsewhere

    def start(self) -> None:
        """Begin to look for the peak, and to count work."""
        self.peak, self.work = self.now, Work()

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leave out the storages of these: they are accounted for elsewhere."""
        for tensor in tensors:
            self._follow(tensor.untyped_storage(), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if any(isinstance(t, FakeTensor | DTensor) for t in outputs):
            return out  # DTensors: what they wrap comes by itself; they ask for shapes by fake ones
        fresh = [t for t in outputs if self._is_new(t)]
        name = func.name()
        self.peak = max(self.peak, self.now + workspace_of(name, args))
        inputs = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
        if fresh or func._schema.is_mutable:
            self._follow_elementwise(name, inputs, fresh)
            self._count(name, args, inputs, outputs)
        return out

    def _is_new(self, tensor: Tensor) -> bool:
        """Return whether the tensor's storage is new; it is then counted until it is freed."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._size_of:
            return False
        self._follow(storage, -(-storage.nbytes() // BLOCK) * BLOCK)
        return True

    def _follow(self, storage: torch.UntypedStorage, size: int) -> None:
        self._size_of[storage._cdata] = size
        weakref.finalize(storage, self._free, storage._cdata)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _free(self, key: int) -> None:
        self.now -= self._size_of.pop(key, 0)
        self.between.pop(key, None)

    def _follow_elementwise(self, name: str, inputs: list[Tensor], fresh: list[Tensor]) -> None:
        if name.startswith(_ELEMENTWISE):
            keys = [t.untyped_storage()._cdata for t in fresh]
            self.between |= {key: self._size_of[key] for key in keys}
            return
        for tensor in inputs:
            self.between.pop(tensor.untyped_storage()._cdata, None)

    def _count(self, name: str, args: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        if name.startswith("_c10d_functional::"):
            self._count_sent(name, args)
            return
        kind, flops = flops_of(name, args, outputs)
        if kind:
            self.work.flops[kind] += flops
            self.work.bytes_fused += moved_by(name, args)
            return
        if name.startswith(_ONLY_ALLOCATE):
            return
        self.work.bytes_moved += sum(map(_bytes, inputs)) + sum(map(_bytes, outputs))

    def _count_sent(self, name: str, args: Any) -> None:
        collective = name.partition("::")[2].partition(".")[0]
        share = _SHARE_SENT.get(collective)
        if share is None:
            return  # waits
        group = args[-1]
        size = dist.distributed_c10d._resolve_process_group(group).size()
        self.work.sent[group, collective] += round(_bytes(args[0]) * share(size))


# Part of its input that a rank of a group of n sends, in a ring.
_SHARE_SENT = {
    "all_gather_into_tensor": lambda n: n - 1,
    "reduce_scatter_tensor": lambda n: (n - 1) / n,
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_to_all_single": lambda n: (n - 1) / n,
}


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
