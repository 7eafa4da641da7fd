"""The end of a script: an error message instead of a traceback, and the exit code."""

from collections.abc import Callable

from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import init_logger, logger


def run_script(work: Callable[[], None], *, resumable: bool = False) -> int:
    """Run `work`; return the exit code: 0 done, 2 user error, 130 Ctrl-C.

    resumable: whether the same command, called again, resumes where it stopped.
    """
    init_logger()
    try:
        work()
    except UserError as error:
        logger.error("%s", error)
        return 2
    except KeyboardInterrupt:
        logger.info("Interrupted%s", "; the same command resumes from here" if resumable else "")
        return 130
    return 0
