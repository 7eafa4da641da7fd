"""The error message for a rank that died or hangs: which rank, and in which collective.

A dead peer closes its connections, so the next collective with it fails at once; a hanging one is
noticed after comm.train_timeout_seconds. gloo and NCCL name neither. The collective is in the
traceback. To find the rank, the ranks that notice the failure sign a list in the store in which
they met at the start: the one that doesn't sign is lost.
"""

import contextlib
import os
import re
import signal
import socket
import time
import traceback
from pathlib import Path

import torch.distributed as dist

from torchtitan.tools.flight_recorder import explain_last_dumps
from torchtitan.tools.node_names import nodes_of

_OF_COMMUNICATION = re.compile(r"gloo|NCCL|by peer|Timed out waiting|Broken pipe", re.IGNORECASE)
_HANGS = re.compile(r"time[d ]*out", re.IGNORECASE)
# All ranks notice a dead peer within moments, a hanging one at times that differ a little.
_SIGNING_SECONDS = {"has gone": 2.0, "does not answer": 8.0}


def explain_lost_peer(error: BaseException, step: int) -> str | None:
    """The message with which this rank ends; None where `error` is not one of communication."""
    is_ours = isinstance(error, dist.DistError) or _OF_COMMUNICATION.search(str(error))
    if not is_ours or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    # The launcher may be ending this rank already: hold it off until the message is written.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    fate = "does not answer" if _HANGS.search(str(error)) else "has gone"
    fate, missing = _who_does_not_sign(fate)
    who = f"rank {', '.join(map(str, missing))}{nodes_of(missing)}" if missing else "another rank"
    recorder = ""
    if dist.get_backend() == "nccl":
        recorder = explain_last_dumps() or (
            "what each rank did last is in the files of comm.save_traces_folder"
        )
        recorder = f"; {recorder}"
    # Cut the position in gloo's sources and its guesses at the cause.
    reason = re.sub(r"^\[\S+\] ", "", str(error).strip()).split(". ")[0].splitlines()[0][:200]
    return f"step {step}: {who} {fate} ({_collective(error)}: {reason}){recorder}."


def _who_does_not_sign(fate: str) -> tuple[str, list[int]]:
    """Find the ranks that have not noticed the failure, and what became of them.

    Each rank signs with the fate it saw. A timeout that any rank saw is the true one: that rank
    then closed its connections, which the others see as a peer that has gone.

    Returns the fate and the ranks; no ranks where the store is lost with one of them.
    """
    me, others = dist.get_rank(), set(range(dist.get_world_size()))
    began = time.monotonic()
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"noticed/{me}", fate)
        _close_connections()
        others.discard(me)
        while others and time.monotonic() - began < _SIGNING_SECONDS[fate]:
            signed = {rank for rank in others if store.check([f"noticed/{rank}"])}
            if any(store.get(f"noticed/{rank}") == b"does not answer" for rank in signed):
                fate = "does not answer"
            others -= signed
            time.sleep(0.05)
    except (dist.DistError, RuntimeError):
        # Rank 0 may hold the store. If it has signed, it waited as long as this rank would.
        return fate, sorted(others) if 0 not in others else []
    return fate, sorted(others)


def _close_connections() -> None:
    """Close this rank's connections to other ranks, all but the store's.

    Ranks that wait for this one and not for the lost one then notice too, and sign. (gloo's groups
    can't be aborted, torch 2.13.)
    """
    store_port = int(os.environ.get("MASTER_PORT", 0))
    for entry in Path("/proc/self/fd").glob("*"):
        # A descriptor that is no connection, or was closed meanwhile, raises OSError.
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(entry.name))) as end:
            if end.family in (socket.AF_INET, socket.AF_INET6):
                ports = {end.getsockname()[1], end.getpeername()[1]}
                if store_port not in ports:
                    end.shutdown(socket.SHUT_RDWR)


def _collective(error: BaseException) -> str:
    """Name torch's innermost public function and ours around it: "all_gather in gather"."""
    frames = traceback.extract_tb(error.__traceback__)
    torchs = [f.name for f in frames if "torch/distributed" in Path(f.filename).as_posix()]
    public = [name for name in torchs if not name.startswith("_") and name != "wrapper"]
    ours = [f.name for f in frames if "torchtitan" in Path(f.filename).as_posix()]
    called = public[-1] if public else "communication of the backward pass"
    return f"{called} in {ours[-1]}" if ours else called
