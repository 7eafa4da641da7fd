"""The products of experts on Hopper, grouped_mm.cu, which gathers rows itself; reference:
grouped_mm_torch.py, whose functions these are."""

from functools import lru_cache
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from torchtitan.ops.cuda import Kernel, tensor_map
from torchtitan.ops.grouped_mm_torch import Gathered
from torchtitan.tools.logging import logger

_SOURCE = Path(__file__).with_name("grouped_mm.cu")
_MOST_EXPERTS = 480
# Alignment, four stages, two buffers of each warp that stores, barriers, what tells blocks their
# tiles, and where each expert's rows end.
_SHARED_MEMORY = 1024 + 4 * (128 + 256) * 128 + 8 * 2 * 16 * 128 + 16 * 4 + 40 + 4 * _MOST_EXPERTS
_COLUMNS_OF_TILE = 256
_NUM_COUNTERS = 128  # streams that run products, or on which graphs with products are recorded
_places = count()
_BY_WEIGHTS, _BY_WEIGHTS_TRANSPOSED, _OVER_ROWS = range(3)


def applies(x_TD: Tensor, w2_EDF: Tensor) -> bool:
    """Tell whether the kernel is the one for these experts: at most 480, in bf16, D and F multiples
    of 64, tokens of less than 4 GiB, a Hopper GPU."""
    E, *sizes = w2_EDF.shape
    if x_TD.dtype != torch.bfloat16 or any(size % 64 for size in sizes) or x_TD.nbytes >= 2**32:
        return False
    if E > _MOST_EXPERTS:
        return False
    return x_TD.is_cuda and _compiles(x_TD.device)


