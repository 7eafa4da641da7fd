"""CUDA C++ kernels, compiled by NVRTC at their first use and launched through CUDA's driver.

Both are reached through `cuda.bindings`, which CUDA builds of torch bring along. A launch doesn't
wait for the device, and a CUDA graph can record it. Sources include the headers beside this file.
"""

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FOLDER = Path(__file__).parent


class Kernel:
    """A kernel of a source file.

    shared: bytes of dynamic shared memory of a block.
    options: definitions for the compiler, such as "-DKIND=1".
    """

    def __init__(self, source: Path, name: str, options: tuple[str, ...] = (), shared: int = 0):
        self.source, self.name, self.options, self.shared = source, name, options, shared

    def load(self, device: torch.device) -> Any:
        """Compile for a GPU, once. Raises `RuntimeError`, or `ImportError` without NVRTC."""
        assert device.index is not None
        return _function(self.source, self.name, self.options, self.shared, device)

    def launch(
        self, device: torch.device, grid: Sequence[int], threads: int, arguments: Sequence[Any]
    ) -> None:
        """Launch on the current stream.

        grid: blocks in up to three dims.
        arguments: tensors (their address), None (a null pointer), ints and floats (32
            bits), tensor maps.
        """
        driver, function = _driver(device), self.load(device)
        held = [_argument(each) for each in arguments]
        addresses = [
            each.getPtr() if hasattr(each, "getPtr") else ctypes.addressof(each) for each in held
        ]
        packed = (ctypes.c_void_p * len(held))(*addresses)
        x, y, z = (*grid, 1, 1)[:3]
        stream = torch.cuda.current_stream(device).cuda_stream
        address = ctypes.addressof(packed)
        _check(
            driver.cuLaunchKernel(function, x, y, z, threads, 1, 1, self.shared, stream, address, 0)
        )


def tensor_map(matrix: Tensor, box_rows: int, box_columns: int) -> Any:
    """Describe a contiguous matrix to the tensor memory accelerator, which then copies boxes from
    or to shared memory, lines of 128 bytes swizzled.

    matrix: bf16, or of a type of one byte.
    """
    place = matrix.device, matrix.data_ptr(), *matrix.shape
    return _tensor_map(*place, matrix.dtype, box_rows, box_columns)


@lru_cache(maxsize=16384)  # the allocator gives the same places again and again
def _tensor_map(
    device: torch.device,
    address: int,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    box_rows: int,
    box_columns: int,
) -> Any:
    driver = _driver(device)
    kinds = driver.CUtensorMapDataType
    wide = dtype == torch.bfloat16
    u32, u64 = driver.cuuint32_t, driver.cuuint64_t
    return _check(
        driver.cuTensorMapEncodeTiled(
            kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 if wide else kinds.CU_TENSOR_MAP_DATA_TYPE_UINT8,
            2,
            address,
            [u64(columns), u64(rows)],
            [u64(columns * dtype.itemsize)],
            [u32(box_columns), u32(box_rows)],
            [u32(1), u32(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


def _driver(device: torch.device) -> Any:
    """Return CUDA's driver; make the GPU's context current in a thread that has none.

    A thread of autograd has none before its first call of CUDA's runtime, which may be ours.
    """
    driver = import_module("cuda.bindings.driver")
    if int(_check(driver.cuCtxGetCurrent())) == 0:
        context = _check(driver.cuDevicePrimaryCtxRetain(device.index))
        _check(driver.cuCtxSetCurrent(context))
    return driver


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if value is None:
        return ctypes.c_void_p(0)
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_int(value) if isinstance(value, int) else value


@lru_cache
def _function(
    source: Path, name: str, options: tuple[str, ...], shared: int, device: torch.device
) -> Any:
    driver = _driver(device)
    with torch.cuda.device(device):
        module = _check(driver.cuModuleLoadData(_compile(source, options)))
        function = _check(driver.cuModuleGetFunction(module, name.encode()))
        size = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuFuncSetAttribute(function, size, shared))
    return function


@lru_cache
def _compile(path: Path, options: tuple[str, ...]) -> bytes:
    nvrtc = import_module("cuda.bindings.nvrtc")
    program = _check(nvrtc.nvrtcCreateProgram(path.read_bytes(), path.name.encode(), 0, [], []))
    flags = [option.encode() for option in ("-arch=sm_90a", "-std=c++17", f"-I{_FOLDER}", *options)]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
    if int(status) != 0:
        log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"NVRTC could not compile {path}:\n{log.decode()}")
    cubin = b" " * _check(nvrtc.nvrtcGetCUBINSize(program))
    _check(nvrtc.nvrtcGetCUBIN(program, cubin))
    return cubin


def _check(result: tuple[Any, ...]) -> Any:
    """Return a call's value; raise `RuntimeError` for an error code."""
    status, *values = result
    if int(status) != 0:
        raise RuntimeError(f"CUDA answered {status!r}")
    return values[0] if values else None
