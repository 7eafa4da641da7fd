"""Keys of the config and their types: checks nested tables and builds `JobConfig` from them.

A key is written with its table, `training.steps`. Tables are flattened to `{key: value}` while they
are checked; `build` puts the flat form back into the dataclasses.
"""

import dataclasses
import difflib
import functools
import json
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torchtitan.config.job_config import JobConfig
from torchtitan.config.moved_keys import MOVED
from torchtitan.tools.errors import UserError, suggest

# Tables of torchtitan v0.2 that are not supported here, with torchtitan's defaults: a file may
# contain them with these values. (As in torchtitan, [quantize] takes effect through
# model.converters only, so the keys of its tables may have any value.)
ANYTHING = object()
FOREIGN_TABLES: dict[str, dict[str, Any]] = {
    "experimental": {"custom_import": "", "custom_args_module": ""},
    "fault_tolerance": {
        "enable": False,
        "process_group": "gloo",
        "process_group_timeout_ms": 10000,
        "replica_id": 0,
        "group_size": 0,
        "min_replica_size": 1,
    },
    "memory_estimation": {"enable": False, "disable_fake_mode": False},
    "quantize.grouped_mm.mx": {"recipe_name": ANYTHING, "fqns": ANYTHING},
    "quantize.linear.mx": {
        "mxfp8_dim1_cast_kernel_choice": ANYTHING,
        "recipe_name": ANYTHING,
        "filter_fqns": ANYTHING,
    },
}


@dataclasses.dataclass(frozen=True)
class Key:
    """One setting: its type annotation and its default."""

    type: Any
    default: Any


def _walk(table: Any, at: str, keys: dict[str, Key], tables: set[str]) -> None:
    for field in dataclasses.fields(table):
        path = f"{at}.{field.name}" if at else field.name
        default = getattr(table, field.name)
        if dataclasses.is_dataclass(default):
            tables.add(path)
            _walk(default, path, keys, tables)
        else:
            keys[path] = Key(field.type, default)


def _known() -> tuple[dict[str, Key], frozenset[str]]:
    keys: dict[str, Key] = {}
    tables: set[str] = set()
    _walk(JobConfig(), "", keys, tables)
    return keys, frozenset(tables)


KEYS, TABLES = _known()


# ---------------------------------------------------------------------------------------------
# Types in words
# ---------------------------------------------------------------------------------------------


def alternatives(kind: Any) -> tuple[Any, ...]:
    """List the members of a union without None; of any other type, the type itself."""
    members = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return tuple(member for member in members if member is not types.NoneType)


def matches(value: Any, kind: Any) -> bool:
    """Tell whether a TOML or JSON value is of the annotated type; an integer may be a float."""
    if get_origin(kind) in (Union, types.UnionType):
        return any(matches(value, member) for member in get_args(kind))
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if row_type(kind) is not None:
        return isinstance(value, list) and all(isinstance(row, dict) for row in value)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(matches(item, *get_args(kind)) for item in value)
    if get_origin(kind) is dict:
        is_item = functools.partial(matches, kind=float) if kind == dict[str, float] else _is_plain
        return isinstance(value, dict) and all(is_item(item) for item in value.values())
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind  # not isinstance, for which True is an integer


def row_type(kind: Any) -> type | None:
    """Return the dataclass of a key that holds a list of tables, [[table.key]]; else None."""
    inner = get_args(kind)[0] if get_origin(kind) is list else None
    return inner if isinstance(inner, type) and dataclasses.is_dataclass(inner) else None


def _is_plain(value: Any) -> bool:
    """Tell whether a value is of numbers, strings, booleans, None, lists and tables: no dates."""
    if isinstance(value, dict):
        return all(_is_plain(item) for item in value.values())
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    return value is None or type(value) in (str, int, float, bool)


def describe(kind: Any) -> str:
    """Describe a type in words: "a string", "true or false", "a list of tables"."""
    if row_type(kind) is not None:
        return "a list of tables"
    words = {
        str: "a string",
        int: "an integer",
        float: "a number",
        bool: "true or false",
        list[str]: "a list of strings",
        list[list[str]]: "a list of lists of strings",
        dict[str, float]: "a table of numbers",
        dict[str, Any]: "a table of numbers, strings, booleans and lists",
    }
    return " or ".join(words[member] for member in alternatives(kind))


