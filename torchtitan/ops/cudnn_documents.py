"""Attention inside of packed documents by one call of cuDNN's kernel for all of them, where the
package nvidia-cudnn-frontend is installed; torch has no way to this kernel (document_attention.py).

A call is built once for each number of tokens, of places for documents, and bound of their length,
in 0.1 s; places are a power of two (`places_for`), and places without a document have no tokens.
Where documents lie is read on the device: the host waits for nothing, and a CUDA graph that is
replayed computes the documents of the moment.

Letters: T tokens of all documents, H heads, C channels.
"""

import threading
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchtitan.ops.packed_documents import Packed
from torchtitan.tools.logging import logger

# cuDNN's names of a call's tensors. AT_…: token at which a document begins, times its tokens' size.
Q, K, V, OUT, SUMS, GRAD, DQ, DK, DV, LENGTHS, AT_QK, AT_V, AT_OUT, AT_SUMS = range(1, 15)
BEGINS = (AT_QK, AT_V, AT_OUT, AT_SUMS)

# Channels of queries and of values with which the kernel was found right, and faster, on a GPU. Of
# others (64, 64) is right, and slower for short documents: they take flash attention.
PROVEN = {(128, 128), (192, 128)}


class Call(NamedTuple):
    """Sizes and types that a cuDNN call is built for.

    v_step: channels from a head's values to those of the next one; more than `v` in a slice.
    documents: places for them.
    longest: length that no document exceeds.
    """

    device: torch.device
    dtype: torch.dtype
    tokens: int
    heads: int
    qk: int
    v: int
    v_step: int
    documents: int
    longest: int
    scale: float
    forward: bool

    @property
    def steps(self) -> tuple[int, int, int, int]:
        """Elements from one token to the next: of queries, values, outputs, sums."""
        return self.heads * self.qk, self.heads * self.v_step, self.heads * self.v, 1


class Built(NamedTuple):
    """Graph of cuDNN, and the bytes that it needs while it runs."""

    graph: Any
    workspace: int


class _OfThread(threading.local):
    """A thread's handle and calls: cuDNN's handles may not be shared, and autograd has threads."""

    def __init__(self) -> None:
        self.handles: dict[torch.device, Any] = {}
        self.calls: dict[Call, Built | None] = {}


_of_thread = _OfThread()


@cache
def package() -> Any:
    """Return the package's module; None where it isn't installed or doesn't start."""
    try:
        module = import_module("cudnn")
        return module if hasattr(module, "pygraph") else None
    except ImportError:
        return None
    except Exception as error:  # of the libraries that it opens
        logger.warning("nvidia-cudnn-frontend does not start, and is left out: %s", error)
        return None


def computes(qk: int, v: int) -> bool:
    """Return whether cuDNN's kernel is to compute heads of so many channels in this run."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    return (qk, v) in PROVEN and not deterministic and package() is not None and _is_hopper()


def _is_hopper() -> bool:
    return torch.cuda.get_device_capability()[0] >= 9


def way(qk: int, v: int) -> str:
    """Say which kernels compute packed documents on this GPU, and what would be faster.

    qk, v: channels of a head.
    """
    if torch.are_deterministic_algorithms_enabled():
        return "flash attention (deterministic)"
    if computes(qk, v):
        return f"cuDNN's kernel, one call for all (nvidia-cudnn-frontend {package().__version__})"
    told = "flash attention, and cuDNN's kernel once for each long one"
    if not _is_hopper() or (qk, v) not in PROVEN:
        return told
    return f"{told}; with `pip install nvidia-cudnn-frontend` attention would be faster"


def places_for(documents: int) -> int:
    """Round up to a power of two, so that few calls are built; at least 16, which cost nothing."""
    return _power_of_two(documents, 16)


def attend(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor] | None:
    """Return the output (T, H, channels of v), and logarithms of the softmax's sums, fp32 (H, T).

    q, k, v: (T, H, C), bf16 or fp16; v may have fewer channels, and be a slice of wider heads.
    starts: int32 (places + 1,), on the device.
    longest: length of the longest document, or more.

    None where cuDNN doesn't compute this.
    """
    v, v_step = _heads_apart(v)
    call = _call(q, v, v_step, starts, longest, scale, forward=True)
    if (built := _built(call)) is None:
        return None
    out = q.new_empty(v.shape)
    log_sums = q.new_empty((call.heads, call.tokens), dtype=torch.float32)
    tensors = {Q: q.contiguous(), K: k.contiguous(), V: v, OUT: out, SUMS: log_sums}
    _run(built, call, tensors, starts)
    return out, log_sums


def attend_backward(
    packed: Packed, log_sums: Tensor, starts: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the gradients of q, k and v; None where cuDNN doesn't compute this.

    log_sums: from `attend`, or its equal.
    """
    grad, q, k, v, out = packed
    v, v_step = _heads_apart(v)
    call = _call(q, v, v_step, starts, longest, scale, forward=False)
    if (built := _built(call)) is None:
        return None
    grads = q.new_empty(q.shape), q.new_empty(k.shape), q.new_empty(v.shape)
    given = dict(zip((GRAD, Q, K, OUT), (grad, q, k, out), strict=True))
    tensors = {name: t.contiguous() for name, t in given.items()}
    tensors |= {V: v, SUMS: log_sums.contiguous()} | dict(zip((DQ, DK, DV), grads, strict=True))
    _run(built, call, tensors, starts)
    return grads


