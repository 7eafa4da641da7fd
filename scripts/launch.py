"""torchrun whose last word is the sentence of the rank that failed, instead of a traceback.

    launch.py [options of torchrun] -m torchtitan.train [...]

Exit code as of `python -m torchtitan.train` itself: 2 where the user can mend it, else 1. It is
torchrun's own process. SIGTERM and SIGUSR1 it hands on to the ranks, which end after their step
with a checkpoint; a second one ends everything at once.
"""

import os
import signal
import sys
import tempfile
from pathlib import Path

# torchrun ends its ranks at SIGTERM, and kills them 30 seconds later, whatever they are writing.
os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGINT,SIGHUP,SIGQUIT")

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from torchtitan.tools.last_words import ERROR_FILE, read_last_words
from torchtitan.tools.logging import init_logger, logger
from torchtitan.tools.signals import POLITE


def main(arguments: list[str] | None = None) -> int:
    init_logger()
    with tempfile.TemporaryDirectory(prefix="torchtitan-") as folder:
        error_file = Path(folder) / "last_words.jsonl"
        os.environ[ERROR_FILE] = str(error_file)  # the ranks inherit it
        hand_on_signals()
        try:
            run.main(arguments)
        except ChildFailedError as error:
            told = read_last_words(error_file)
            killed = _killed(error)
            if told is None and killed is None:  # torchrun's report is all there is
                raise
            sentence, exit_code = told or ("no other rank has said anything", 1)
            logger.error("%s", f"{killed}; {sentence}" if killed else sentence)
            return exit_code
    return 0


def hand_on_signals() -> None:
    """To all ranks of this machine; the second one as a kill, and then this process ends too."""
    received = []

    def receive(number: int, frame: object) -> None:
        received.append(number)
        for child in _children():
            os.kill(child, number if len(received) == 1 else signal.SIGKILL)
        if len(received) > 1:
            os._exit(128 + number)

    for number in POLITE:
        signal.signal(number, receive)


def _children() -> list[int]:
    """Processes that this one has started: the ranks."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # "pid (name) state parent ...", and the name may hold anything
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # gone meanwhile
            continue
        if parent == os.getpid():
            found.append(int(stat.parent.name))
    return found


def _killed(error: ChildFailedError) -> str | None:
    """ "rank 1 was ended by SIGKILL", if that is how it began."""
    rank, failure = error.get_first_failure()
    if failure.exitcode >= 0:
        return None
    name = signal.Signals(-failure.exitcode).name
    hint = ""
    if name == "SIGKILL":
        hint = " (perhaps the machine ran out of memory: see dmesg)"
    if name == "SIGABRT":
        hint = (
            " (NCCL's watchdog ends a rank so: see its lines above and the flight recorder's files "
            "in comm.save_traces_folder)"
        )
    return f"rank {rank} was ended by {name}{hint}"


if __name__ == "__main__":
    sys.exit(main())
