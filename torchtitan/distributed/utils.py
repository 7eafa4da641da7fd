"""Process groups: start, time limits, seeds, sums of scalars, end."""

import itertools
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from torchtitan.config import Comm, Debug
from torchtitan.distributed import dry_run
from torchtitan.distributed.agreement import Meeting, Settings
from torchtitan.distributed.meeting_point import meet
from torchtitan.tools import flight_recorder
from torchtitan.tools.disk import SideOutput
from torchtitan.tools.error_file import name_dumps
from torchtitan.tools.errors import UserError
from torchtitan.tools.launcher import planned_processes, read_launch, warn_if_alone_by_mistake
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import check_local_processes


def init_distributed(
    config: Comm,
    device: torch.device,
    dump_folder: str,
    settings: Callable[[int], Settings] = lambda rank: {},
) -> Callable[[], None]:
    """Join the other processes that torchrun started; alone, a group of one.

    An existing process group is used, and left to its owner. With `comm.mode` "fake_backend" this
    process is rank 0 of WORLD_SIZE and nothing is communicated: a dry run of a large layout.

    settings: called with this process's rank before any group is made; what it returns must be the
        same on all ranks, and a `UserError` of one rank is raised on all (`Meeting.agree`).

    Returns a function that leaves the group.
    """
    if dist.is_initialized():
        meeting = meeting_of_ranks(config)
        meeting.agree(lambda: settings(meeting.rank))
        return lambda: None
    _join(config, device, dump_folder, settings)
    return dist.destroy_process_group


def _join(
    config: Comm, device: torch.device, dump_folder: str, settings: Callable[[int], Settings]
) -> None:
    if config.mode == "fake_backend":
        settings(0)
        _init_fake()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return
    launch = read_launch()
    if launch.local_world_size is not None:
        check_local_processes(launch.local_world_size)
    if launch.world_size > 1:
        meeting = meet(launch, config.init_timeout_seconds)
        meeting.agree(lambda: settings(launch.rank))
        store = meeting.store
    else:  # plain `python -m torchtitan.train`
        settings(0)
        warn_if_alone_by_mistake()
        store = dist.HashStore()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        _set_up_flight_recorder(config, dump_folder)
    else:
        # gloo records, too, but nothing writes it out. Its entries, small and made between large
        # activations, would stay for 2,000 collectives and keep the heap from reusing the gaps.
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "0")
    try:
        dist.init_process_group(
            backend="cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=config.init_timeout_seconds),
            store=store,
            rank=launch.rank,
            world_size=launch.world_size,
        )
    except dist.DistError as error:
        raise UserError(
            f"the {launch.world_size} processes met, but could not connect to each other "
            f"({str(error).strip().splitlines()[0][:200]}): check that GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME name a network that all machines share, or unset them."
        ) from None


_meetings = itertools.count()  # advances alike on all ranks


def meeting_of_ranks(config: Comm) -> Meeting:
    """Make a meeting of all ranks of the default group."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if dist.get_backend() == dry_run.BACKEND:  # the other ranks don't exist
        rank, world_size = 0, 1
    store = dist.distributed_c10d._get_default_store()
    store = dist.PrefixStore(f"meeting_{next(_meetings)}", store)
    keeps_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    return Meeting(store, rank, world_size, config.init_timeout_seconds, keeps_store)


def _init_fake() -> None:
    world_size, _ = planned_processes()
    if os.environ.get("RANK", "0") != "0":
        raise UserError(
            f'comm.mode = "fake_backend" is a dry run of rank 0 in one process, but RANK is '
            f"{os.environ['RANK']}: start one process, with COMM_MODE=fake_backend ./run_train.sh."
        )
    dry_run.init_dry_run(world_size)
    logger.warning(
        "comm.mode fake_backend: a dry run of rank 0 of %d in one process; nothing is communicated "
        "(the other ranks are assumed to do what it does), so losses mean nothing",
        world_size,
    )


def _set_up_flight_recorder(config: Comm, dump_folder: str) -> None:
    """Let NCCL record its last collectives, and write them to disk when one times out."""
    os.environ["TORCH_FR_BUFFER_SIZE"] = str(config.trace_buf_size)
    if config.trace_buf_size > 0:
        prefix = Path(dump_folder, config.save_traces_folder, config.save_traces_file_prefix)
        lost = "a collective that times out leaves no trace"
        with SideOutput(str(prefix.parent), prefix.parent, lost).attempt():
            prefix.parent.mkdir(parents=True, exist_ok=True)
            os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "1"
            os.environ[flight_recorder.PREFIX] = str(prefix)
            name_dumps(prefix)


def set_timeout(seconds: int, except_for: dist.ProcessGroup | None = None) -> None:
    """Set the time after which a collective fails, in every existing group except `except_for`."""
    for group in dist.distributed_c10d._world.pg_map:
        if group is not except_for and dist.get_backend(group) != dry_run.BACKEND:
            _set_pg_timeout(timedelta(seconds=seconds), group)


def set_determinism(config: Debug, device: torch.device, of_run: int | None = None) -> int:
    """Seed all ranks alike and return the seed (a fresh one when none is set).

    of_run: seed of the run that is resumed, if any.
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
    """Gather `value`, of one shape on all ranks: a list by rank."""
    out = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(out, value)
    return out


class ObjectCollectives:
    """Collectives of Python objects; every rank of the group must call each method."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)

    def from_rank_0(self, read: Callable[[], Any]) -> Any:
        """Call `read` on the group's first rank and return its result on all of them.

        Only one rank reads, because folders may look different from other nodes. Its `UserError` or
        `OSError` is raised on all ranks.
        """
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer[0] = read()
            except (UserError, OSError) as error:
                answer[1] = error
        dist.broadcast_object_list(answer, group_src=0, group=self.group)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def gather(self, value: Any) -> list[Any]:
        """Gather the value of every rank: a list by rank."""
        gathered: list[Any] = [None] * self.count
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered
