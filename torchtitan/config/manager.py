"""From a TOML file and a command line to one frozen `JobConfig`: command line > file > defaults.

`tyro` turns the text of options into values and prints `--help`. Names are checked before it sees
them, and what it refuses is said again in one sentence (`UserError`), the same as for the file.
"""

import contextlib
import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any

import tomli
import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from torchtitan.config.job_config import JobConfig
from torchtitan.config.schema import (
    KEYS,
    alternatives,
    build,
    flatten,
    make_row,
    matches,
    requirement,
    row_type,
)
from torchtitan.config.schema import unknown as unknown_key
from torchtitan.tools.errors import UserError, suggest

_MODEL_ARGS = "model.args"
_ABOUT = (
    "Train a DeepSeek-V3-like mixture-of-experts model. Each option is a key of the TOML file "
    "named by --job.config_file, and wins over it. "
    'Lists are written a,b or \'["a", "b"]\'; switches --table.key, --table.no_key or '
    "--table.key=false."
)


class ConfigManager:
    """Reads the settings of a run."""

    def parse_args(self, argv: list[str] | None = None) -> JobConfig:
        """The config for these options (default: those of this process).

        Raises UserError for the first mistake; `--help` prints all keys and exits with code 0.
        """
        argv = sys.argv[1:] if argv is None else argv
        if "-h" in argv or "--help" in argv:
            _run_tyro(["--help"], JobConfig())
        options = _read_options(argv)
        flat: dict[str, Any] = {}
        if (file := options.pop("job.config_file", None)) is not None:
            flat = read_config_file(file)
            flat["job.config_file"] = file
        model_args = flat.get(_MODEL_ARGS, {})
        for path in [path for path in options if _is_model_arg(path)]:
            model_args = deep_merge(model_args, _model_arg(path, options.pop(path)))
        flat[_MODEL_ARGS] = model_args
        return _apply_options(options, build(flat))


# ---------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------


def read_config_file(file: str) -> dict[str, Any]:
    """A TOML file as checked `{'training.steps': 10, ...}`; also the JSON file that a run saved."""
    path = Path(file)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        near = suggest(path.name, [p.name for p in path.parent.glob("*.toml")])
        raise UserError(f"job.config_file {file} does not exist{near}") from None
    except OSError as error:
        raise UserError(
            f"job.config_file {file} cannot be read ({error.strerror}); name a readable TOML file."
        ) from None
    try:
        text = raw.decode("utf-8-sig")  # some Windows editors put a byte-order mark in front
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"{file} is not UTF-8 text (at line {line}), which TOML requires; save it as UTF-8."
        ) from None
    language, parse = ("JSON", json.loads) if path.suffix == ".json" else ("TOML", tomli.loads)
    try:
        table = parse(text)
    except ValueError as error:  # both parsers say the line
        raise UserError(f"{file} is not valid {language}: {error}.") from None
    if not isinstance(table, dict):
        raise UserError(f"{file} must hold a JSON object with one entry per table.")
    return flatten(table, source=file)


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------


def _read_options(argv: list[str]) -> dict[str, str | bool]:
    """Options as {key: text}, switches as {key: bool}; the last of two equal keys wins."""
    options: dict[str, str | bool] = {}
    position = 0
    while position < len(argv):
        token = argv[position]
        if not token.startswith("--"):
            raise UserError(
                f"command line: '{token}' is not an option; options look like --training.steps 100."
            )
        name, has_value, value = token[2:].partition("=")
        values = [value] if has_value else []
        position += 1
        while position < len(argv) and not argv[position].startswith("--"):
            values.append(argv[position])
            position += 1
        path, negated = _option_path(name)
        options[path] = _option_value(path, negated, values)
    return options


def _is_model_arg(path: str) -> bool:
    return path == _MODEL_ARGS or path.startswith(_MODEL_ARGS + ".")


def _option_path(name: str) -> tuple[str, bool]:
    """The key that an option names, and whether it is switched off: `--metrics.no_enable_...`."""
    path = name.replace("-", "_")
    if path in KEYS or _is_model_arg(path):
        return path, False
    table, _, key = path.rpartition(".")
    positive = f"{table}.{key.removeprefix('no_')}"
    if key.startswith("no_") and positive in KEYS and KEYS[positive].type is bool:
        return positive, True
    raise UserError(f"command line: --{name}: {unknown_key(path)}")


def _option_value(path: str, negated: bool, values: list[str]) -> str | bool:
    shown = f"command line: {' '.join([f'--{path}', *values])}"
    if not _is_model_arg(path):
        kind = KEYS[path].type
        if kind is bool:
            switch = {"true": True, "false": False}.get(" ".join(values or ["true"]).lower())
            if switch is None or (negated and values):
                raise UserError(f"{shown} {requirement(path, values)}")
            return switch and not negated
        if list[str] in alternatives(kind):
            return ",".join(values)
        if values and matches(tables := parse_value(values[0]), kind) and row_type(kind):
            _rows(kind, tables, f"command line: --{path}")  # says what is wrong inside a table
    if not values:
        raise UserError(f"{shown} needs a value, as in --{path}=VALUE.")
    if len(values) > 1:
        raise UserError(
            f"{shown} takes one value, not {len(values)}; put quotes around a value with spaces."
        )
    return values[0]


def _apply_options(options: dict[str, str | bool], default: JobConfig) -> JobConfig:
    args = {path: _tyro_option(path, value) for path, value in options.items()}
    config = _run_tyro(list(args.values()), default)
    if config is not None:
        return config
    # tyro does not say in data which option it refused, so each is tried on its own.
    wrong = next(path for path, arg in args.items() if _run_tyro([arg], default) is None)
    raise UserError(
        f"command line: --{wrong} {options[wrong]} {requirement(wrong, options[wrong])}"
    )


def _tyro_option(path: str, value: str | bool) -> str:
    if isinstance(value, bool):
        table, _, key = path.rpartition(".")
        return f"--{path}" if value else f"--{table}.no_{key}"
    return f"--{path}={value}"


def _run_tyro(args: list[str], default: JobConfig) -> JobConfig | None:
    """The config, or None where tyro refuses; leaves through SystemExit after `--help`."""
    wants_help = args == ["--help"]
    # console_outputs alone leaves some of tyro's error boxes on the screen (1.0.17).
    silence = contextlib.nullcontext() if wants_help else contextlib.redirect_stderr(io.StringIO())
    try:
        with silence:
            return tyro.cli(
                JobConfig,
                prog="python -m torchtitan.train",
                description=_ABOUT,
                args=args,
                default=default,
                use_underscores=True,
                console_outputs=wants_help,
                registry=_REGISTRY,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        return None


_REGISTRY = ConstructorRegistry()


@_REGISTRY.primitive_rule
def _lists_and_tables(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """tyro's rule for lists (`a,b` as in torchtitan, or a TOML array) and for tables."""
    kinds = alternatives(info.type)
    if not {list[str], list[list[str]], dict[str, Any]} & set(kinds):
        return None

    def parse(texts: list[str]) -> Any:
        text = texts[0].strip()
        if text.startswith("[") or list[str] not in kinds:
            value = parse_value(text)
        else:
            value = [word.strip() for word in text.split(",") if word.strip()]
        if not matches(value, info.type):
            raise ValueError(text)
        return value

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="TABLE" if dict[str, Any] in kinds else "LIST",
        instance_from_str=parse,
        is_instance=lambda value: matches(value, info.type),
        str_from_instance=lambda value: ["None" if value is None else json.dumps(value)],
    )


@_REGISTRY.primitive_rule
def _lists_of_tables(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """[[table.key]] on the command line: a TOML array of inline tables."""
    if row_type(info.type) is None:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="TABLES",
        instance_from_str=lambda texts: _rows(info.type, parse_value(texts[0]), ""),
        is_instance=lambda value: isinstance(value, list),
        str_from_instance=lambda rows: [json.dumps([dataclasses.asdict(row) for row in rows])],
    )


def _rows(kind: Any, tables: Any, where: str) -> list[Any]:
    if not matches(tables, kind):
        raise ValueError(str(tables))
    rows = enumerate(tables, start=1)
    return [make_row(row_type(kind), table, f"{where} {n}") for n, table in rows]


# ---------------------------------------------------------------------------------------------
# Model arguments
# ---------------------------------------------------------------------------------------------


def parse_value(text: str) -> Any:
    """Text as a TOML value; None, True and False as in Python; anything else is a string."""
    if text in ("None", "True", "False"):
        return {"None": None, "True": True, "False": False}[text]
    try:
        table = tomli.loads(f"value = {text}")
    except tomli.TOMLDecodeError:
        return text
    return table["value"] if list(table) == ["value"] else text


def _model_arg(path: str, text: str | bool) -> dict[str, Any]:
    """`model.args.moe_args.top_k` and "2" as {"moe_args": {"top_k": 2}}."""
    assert isinstance(text, str), f"{path} is no switch"
    value = parse_value(text)
    for name in reversed(path.split(".")[2:]):
        value = {name: value}
    if not matches(value, KEYS[_MODEL_ARGS].type):
        raise UserError(f"command line: --{path} {text} {requirement(_MODEL_ARGS, value)}")
    return value


def deep_merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Both tables as one; of two values `above` wins, two tables are merged the same way."""
    merged = dict(below)
    for name, value in above.items():
        if isinstance(value, dict) and isinstance(merged.get(name), dict):
            value = deep_merge(merged[name], value)
        merged[name] = value
    return merged
