"""Prove on this CPU that a TOML's layout computes what one process does, before paying for GPUs.

    python scripts/prove.py CONFIG.toml [--world-size N] [--node-size 8] [--processes 16]

Shrinks what is only size, starts the layout's ranks (or, of a large world, smaller ones that have
each pair of its axes), and compares losses, gradients, weights, expert bias and resumes with one
process: docs/proving.md. Exit code: 0 all is the same, 1 a difference, 2 what the user can mend.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripts import entry

# isort: split
from torchtitan.config import ConfigManager, JobConfig
from torchtitan.tools.errors import UserError


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=entry.about(__doc__))
    parser.add_argument("config", metavar="CONFIG.toml", help="the run to prove")
    parser.add_argument("--world-size", help="processes of the run; default: the fewest")
    parser.add_argument("--node-size", default="8", help="processes of a machine (8)")
    parser.add_argument("--processes", default="16", help="most to start at once (16)")
    return parser.parse_args(argv)


def number(option: str, text: str, least: int | None = None) -> int:
    """Return the number that an option gives. Raises `UserError`."""
    if not re.fullmatch(r"-?[0-9]{1,9}", text):
        raise UserError(f"{option} {text} must be a whole number; leave it out for the default.")
    if least is not None and int(text) < least:
        raise UserError(f"{option} {text} must be {least} or more; leave it out for the default.")
    return int(text)


def check(argv: list[str] | None) -> tuple[argparse.Namespace, JobConfig]:
    """Return the options, numbers as such, and the run's settings. Raises `UserError`."""
    args = parse(argv)
    args.world_size = args.world_size and number("--world-size", args.world_size)
    args.node_size = number("--node-size", args.node_size, least=1)
    args.processes = number("--processes", args.processes, least=2)
    return args, ConfigManager().parse_args(["--job.config_file", args.config])


if __name__ == "__main__":
    entry.check_first(check)

os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks share the cores
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"

from torchtitan.proof import report
from torchtitan.proof.plan import make_plan
from torchtitan.proof.processes import Processes
from torchtitan.proof.prove import prove
from torchtitan.tools.logging import init_logger, logger


def main(argv: list[str] | None = None) -> int:
    init_logger()
    logger.setLevel("WARNING")
    try:
        with tempfile.TemporaryDirectory(prefix="prove-") as folder:
            return run(*check(argv), Path(folder))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def run(args: argparse.Namespace, config: JobConfig, folder: Path) -> int:
    began = time.monotonic()
    sizes = {"node_size": args.node_size, "most": args.processes}
    plan = make_plan(config, args.world_size, **sizes, folder=folder)
    tell(report.opening(plan))
    results = []
    for n, world in enumerate(plan.runs, start=1):
        checks, seeds = prove(world, Processes, folder / f"world-{n}")
        tell(report.of_world(n, world, checks, seeds))
        results.append(checks)
    last, code = report.ending(plan, results)
    print(f"{last}, {time.monotonic() - began:.0f} s", flush=True)
    return code


def tell(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    entry.run(main)
