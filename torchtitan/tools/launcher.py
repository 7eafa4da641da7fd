"""Rank, world size and address of this process: torchrun's variables, checked in one place.

A process without them trains alone. A process that belongs to a group, according to variables that
a user or a scheduler has set, must not train alone silently: missing or impossible variables raise
`UserError`.
"""

import os
import re
from dataclasses import dataclass

import torch.distributed as dist

from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger

MOST_PROCESSES = 999_999
# Variable: least and largest value, meaning.
_NUMBERS = {
    "RANK": (0, MOST_PROCESSES, "the number of this process in the run"),
    "WORLD_SIZE": (1, MOST_PROCESSES, "the number of processes of the run"),
    "LOCAL_RANK": (0, MOST_PROCESSES, "the number of this process on its machine"),
    "LOCAL_WORLD_SIZE": (1, MOST_PROCESSES, "the number of processes on this machine"),
    "MASTER_PORT": (1, 65535, "the port on the machine of rank 0 at which all ranks meet"),
}
_ADDRESS = "MASTER_ADDR"
# Launchers that start processes without the variables above: their variables for the number of
# processes, and for the number of this one.
_OTHERS = {
    "srun": (("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"), "SLURM_PROCID"),
    "mpirun (Open MPI)": (("OMPI_COMM_WORLD_SIZE",), "OMPI_COMM_WORLD_RANK"),
    "mpirun (MVAPICH)": (("MV2_COMM_WORLD_SIZE",), "MV2_COMM_WORLD_RANK"),
    "mpiexec": (("PMI_SIZE",), "PMI_RANK"),
}
_TORCHRUN = "start the processes with torchrun (or ./run_train.sh), which sets it"


@dataclass(frozen=True)
class Launch:
    """Place of this process among those of the run.

    local_world_size: None where it is unknown.
    master_addr, master_port: address at which the ranks meet; "" and 0 for a single process.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int | None = None
    master_addr: str = ""
    master_port: int = 0


def read_launch() -> Launch:
    """Read the place of a process that trains. Raises `UserError` for impossible variables."""
    if dist.is_initialized():  # the caller's group decides, not the environment
        local = local_rank(), planned_processes()[1]
        return Launch(dist.get_rank(), dist.get_world_size(), *local)
    numbers = {name: _number(name) for name in _NUMBERS}
    address = _text(_ADDRESS)
    if numbers["WORLD_SIZE"] is None:
        if numbers["RANK"] is not None:
            raise _missing("WORLD_SIZE", f"RANK is {numbers['RANK']}")
        _refuse_other_launchers()
    several = (numbers["WORLD_SIZE"] or 1) > 1
    for name, value in (*numbers.items(), (_ADDRESS, address)):
        if several and value is None:
            raise _missing(name, f"WORLD_SIZE is {numbers['WORLD_SIZE']}")
    local_world_size = numbers["LOCAL_WORLD_SIZE"] or 1
    launch = Launch(
        rank=numbers["RANK"] or 0,
        world_size=numbers["WORLD_SIZE"] or 1,
        local_rank=numbers["LOCAL_RANK"] or 0,
        local_world_size=local_world_size,
        master_addr=address or "",
        master_port=numbers["MASTER_PORT"] or 0,
    )
    _check_together(launch, local_world_size)
    return launch


def planned_processes() -> tuple[int, int | None]:
    """Read WORLD_SIZE (default: 1) and LOCAL_WORLD_SIZE. Raises `UserError`.

    A check of a config and a dry run need no other variable.
    """
    return _number("WORLD_SIZE") or 1, _number("LOCAL_WORLD_SIZE")


def local_rank() -> int:
    """Read LOCAL_RANK, 0 where it is not set. Raises `UserError`."""
    return _number("LOCAL_RANK") or 0


def warn_if_alone_by_mistake() -> None:
    """Warn where a single process has the address of a group in its environment."""
    if _ADDRESS in os.environ and "WORLD_SIZE" not in os.environ:
        logger.warning(
            "%s is set but RANK and WORLD_SIZE are not: this process trains alone; to train with "
            "others, start all of them with torchrun",
            _ADDRESS,
        )


def _number(name: str) -> int | None:
    least, most, meaning = _NUMBERS[name]
    text = _text(name)
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise UserError(
            f"the environment variable {name} is '{text[:40]}', but {meaning} must be a whole "
            f"number from {least} to {most}; {_TORCHRUN}, or unset it to train with one process."
        )
    return int(text)


def _text(name: str) -> str | None:
    text = os.environ.get(name)
    if text is not None and not text.strip():
        raise UserError(
            f"the environment variable {name} is empty; {_TORCHRUN}, or unset it to train with one "
            "process."
        )
    return text


def _missing(name: str, because: str) -> UserError:
    return UserError(
        f"the environment variable {name} is not set, but {because}; {_TORCHRUN}, or unset RANK "
        "and WORLD_SIZE to train with one process."
    )


def _check_together(launch: Launch, local_world_size: int) -> None:
    """Check each number against the others; `read_launch` has checked their ranges."""
    pairs = [
        ("RANK", launch.rank, "below WORLD_SIZE", launch.world_size - 1, launch.world_size),
        (
            "LOCAL_WORLD_SIZE",
            local_world_size,
            "at most WORLD_SIZE",
            launch.world_size,
            launch.world_size,
        ),
        (
            "LOCAL_RANK",
            launch.local_rank,
            "below LOCAL_WORLD_SIZE",
            local_world_size - 1,
            local_world_size,
        ),
        ("LOCAL_RANK", launch.local_rank, "at most RANK", launch.rank, launch.rank),
    ]
    for name, value, rule, most, bound in pairs:
        if value > most:
            raise UserError(
                f"the environment variable {name} is {value}, but must be {rule} ({bound}); "
                f"{_TORCHRUN}, or unset RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE to train "
                "with one process."
            )


def _refuse_other_launchers() -> None:
    for launcher, (counts, index) in _OTHERS.items():
        for name in (*counts, index):
            text = os.environ.get(name, "")
            if text.isdecimal() and int(text) > (0 if name == index else 1):
                raise UserError(
                    f"the environment variable {name} is {text}, but RANK and WORLD_SIZE are not "
                    f"set: processes that {launcher} starts would each train alone; let it start "
                    "one torchrun on each machine, or set WORLD_SIZE=1 to train with this process "
                    "alone."
                )
