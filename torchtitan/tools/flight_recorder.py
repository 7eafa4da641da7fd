"""The flight recorder's dumps in a sentence: which collective was not finished, and for which rank.

NCCL's process groups record their last collectives, and each rank writes them to a file when one
times out (torch's flight recorder; gloo has none). The files are pickles of plain values.
"""

import contextlib
import json
import os
import pickle
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtitan.tools.errors import UserError

# Torch's variable for the files: a path to which each rank appends its number.
PREFIX = "TORCH_FR_DUMP_TEMP_FILE"
_STARTED = time.time()
_SHOWN = 8  # ranks


@dataclass(frozen=True)
class Stuck:
    """A collective that some rank has entered and not finished.

    began: time in ns.
    waiting: ranks that have entered it.
    missing: ranks of its group that have not.
    silent: ranks of its group without a file.
    """

    group: str
    what: str
    number: int
    began: int
    waiting: list[int]
    missing: list[int]
    silent: list[int]


def explain_last_dumps() -> str | None:
    """Explain the files that ranks of this run have written since this process began; None where
    there are none."""
    if PREFIX not in os.environ:
        return None
    prefix = Path(os.environ[PREFIX])
    with contextlib.suppress(UserError):
        return explain(prefix.parent, prefix.name, since=_STARTED)
    return None


def explain(folder: Path, prefix: str = "", *, since: float = 0.0) -> str | None:
    """Explain a folder's dumps in one sentence; None where it holds none.

    prefix: of the files' names; the rank follows.
    since: time before which a file belongs to an earlier hang.
    """
    dumps = {
        rank: dump
        for rank, path in _files(folder, prefix)
        if path.stat().st_mtime >= since and (dump := _read(path)) is not None
    }
    if not dumps:
        return None
    named = f"the flight recorder's files in {folder} (of rank {_listed(sorted(dumps))})"
    stuck = _stuck(dumps)
    if not stuck:
        return f"{named} have no unfinished collective"
    # A rank that is missing in one collective may wait in another: the cause is the one for which
    # somebody is missing who waits nowhere; among several, the first.
    waits_somewhere = {rank for each in stuck for rank in each.waiting}
    first = min(
        stuck,
        key=lambda each: (
            not set(each.missing + each.silent) - waits_somewhere,
            not each.missing + each.silent,
            each.began,
        ),
    )
    return f"{named} say: {_sentence(first)}"


def _sentence(stuck: Stuck) -> str:
    who = []
    if stuck.missing:
        who.append(f"rank {_listed(stuck.missing)} has not entered it")
    if stuck.silent:
        who.append(f"rank {_listed(stuck.silent)} left no file")
    if not who:
        who = ["all its ranks have entered it, so one is held up inside, or the network is"]
    return (
        f"{stuck.what}, number {stuck.number} of the group {stuck.group}, was not finished: "
        f"{' and '.join(who)}, while rank {_listed(stuck.waiting)} waited"
    )


def _listed(ranks: list[int]) -> str:
    more = f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else ""
    return ", ".join(map(str, ranks[:_SHOWN])) + more


def _stuck(dumps: Mapping[int, Mapping[str, Any]]) -> list[Stuck]:
    """List the oldest unfinished collective of each group."""
    newest: dict[tuple[str, int], int] = {}  # by group and rank: number of the last one entered
    open_ones: dict[tuple[str, int], list[tuple[int, Mapping[str, Any]]]] = {}
    members: dict[str, list[int]] = {}
    for rank, dump in dumps.items():
        for config in dump.get("pg_config", {}).values():
            members.setdefault(config["name"], json.loads(config["ranks"]))
        for entry in dump["entries"]:
            if entry.get("is_p2p"):
                continue
            group, number = entry["process_group"][0], entry["collective_seq_id"]
            newest[group, rank] = max(number, newest.get((group, rank), 0))
            if entry["state"] != "completed":
                open_ones.setdefault((group, number), []).append((rank, entry))
    found: dict[str, Stuck] = {}
    for (group, number), entered in sorted(open_ones.items()):
        if group in found:
            continue
        entry = entered[0][1]
        ranks = members.get(group) or sorted(dumps)
        name = entry["process_group"][1]
        if name in ("", "undefined"):  # the group was made without one
            name = group
        found[group] = Stuck(
            group=name,
            what=entry["profiling_name"],
            number=number,
            began=min(each["time_created_ns"] for _, each in entered),
            waiting=sorted(rank for rank, _ in entered),
            missing=[r for r in ranks if r in dumps and newest.get((group, r), 0) < number],
            silent=[r for r in ranks if r not in dumps],
        )
    return list(found.values())


def _files(folder: Path, prefix: str) -> Iterator[tuple[int, Path]]:
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(
            f"{folder} can't be read ({error.strerror}); give the comm.save_traces_folder of a run."
        ) from None
    for path in paths:
        found = re.fullmatch(re.escape(prefix) + r"\D*?(\d+)", path.name)
        if found and path.is_file():
            yield int(found[1]), path


class _PlainValues(pickle.Unpickler):
    """Reads dumps, which hold no objects: others are refused, since they could run code."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"{module_name}.{global_name} is no plain value")


def _read(path: Path) -> dict[str, Any] | None:
    """Read a dump; None for another file, or half a one."""
    try:
        with path.open("rb") as file:
            dump = _PlainValues(file).load()
    except (OSError, EOFError, ValueError, KeyError, IndexError, pickle.UnpicklingError):
        return None
    return dump if isinstance(dump, dict) and isinstance(dump.get("entries"), list) else None
