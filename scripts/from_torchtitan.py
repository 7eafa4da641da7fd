"""Translate a settings file of torchtitan v0.1, v0.2 or v0.3 into one of ours.

    python scripts/from_torchtitan.py OLD.toml -o NEW.toml

The translation goes to the standard output, or to -o FILE; keys that moved, are left out or mean
something else go to the standard error, a line each. v0.3 has no TOML: give the JSON that it saves
with its debug.save_config_file. What differs: docs/from_torchtitan.md.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripts import entry


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=entry.about(__doc__))
    parser.add_argument("old", type=Path, metavar="OLD.toml", help="of torchtitan; or v0.3's .json")
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help="default: standard output")
    return parser.parse_args(argv)


if __name__ == "__main__":
    entry.check_first(parse, "old")

# isort: split
import tomli

from scripts.torchtitan_files.read import read, write
from scripts.torchtitan_files.translate import Translation, translate
from torchtitan.config.schema import flatten
from torchtitan.tools.errors import UserError, some
from torchtitan.tools.script import run_script


def tell(done: Translation) -> None:
    for old, new in done.moved.items():
        print(f"moved     {old} -> {new}", file=sys.stderr)
    for reason, keys in done.left_out.items():
        print(f"left out  {some(keys, ', ')}: {reason}", file=sys.stderr)
    for note in done.notes:
        print(f"differs   {note}", file=sys.stderr)


def run(args: argparse.Namespace) -> None:
    done = translate(read(args.old))
    if done.refused:
        for sentence in done.refused[:-1]:
            print(f"{args.old}: {sentence}", file=sys.stderr)
        raise UserError(f"{args.old}: {done.refused[-1]}")
    text = write(done.source)
    flatten(tomli.loads(text), source=str(args.out or args.old))  # our own reader takes it
    tell(done)
    if args.out is None:
        print(text, end="")
        return
    try:
        args.out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"-o {args.out} can't be written ({error.strerror}).") from None
    check = f"python -m torchtitan.train --job.config_file {args.out} --job.check_config"
    print(f"written   {args.out}; check it with `{check}`", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return run_script(lambda: run(args))


if __name__ == "__main__":
    entry.run(main)
