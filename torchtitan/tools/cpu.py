"""Settings and properties of CPUs: oneDNN's cache, and whether bf16 is emulated."""

import os
import platform
from pathlib import Path

# CPU flags of x86 and of Arm; without any of them bf16 products are emulated.
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"}


def bound_onednn_cache() -> None:
    """Let oneDNN cache few compiled products, unless the user has set how many.

    Every new number of rows of an expert's product is one more entry, with buffers of its own: at
    oneDNN's default of 1,024 entries a process grows by 8 to 17 MB a step. Call it before the first
    product.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")


def lacks_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Tell whether this CPU is known to have no bf16 instructions; False where that is unknown."""
    if platform.system() != "Linux":
        return False
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return False
    flags = next((x for x in lines if x.lower().startswith(("flags", "features"))), None)
    return flags is not None and not _BF16_FLAGS & set(flags.partition(":")[2].split())
