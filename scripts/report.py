"""Write the report of a run, or of several beside each other, as one HTML page.

    python scripts/report.py outputs                    writes outputs/report.html
    python scripts/report.py RUN_A RUN_B [--out FILE]   writes report.html, with both runs' curves

A RUN is a job.dump_folder, of a run in progress too, or a metrics.N.jsonl of an earlier run in it.
What the page shows: docs/read_a_run.md.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripts import entry


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=entry.about(__doc__), allow_abbrev=False)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a job.dump_folder")
    parser.add_argument("--out", metavar="FILE", type=Path, help="the page to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    entry.check_first(parse, "runs")

# isort: split
from torchtitan.report import write_report
from torchtitan.report.write import NAME
from torchtitan.tools.logging import logger
from torchtitan.tools.script import run_script


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    alone = args.runs[0] if len(args.runs) == 1 and args.runs[0].is_dir() else Path()
    path = args.out or alone / NAME

    def work() -> None:
        runs = write_report(args.runs, path)
        broken = sum(sum(run.broken.values()) for run in runs)
        left_out = f"; {broken:,} broken lines were left out" if broken else ""
        logger.info(f"Wrote {path}{left_out}")

    return run_script(work)


if __name__ == "__main__":
    entry.run(main)
