r"""Measure what interleaved passes save (`pipeline_parallel_expert_parallel_overlap`).

    torchrun --nproc_per_node 2 scripts/measure_overlap.py --model.flavor 16B \
        --model.args.n_layers 4 --parallelism.expert_parallel_degree 2 [any option of a run]

Each rank has two models, as it has two stages in DualPipeV, and repeats that schedule's pair: the
forward pass of a micro-batch through one, the backward pass of another through the other. Pairs are
timed sequentially and interleaved, alternately in one process; the time of the all-to-all kernels
of a pair is measured, too.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripts import entry

# isort: split
from torchtitan.config import ConfigManager, JobConfig
from torchtitan.tools.errors import UserError


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=entry.about(__doc__), add_help=False)
    parser.add_argument("--pairs", type=int, default=10, help="of each measurement")
    return parser.parse_known_args(argv)


def check(argv: list[str] | None) -> tuple[argparse.Namespace, JobConfig]:
    """Return our own options and the run's settings. Raises `UserError` for impossible ones."""
    options, others = parse(argv)
    if options.pairs < 1:
        raise UserError(f"--pairs = {options.pairs} must be 1 or more.")
    config = ConfigManager().parse_args([*others, "--activation_checkpoint.mode=none"])
    if config.parallelism.expert_parallel_degree < 2:
        raise UserError(
            "parallelism.expert_parallel_degree = 1, so nothing is exchanged; start this with "
            "torchrun on two or more processes and set it to their number."
        )
    return options, config


if __name__ == "__main__":
    entry.check_first(check)

# isort: split
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.profiler import ProfilerActivity, profile

from torchtitan.components.optimizer.build_compute_weights import build_compute_weights
from torchtitan.distributed.overlap import interleave
from torchtitan.distributed.utils import init_distributed
from torchtitan.tools.logging import init_logger, logger
from torchtitan.tools.utils import local_device
from torchtitan.trainer.build import build_model, build_parallel_dims
from torchtitan.trainer.preflight import check_config

WARMUP, ROUNDS = 6, 5


class Pairs:
    """Two models. `run` does the next pair: forward through the model without a pending backward
    pass, backward through the other one."""

    def __init__(self, config: JobConfig, device: torch.device):
        spec, args, _ = check_config(config)
        dims = build_parallel_dims(config)
        self.models = [build_model(spec, args, dims, config, device)[0] for _ in range(2)]
        for model in self.models:  # as for all micro-batches of a pipeline but the last
            build_compute_weights(model, config, dims, several_passes=True)
            spread = cast(FSDPModule, model)  # there are two ranks or more
            spread.set_requires_gradient_sync(False)
            spread.set_is_last_backward(False)
            spread.set_reshard_after_backward(False)
            model.set_tokens_in_step(*torch.ones(2, device=device))
        shape = config.training.local_batch_size, config.training.seq_len
        self.tokens = torch.randint(0, args.vocab_size, shape, device=device)
        self.waiting = self._forward(0)
        self.next = 1

    def run(self, together: Callable[[Callable, Callable], None]) -> None:
        loss = []
        together(lambda: loss.append(self._forward(self.next)), self.waiting.backward)
        (self.waiting,) = loss
        self.next = 1 - self.next

    def _forward(self, which: int) -> torch.Tensor:
        mask = torch.ones_like(self.tokens, dtype=torch.bool)
        return self.models[which](self.tokens, token_mask=mask, labels=self.tokens)


def one_after_the_other(first: Callable[[], None], second: Callable[[], None]) -> None:
    first()
    second()


def milliseconds(pairs: Pairs, together: Callable, count: int) -> float:
    """Measure the milliseconds of a pair on the slowest rank."""
    _wait()
    began = time.perf_counter()
    for _ in range(count):
        pairs.run(together)
    _wait()
    seconds = torch.tensor((time.perf_counter() - began) / count, device=local_device())
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return 1e3 * seconds.item()


def exchange_milliseconds(pairs: Pairs) -> float | None:
    """Measure the milliseconds of a pair's all-to-all kernels on this rank, waiting for others
    included; None on CPUs."""
    if not torch.cuda.is_available():
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(2):
            pairs.run(one_after_the_other)
        _wait()
    spent = [e.self_device_time_total for e in profiler.key_averages() if "SendRecv" in e.key]
    return sum(spent) / 2 / 1e3


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()


def main(argv: list[str] | None = None) -> int:
    init_logger()
    try:
        device = local_device()
        options, config = check(argv)
        leave = init_distributed(config.comm, device, config.job.dump_folder)
        pairs = Pairs(config, device)
    except UserError as error:
        logger.error("%s", error)
        return 2
    kinds = {"one after the other": one_after_the_other, "interleaved": interleave}
    for together in kinds.values():
        milliseconds(pairs, together, WARMUP)
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(ROUNDS):
        for name, together in kinds.items():
            found[name].append(milliseconds(pairs, together, options.pairs))
    row: dict[str, object] = {
        f"{name}, ms a pair": statistics.median(times) for name, times in found.items()
    }
    row["all-to-all kernels, ms a pair"] = exchange_milliseconds(pairs)
    row["all rounds"] = found
    if dist.get_rank() == 0:
        print(json.dumps(row, indent=1))
    leave()
    return 0


if __name__ == "__main__":
    entry.run(main)
