"""torchrun whose last word is the sentence of the rank that failed, instead of a traceback.

    launch.py [options of torchrun] -m torchtitan.train [...]

Exit code as of `python -m torchtitan.train` itself: 2 where the user can mend it, else 1. It is
torchrun's own process. Signals that ask for an end it hands on to the ranks, which end after their
step with a checkpoint; a second one ends everything at once. docs/checkpoint.md has the table.
"""

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripts import entry

# isort: split
from torchtitan.tools.last_words import (
    ERROR_FILE,
    have_steps_begun,
    read_last_words,
    read_stop_code,
)
from torchtitan.tools.logging import init_logger, logger
from torchtitan.tools.signals import SignalListener, stop_code


class Launch:
    """The ranks' files, and what a signal does to the ranks of this machine.

    torchrun's own way with signals is kept out (`SignalListener` blocks them): it would end the
    ranks 30 seconds after SIGTERM, whatever they are writing, and fail itself with a traceback.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="torchtitan-"))
        self.error_file = self.folder / "last_words.jsonl"
        os.environ[ERROR_FILE] = str(self.error_file)  # the ranks inherit both
        path = (sys.path[0], os.environ.get("PYTHONPATH"))  # the package need not be installed
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        self._number = 0
        SignalListener(self._receive).start()

    def exit_code(self) -> int:
        """Exit code of a run that went well."""
        return stop_code(self._number) if self._number else read_stop_code(self.error_file)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _receive(self, number: signal.Signals, sender: int | None) -> None:
        ranks = _children()
        if self._number:
            self._end(128 + number, f"{number.name}: the second signal, so all ranks end at once")
        self._number = number
        if not have_steps_begun(self.error_file, ranks):
            self._end(stop_code(number), f"{number.name}: the run ends before its first step")
        _kill(ranks, number)
        threading.Thread(target=self._let_none_begin_anew, args=(ranks,), daemon=True).start()

    def _let_none_begin_anew(self, ranks: set[int]) -> None:
        """torchrun does that (--max-restarts) where one of them fails on its way to the end."""
        while _children() <= ranks:
            time.sleep(0.1)
        sentence, code = read_last_words(self.error_file) or ("a rank failed at the end", 1)
        self._end(code, sentence)

    def _end(self, code: int, sentence: str) -> None:
        _kill(_children(), signal.SIGKILL)
        logger.warning("%s", sentence)
        self.close()
        os._exit(code)


def _children() -> set[int]:
    """Processes that this one has started: the ranks."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # "pid (name) state parent ...", and the name may hold anything
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # gone meanwhile
            continue
        if int(parent) == os.getpid() and state != "Z":
            found.add(int(stat.parent.name))
    return found


def _kill(processes: set[int], number: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):  # gone meanwhile
            os.kill(process, number)


def main(arguments: list[str] | None = None) -> int:
    init_logger()
    launch = Launch()
    try:
        # Only now that signals are heard: it takes seconds.
        from torch.distributed import run
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        try:
            run.main(arguments)
        except ChildFailedError as error:
            told = read_last_words(launch.error_file)
            killed = _killed(*error.get_first_failure())
            if told is None and killed is None:  # torchrun's report is all there is
                raise
            sentence, exit_code = told or ("no other rank has said anything", 1)
            logger.error("%s", f"{killed}; {sentence}" if killed else sentence)
            return exit_code
        return launch.exit_code()
    finally:
        launch.close()


def _killed(rank: int, failure: Any) -> str | None:
    """ "rank 1 was ended by SIGKILL", if that is how it began. failure: torch's ProcessFailure."""
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
            " (NCCL's watchdog ends a rank so: see its lines above and the flight recorder's files "
            "in comm.save_traces_folder)"
        )
    return f"rank {rank} was ended by {name}{hint}"


if __name__ == "__main__":
    entry.run(main)
