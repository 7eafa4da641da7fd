"""Process groups: start, time limits, seeds, sums of scalars, end."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from torchtitan.config import Comm, Debug
from torchtitan.distributed import played
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
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = _meeting_point(rank, world_size, options["timeout"])
        dist.init_process_group(**options, store=store, rank=rank, world_size=world_size)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise UserError(
            f"the {os.environ['WORLD_SIZE']} processes did not find each other within "
            f"comm.init_timeout_seconds ({config.init_timeout_seconds}): {error}; check that all "
            "nodes were started with the same --rdzv-endpoint and that it is reachable."
        ) from None


def _meeting_point(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """Where ranks leave their addresses for each other; torchrun's agent keeps it where it can.

    torchrun keeps one store over its restarts (at least in torch 2.11-2.13), and the ranks of the
    next attempt would call at the addresses of the last one: each attempt gets names of its own.
    """
    agent_keeps_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size,
        is_master=rank == 0 and not agent_keeps_it,
        timeout=timeout,
        multi_tenant=True,
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"attempt_{attempt}", store)


def _init_fake() -> None:
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    played.init_played(world_size)
    logger.warning(
        "comm.mode fake_backend: one process plays rank 0 of %d and nothing is communicated (the "
        "others are taken to do what it does), so losses mean nothing",
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


def set_timeout(seconds: int, except_for: dist.ProcessGroup | None = None) -> None:
    """From now on a collective fails after this long, in every other group that exists."""
    for group in dist.distributed_c10d._world.pg_map:
        if group is not except_for and dist.get_backend(group) != played.BACKEND:
            _set_pg_timeout(timedelta(seconds=seconds), group)


def set_determinism(config: Debug, device: torch.device, of_run: int | None = None) -> int:
    """Seed all ranks alike and return the seed (a fresh one when none is set).

    of_run: the seed of the run that is gone on with, if there is one.
    """
    if config.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS's condition for repeatable sums
        torch.use_deterministic_algorithms(True, warn_only=config.deterministic_warn_only)
        torch.backends.cudnn.benchmark = False
    seed = config.seed if config.seed is not None else of_run
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


def gather_from_ranks(value: torch.Tensor) -> list[torch.Tensor]:
    """The same tensor of every rank, by rank."""
    out = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(out, value)
    return out


class RanksOf:
    """Python objects between the ranks of a group; every rank of it calls each method."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)

    def from_rank_0(self, read: Callable[[], Any]) -> Any:
        """What the group's first rank reads: folders may look different from other nodes."""
        answer = [read() if self.rank == 0 else None]
        dist.broadcast_object_list(answer, group_src=0, group=self.group)
        return answer[0]

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, by rank."""
        gathered: list[Any] = [None] * self.count
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered
