"""Pages name files, folders and keys that exist; the tree in CONTRIBUTING is the package's."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from tests.pages import PAGES, REPO, blocks, inline_code, paragraphs, prose
from torchtitan.config import ConfigManager
from torchtitan.config.schema import KEYS, TABLES, row_type

PACKAGE = REPO / "torchtitan"
README = REPO / "README.md"
CONTRIBUTING = REPO / "CONTRIBUTING.md"
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

# A path begins with a folder of the repository or of the package, or is the bare name of a file.
_IN_REPO = ("torchtitan", "tests", "scripts", "docs", "train_configs", ".ci")
_IN_PACKAGE = [path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name[0] != "_"]
_PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join([*_IN_REPO, *_IN_PACKAGE])})/[\w./<>*-]*")
_BARE = re.compile(r"[\w.]*\w\.(?:py|toml|sh)")
# Files that a reader makes.
EXAMPLES = {"X.toml", "CONFIG.toml", "OLD.toml", "NEW.toml", "my_text.toml"}
NOT_OF_A_CONFIG = ("section.key", "table.key", "model.layers.")  # the last: Hugging Face's tensors


def is_there(path: str) -> bool:
    return any(next(root.glob(path), None) is not None for root in (REPO, PACKAGE))


@by_page
def test_every_path_exists(page: Path) -> None:
    named = [path for code in inline_code(page) for path in _PATH.findall(code)]
    named = [path.rstrip("./") for path in named if "<" not in path]
    assert [path for path in named if not is_there(path)] == []
    bare = {code for code in inline_code(page) if _BARE.fullmatch(code)} - EXAMPLES
    files = {path.name for top in _IN_REPO for path in (REPO / top).rglob("*")}
    assert bare - files - {path.name for path in REPO.iterdir()} == set()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", prose(page)) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


@by_page
def test_every_key_exists(page: Path) -> None:
    """`table.key` in a span of code, and --table.key anywhere."""
    rows = {
        f"{key}.{field.name}"
        for key, known in KEYS.items()
        if (row := row_type(known.type))
        for field in fields(row)
    }
    known = set(KEYS) | TABLES | rows
    tables = "|".join(sorted({key.partition(".")[0] for key in KEYS}))
    in_code = re.compile(rf"(?<![\w./-])(?:{tables})(?:\.\w+)+(?![\w/(])")
    named = [key for code in inline_code(page) for key in in_code.findall(code)]
    named += re.findall(r"(?<=--)[a-z_]+(?:\.\w+)+", page.read_text())
    wrong = [
        key
        for key in named
        if key not in known
        and not key.startswith(("model.args.", *NOT_OF_A_CONFIG))
        and not re.search(r"\.(py|md|toml|jsonl?|csv|png)$", key)
    ]
    assert wrong == []


@by_page
def test_every_toml_block_is_one_that_a_run_reads(page: Path, tmp_path: Path) -> None:
    for n, block in enumerate(blocks(page, "toml")):
        file = tmp_path / f"{n}.toml"
        file.write_text(block)
        ConfigManager().parse_args([f"--job.config_file={file}"])


def tree() -> list[str]:
    """The paths of the tree in CONTRIBUTING, relative to the repository."""
    (block,) = [text for text in blocks(CONTRIBUTING, "") if text.startswith("torchtitan/")]
    paths, above = [], {}
    for line in block.splitlines():
        depth, name = len(line) - len(line.lstrip()), line.split()[0]
        above = {at: path for at, path in above.items() if at < depth}
        above[depth] = f"{above[max(above)]}{name}" if above else name
        paths.append(above[depth])
    return paths


def test_the_tree_is_that_of_the_package() -> None:
    listed = tree()
    assert [path for path in listed if not (REPO / path).exists()] == []
    folders = {f"{init.parent.relative_to(REPO)}/" for init in PACKAGE.rglob("__init__.py")}
    assert folders - set(listed) == set()


def test_the_reading_list_is_short_and_there() -> None:
    text = prose(CONTRIBUTING)
    start = text.index("tell the story")
    files = re.findall(r"`([\w/]+\.\w+)`", text[start : text.index("\n\n", start)])
    assert len(files) == 12
    assert sum(len((REPO / file).read_text().splitlines()) for file in files) < 2500


def test_where_would_i_change_is_short_and_there() -> None:
    text = prose(CONTRIBUTING)
    section = text[text.index("**Where would I change") :].split("\n\n")[1]
    assert len(section.splitlines()) <= 20
    named = [name for name in re.findall(r"`([\w./]+)`", section) if "/" in name or "." in name]
    named = [name for name in named if name != "__init__.py"]
    assert [name for name in named if not any((r / name).exists() for r in (REPO, PACKAGE))] == []


def test_the_readme_is_read_in_a_minute() -> None:
    assert [lines for lines in paragraphs(README) if len(lines) > 4] == []
    assert max(map(len, README.read_text().splitlines())) <= 160


def test_the_readmes_speeds_are_those_of_the_performance_page() -> None:
    (table,) = [text for text in prose(README).split("\n\n") if text.startswith("| `--preset`")]
    speeds = re.findall(r"\d+,\d{3}|\d+\.\d %", table)
    measured = (REPO / "docs/performance.md").read_text()
    assert len(speeds) == 20 and [speed for speed in speeds if speed not in measured] == []
