"""One logger for the whole package; rank 0 speaks, the other ranks only warn."""

import logging
import os
import sys

logger = logging.getLogger("torchtitan")


def init_logger() -> None:
    """Send the package's log lines to stderr; ranks other than 0 are quiet below WARNING."""
    rank = int(os.environ.get("RANK", 0))
    handler = logging.StreamHandler(sys.stderr)
    prefix = "[titan]" if rank == 0 else f"[titan rank {rank}]"
    handler.setFormatter(
        logging.Formatter(f"{prefix} %(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S")
    )
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
