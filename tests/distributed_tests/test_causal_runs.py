"""Context parallelism by runs of queries (ops/causal_runs.py), as on GPUs, trains like one process.

On a CPU masks are dense; here ranks take a GPU's form of the mask, and the kernel's plain twin.
"""

import pytest
import torch

from tests.distributed_tests.test_layouts import LAYOUTS
from tests.distributed_tests.training_ranks import (
    assert_trained_alike,
    one_process,  # noqa: F401
    train_on_this_rank,
)
from torchtitan.ops import attention


def trained_by_runs(options: list[str], folder: str) -> tuple[dict, int]:
    """And how often runs were attended to in eager code (compiled code is traced once)."""
    calls, real = [], attention.causal_runs

    def counted(*args):
        calls.append(1)
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_mask", attention._block_mask)
        patch.setattr(attention, "can_use_runs", lambda *_: True)
        patch.setattr(attention, "causal_runs", counted)
        return train_on_this_rank(options, folder), len(calls)


@pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs have no such kernel for fp32")
@pytest.mark.parametrize("name", ["CP 2, recomputed", "CP 2, compiled", "CP 4"])
def test_runs_of_queries_train_like_one_process(ranks, one_process, name, tmp_path):  # noqa: F811
    world_size, options = LAYOUTS[name]
    for result, calls in ranks(world_size).run(trained_by_runs, options, str(tmp_path)):
        assert_trained_alike(result, one_process)
        assert calls > 0