@lru_cache
def _compiles(device: torch.device) -> bool:
    """Build the kernel for this GPU, tried once; tell whether it worked, and log why not."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        return False
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        why = "the package cuda-bindings is not installed"
    else:
        try:
            _kernel(_BY_WEIGHTS, gathers=False).load(device)
            _counters(device)  # not in a CUDA graph's memory, which ends with the graph
            # They are 0 before any stream counts.
            torch.cuda.current_stream(device).synchronize()
            return True
        except (ImportError, OSError, RuntimeError) as error:
            why = str(error)
    logger.warning("Experts: torch's grouped products are used instead of ours, because %s", why)
    return False


def gather(rows: Gathered) -> Gathered:
    return rows


def gate_up_swiglu(
    rows: Gathered, w13_E2FD: Tensor, weights_TK: Tensor, ends_E: Tensor
) -> tuple[Tensor, Tensor]:
    R, F = rows.slot_of_row_R.numel(), w13_E2FD.size(1) // 2
    gate_up_R2F, hidden_RF = rows.x.new_empty(R, 2 * F), rows.x.new_empty(R, F)
    swiglu = _SwiGLU(weights_TK, hidden_RF)
    _launch(_BY_WEIGHTS, rows, w13_E2FD, ends_E, gate_up_R2F, N=F, swiglu=swiglu)
    return gate_up_R2F, hidden_RF


def by_weights(rows_RK: Tensor, w_ENK: Tensor, ends_E: Tensor) -> Tensor:
    out_RN = rows_RK.new_empty(rows_RK.size(0), w_ENK.size(1))
    _launch(_BY_WEIGHTS, rows_RK, w_ENK, ends_E, out_RN, N=w_ENK.size(1))
    return out_RN


def by_weights_transposed(rows_RK: Tensor, w_EKN: Tensor, ends_E: Tensor) -> Tensor:
    out_RN = rows_RK.new_empty(rows_RK.size(0), w_EKN.size(2))
    _launch(_BY_WEIGHTS_TRANSPOSED, rows_RK, w_EKN, ends_E, out_RN, N=w_EKN.size(2))
    return out_RN


def swiglu_backward(
    grads: Gathered,
    w2_EDF: Tensor,
    gate_up_R2F: Tensor,
    weights_TK: Tensor,
    slot_of_row_R: Tensor,
    num_rows: Tensor | None,
    ends_E: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    R, F = gate_up_R2F.size(0), w2_EDF.size(2)
    grad_gate_up_R2F, hidden_RF = torch.empty_like(gate_up_R2F), gate_up_R2F.new_empty(R, F)
    new = weights_TK.new_empty if num_rows is None else weights_TK.new_zeros
    tiles = -(-F // _COLUMNS_OF_TILE)  # each adds up its part of the weights' gradients
    parts_TKN = new(*weights_TK.shape, tiles)
    swiglu = _SwiGLU(weights_TK, hidden_RF, gate_up_R2F, parts_TKN)
    _launch(_BY_WEIGHTS_TRANSPOSED, grads, w2_EDF, ends_E, grad_gate_up_R2F, N=F, swiglu=swiglu)
    return grad_gate_up_R2F, hidden_RF, parts_TKN.sum(dim=2)


def over_rows(a: Tensor | Gathered, b: Tensor | Gathered, ends_E: Tensor) -> Tensor:
    M, N = (each.x.size(1) if isinstance(each, Gathered) else each.size(1) for each in (a, b))
    out_EMN = ends_E.new_empty(ends_E.numel(), M, N, dtype=torch.bfloat16)
    if isinstance(b, Gathered):  # the kernel gathers the first matrix only
        assert isinstance(a, Tensor)
        _launch(_OVER_ROWS, b, a, ends_E, out_EMN, M=N, N=M, transposed=True)
    else:
        _launch(_OVER_ROWS, a, b, ends_E, out_EMN, M=M, N=N)
    return out_EMN


class _SwiGLU(NamedTuple):
    """SwiGLU's tensors beside the product's.

    hidden_RF: receives the activation.
    gate_up_R2F: read by the backward pass; None = forward.
    grad_weights_TKN: receives the weights' gradients, to be added up over N tiles of columns.
    """

    weights_TK: Tensor
    hidden_RF: Tensor
    gate_up_R2F: Tensor | None = None
    grad_weights_TKN: Tensor | None = None


def _kernel(
    kind: int, *, gathers: bool, top_k: int = 1, swiglu: bool = False, transposed: bool = False
) -> Kernel:
    settings = {
        "KIND": kind,
        "TRANSPOSED": int(transposed),
        "GATHER": int(gathers),
        "SWIGLU": int(swiglu),
        "TOP_K": top_k,
    }
    options = tuple(f"-D{name}={value}" for name, value in settings.items())
    return Kernel(_SOURCE, "grouped_mm", options, _SHARED_MEMORY)


@lru_cache
def _counters(device: torch.device) -> Tensor:
    """Counters of tiles, which each product leaves at 0: one a stream, and one for the graphs that
    are recorded on it. Two such graphs must not run at the same time.
    """
    return torch.zeros(_NUM_COUNTERS, dtype=torch.int32, device=device)


@lru_cache
def _place_of(stream: int, recorded: bool) -> int:
    """Give each stream a counter of its own, and its graphs another."""
    place = next(_places)
    assert place < _NUM_COUNTERS, f"more than {_NUM_COUNTERS} streams and graphs run experts"
    return place


def _launch(
    kind: int,
    a: Tensor | Gathered,
    b: Tensor,
    ends_E: Tensor,
    out: Tensor,
    *,
    M: int = 0,
    N: int,
    swiglu: _SwiGLU | None = None,
    transposed: bool = False,
) -> None:
    gathered = a if isinstance(a, Gathered) else None
    slots, top_k = (gathered.slot_of_row_R, gathered.top_k) if gathered else (None, 1)
    a, b = (a.x if isinstance(a, Gathered) else a).contiguous(), b.contiguous()
    assert slots is None or slots.dtype == torch.int32
    assert gathered is None or gathered.x.nbytes < 2**32
    over_rows = kind == _OVER_ROWS
    maps = [
        tensor_map(a, 64 if over_rows else 128, 64),
        tensor_map(b.flatten(0, -2), 128 if kind == _BY_WEIGHTS else 64, 64),
    ]
    for each in (out, swiglu.hidden_RF if swiglu else out):
        maps.append(tensor_map(each.flatten(0, -2), 16, 64))
    gate_up_R2F = swiglu.gate_up_R2F if swiglu else None
    maps.append(maps[0] if gate_up_R2F is None else tensor_map(gate_up_R2F, 128, 64))
    sizes = ends_E.numel(), M, N, 0 if over_rows else a.size(1)
    assert sizes[0] <= _MOST_EXPERTS and not any(size % 64 for size in sizes[1:])
    blocks = torch.cuda.get_device_properties(out.device).multi_processor_count // 2 * 2
    stream = torch.cuda.current_stream(out.device).cuda_stream
    counter = _counters(out.device)[_place_of(stream, torch.cuda.is_current_stream_capturing())]
    weights, hidden, _, grad_weights = swiglu or (None,) * 4
    arguments = (*maps, a, b, out, ends_E, *sizes, slots, weights, hidden, grad_weights, counter)
    kernel = _kernel(
        kind,
        gathers=gathered is not None,
        top_k=top_k,
        swiglu=swiglu is not None,
        transposed=transposed,
    )
    kernel.launch(out.device, (blocks,), 384, arguments)
