"""CPU runs: memory stays bounded while experts get other counts, and slow bf16 is told."""

import subprocess
import sys

import pytest

from torchtitan.tools.cpu import lacks_bf16

GROW = """
import random, resource, torch
from torchtitan.tools.cpu import bound_onednn_cache
bound_onednn_cache()
torch.set_num_threads(1)
rows, weight = list(range(1, 1201)), torch.randn(256, 256)
random.Random(0).shuffle(rows)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
torch.randn(1300, 256) @ weight
for i, n in enumerate(rows):
    torch.randn(n, 256) @ weight
    if i == 60: first = peak()
print(peak() / first)
"""


def test_memory_does_not_grow_with_the_row_counts_of_products():
    """1,200 different counts: on CPUs whose products oneDNN compiles, as many entries."""
    run = subprocess.run([sys.executable, "-c", GROW], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 1.15


@pytest.mark.parametrize(
    "text, slow",
    [
        ("processor : 0\nflags\t\t: fpu avx2 fma\n", True),
        ("processor : 0\nflags\t\t: fpu avx2 avx512f avx512bw\n", True),
        ("processor : 0\nflags\t\t: fpu avx512f avx512_bf16\n", False),
        ("processor : 0\nflags\t\t: fpu amx_bf16 amx_tile\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd\n", True),
        ("no flags at all\n", False),
    ],
)
def test_a_cpu_without_bf16_is_known_by_its_flags(tmp_path, text, slow):
    (tmp_path / "cpuinfo").write_text(text)
    assert lacks_bf16(tmp_path / "cpuinfo") == slow


def test_a_machine_that_tells_nothing_is_not_called_slow(tmp_path):
    assert not lacks_bf16(tmp_path / "missing")
