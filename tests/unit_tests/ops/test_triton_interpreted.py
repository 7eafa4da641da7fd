"""Runs triton_kernels.py in Triton's interpreter, where Triton is installed."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).with_name("triton_kernels.py")


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs Triton (pip install triton), which a CPU's torch comes without",
)
def test_every_kernel_is_its_twin():
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(KERNELS)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout
