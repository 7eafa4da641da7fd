"""Reading of a settings file as single settings, with the comments and the spelling of each."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli

from torchtitan.tools.errors import UserError

_HEADER = re.compile(r"\[\s*([\w\s.-]+?)\s*\]\s*(#.*)?")
_ROWS = re.compile(r"\[\[\s*([\w\s.-]+?)\s*\]\]\s*(#.*)?")
_KEY = re.compile(r"\s*([\w-]+(?:\s*\.\s*[\w-]+)*)\s*=(.*)", re.DOTALL)


@dataclass
class Setting:
    """One key.

    key: with its table, training.steps.
    text: the value as the file spells it; None = write it anew.
    above: comment lines before it.
    beside: comment on its line, with #.
    """

    key: str
    value: Any
    text: str | None = None
    above: list[str] = field(default_factory=list)
    beside: str = ""

    @property
    def table(self) -> str:
        return self.key.rpartition(".")[0]

    @property
    def name(self) -> str:
        return self.key.rpartition(".")[2]


@dataclass
class Source:
    """A file.

    headers: comment lines before the header of each table.
    beside: comment on the line of each table's header, with #.
    ending: comment lines after the last setting.
    """

    settings: list[Setting]
    headers: dict[str, list[str]] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)
    ending: list[str] = field(default_factory=list)


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
    source = Source([]) if path.suffix == ".json" else _scan(text)
    known = {each.key: each for each in source.settings}
    # The parser has the last word: what the scan missed or misread is written anew.
    source.settings = [
        known[key] if key in known and known[key].value == value else Setting(key, value)
        for key, value in values.items()
    ]
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
    """Find settings with spelling and comments; keys of [[lists of tables]] are left out."""
    source, table, above = Source([]), "", list[str]()
    lines = iter(text.replace("\r\n", "\n").split("\n"))
    for line in lines:
        stripped = line.strip()
        if stripped.startswith("#"):
            above.append(stripped)
        elif match := _HEADER.fullmatch(stripped):
            table = "".join(match[1].split())
            source.headers.setdefault(table, []).extend(above)
            source.beside |= {table: match[2]} if match[2] else {}
            above = []
        elif _ROWS.fullmatch(stripped):
            table, above = "[]", []
        elif stripped:
            while _value(line) is None and (more := next(lines, None)) is not None:
                line += f"\n{more}"
            source.settings += _setting(line, table, above)
            above = []
    source.ending = above
    return source


def _setting(line: str, table: str, above: list[str]) -> list[Setting]:
    match, values = _KEY.fullmatch(line), _value(line)
    if match is None or not values or table.startswith("[]"):
        return []
    end = next(
        (n for n, c in enumerate(line) if c == "#" and _value(line[:n]) == values), len(line)
    )
    beside = line[end:].rstrip() if "\n" not in line[end:] else ""
    text = line[match.start(2) : end].strip()
    at = f"{table}." if table else ""
    found = flat(values)
    spelled = len(found) == 1 and not text.startswith("{")
    return [
        Setting(at + key, value, text if spelled else None, above if n == 0 else [], beside)
        for n, (key, value) in enumerate(found.items())
    ]


def keep_items(text: str | None, kept: list[str]) -> str | None:
    """Leave the strings of `kept` in the text of an array, one a line with its comments; None (to
    write it anew) without comments."""
    if "#" not in (text or ""):
        return None
    lines, keeps = list[str](), True
    for break_, found in re.findall(r"""(\n\s*)?("[^"\n]*"|'[^'\n]*'|#[^\n]*)""", text or ""):
        if not found.startswith("#"):
            keeps = found[1:-1] in kept
            lines += [f"    {found},"] if keeps else []
        elif break_ or not lines:
            lines.append(f"    {found}")
        elif keeps:
            lines[-1] += f"  {found}"
    return "\n".join(["[", *lines, "]"])


def _value(line: str) -> dict[str, Any] | None:
    try:
        return tomli.loads(line)
    except ValueError:
        return None


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------


def write(source: Source) -> str:
    """Write settings as TOML, by table in the order of the file."""
    tables: dict[str, list[Setting]] = {}
    for setting in source.settings:
        tables.setdefault(setting.table, []).append(setting)
    parts = []
    for table, settings in tables.items():
        plain = [each for each in settings if not _is_rows(each.value)]
        lines, beside = list(source.headers.get(table, [])), source.beside.get(table, "")
        lines += [f"[{table}]  {beside}".rstrip()] if plain else filter(None, [beside])
        for each in plain:
            beside = f"  {each.beside}" if each.beside else ""
            lines += [*each.above, f"{each.name} = {each.text or as_toml(each.value)}{beside}"]
        parts.append("\n".join(lines))
        parts += [_rows(each) for each in settings if _is_rows(each.value)]
    parts += ["\n".join(source.ending)] if source.ending else []
    return "\n\n".join(part for part in parts if part) + "\n"


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _rows(setting: Setting) -> str:
    rows = [
        "\n".join([f"[[{setting.key}]]", *(f"{n} = {as_toml(v)}" for n, v in row.items())])
        for row in setting.value
    ]
    return "\n\n".join(["\n".join([*setting.above, rows[0]]), *rows[1:]])


def as_toml(value: Any) -> str:
    """Write a value in TOML."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_toml, value))}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{name} = {as_toml(v)}' for name, v in value.items())} }}"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
