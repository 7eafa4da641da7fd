"""Write docs/config.md: every key of a config with its type, default and sentence.

    python scripts/write_config_docs.py

The page comes from the dataclasses of the config, as `--help` does; a test fails where it is stale.
"""

import argparse
import ast
import dataclasses
import inspect
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripts import entry


def parse(argv: list[str] | None) -> argparse.Namespace:
    return argparse.ArgumentParser(description=entry.about(__doc__)).parse_args(argv)


if __name__ == "__main__":
    entry.check_first(parse)

# isort: split
from torchtitan.config import JobConfig
from torchtitan.config.schema import alternatives, as_text, describe, row_type
from torchtitan.models.deepseek_v3 import DeepSeekV3ModelArgs
from torchtitan.models.moe import MoEArgs
from torchtitan.models.qwen3 import Qwen3ModelArgs

PAGE = entry.REPO / "docs/config.md"
HEAD = """\
# Every key of a config

Written by `python scripts/write_config_docs.py` from the dataclasses in `torchtitan/config/` and
those of the models' arguments; do not edit it. Each heading is a table of the TOML file. On the
command line a key is `--table.key value`, which overrides the file; a list of tables is written
there as TOML's inline tables. Names, types and defaults are torchtitan v0.2's, except for keys
marked (ours). Rules beyond the type of a key are checked before the run starts
(`torchtitan/config/rules/`).
"""
MODEL_HEAD = """\
Overrides of the flavor's arguments, such as `--model.args.n_layers 8`. A flavor sets values of its
own; the defaults here are those of the class. The docstring of the class follows each table.
"""
ARGUMENTS = {
    '[model.args] with model.name = "deepseek_v3"': DeepSeekV3ModelArgs,
    '[model.args] with model.name = "qwen3"': Qwen3ModelArgs,
    "[model.args.moe_args]": MoEArgs,
}


def sentences(table: type) -> dict[str, str]:
    """Collect the string below each field of a dataclass, by field."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(table))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            if isinstance(below.value, ast.Constant):
                found[ast.unparse(field.target)] = str(below.value.value)
    return found


def type_of(kind: Any) -> str:
    """Describe a type in words, without article; choices between backquotes."""
    first = alternatives(kind)[0]
    if get_origin(first) is Literal:
        return ", ".join(f"`{as_text(choice)}`" for choice in get_args(first))
    return describe(kind).removeprefix("an ").removeprefix("a ")


def default_of(field: dataclasses.Field) -> str:
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING:
        return "must be set"
    return "unset" if value is None else f"`{as_text(value)}`"


def rows(table: type, meaning: dict[str, str] | None) -> Iterator[str]:
    """Yield the lines of a Markdown table of a dataclass's keys.

    meaning: the sentence on each key; None = no column for it.
    """
    yield "| key | type | default |" + " meaning |" * bool(meaning)
    yield "|---|---|---|" + "---|" * bool(meaning)
    hints = get_type_hints(table)
    for field in dataclasses.fields(table):
        if dataclasses.is_dataclass(hints[field.name]):
            continue
        cells = [f"`{field.name}`", type_of(hints[field.name]), default_of(field)]
        cells += [meaning[field.name]] if meaning else []
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def section(table: type, name: str) -> Iterator[str]:
    """Yield the keys of a TOML table, then its lists of tables, then the tables inside of it."""
    hints = get_type_hints(table)
    names = [field.name for field in dataclasses.fields(table)]
    inner = [key for key in names if dataclasses.is_dataclass(hints[key])]
    if len(inner) < len(names):
        yield from ("", f"## [{name}]", "", inspect.cleandoc(table.__doc__ or ""), "")
        yield from rows(table, sentences(table))
    for key in names:
        if row := row_type(hints[key]):
            yield from ("", f"### [[{name}.{key}]]", "", inspect.cleandoc(row.__doc__ or ""), "")
            yield from rows(row, sentences(row))
    for key in inner:
        yield from section(hints[key], f"{name}.{key}" if name else key)


def docstring(args: type) -> list[str]:
    return ["", f"`{args.__name__}`:", "", "```text", inspect.cleandoc(args.__doc__ or ""), "```"]


def model_section() -> Iterator[str]:
    """Yield the model arguments, which the docstrings of their classes explain."""
    yield from ("", "## [model.args]", "", MODEL_HEAD.strip())
    for title, args in ARGUMENTS.items():
        yield from ("", f"### {title}", "", *rows(args, None), *docstring(args))
    yield from ("", "### All families")
    for shared in next(iter(ARGUMENTS.values())).__mro__[1:-1]:
        yield from docstring(shared)


def page() -> str:
    lines = [HEAD.strip(), *section(JobConfig, ""), *model_section()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parse(None)
    PAGE.write_text(page())


if __name__ == "__main__":
    entry.run(main)
