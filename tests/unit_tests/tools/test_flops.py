"""Peak FLOP/s by the names that drivers really report."""

import pytest
import torch

from torchtitan.tools.flops import peak_flops

BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn


@pytest.mark.parametrize(
    "name, bf16, fp8",
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 1979e12),
        ("NVIDIA H100 PCIe", 756e12, 1513e12),
        ("NVIDIA H100 NVL", 835.5e12, 1670.5e12),
        ("NVIDIA H200", 989e12, 1979e12),
        ("NVIDIA H200 NVL", 835.5e12, 1670.5e12),
        ("NVIDIA GH200 480GB", 989e12, 1979e12),
        ("NVIDIA H800", 989e12, 1979e12),
        ("NVIDIA H20", 148e12, 296e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, None),
        ("NVIDIA B200", 2.25e15, 4.5e15),
        ("NVIDIA GB200", 2.5e15, 5e15),
        ("NVIDIA B300 SXM6 AC", 2.25e15, 4.5e15),
        ("NVIDIA L40S", 362.05e12, 733e12),
        ("AMD Instinct MI300X", 1307.4e12, 2614.9e12),
        ("AMD Instinct MI325X", 1307.4e12, 2614.9e12),
        ("AMD Instinct MI350X", 2306.9e12, 4613.7e12),
        ("AMD Instinct MI355X", 2516.6e12, 5033.2e12),
    ],
)
def test_known_devices(name, bf16, fp8):
    assert peak_flops(name, BF16) == pytest.approx(bf16)
    assert peak_flops(name, FP16) == pytest.approx(bf16)
    assert peak_flops(name, FP8) == (None if fp8 is None else pytest.approx(fp8))


@pytest.mark.parametrize(
    "name",
    [
        "x86_64",
        "CPU",
        "",
        "NVIDIA GeForce RTX 4090",
        "Tesla V100-SXM2-16GB",
        "NVIDIA A10",  # Not an A100.
        "NVIDIA A10G",
        "NVIDIA GB10",  # Not a GB100.
        "AMD Instinct MI250X / MI250",  # Two devices under one name.
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",  # A seventh of an H100.
    ],
)
def test_unknown_devices_have_no_peak_rather_than_a_wrong_one(name):
    assert peak_flops(name, BF16) is None


def test_float32_has_no_peak_because_it_depends_on_tf32():
    assert peak_flops("NVIDIA H100 80GB HBM3", torch.float32) is None
