"""scripts/measure_node_traffic.py: what it refuses, and a small real measurement where it can."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
SCRIPT = str(REPO / "scripts/measure_node_traffic.py")
SMALL = "--nodes 2 --ranks_per_node 1 --num_experts 8 --top_k 4 --routings 2:1 --tokens 64"


def measure(*arguments: str, command: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*command, sys.executable, SCRIPT, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPO)},
    )


def test_experts_that_do_not_spread_evenly_are_refused():
    done = measure("--num_experts", "60")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "--num_experts (60) must be a multiple of the 8 ranks" in done.stderr


@pytest.mark.skipif(shutil.which("setpriv") is None or os.geteuid() != 0, reason="needs root")
def test_without_root_it_says_so(tmp_path):
    done = measure("--out", str(tmp_path), command=("setpriv", "--reuid=65534", "--clear-groups"))
    if "Permission denied" in done.stderr:
        pytest.skip("another user can't read this interpreter")
    assert done.returncode == 2 and "run it with sudo" in done.stderr, done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
def test_the_wire_carries_what_arithmetic_says(tmp_path):
    """2 nodes, top-4 in one group of two (a node each): a token's rows all go to one node."""
    done = measure(
        *SMALL.split(), "--steps", "1", "--dim", "1024", "--rate_mbit", "0", "--out", str(tmp_path)
    )
    if done.returncode == 2:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    lines = json.loads((tmp_path / "node_traffic.json").read_text())["lines"]
    plain, per_rank, per_node = lines
    assert [line["dispatcher"] for line in lines] == ["plain", "all_to_all", "node_limited"]
    assert plain["rows"] == 4 * per_node["rows"] and per_rank["rows"] == per_node["rows"]
    for line in lines:
        assert 1 < line["link_bytes"] / line["payload_bytes"] < 1.1, line
