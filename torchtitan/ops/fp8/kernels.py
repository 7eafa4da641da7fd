"""FP8 on Hopper: quantize.cu, swiglu.cu, adamw.cu and gemm.cu; reference: quantize.py.

Letters as in quantize.py. `ends` are int32 numbers of rows up to the end of each group, on the
device; `padded_ends` the same with each group padded to a multiple of 128.
"""

from pathlib import Path

import torch
from torch import Tensor

from torchtitan.ops.cuda import Kernel, tensor_map
from torchtitan.ops.fp8.quantize import BLOCK, E4M3, E5M2, Fp8, padded_tiles
from torchtitan.ops.fp8.weight import Fp8Weight

_FOLDER = Path(__file__).parent
_QUANTIZE, _SWIGLU = _FOLDER / "quantize.cu", _FOLDER / "swiglu.cu"
_THREADS = 512  # of a quantising block
_SWIGLU_THREADS = 256  # that go through 64 rows
# Of `swiglu_backward`: maxima of columns, and three tiles of bf16.
_WAITING = 3 * 4 * BLOCK + 3 * 2 * BLOCK * BLOCK
# Tiles of 256 rows: faster than of 128 nearly everywhere (docs/LOG.md, 2026-11-27).
_HALVES = 2
# A warp of gemm.cu stores its results by boxes of 16 rows by 64 columns.
_BUFFERS, _BYTES_BOX = 2, 16 * 128
_SHARED_MEMORY = 227 * 1024  # of a block on Hopper


