"""Parts that our rows and the peers' share beside the clock: the tokens, and the making of a row.

Imports nothing of ours but the clock, so that a peer of the same import name can use it.
"""

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.timing import machine, quartiles


def summary(
    name: str,
    settings: dict[str, Any],
    seconds: list[float],
    losses: list[float],
    sequences: float | None = None,
) -> dict[str, Any]:
    """Make a row: numbers of one device.

    sequences: of a step, per device; None = those of a batch.
    """
    tokens = (sequences or settings["batch"]) * settings["seq_len"]
    per_second = quartiles([tokens / s for s in seconds])
    flops = per_second["median"] * settings["flops_per_token"]
    peak = settings["peak_flops"]
    return {
        "name": name,
        "step_seconds": quartiles(seconds),
        "tokens_per_second": per_second,
        "tflops": flops / 1e12,
        "mfu_percent": None if peak is None else 100 * flops / peak,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "settings": settings,
        "machine": machine(),
    }


def random_batches(
    settings: dict[str, Any], dp_rank: int = 0
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Uniform tokens from a fixed seed, for ever; with document masks the ends of documents too."""
    args = settings["model_args"]
    generator = torch.Generator().manual_seed(dp_rank)
    shape = (settings["batch"], settings["seq_len"] + 1)
    while True:
        tokens = torch.randint(args["vocab_size"], shape, generator=generator)
        if args["attn_mask_type"] == "block_causal":
            ends = torch.rand(shape, generator=generator) < 1 / settings["mean_document"]
            tokens[ends] = settings["eos_id"]
        yield {"input": tokens[:, :-1].contiguous()}, tokens[:, 1:].contiguous()
