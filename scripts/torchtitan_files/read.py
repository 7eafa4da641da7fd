"""Reading of a settings file as single lines, so that those that stay are written as they were."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tomli

from torchtitan.config.schema import TABLES
from torchtitan.tools.errors import UserError

_KEY = re.compile(r"(\s*)([\w-]+(?:\s*\.\s*[\w-]+)*)(\s*=\s*)")
_ITEM = re.compile(r"""("[^"]*"|'[^']*')\s*,?[ \t]*|#.*""")


@dataclass
class Setting:
    """One key.

    key: with its table, training.steps.
    text: the value as the file spells it; None = write it anew.
    above: comments and empty lines that belong to it.
    spaces: before the name, and from there to the value.
    beside: the rest of its line, with the spaces before the comment.
    as_tables: whether `text` is all lines from the first [[key]] on.
    """

    key: str
    value: Any
    text: str | None = None
    above: list[str] = field(default_factory=list)
    spaces: tuple[str, str] = ("", " = ")
    beside: str = ""
    as_tables: bool = False

    @property
    def table(self) -> str:
        return self.key.rpartition(".")[0]

    @property
    def name(self) -> str:
        return self.key.rpartition(".")[2]

    @property
    def section(self) -> str:
        """Name of what its header begins: the table, or its own [[tables]]."""
        return f"[{self.key}]" if self.as_tables else self.table

    def lines(self) -> list[str]:
        if self.as_tables and self.text is not None:
            return [*self.above, self.text]
        text = as_toml(self.value) if self.text is None else self.text
        before, between = self.spaces
        return [*self.above, f"{before}{self.name}{between}{text}{self.beside}"]


@dataclass
class Header:
    """The header of a table.

    text: as the file spells it; None = write it anew.
    above: comments and empty lines before it.
    beside: the rest of its line, with the spaces before the comment.
    """

    section: str
    text: str | None = None
    above: list[str] = field(default_factory=list)
    beside: str = ""

    def lines(self) -> list[str]:
        return [*self.above, (self.text or f"[{self.section}]") + self.beside]


@dataclass
class Remark:
    """Comments and empty lines in a table that belong to no key: an empty line follows."""

    section: str
    above: list[str]

    def lines(self) -> list[str]:
        return self.above


Item = Setting | Header | Remark


@dataclass
class Source:
    """A file.

    items: in its order.
    ending: lines after the last setting.
    """

    items: list[Item]
    ending: list[str] = field(default_factory=list)

    @property
    def settings(self) -> list[Setting]:
        return [each for each in self.items if isinstance(each, Setting)]


def read(path: Path) -> Source:
    """Read a TOML file, or the JSON that torchtitan v0.3 saves. Raises `UserError`."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text) if path.suffix == ".json" else tomli.loads(text)
        if not isinstance(content, dict):
            raise ValueError("it holds no tables")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read ({error}); name torchtitan's settings.") from None
    values = flat(content)
    source = Source([]) if path.suffix == ".json" else _scan(text.replace("\r\n", "\n"))
    # The parser has the last word: what the scan missed or misread is written anew.
    known = {each.key for each in source.settings if (each.key, each.value) in values.items()}
    source.items = [
        each for each in source.items if not isinstance(each, Setting) or each.key in known
    ]
    source.items += [Setting(key, value) for key, value in values.items() if key not in known]
    return source


def flat(table: dict[str, Any], at: str = "") -> dict[str, Any]:
    """Flatten nested tables to {"training.steps": 10}."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, dict):
            found |= flat(value, f"{at}{name}.")
        else:
            found[at + name] = value
    return found


def _scan(text: str) -> Source:
    """Split a file into its items."""
    source, table, of_rows, above = Source([]), "", False, list[str]()
    tables: dict[str, Setting] = {}
    lines = iter(text.split("\n"))
    for line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            above.append(line)
            continue
        while _value(line) is None and (more := next(lines, None)) is not None:
            line += f"\n{more}"
        if is_header := line.lstrip().startswith("["):
            table, of_rows = _header_name(line)
        rows = next((r for key, r in tables.items() if f"{table}.".startswith(f"{key}.")), None)
        if rows is not None:
            rows.text = "\n".join([rows.text or "", *above, line])
        elif is_header and of_rows:
            tables[table] = Setting(table, None, line, above, as_tables=True)
            source.items.append(tables[table])
        elif is_header:
            spelled, beside = _beside(line)
            source.items.append(Header(table, spelled, above, beside))
        else:
            source.items += _settings(line, table, above)
        above = []
    source.ending = above
    for key, rows in tables.items():
        rows.value = flat(_value(rows.text or "") or {}).get(key)
    return source


