"""Write docs/code_index.md: the files that read each key, and each file with its first line.

    python scripts/write_code_index.py

The page comes from the source. A test fails where it is stale.
"""

import argparse
import ast
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripts import entry

# isort: split
from torchtitan.config.schema import KEYS

PAGE = entry.REPO / "docs/code_index.md"
PACKAGE = entry.REPO / "torchtitan"
HEAD = """\
# Index of keys and files

Written by `python scripts/write_code_index.py` from the source; do not edit it. What a key means:
[config.md](config.md). Reading order, tree, where to change what:
[CONTRIBUTING.md](../CONTRIBUTING.md).

## Keys

The files of `torchtitan/` that name a key, in code or in a sentence, as `table.key` or, where no
other table has a key of that name, as `.key`; its definition in `config/` is left out. A key
without a file is read through a whole table, or only with another one ([config.md](config.md)).
"""
# They define keys.
DEFINITIONS = re.compile(r"config/(job_config|\w+_tables)\.py")


def sources(root: Path) -> list[Path]:
    return [path for path in sorted(root.rglob("*.py")) if "__pycache__" not in path.parts]


def readers() -> dict[str, list[str]]:
    """Find the files of the package that name each key, by key: `training.seq_len`, or `.seq_len`
    where no other table has a key of that name."""
    counts = Counter(key.rpartition(".")[2] for key in KEYS)
    alone = [key for key in KEYS if "_" in key.rpartition(".")[2]]
    alone = {name: key for key in alone if counts[name := key.rpartition(".")[2]] == 1}
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, KEYS))})\b|\.({'|'.join(alone)})\b")
    found = defaultdict(set)
    for path in sources(PACKAGE):
        name = str(path.relative_to(PACKAGE))
        if not DEFINITIONS.fullmatch(name):
            for key, own_name in pattern.findall(path.read_text()):
                found[key or alone[own_name]].add(name)
    return {key: sorted(found[key]) for key in KEYS}


def first_line(path: Path) -> str:
    """Return the first line of a file's docstring, or of a shell script's comment."""
    text = path.read_text()
    if path.suffix == ".sh":
        return text.splitlines()[1].removeprefix("# ")
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


def rows() -> Iterator[str]:
    """Yield the page's lines on keys, then on files by folder."""
    yield from ("", "| key | files |", "|---|---|")
    for key, files in readers().items():
        yield f"| `{key}` | {', '.join(f'`{file}`' for file in files)} |".replace("|  |", "| |")
    yield from ("", "## Files")
    roots = (PACKAGE, entry.REPO / "scripts", entry.REPO / "tests")
    for folder in sorted({path.parent for root in roots for path in sources(root)}):
        files = [path for path in sorted(folder.glob("*.py")) if first_line(path)]
        if files:
            yield from ("", f"### {folder.relative_to(entry.REPO)}/", "")
        for path in files:
            yield f"- `{path.name}`: {first_line(path)}"


def page() -> str:
    return "\n".join([HEAD.strip(), *rows()]) + "\n"


def main() -> None:
    argparse.ArgumentParser(description=entry.about(__doc__)).parse_args()
    PAGE.write_text(page())


if __name__ == "__main__":
    entry.run(main)
