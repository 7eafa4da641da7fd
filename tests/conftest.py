"""Settings of all tests, and the pools of processes that they share.

How to write a fast test (the goal for the whole suite is 15 minutes on two cores):

- A start of Python with torch takes four seconds of a core, with a launcher and two ranks sixteen.
  Call `main([...])` in this process. For what needs a process (signals, sessions, exit codes, what
  a shell script says) tests/forks.py makes one in a tenth of a second. `subprocess` with torch is
  for the start itself.
- Ranks come from `ranks(n).run(fn, ...)`, whose processes live on between tests. A run costs each
  rank half a second of a core, so 8 ranks are for what 4 can't hold; several checks share a visit.
- The reference of several rows is a fixture of scope "module".
- Two steps show an update; each more costs a sixth of the run. A pipeline needs four micro-batches.
- Each graph costs a second of every rank to compile, also with `backend=aot_eager`. Rows that
  compile equal layers share them within a pool; inductor only where it is what is tested.
"""

import gc
import logging
import os
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.helpers import Ranks, compile_cheaply
from torchtitan.tools.logging import logger

compile_cheaply()
# Nothing here may reach out for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# A shell on a cluster may have more tasks; the tests start theirs themselves.
for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "PMI_", "MV2_"))]:
    del os.environ[name]


def pytest_collection_finish() -> None:
    """Keep what all tests have imported: every trainer collects garbage when it starts, and would
    look through all of it (tests/helpers.py does the same in its processes)."""
    gc.freeze()


@pytest.fixture(autouse=True)
def same_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_logger() -> None:
    """Reset the logger to its state at import: an earlier test's `main` has sent log lines to its
    own stderr, away from caplog."""
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """`ranks(4).run(fn, ...)` runs a function on four processes: on GPUs where there are any."""
    pools: dict[int, Ranks] = {}

    def pool(world_size: int) -> Ranks:
        if torch.cuda.is_available() and torch.cuda.device_count() < world_size:
            pytest.skip(f"needs {world_size} GPUs, or none (CUDA_VISIBLE_DEVICES=)")
        return pools.setdefault(world_size, Ranks(world_size))

    yield pool
    for each in pools.values():
        each.close()