def _header_name(line: str) -> tuple[str, bool]:
    """Return the name in [name] or [[name]], and whether it is the second."""
    names, inner = list[str](), _value(line)
    while isinstance(inner, dict) and inner:
        ((name, inner),) = inner.items()
        names.append(name)
    return ".".join(names), isinstance(inner, list)


def _settings(line: str, table: str, above: list[str]) -> list[Item]:
    """Return the keys of one statement, of which there are several in an inline table."""
    match = _KEY.match(line)
    if match is None:  # a name in quotes
        return [Remark(table, above)]
    kept, own = _split(above)
    spelled, beside = _beside(line)
    at, found = f"{table}." if table else "", flat(_value(line) or {})
    result: list[Item] = [Remark(table, kept)] if kept else []
    for n, (key, value) in enumerate(found.items()):
        setting = Setting(at + key, value, above=[] if n else own)
        if len(found) == 1 and not (text := spelled[match.end() :]).startswith("{"):
            spaces = (match[1], match[3])
            setting = replace(setting, text=text, spaces=spaces, beside=beside)
        result.append(setting)
    return result


def _split(above: list[str]) -> tuple[list[str], list[str]]:
    """Split lines into those that stand alone and those of the next line: its comments, and the
    empty lines before them."""
    own = len(above)
    while own and above[own - 1].strip():
        own -= 1
    while own and not above[own - 1].strip():
        own -= 1
    return above[:own], above[own:]


def _beside(line: str) -> tuple[str, str]:
    """Split a statement into itself and what follows it: spaces and a comment."""
    marks = (n for n, c in enumerate(line) if c == "#" and _value(line[:n]) == _value(line))
    spelled = line[: next(marks, len(line))].rstrip()
    return spelled, line[len(spelled) :]


def _value(line: str) -> dict[str, Any] | None:
    try:
        return tomli.loads(line)
    except ValueError:
        return None


def keep_items(text: str | None, kept: list[str]) -> str | None:
    """Leave the strings of `kept` in the text of an array; None (to write it anew) if that fails.

    A line that has no string any more goes with its comment.
    """
    lines = list[str]()
    for line in (text or "").split("\n"):
        left = _ITEM.sub(lambda m: m[0] if not m[1] or m[1][1:-1] in kept else "", line)
        if left == line or re.search(r"""["'\[\]]""", left.partition("#")[0]):
            lines.append(left)
    joined = re.sub(r",[ \t]*\]$", "]", "\n".join(lines))
    return joined if _value(f"items = {joined}") == {"items": kept} else None


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------


def write(source: Source) -> str:
    """Write a file: sections at the place of their headers, new ones where their first key was."""
    sections: dict[str, list[Item]] = {"": []}
    for item in source.items:
        sections.setdefault(item.section, []).append(item)
    places = {each.section: n for n, each in enumerate(source.items) if isinstance(each, Header)}
    first = {each.section: n for n, each in reversed([*enumerate(source.items)])}
    order = sorted(sections, key=lambda name: places.get(name, first.get(name, 0)) if name else -1)
    lines = [line for name in order for line in _section(name, sections[name])]
    return "\n".join([*lines, *source.ending]).strip("\n") + "\n"


def _section(name: str, items: Sequence[Item]) -> list[str]:
    headers = [each for each in items if isinstance(each, Header)]
    rest = [line for each in items if not isinstance(each, Header) for line in each.lines()]
    is_used = any(isinstance(each, Setting) for each in items) or name in TABLES
    if not is_used:
        return [line for each in headers for line in _split(each.above)[0]] + rest
    if not name or name.startswith("["):
        return rest
    first, *others = headers or [Header(name, above=[""])]
    merged = [line for each in others for line in [*each.above, each.beside.strip()] if line]
    return [*first.lines(), *merged, *rest]


def as_toml(value: Any) -> str:
    """Write a value in TOML."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_toml, value))}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{name} = {as_toml(v)}' for name, v in value.items())} }}"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
