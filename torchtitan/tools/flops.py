"""Dense peak FLOP/s of devices by name and dtype, the denominator of MFU.

A device that is not in the table has no peak, and a run on it reports no MFU. A guess would be
worse: torchtitan's fall-back to the A100 made MI355X users see 563 % (AMD-AGI/Primus issue 772).
"""

import re

import torch

_HALF = (torch.bfloat16, torch.float16)
_FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)

# (words that must all occur in the device's name, 16-bit peak, 8-bit float peak), in TFLOP/s,
# dense: where the data sheet prints the 2:4-sparse number, half of it. The first row that fits
# wins, so rows with more words come first.
_PEAKS: list[tuple[set[str], float, float | None]] = [
    # https://www.nvidia.com/en-us/data-center/gb300-nvl72: 360 PFLOPS sparse 16-bit per 72 GPUs.
    ({"GB300"}, 2500, 5000),
    # https://www.nvidia.com/en-us/data-center/gb200-nvl72: 5 and 10 (FP8) PFLOPS sparse per GPU.
    ({"GB200"}, 2500, 5000),
    # https://www.nvidia.com/en-us/data-center/hgx: HGX B300 and B200, 36 PFLOPS sparse 16-bit and
    # 72 PFLOPS sparse FP8 per 8 GPUs; HGX B100 28 and 56.
    ({"B300"}, 2250, 4500),
    ({"B200"}, 2250, 4500),
    ({"B100"}, 1750, 3500),
    # https://www.nvidia.com/en-us/data-center/h200, sparse: SXM 1,979 and 3,958; NVL 1,671, 3,341.
    ({"H200", "NVL"}, 835.5, 1670.5),
    ({"H200"}, 989, 1979),
    # https://resources.nvidia.com/en-us-grace-cpu/grace-hopper-superchip: 990 and 1,979 dense.
    ({"GH200"}, 989, 1979),
    # https://www.nvidia.com/en-us/data-center/h100, sparse: SXM 1,979 and 3,958; NVL 1,671, 3,341.
    # PCIe is in the older data sheet (2287922) only: 1,513 and 3,026 sparse.
    ({"H100", "NVL"}, 835.5, 1670.5),
    ({"H100", "PCIE"}, 756, 1513),
    ({"H100"}, 989, 1979),
    # H800: the H100 with less NVLink and FP64; its Tensor Cores are the H100's
    # (https://arxiv.org/abs/2402.13499).
    ({"H800", "PCIE"}, 756, 1513),
    ({"H800"}, 989, 1979),
    # NVIDIA H20 data sheet: 148 and 296 dense.
    ({"H20"}, 148, 296),
    # https://www.nvidia.com/en-us/data-center/a100: 312 dense, all variants; no FP8 Tensor Cores.
    # A800: the same chip with less NVLink.
    ({"A100"}, 312, None),
    ({"A800"}, 312, None),
    # https://www.nvidia.com/en-us/data-center/products/a30-gpu: 165 dense.
    ({"A30"}, 165, None),
    # https://www.nvidia.com/en-us/data-center/l40s: 362.05 and 733 dense.
    ({"L40S"}, 362.05, 733),
    # https://www.nvidia.com/en-us/data-center/l40: 181.05 and 362 dense.
    ({"L40"}, 181.05, 362),
    # NVIDIA RTX Blackwell PRO architecture v1.1, table 4: dense 16-bit with FP32 accumulation.
    ({"RTX", "PRO", "6000", "BLACKWELL", "MAX", "Q"}, 438.9, None),
    ({"RTX", "PRO", "6000", "BLACKWELL", "WORKSTATION"}, 503.8, None),
    # https://www.amd.com/en/products/accelerators/instinct/mi350.html: 2.5 and 5, 2.3 and 4.6
    # PFLOPS; in full, 256 compute units x 4,096 (FP8: 8,192) FLOP per cycle x 2.4 or 2.2 GHz.
    ({"MI355X"}, 2516.6, 5033.2),
    ({"MI350X"}, 2306.9, 4613.7),
    # https://www.amd.com/en/products/accelerators/instinct/mi300.html: MI325X and MI300X have the
    # same compute dies (1,307.4 and 2,614.9); MI300A 980.6 and 1,961.2.
    ({"MI325X"}, 1307.4, 2614.9),
    ({"MI300X"}, 1307.4, 2614.9),
    ({"MI300A"}, 980.6, 1961.2),
]


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Dense peak FLOP/s of a device of this name (as torch reports it) in products of `dtype`.

    None where it is uncertain: unknown devices, the CPU, slices of a GPU (MIG), and float32, where
    it depends on whether TF32 is allowed.
    """
    words = set(re.split(r"[^A-Z0-9]+", device_name.upper()))
    if "MIG" in words:
        return None
    for required, half, fp8 in _PEAKS:
        if required <= words:
            tera = half if dtype in _HALF else fp8 if dtype in _FP8 else None
            return None if tera is None else tera * 1e12
    return None