def _heads_apart(v: Tensor) -> tuple[Tensor, int]:
    """Return values whose heads lie at equal distances, and this distance: v itself, or a copy."""
    step = v.stride(1)
    aligned = v.data_ptr() % 16 == 0 and step % 8 == 0
    if aligned and v.stride() == (v.size(1) * step, step, 1):
        return v, step
    return v.contiguous(), v.size(2)


def _call(
    q: Tensor, v: Tensor, v_step: int, starts: Tensor, longest: int, scale: float, *, forward: bool
) -> Call:
    (T, H, C), bound = q.shape, _power_of_two(longest, 256)
    return Call(
        q.device, q.dtype, T, H, C, v.size(2), v_step, starts.numel() - 1, min(bound, T), scale,
        forward,
    )  # fmt: skip


def _power_of_two(number: int, least: int) -> int:
    return max(least, 1 << (number - 1).bit_length())


def _built(call: Call) -> Built | None:
    """Return what is built for this call, by this thread; None where cuDNN is not to compute it.

    A deterministic run has other kernels: cuDNN's needs a square of `longest` for each head and
    document in memory.
    """
    if call.device.type != "cuda" or not computes(call.qk, call.v):
        return None
    calls = _of_thread.calls
    if call not in calls:
        try:
            calls[call] = build(call)
        except Exception as error:  # the package has many kinds, and other versions have others
            _tell_refusal(call.qk, call.v, " ".join(str(error).split())[:300])
            calls[call] = None
    return calls[call]


@cache
def _tell_refusal(qk: int, v: int, error: str) -> None:
    logger.warning(
        "cuDNN refuses packed documents with heads of %d and %d channels; flash attention computes "
        "them: %s",
        qk,
        v,
        error,
    )


def build(call: Call) -> Built:
    """Build a call. Raises what the package raises where cuDNN has no kernel for it."""
    graph = _Graph(call)
    if call.forward:
        graph.add_forward()
    else:
        graph.add_backward()
    return graph.planned()


