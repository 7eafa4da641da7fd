"""Explain the flight recorder's dumps of a run that hung: which collective, and which rank.

    python scripts/explain_hang.py outputs/comm_traces

NCCL's process groups write them when a collective times out (comm.trace_buf_size > 0). For more
than a sentence: python -m torch.distributed.flight_recorder.fr_trace outputs/comm_traces
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripts import entry


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=entry.about(__doc__), allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="comm.save_traces_folder of the run")
    return parser.parse_args(argv)


if __name__ == "__main__":
    entry.check_first(parse, "folder")

# isort: split
from torchtitan.tools.errors import UserError
from torchtitan.tools.flight_recorder import explain
from torchtitan.tools.script import run_script


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)

    def work() -> None:
        sentence = explain(args.folder)
        if sentence is None:
            raise UserError(
                f"{args.folder} holds no dump of the flight recorder; give the "
                "comm.save_traces_folder of a run whose collective timed out on NCCL."
            )
        print(f"{sentence[0].upper()}{sentence[1:]}.")

    return run_script(work)


if __name__ == "__main__":
    entry.run(main)
