"""torchrun whose last word is the sentence of the rank that failed, instead of a traceback.

    launch.py [options of torchrun] -m torchtitan.train [...]

Exit code as of `python -m torchtitan.train` itself: 2 where the user can mend it, else 1. It is
torchrun's own process, so signals reach it as ever.
"""

import os
import sys
import tempfile
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from torchtitan.tools.last_words import ERROR_FILE, read_last_words
from torchtitan.tools.logging import init_logger, logger


def main(arguments: list[str] | None = None) -> int:
    with tempfile.TemporaryDirectory(prefix="torchtitan-") as folder:
        error_file = Path(folder) / "last_words.jsonl"
        os.environ[ERROR_FILE] = str(error_file)  # the ranks inherit it
        try:
            run.main(arguments)
        except ChildFailedError:
            told = read_last_words(error_file)
            if told is None:  # it failed in another way: torchrun's report is all there is
                raise
            init_logger()
            sentence, exit_code = told
            logger.error("%s", sentence)
            return exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