class _Graph:
    """A call's tensors and its one operation, told to the package.

    To cuDNN each tensor is (documents, H, longest, C), of which a document has its own tokens only.
    """

    def __init__(self, call: Call) -> None:
        cudnn = package()
        self.call, self.kinds = call, cudnn.data_type
        half = self.kinds.BFLOAT16 if call.dtype == torch.bfloat16 else self.kinds.HALF
        self.graph = cudnn.pygraph(
            io_data_type=half,
            intermediate_data_type=self.kinds.FLOAT,
            compute_data_type=self.kinds.FLOAT,
            handle=_handle(call.device),
        )
        self.half = half
        lengths = self._numbers(LENGTHS, call.documents, self.kinds.INT32)
        count, kind = call.documents + 1, self.kinds.INT64
        self.begins = {name: self._numbers(name, count, kind) for name in BEGINS}
        self.options = {
            "attn_scale": call.scale,
            "use_padding_mask": True,
            "seq_len_q": lengths,
            "seq_len_kv": lengths,
            "diagonal_alignment": cudnn.diagonal_alignment.TOP_LEFT,
            "diagonal_band_right_bound": 0,  # causal
        }
        self.q, self.k = self._given(Q, AT_QK, call.qk), self._given(K, AT_QK, call.qk)
        self.v = self._given(V, AT_V, call.v, call.v_step)

    def add_forward(self) -> None:
        out, sums = self.graph.sdpa(
            name="forward", q=self.q, k=self.k, v=self.v, generate_stats=True, **self.options
        )
        self._result(out, OUT, AT_OUT, self.call.v)
        dim, stride = self._layout_of_sums()
        sums.set_uid(SUMS).set_output(True).set_data_type(self.kinds.FLOAT)
        sums.set_dim(dim).set_stride(stride).set_ragged_offset(self.begins[AT_SUMS])

    def add_backward(self) -> None:
        call = self.call
        dim, stride = self._layout_of_sums()
        sums = self.graph.tensor(uid=SUMS, dim=dim, stride=stride, data_type=self.kinds.FLOAT)
        sums.set_ragged_offset(self.begins[AT_SUMS])
        grads = self.graph.sdpa_backward(
            name="backward",
            q=self.q,
            k=self.k,
            v=self.v,
            o=self._given(OUT, AT_OUT, call.v),
            dO=self._given(GRAD, AT_OUT, call.v),
            stats=sums,
            max_total_seq_len_q=call.tokens,  # otherwise memory for documents × longest
            max_total_seq_len_kv=call.tokens,
            **self.options,
        )
        sizes = (DQ, AT_QK, call.qk), (DK, AT_QK, call.qk), (DV, AT_OUT, call.v)
        for tensor, size in zip(grads, sizes, strict=True):
            self._result(tensor, *size)

    def planned(self) -> Built:
        modes = package().heur_mode
        self.graph.deselect_engines(["sdpa_fwd_prefill_sm90"])  # compiles with cutlass, if it can
        self.graph.validate()
        self.graph.build_operation_graph()
        self.graph.create_execution_plans([modes.A, modes.FALLBACK])
        self.graph.check_support()
        self.graph.build_plans()
        return Built(self.graph, self.graph.get_workspace_size())

    def _numbers(self, name: int, count: int, kind: Any) -> Any:
        dim, stride = [count, 1, 1, 1], [1, 1, 1, 1]
        return self.graph.tensor(uid=name, dim=dim, stride=stride, data_type=kind)

    def _given(self, name: int, at: int, channels: int, step: int = 0) -> Any:
        dim, stride = self._layout(channels, step or channels)
        tensor = self.graph.tensor(uid=name, dim=dim, stride=stride, data_type=self.half)
        tensor.set_ragged_offset(self.begins[at])
        return tensor

    def _result(self, tensor: Any, name: int, at: int, channels: int) -> None:
        dim, stride = self._layout(channels, channels)
        tensor.set_uid(name).set_output(True).set_dim(dim).set_stride(stride)
        tensor.set_ragged_offset(self.begins[at])

    def _layout(self, channels: int, step: int) -> tuple[list[int], list[int]]:
        B, S, H = self.call.documents, self.call.longest, self.call.heads
        return [B, H, S, channels], [S * H * step, step, H * step, 1]

    def _layout_of_sums(self) -> tuple[list[int], list[int]]:
        """(H, T), as flash attention has them."""
        B, S, H = self.call.documents, self.call.longest, self.call.heads
        return [B, H, S, 1], [H * S, self.call.tokens, 1, 1]


def _handle(device: torch.device) -> Any:
    """Return this thread's handle of cuDNN, on the current stream."""
    cudnn, handles = package(), _of_thread.handles
    if device not in handles:
        with torch.cuda.device(device):
            handles[device] = cudnn.create_handle()
    cudnn.set_stream(handles[device], torch.cuda.current_stream(device).cuda_stream)
    return handles[device]


def _run(built: Built, call: Call, tensors: dict[int, Tensor], starts: Tensor) -> None:
    handle = _handle(call.device)
    space = torch.empty(max(1, built.workspace), dtype=torch.uint8, device=call.device)
    built.graph.execute(tensors | places(starts, call.steps), space, handle=handle)


def places(starts: Tensor, steps: tuple[int, int, int, int]) -> dict[int, Tensor]:
    """Return where documents lie, by cuDNN's names: their lengths, and where their tensors begin.

    steps: elements from one token to the next, of queries, values, outputs, sums.
    """
    count = starts.numel()
    # Each row begins at a multiple of 16 bytes.
    begins = starts.new_empty((4, count + count % 2), dtype=torch.int64)[:, :count]
    torch.mul(starts, _on_device(steps, starts.device), out=begins)
    return {LENGTHS: starts.diff()} | dict(zip(BEGINS, begins, strict=True))


@cache
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the numbers as a column; copied once, since the host may not wait for the device."""
    return torch.tensor(numbers, device=device).unsqueeze(1)