def _example(key: Key) -> str:
    if (row := row_type(key.type)) is not None:
        hints = get_type_hints(row)
        needed = [f.name for f in dataclasses.fields(row) if f.default is dataclasses.MISSING]
        values = {n: "1000" if hints[n] is float else _example(Key(hints[n], None)) for n in needed}
        return f"[{{ {', '.join(f'{name} = {value}' for name, value in values.items())} }}]"
    if key.default not in (None, "", [], {}):
        return as_text(key.default)
    by_type = {
        str: '"name"',
        int: "1",
        float: "0.5",
        list[str]: '["name"]',
        list[list[str]]: '[["tok_embeddings", "layers.0"], ["layers.1", "norm", "output"]]',
        dict[str, float]: "{ web = 0.7, code = 0.3 }",
        dict[str, Any]: "{ n_layers = 8 }",
    }
    return by_type[alternatives(key.type)[0]]


def requirement(path: str, value: Any) -> str:
    """End of a sentence about a wrong value: `must be an integer, for example 10000.`"""
    return _requirement(KEYS[path], value)


def _requirement(key: Key, value: Any) -> str:
    first = alternatives(key.type)[0]
    if get_origin(first) is Literal:
        return f"must be {_either(_nearest_first(str(value), get_args(first)))}."
    if first is bool:
        return "must be true or false."
    return f"must be {describe(key.type)}, for example {_example(key)}."


def _nearest_first(value: str, choices: tuple[str, ...]) -> list[str]:
    value = value[:100]  # the comparison takes the product of both lengths

    def distance(choice: str) -> float:
        return -difflib.SequenceMatcher(None, value.lower(), choice.lower()).ratio()

    return sorted(choices, key=distance)


def _either(choices: list[str]) -> str:
    quoted = [as_text(choice) for choice in choices]
    return " or ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)


def as_text(value: Any) -> str:
    """Write a value as in a TOML file, cut where it is long."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


# ---------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------


def unknown(path: str, *, is_table: bool = False) -> str:
    """End of a sentence about an unknown key (or table), with a hint at the right one."""
    parts = path.split(".", 16)  # the rest is one name: no table is nested as deep
    prefixes = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
    for prefix in prefixes:
        if prefix in FOREIGN_TABLES:
            return f"[{prefix}] is a table of torchtitan that is not supported here; remove it."
        if prefix in KEYS:
            return f"{prefix} is a key, not a table; it {requirement(prefix, path)}"
    if path in TABLES:
        first = next(key for key in KEYS if key.startswith(path + "."))
        return f"[{path}] is a table, not a key; name one of its keys, such as {first}."
    known = [prefix for prefix in prefixes if prefix in TABLES]
    table, name = (known[-1] if known else ""), parts[len(known)]
    is_key = len(known) == len(parts) - 1 and not is_table
    homes = [f"[{key.rpartition('.')[0]}]" for key in KEYS if key.rpartition(".")[2] == name]
    if is_key and homes:
        where = f"[{table}]" if table else "the top level"
        return f"'{name}' is not a key of {where}; it belongs to {' or '.join(homes)}."
    if path in MOVED:
        return (
            f"{path} is {MOVED[path]} here; python scripts/from_torchtitan.py translates a whole "
            "file of torchtitan."
        )
    tables, keys = _children(table, TABLES), _children(table, KEYS)
    inside = f" in [{table}]" if table else ""
    if is_key and table:
        return f"unknown key '{name}'{inside}{suggest(name, keys or tables)}"
    return f"unknown table [{name}]{inside}{suggest(name, tables or keys)}"


def _children(table: str, paths: Any) -> list[str]:
    """List the names directly below a table ("" is the top)."""
    split = (path.rpartition(".") for path in paths)
    return [name for parent, _, name in split if parent == table]


# ---------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------


def flatten(table: dict[str, Any], *, source: str, at: str = "") -> dict[str, Any]:
    """Flatten nested tables to `{'training.steps': 10, ...}`. Raises UserError for a wrong key.

    Integers become floats where the key is a float.

    source: names the file in messages.
    at: table in which `table` is nested; "" = the top.
    """
    flat: dict[str, Any] = {}
    for name, value in table.items():
        path = f"{at}.{name}" if at else name
        if "." in name:
            raise UserError(
                f"{source}: the quoted name {as_text(name)} holds a dot; write a key below its "
                "[table], without quotes."
            )
        if path in TABLES:
            if not isinstance(value, dict):
                shown = as_text(value)
                raise UserError(f"{source}: {path} = {shown} must be a table, written [{path}].")
            flat |= flatten(value, source=source, at=path)
        elif path in KEYS:
            flat[path] = _checked(path, value, source)
        elif path in FOREIGN_TABLES and _asks_for_nothing(FOREIGN_TABLES[path], value):
            continue
        else:
            raise UserError(f"{source}: {unknown(path, is_table=isinstance(value, dict))}")
    return flat


def _asks_for_nothing(defaults: dict[str, Any], table: Any) -> bool:
    return isinstance(table, dict) and all(
        name in defaults and defaults[name] in (ANYTHING, value) for name, value in table.items()
    )


def _checked(path: str, value: Any, source: str) -> Any:
    kind = KEYS[path].type
    if not matches(value, kind):
        raise UserError(f"{source}: {path} = {as_text(value)} {requirement(path, value)}")
    if (row := row_type(kind)) is not None:
        return [
            make_row(row, table, f"{source}: {path} {n}") for n, table in enumerate(value, start=1)
        ]
    return as_float(value, kind)


def as_float(value: Any, kind: Any) -> Any:
    """Convert an integer to a float where the annotation is one; return any other value unchanged.

    An integer too large for a float is unchanged, too: rules/numbers.py refuses it then.
    """
    if float not in alternatives(kind) or type(value) is not int:
        return value
    try:
        return float(value)
    except OverflowError:
        return value


def make_row(row: type, table: dict[str, Any], where: str) -> Any:
    """Convert one table of a list to its dataclass.

    where: names the table in messages: "x.toml: a.b 2".
    """
    for mistake in row_mistakes(row, table, where):
        raise UserError(mistake)
    kinds = get_type_hints(row)
    return row(**{name: as_float(value, kinds[name]) for name, value in table.items()})


def row_mistakes(row: type, table: dict[str, Any], where: str) -> Iterator[str]:
    """Yield a sentence for each wrong key of a table that `make_row` can't convert."""
    hints = get_type_hints(row)
    kinds = {field.name: hints[field.name] for field in dataclasses.fields(row)}
    for name, value in table.items():
        if name not in kinds:
            yield f"{where}: unknown key '{name}'{suggest(name, kinds)}"
        elif not matches(value, kinds[name]):
            key = Key(kinds[name], None)
            yield f"{where}: {name} = {as_text(value)} {_requirement(key, value)}"
    for field in dataclasses.fields(row):
        if field.name not in table and field.default is dataclasses.MISSING:
            yield f"{where}: {field.name} is missing; each of these tables needs it."


