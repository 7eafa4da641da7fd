"""Memory that is used up: one sentence, which names scripts/plan.py."""

import pytest
import torch

from torchtitan.tools.out_of_memory import out_of_memory

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79.1 GiB\nmore"


def of_the_cpu() -> Exception:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    return caught.value


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: torch.OutOfMemoryError(CUDA), "CUDA out of memory. Tried to allocate 2.00 GiB"),
        (MemoryError, "This machine's memory is used up"),
        (of_the_cpu, "This machine's memory is used up"),
    ],
)
def test_the_sentence_names_the_plan(monkeypatch, make, what) -> None:
    monkeypatch.setenv("WORLD_SIZE", "64")
    assert out_of_memory(make()) == (
        f"{what}; python scripts/plan.py CONFIG.toml --world-size 64 shows where a run's memory "
        "goes, and names the nearest change with which it fits."
    )


def test_other_errors_are_left_alone() -> None:
    assert out_of_memory(RuntimeError("sizes differ")) is None
