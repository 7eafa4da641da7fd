"""Process groups: start, time limits, seeds, sums of scalars, end."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from torchtitan.config import Comm, Debug
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger


def init_distributed(config: Comm, device: torch.device, dump_folder: str) -> Callable[[], None]:
    """Join the other processes that torchrun started; alone, a group of one. Returns how to leave.

    A process group that is already there is used, and left to its owner. With `comm.mode`
    "fake_backend" this process plays rank 0 of WORLD_SIZE and collectives do nothing: a dry run of
    a large layout.
    """
    if dist.is_initialized():
        return lambda: None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _join(config, device, dump_folder)
    return dist.destroy_process_group


def _join(config: Comm, device: torch.device, dump_folder: str) -> None:
    if config.mode == "fake_backend":
        _init_fake()
        return
    if device.type == "cuda":
        _set_up_flight_recorder(config, dump_folder)
    options = {
        "backend": "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo",
        "timeout": timedelta(seconds=config.init_timeout_seconds),
    }
    if "RANK" not in os.environ:  # plain `python -m torchtitan.train`
        dist.init_process_group(**options, store=dist.HashStore(), rank=0, world_size=1)
        return
    try:
        dist.init_process_group(**options)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise UserError(
            f"the {os.environ['WORLD_SIZE']} processes did not find each other within "
            f"comm.init_timeout_seconds ({config.init_timeout_seconds}): {error}; check that all "
            "nodes were started with the same --rdzv-endpoint and that it is reachable."
        ) from None


def _init_fake() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    world_size = int(os.environ.get("WORLD_SIZE", 1))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    logger.warning(
        "comm.mode fake_backend: one process plays rank 0 of %d and nothing is communicated, so "
        "losses mean nothing",
        world_size,
    )


def _set_up_flight_recorder(config: Comm, dump_folder: str) -> None:
    """Let NCCL keep its last collectives, and write them down when one times out."""
    os.environ["TORCH_FR_BUFFER_SIZE"] = str(config.trace_buf_size)
    if config.trace_buf_size > 0:
        prefix = Path(dump_folder, config.save_traces_folder, config.save_traces_file_prefix)
        prefix.parent.mkdir(parents=True, exist_ok=True)
        os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "1"
        os.environ["TORCH_FR_DUMP_TEMP_FILE"] = str(prefix)


def set_timeout(seconds: int) -> None:
    """From now on a collective fails after this long, in every group that exists."""
    for group in dist.distributed_c10d._world.pg_map:
        if dist.get_backend(group) != "fake":
            _set_pg_timeout(timedelta(seconds=seconds), group)


def set_determinism(config: Debug, device: torch.device) -> int:
    """Seed all ranks alike and return the seed (a fresh one when none is set)."""
    if config.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS's condition for repeatable sums
        torch.use_deterministic_algorithms(True, warn_only=config.deterministic_warn_only)
        torch.backends.cudnn.benchmark = False
    seed = config.seed
    if seed is None:
        fresh = torch.tensor(int.from_bytes(os.urandom(4)), device=device)
        dist.broadcast(fresh, src=0)
        seed = int(fresh.item())  # host sync: once, at start
    torch.manual_seed(seed)
    logger.info("Seed %d%s", seed, "" if config.seed is not None else " (set debug.seed to repeat)")
    return seed


def sum_over_ranks(value: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Sum over the ranks of `group` (None: all), in place; equal on each of them afterwards."""
    dist.all_reduce(value, group=group)
    return value


def gather_from_ranks(
    value: torch.Tensor, group: dist.ProcessGroup | None = None
) -> list[torch.Tensor]:
    """The same tensor of every rank of `group` (None: all), by rank."""
    out = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
    dist.all_gather(out, value, group=group)
    return out
