"""Print the shell's completion of every key for run_train.sh.

    source <(python scripts/completion.py bash)

It completes the names of keys, and their values where they are choices. tyro writes it, from the
parser that prints --help.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripts import entry

# isort: split
from torchtitan.config.manager import completion

PROGRAM = "run_train.sh"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=entry.about(__doc__), allow_abbrev=False)
    parser.add_argument("shell", choices=("bash", "zsh"), help="whose completion to print")
    print(completion(PROGRAM, parser.parse_args(argv).shell))


if __name__ == "__main__":
    entry.run(main)