def build(flat: dict[str, Any]) -> JobConfig:
    """Build the config in which these keys have these values and all others their defaults."""
    return _filled(JobConfig(), flat, "")


def _filled(table: Any, flat: dict[str, Any], at: str) -> Any:
    changes = {}
    for field in dataclasses.fields(table):
        path = f"{at}.{field.name}" if at else field.name
        if path in TABLES:
            changes[field.name] = _filled(getattr(table, field.name), flat, path)
        elif path in flat:
            changes[field.name] = flat[path]
    return dataclasses.replace(table, **changes)


# ---------------------------------------------------------------------------------------------
# All settings of a config
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Entry:
    """A setting with its value.

    key: such as "schedule.phase.lr", in every phase.
    title: name in messages, such as "schedule.phase 1: lr".
    type: annotation.
    """

    key: str
    title: str
    type: Any
    value: Any


def entries(config: JobConfig) -> Iterator[Entry]:
    """Yield every setting, also those in lists of tables, and the numbers in tables of numbers."""
    for key, known in KEYS.items():
        value = value_of(config, key)
        row = row_type(known.type)
        if row is None:
            yield Entry(key, key, known.type, value)
            continue
        hints = get_type_hints(row) if value else {}
        for n, table in enumerate(value, start=1):
            for name, kind in hints.items():
                item = getattr(table, name)
                entry = Entry(f"{key}.{name}", f"{key} {n}: {name}", kind, item)
                yield entry
                if dict[str, float] in alternatives(kind):
                    yield from _numbers_of(entry)


def _numbers_of(entry: Entry) -> Iterator[Entry]:
    for name, number in (entry.value or {}).items():
        yield Entry(entry.key, f"{entry.title}.{name}", float, number)


def replace_entries(config: JobConfig, values: Mapping[str, Any]) -> JobConfig:
    """Replace settings.

    values: by title.
    """
    flat = {}
    for key, known in KEYS.items():
        value = value_of(config, key)
        if (row := row_type(known.type)) is not None:
            names = [field.name for field in dataclasses.fields(row)]
            value = [
                dataclasses.replace(
                    table,
                    **{x: values[t] for x in names if (t := f"{key} {n}: {x}") in values},
                )
                for n, table in enumerate(value, start=1)
            ]
        flat[key] = values.get(key, value)
    return build(flat)


def value_of(config: JobConfig, key: str) -> Any:
    """Return the value of `section.key`."""
    return functools.reduce(getattr, key.split("."), config)
