"""torchrun that ends with the error message of the rank that failed, instead of a traceback.

    launch.py [options of torchrun] -m torchtitan.train [...]

The exit code is that of `python -m torchtitan.train` itself: 2 for user errors, else 1. It runs
torchrun in its own process. On several nodes (--nnodes, --node-rank, --master-addr, --master-port)
the launchers meet first, and the message names nodes (torchtitan/distributed/nodes.py). Signals
that ask for an end are forwarded to the ranks, which end after their step with a checkpoint; a
second one ends everything at once (table: docs/checkpoint.md).
"""

import argparse
import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripts import entry

# isort: split
from torchtitan.tools.error_file import (
    ERROR_FILE,
    RankError,
    have_steps_begun,
    read_dumps_prefix,
    read_errors,
    read_stop_code,
)
from torchtitan.tools.errors import RunError, UserError
from torchtitan.tools.flight_recorder import explain
from torchtitan.tools.logging import init_logger, logger
from torchtitan.tools.progress_bar import share_terminal
from torchtitan.tools.signals import TRACE, SignalListener, stop_code


class Launch:
    """The ranks' files, and the handling of signals for the ranks of this machine.

    torchrun's own handling of signals is disabled (`SignalListener` blocks them): it would kill the
    ranks 30 seconds after SIGTERM, whatever they are writing, and fail itself with a traceback.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="torchtitan-"))
        self.error_file = self.folder / "errors.jsonl"
        os.environ[ERROR_FILE] = str(self.error_file)  # the ranks inherit both
        share_terminal()
        path = (sys.path[0], os.environ.get("PYTHONPATH"))  # the package need not be installed
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        self._number = 0
        self._began = time.time()
        SignalListener(self._receive).start()

    def exit_code(self) -> int:
        """Exit code of a run that went well."""
        return stop_code(self._number) if self._number else read_stop_code(self.error_file)

    def explain_dumps(self) -> str | None:
        """Explain the flight recorder's files of this run; None without any."""
        prefix = read_dumps_prefix(self.error_file)
        if prefix is None or not prefix.parent.is_dir():
            return None
        return explain(prefix.parent, prefix.name, since=self._began)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _receive(self, number: signal.Signals, sender: int | None) -> None:
        ranks = _children()
        if number == TRACE:
            _kill(ranks, number)
            return
        if self._number:
            self._end(128 + number, f"{number.name}: the second signal, so all ranks end at once")
        self._number = number
        if not have_steps_begun(self.error_file, ranks):
            self._end(stop_code(number), f"{number.name}: the run ends before its first step")
        _kill(ranks, number)
        threading.Thread(target=self._prevent_restarts, args=(ranks,), daemon=True).start()

    def _prevent_restarts(self, ranks: set[int]) -> None:
        """End the run where torchrun restarts ranks (--max-restarts), because one failed while
        ending."""
        while _children() <= ranks:
            time.sleep(0.1)
        errors = read_errors(self.error_file) or [RankError("a rank failed at the end", 1)]
        for each in errors[1:]:
            logger.error("%s", each.sentence)
        self._end(errors[0].exit_code, errors[0].sentence)

    def _end(self, code: int, sentence: str) -> None:
        logger.warning("%s", sentence)
        logging.disable()  # torchrun, in the main thread, would tell how its ranks end
        self.close()
        _kill(_children(), signal.SIGKILL)
        os._exit(code)


def _children() -> set[int]:
    """Process ids of this process's children: the ranks."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # "pid (name) state parent ...", where the name may contain any character
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has ended meanwhile
            continue
        if int(parent) == os.getpid() and state != "Z":
            found.add(int(stat.parent.name))
    return found


def _kill(processes: set[int], number: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.kill(process, number)


def _check_program(options: argparse.Namespace) -> None:
    """Raise `UserError` for a program that does not exist: each rank would end in a traceback."""
    program = options.training_script
    if options.module:
        sys.path.append(os.getcwd())  # `python -m` has it, too
        try:
            found = find_spec(program) is not None
        except ImportError:  # a package above it does not exist
            found = False
    else:
        found = options.no_python or Path(program).exists()
    if not found:
        kind = "module" if options.module else "file"
        raise UserError(f"there is no {kind} {program} to run; training is -m torchtitan.train.")


def main(arguments: list[str] | None = None) -> int:
    init_logger()
    launch = Launch()
    try:
        # Imported after signals are handled, because it takes seconds.
        from torch.distributed import run
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        from torchtitan.distributed.nodes import meet_nodes, read_place

        nodes = None
        try:
            options = run.parse_args(arguments)
            _check_program(options)
            if place := read_place(options):
                nodes = meet_nodes(place)
            run.main(arguments)
        except (UserError, RunError) as error:
            logger.error("%s", error)
            return 2 if isinstance(error, UserError) else 1
        except ValueError as error:  # of torchrun, before it starts a rank
            logger.error("torchrun can't use these options: %s", str(error).rstrip(".") + ".")
            return 2
        except ChildFailedError as error:
            reported = read_errors(launch.error_file)
            for each in reported[1:]:
                logger.error("%s", each.sentence)
            known = _explain(launch, error, reported[0] if reported else None)
            sentence, exit_code, follows = known or RankError("a rank failed with a traceback", 1)
            if nodes is not None:
                sentence, exit_code = nodes.end(sentence, exit_code, follows=follows)
            if known is None:
                raise
            logger.error("%s", sentence)
            return exit_code
        return launch.exit_code()
    finally:
        launch.close()


def _explain(launch: Launch, error: Any, reported: RankError | None) -> RankError | None:
    """How the ranks of this machine failed; None where only torchrun's report exists.

    error: torch's ChildFailedError.
    reported: the first rank's message.
    """
    rank, failure = error.get_first_failure()
    killed = _killed(rank, failure, launch.explain_dumps())
    if killed is None:
        return reported
    sentence, exit_code, _ = reported or RankError("no other rank reported an error", 1)
    return RankError(f"{killed}; {sentence}", exit_code)


def _killed(rank: int, failure: Any, dumps: str | None = None) -> str | None:
    """Describe the first failure, "rank 1 was ended by SIGKILL"; None if no signal caused it.

    failure: torch's ProcessFailure.
    dumps: a sentence about the flight recorder's files.
    """
    if failure.exitcode >= 0:
        return None
    name = signal.Signals(-failure.exitcode).name
    hint = ""
    if name == "SIGKILL":
        hint = (
            " (perhaps the machine ran out of memory: see dmesg; python scripts/plan.py says what "
            "a run needs)"
        )
    if name == "SIGABRT":
        hint = (
            " (as NCCL's watchdog does: see its lines above; "
            f"{dumps or 'the flight recorder left no files in comm.save_traces_folder'})"
        )
    return f"rank {rank} was ended by {name}{hint}"


if __name__ == "__main__":
    entry.run(main)
