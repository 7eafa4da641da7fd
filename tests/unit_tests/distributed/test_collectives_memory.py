"""CPU runs: collectives leave nothing behind that would keep the heap from reusing its gaps."""

import subprocess
import sys

import pytest
from torch._C import _distributed_c10d

RECORDED = """
import pickle, sys, torch
import torch.distributed as dist
from torch._C._distributed_c10d import _dump_fr_trace
from torchtitan.config.job_config import Comm
from torchtitan.distributed.utils import init_distributed

leave = init_distributed(Comm(), torch.device("cpu"), sys.argv[1])
for _ in range(3):
    dist.all_reduce(torch.ones(4))
print(len(pickle.loads(_dump_fr_trace()).get("entries", ())))
leave()
"""


@pytest.mark.skipif(
    not hasattr(_distributed_c10d, "_dump_fr_trace"), reason="this torch doesn't tell its record"
)
def test_no_collective_of_a_cpu_run_is_recorded(tmp_path):
    command = [sys.executable, "-c", RECORDED, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout == "0\n"
