"""One logger for the whole package: ranks of LOG_RANK log everything, the others warnings only."""

import logging
import os
import sys

from torchtitan.tools.progress_bar import CLEAR_LINE, beside_a_bar

logger = logging.getLogger("torchtitan")


def init_logger() -> None:
    """Send the package's log lines to stderr; ranks outside LOG_RANK ("0,1"; default 0) log nothing
    below WARNING."""
    rank = os.environ.get("RANK") or "0"
    if sys.stderr is None:  # closed by the parent process
        sys.stderr = open(os.devnull, "w")
    handler = logging.StreamHandler(sys.stderr)
    prefix = "[titan]" if rank == "0" else f"[titan rank {rank}]"
    prefix = CLEAR_LINE + prefix if beside_a_bar() else prefix
    handler.setFormatter(
        logging.Formatter(f"{prefix} %(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S")
    )
    logger.handlers[:] = [handler]
    logger.propagate = False
    verbose = rank in (os.environ.get("LOG_RANK") or "0").split(",")
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
