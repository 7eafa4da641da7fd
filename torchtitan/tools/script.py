"""How a script ends: a sentence instead of a traceback, and the exit code."""

from collections.abc import Callable

from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import init_logger, logger


def run_script(work: Callable[[], None], *, goes_on: bool = False) -> int:
    """0 done, 2 for what the user can mend, 130 for Ctrl-C.

    goes_on: whether the same command, called again, goes on where it stopped.
    """
    init_logger()
    try:
        work()
    except UserError as error:
        logger.error("%s", error)
        return 2
    except KeyboardInterrupt:
        logger.info("Interrupted%s", "; the same command goes on from here" if goes_on else "")
        return 130
    return 0