def _ceil(size: int) -> int:
    return -(-size // BLOCK)


def _launch(
    source: Path,
    name: str,
    kind: torch.dtype,
    grid: tuple[int, ...],
    *arguments: object,
    shared: int = 0,
    threads: int = _THREADS,
) -> None:
    device = next(each.device for each in arguments if isinstance(each, Tensor))
    kernel = Kernel(source, name, (f"-DE5M2={int(kind == E5M2)}",), shared)
    if 0 not in grid:
        kernel.launch(device, grid, threads, arguments)


def _multiprocessors(like: Tensor) -> int:
    return torch.cuda.get_device_properties(like.device).multi_processor_count


def _parts(like: Tensor, tiles: int, blocks: int) -> int:
    """Return how many thread blocks share a tile's columns.

    Each goes through up to 4 blocks of columns, as long as every multiprocessor has 16 turns.
    """
    each = min(4, max(1, tiles * blocks // (16 * _multiprocessors(like))))
    return -(-blocks // each)


def _new(like: Tensor, *shape: int, kind: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=kind, device=like.device)


def by_rows(x_RK: Tensor, kind: torch.dtype = E4M3) -> Fp8:
    """Compute `quantize.by_rows` of a bf16 matrix, K a multiple of 16."""
    R, K = x_RK.shape
    out = Fp8(_new(x_RK, R, K, kind=kind), _new(x_RK, _ceil(K), R))
    _launch(_QUANTIZE, "quantize_rows", kind, (_ceil(R), _ceil(K)), x_RK, *out, R, K)
    return out


def by_blocks(w_ENK: Tensor, *, transposed: bool = False) -> Fp8:
    """Compute `quantize.by_blocks` of bf16 or fp32 weights, N and K multiples of 16.

    transposed: return the same values and scales as (E, K, N).
    """
    E, N, K = w_ENK.shape
    n, k = _ceil(N), _ceil(K)
    rows, columns, of_rows, of_columns = (K, N, k, n) if transposed else (N, K, n, k)
    out = Fp8(_new(w_ENK, E, rows, columns, kind=E4M3), _new(w_ENK, E, of_rows, of_columns))
    in_fp32 = int(w_ENK.dtype == torch.float32)
    grid = (k, n, E)
    _launch(_QUANTIZE, "quantize_blocks", E4M3, grid, w_ENK, *out, N, K, in_fp32, int(transposed))
    return out


def transposed_blocks(weight: Fp8) -> Fp8:
    """Compute `quantize.transposed_blocks`, N and K multiples of 16."""
    E, N, K = weight.values.shape
    n, k = _ceil(N), _ceil(K)
    out = Fp8(_new(weight.values, E, K, N, kind=E4M3), _new(weight.values, E, k, n))
    _launch(_QUANTIZE, "transpose_blocks", E4M3, (k, n, E), *weight, *out, N, K)
    return out


def by_both(
    x_RK: Tensor, ends: Tensor, padded_ends: Tensor, kind: torch.dtype = E4M3
) -> tuple[Fp8, Fp8]:
    """Return a bf16 matrix by rows, and these by columns (`by_columns`), in one pass; of rows
    behind the last group nothing is defined. K is a multiple of 16."""
    R, K = x_RK.shape
    tiles, blocks = padded_tiles(R, ends.numel()), _ceil(K)
    rows = Fp8(_new(x_RK, R, K, kind=kind), _new(x_RK, blocks, R))
    columns = _new_columns(ends, K, tiles, kind)
    grid = (tiles, _parts(ends, tiles, blocks))
    sizes = R, K, ends.numel()
    _launch(
        _QUANTIZE, "quantize_both", kind, grid, x_RK, ends, padded_ends, *rows, *columns, *sizes
    )
    return rows, columns


def _new_columns(like: Tensor, K: int, tiles: int, kind: torch.dtype) -> Fp8:
    scales = _new(like, tiles, _ceil(K) * BLOCK)
    return Fp8(_new(like, K, tiles * BLOCK, kind=kind), scales)


def by_columns(
    x: Fp8,
    ends: Tensor,
    padded_ends: Tensor,
    rows: int,
    slot_of_row: Tensor | None = None,
    top_k: int = 1,
) -> Fp8:
    """Transpose a matrix quantised by rows to one by columns.

    rows: most that there can be.
    slot_of_row: int32, rows are tokens slot // top_k of `x`; None = they are those of `x`.
    """
    T, K = x.values.shape
    groups, kind = ends.numel(), x.values.dtype
    tiles = padded_tiles(rows, groups)
    out = _new_columns(ends, K, tiles, kind)
    lists, grid = (slot_of_row, ends, padded_ends), (tiles, _parts(ends, tiles, _ceil(K)))
    _launch(_QUANTIZE, "transpose", kind, grid, *x, *lists, *out, T, K, groups, top_k)
    return out


def gather(x: Fp8, slot_of_row_R: Tensor, ends: Tensor, top_k: int) -> Fp8:
    """Copy the token, slot // top_k, of every row. K is a multiple of 16."""
    (T, K), R = x.values.shape, slot_of_row_R.numel()
    out = Fp8(_new(ends, R, K, kind=x.values.dtype), _new(ends, _ceil(K), R))
    lists, grid = (slot_of_row_R, ends), (_ceil(R), -(-K // 512))
    _launch(_QUANTIZE, "gather", E4M3, grid, *x, *lists, *out, T, R, K, ends.numel(), top_k)
    return out


def swiglu(
    gate_up_R2F: Tensor, weights_N: Tensor | None, slot_of_row_R: Tensor | None, ends: Tensor
) -> tuple[Fp8, Fp8]:
    """Compute `quantize.swiglu`. F is a multiple of 128.

    weights_N: fp32, of each slot; None = 1, and there are no slots.
    """
    R, F = gate_up_R2F.size(0), gate_up_R2F.size(1) // 2
    blocks = _ceil(F)
    hidden = Fp8(_new(ends, R, F, kind=E4M3), _new(ends, blocks, R))
    kept = Fp8(_new(ends, R, 2 * F, kind=E4M3), _new(ends, 2 * blocks, R))
    tiles = -(-R // 64)
    grid = (tiles, _parts(ends, tiles, blocks))
    _launch(
        _SWIGLU, "swiglu", E4M3, grid, gate_up_R2F, weights_N, slot_of_row_R, ends, *hidden, *kept,
        R, F, ends.numel(), threads=_SWIGLU_THREADS,
    )  # fmt: skip
    return hidden, kept


def swiglu_backward(
    grad_RF: Tensor,
    kept: Fp8,
    weights_N: Tensor | None,
    slot_of_row_R: Tensor | None,
    ends: Tensor,
    padded_ends: Tensor,
    kind: torch.dtype,
) -> tuple[Fp8, Fp8, Fp8, Tensor]:
    """Compute `quantize.swiglu_backward`; of rows behind the last group nothing is defined.

    weights_N: as in `swiglu`; without weights their gradient has no elements.
    """
    R, F = grad_RF.shape
    tiles, blocks = padded_tiles(R, ends.numel()), F // BLOCK
    grad = Fp8(_new(ends, R, 2 * F, kind=kind), _new(ends, 2 * blocks, R))
    t_grad, t_hidden = _new_columns(ends, 2 * F, tiles, kind), _new_columns(ends, F, tiles, E4M3)
    parts = _new(ends, blocks, 0 if weights_N is None else R)
    grid = (tiles, _parts(ends, tiles, blocks))
    _launch(
        _SWIGLU, "swiglu_backward", kind, grid, grad_RF, *kept, weights_N, slot_of_row_R, ends,
        padded_ends, *grad, *t_grad, *t_hidden, parts, R, F, ends.numel(), shared=_WAITING,
    )  # fmt: skip
    return grad, t_grad, t_hidden, parts.sum(0)


def adamw(
    param: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    numbers_4: Tensor,
    copy: Fp8Weight,
    factor: Tensor | None,
    *,
    betas: tuple[float, float],
    eps: float,
    l2: float,
) -> None:
    """Compute `ops.adamw.adamw_update` of fp32 weights and states, in place, and quantise the new
    weights into `copy`, by blocks.

    grad: bf16 or fp32.
    """
    if grad.data_ptr() % 16:
        grad = grad.clone()  # the kernel reads 16 bytes at a time
    tensors = [t if t.ndim == 3 else t.unsqueeze(0) for t in (param, grad, *copy.parts())]
    weight, grad, values, scales = tensors
    E, N, K = weight.shape
    assert all(t.stride(1) == t.size(2) for t in tensors), "each matrix is dense"
    assert weight.dtype == mean.dtype == square.dtype == torch.float32
    assert grad.dtype in (torch.bfloat16, torch.float32)
    assert K % 16 == 0 and not any(t.data_ptr() % 16 for t in (weight, mean, square, values))
    in_fp32 = int(grad.dtype == torch.float32)
    kernel = Kernel(_FOLDER / "adamw.cu", "adamw", (f"-DGRAD_FP32={in_fp32}",))
    read_or_written = weight, grad, mean, square, numbers_4, values, scales, factor
    strides = (t.stride(0) for t in tensors)
    arguments = *read_or_written, N, K, *strides, *map(float, (*betas, eps, l2))
    kernel.launch(param.device, (_ceil(K), _ceil(N), E), _THREADS, arguments)


def rows_by_blocks(
    x: Fp8, weight: Fp8, ends: Tensor, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Compute x[rows of group e] · weight[e]ᵀ: (R, N), undefined behind the last group.

    dtype: of the result, bf16.
    out: place to fill, contiguous; None = a new one.
    """
    if out is None:
        out = _new(ends, x.values.size(0), weight.values.size(1), kind=dtype)
    _gemm(0, x, weight, ends, out)
    return out


def rows_by_rows(
    a: Fp8, b: Fp8, padded_ends: Tensor, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Compute a · bᵀ over the elements of each group: (E, M, N).

    a, b: by columns of (P, M) and (P, N): values (M, P) and (N, P).
    dtype: of the result, bf16.
    out: place to fill, contiguous; None = a new one.
    """
    if out is None:
        out = _new(padded_ends, padded_ends.numel(), a.values.size(0), b.values.size(0), kind=dtype)
    _gemm(1, a, b, padded_ends, out)
    return out


def _gemm(kind: int, a: Fp8, b: Fp8, ends: Tensor, out: Tensor) -> None:
    assert out.dtype == torch.bfloat16 and out.is_contiguous()
    rows, K = a.values.shape
    if out.numel() == 0 or K == 0:
        out.zero_()
        return
    b_NK = b.values.flatten(0, -2)
    N = b.values.size(-2)
    stage = BLOCK * BLOCK * (_HALVES + 1) + 4 * BLOCK * kind + 16  # with its barriers
    of_results = 8 * _BUFFERS * _BYTES_BOX
    stages = min(8, (_SHARED_MEMORY - of_results) // stage)
    kernel = Kernel(
        _FOLDER / "gemm.cu",
        "fp8_gemm",
        (
            f"-DKIND={kind}",
            f"-DHALVES={_HALVES}",
            f"-DSTAGES={stages}",
            f"-DBUFFERS={_BUFFERS}",
            f'-DTYPE_A="{"e5m2" if a.values.dtype == E5M2 else "e4m3"}"',
        ),
        shared=stages * stage + of_results,
    )
    device = out.device
    maps = (
        tensor_map(a.values, BLOCK * _HALVES, BLOCK),
        tensor_map(b_NK, BLOCK, BLOCK),
        tensor_map(out.flatten(0, -2), 16, 64),
    )
    arguments = *maps, a.scales, b.scales, out, ends, ends.numel(), rows, N, K
    kernel.launch(device, (_multiprocessors(out),), 384, arguments)
