"""Settings of all tests, and the pools of processes that they share."""

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.helpers import Ranks

# Nothing here may reach out for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(autouse=True)
def same_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """`ranks(4).run(fn, ...)` runs a function on four gloo processes."""
    pools: dict[int, Ranks] = {}

    def pool(world_size: int) -> Ranks:
        return pools.setdefault(world_size, Ranks(world_size))

    yield pool
    for each in pools.values():
        each.close()
