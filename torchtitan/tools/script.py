"""The end of a script: an error message instead of a traceback, and the exit code."""

import errno
import os
import sys
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
        sys.stdout.flush()
    except UserError as error:
        logger.error("%s", error)
        return 2
    except KeyboardInterrupt:
        logger.info("Interrupted%s", "; the same command resumes from here" if resumable else "")
        return 130
    except OSError as error:
        return without_output(error)
    return 0


def without_output(error: OSError) -> int:
    """Return the exit code where standard output was lost: 0 if its reader has gone (`| head`), 2
    if its disk is full. Raises any other error again."""
    if error.filename is not None or error.errno not in (errno.EPIPE, errno.ENOSPC):
        raise error
    # What is left in the buffer goes nowhere, or Python would fail again at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if error.errno == errno.EPIPE:
        return 0
    logger.error("The standard output can't be written: %s", error.strerror)
    return 2
