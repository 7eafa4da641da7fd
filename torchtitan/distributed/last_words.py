"""Error messages with which several ranks end: those that are the same are told once a machine."""

import hashlib
import re
import time
from datetime import timedelta

import torch.distributed as dist

from torchtitan.distributed.agreement import Meeting
from torchtitan.distributed.meeting_point import meet
from torchtitan.tools.errors import UserError
from torchtitan.tools.launcher import Launch, read_launch

# How long a rank that fails waits for others, which may not fail.
SECONDS = 2.0


def last_words(sentence: str) -> str | None:
    """Return what this rank has to log of its error message; None where the first rank of its
    machine logs the same one.

    Each rank that fails calls it once. Rank 0 is named where not all ranks fail alike; the log's
    lines name other ranks by themselves.
    """
    try:
        launch = read_launch()
        if launch.world_size == 1:
            return sentence
        return _compare(launch, meet(launch, SECONDS), sentence)
    except (UserError, dist.DistError, RuntimeError):  # the others have gone
        return sentence


def _compare(launch: Launch, meeting: Meeting, sentence: str) -> str | None:
    store, cause = meeting.store, _without_rank(sentence)
    alike = f"alike/{hashlib.sha256(cause.encode()).hexdigest()}"
    store.set(f"word/{launch.rank}", cause)
    store.add(alike, 1)
    if launch.rank:
        first = f"word/{launch.rank - launch.local_rank}"
        store.wait([first], timedelta(seconds=SECONDS))
        told = store.get(first).decode()
        store.add("heard", 1)
        return None if launch.local_rank and told == cause else sentence
    deadline, others, count = time.monotonic() + SECONDS, launch.world_size - 1, 1
    while time.monotonic() < deadline:
        count = store.add(alike, 0)
        if count > others and (not meeting.keeps_store or store.add("heard", 0) == others):
            break
        time.sleep(0.02)
    if count > others or cause != sentence:
        return sentence
    return f"rank 0{f' and {count - 1} of {others} others' if count > 1 else ''}: {sentence}"


def _without_rank(sentence: str) -> str:
    """Leave out the name of the rank that found it, which the others put before it."""
    return re.sub(r"^rank \d+: ", "", sentence)
