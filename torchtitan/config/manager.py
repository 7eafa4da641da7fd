"""One frozen `JobConfig` from a TOML file and a command line: command line > file > defaults.

`tyro` parses the text of options and prints `--help`. Names are checked before it gets them, and a
value that it refuses is reported in one sentence (`UserError`), the same as for the file.
"""

import contextlib
import dataclasses
import io
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import tomli
import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

import torchtitan
from torchtitan.config.job_config import JobConfig
from torchtitan.config.rules.text import check_path, with_home
from torchtitan.config.schema import (
    KEYS,
    alternatives,
    as_text,
    build,
    flatten,
    make_row,
    matches,
    replace_entries,
    requirement,
    row_type,
)
from torchtitan.config.schema import unknown as unknown_key
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger
from torchtitan.tools.near_path import near_path

_MODEL_ARGS = "model.args"
# Limit of a config file, in bytes; ours have two thousand.
LARGEST_FILE = 1_000_000
# Limit of nested tables and lists; real ones have four levels.
DEEPEST = 16
_CONFIGS = "name a TOML file, such as train_configs/debug_model.toml."
_ABOUT = (
    "Train a DeepSeek-V3-like mixture-of-experts model. Each option is a key of the TOML file "
    "named by --job.config_file, and overrides it. "
    'Lists are written a,b or \'["a", "b"]\'; switches --table.key, --table.no_key or '
    "--table.key=false."
)


class ConfigManager:
    """Reads the settings of a run."""

    def parse_args(self, argv: list[str] | None = None) -> JobConfig:
        """Read the config for these options.

        Raises UserError for the first mistake; `--help` prints all keys, `--version` the version,
        and both exit with code 0.

        argv: options; None = those of this process.
        """
        argv = sys.argv[1:] if argv is None else argv
        if "--version" in argv:
            print(f"torchtitan-moe {torchtitan.__version__}")
            sys.exit(0)
        if "-h" in argv or "--help" in argv:
            _run_all_keys("python -m torchtitan.train", ["--help"])
        options = _read_options(argv)
        flat: dict[str, Any] = {}
        if (file := options.pop("job.config_file", None)) is not None:
            file = os.path.expanduser(str(file))
            check_path("job.config_file", file)
            flat = read_config_file(file)
            if "job.config_file" in flat and not file.endswith(".json"):  # saved configs have it
                logger.warning(
                    "%s: job.config_file = %s is not read, because a file can't include another; "
                    "remove it, and copy the content of that file.",
                    file,
                    as_text(flat["job.config_file"]),
                )
            flat["job.config_file"] = file
        model_args = flat.get(_MODEL_ARGS, {})
        for path in [path for path in options if _is_model_arg(path)]:
            model_args = deep_merge(model_args, _model_arg(path, options.pop(path)))
        flat[_MODEL_ARGS] = model_args
        flat |= {path: value for path, value in options.items() if isinstance(value, bool)}
        texts = {path: value for path, value in options.items() if isinstance(value, str)}
        config = build(flat)
        return with_home(_apply_texts(texts, config) if texts else config)


# ---------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------


def read_config_file(file: str) -> dict[str, Any]:
    """Read a TOML file, or the JSON that a run saved, as checked `{'training.steps': 10, ...}`."""
    path = Path(file)
    raw = _read(path)
    try:
        text = raw.decode("utf-8-sig")  # some Windows editors begin with a byte-order mark
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"{file} is not UTF-8 text (at line {line}), which TOML requires; save it as UTF-8."
        ) from None
    language, parse = ("JSON", _loads_json) if path.suffix == ".json" else ("TOML", tomli.loads)
    try:
        table = parse(text)
    except (tomli.TOMLDecodeError, json.JSONDecodeError) as error:  # both name the line
        raise UserError(f"{file} is not valid {language}: {error}.") from None
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except ValueError:  # Python's limit for integers
        raise UserError(
            f"{file} holds an integer of more than {sys.get_int_max_str_digits()} digits; no "
            "setting takes one."
        ) from None
    except RecursionError:
        table = None
    if table is None or is_deep(table):
        raise UserError(
            f"{file} has tables or lists nested more than {DEEPEST} deep, which no setting takes; "
            "remove them."
        )
    if not isinstance(table, dict):
        raise UserError(f"{file} must hold a JSON object with one entry per table.")
    return flatten(table, source=file)


def _read(path: Path) -> bytes:
    """Read the whole file. Raises `UserError` before reading one that can't be a config."""
    try:
        status = path.stat()
        if not (path.is_file() or path.is_dir()):  # a pipe may wait, and has one reader only
            raise UserError(
                f"job.config_file {path} is a pipe or a device; write its content to a TOML file."
            )
        if status.st_size > LARGEST_FILE:
            raise UserError(
                f"job.config_file {path} has {status.st_size:,} bytes, but a config has at most "
                f"{LARGEST_FILE:,}; name the TOML file of the run."
            )
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"job.config_file {path} does not exist; {near_path(path, _CONFIGS)}"
        ) from None
    except OSError as error:
        raise UserError(
            f"job.config_file {path} cannot be read ({error.strerror}); name a readable TOML file."
        ) from None


def _loads_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_without_duplicates)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"the key {as_text(twice)} occurs twice in one table; leave one out.")
    return table


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------


def _read_options(argv: list[str]) -> dict[str, str | bool]:
    """Split options into {key: text}, switches into {key: bool}; the last of equal keys wins."""
    options: dict[str, str | bool] = {}
    position = 0
    while position < len(argv):
        token = argv[position]
        if not token.startswith("--"):
            way_out = "options look like --training.steps 100"
            if token.endswith(".toml"):
                way_out = f"name a settings file so: CONFIG_FILE={token} ./run_train.sh"
            raise UserError(f"command line: '{token}' is not an option; {way_out}.")
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
    """Return the key that an option names, and whether it is negated: `--metrics.no_enable_...`."""
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
    if bare := next((v for v in values if v.partition("=")[0] in KEYS), None):
        raise UserError(f"command line: {bare} is a key without dashes; write --{bare}.")
    if not _is_model_arg(path):
        kind = KEYS[path].type
        if kind is bool:
            switch = {"true": True, "false": False}.get(" ".join(values or ["true"]).lower())
            if switch is None or (negated and values):
                raise UserError(f"{shown} {requirement(path, values)}")
            return switch and not negated
        if list[str] in alternatives(kind):
            return ",".join(values)
        row = row_type(kind)
        if row and values and matches(tables := parse_value(values[0]), kind):
            _rows(kind, row, tables, f"command line: --{path}")  # reports mistakes inside a table
    if not values:
        raise UserError(f"{shown} needs a value, as in --{path}=VALUE.")
    if len(values) > 1:
        raise UserError(
            f"{shown} takes one value, not {len(values)}; put quotes around a value with spaces."
        )
    return values[0]


def _apply_texts(options: dict[str, str], default: JobConfig) -> JobConfig:
    values = _values(options)
    if values is not None:
        return replace_entries(default, values)
    # tyro does not tell a program which option it refused, so each is tried on its own.
    wrong = next(path for path, text in options.items() if _values({path: text}) is None)
    raise UserError(
        f"command line: --{wrong} {options[wrong]} {requirement(wrong, options[wrong])}"
    )


def _values(options: dict[str, str]) -> dict[str, Any] | None:
    """Parse each option's text; None where tyro refuses one.

    tyro gets only these options: a parser for all keys takes ten times as long.
    """
    fields = [
        (f"option_{n}", Annotated[KEYS[path].type, tyro.conf.arg(name=path)])
        for n, path in enumerate(options)
    ]
    table = dataclasses.make_dataclass("Options", fields)
    args = [f"--{path}={text}" for path, text in options.items()]
    try:
        # console_outputs alone does not suppress all of tyro's error boxes (1.0.17).
        with contextlib.redirect_stderr(io.StringIO()):
            values = _run_tyro(table, args, console_outputs=False)
    except SystemExit:
        return None
    return {path: getattr(values, f"option_{n}") for n, path in enumerate(options)}


def _run_tyro(table: type, args: list[str], **how: Any) -> Any:
    """Call tyro. Raises SystemExit: with 0 after `--help`, with 2 for a value that tyro refuses."""
    return tyro.cli(table, args=args, use_underscores=True, registry=_REGISTRY, **how)


def _run_all_keys(prog: str, args: list[str]) -> None:
    """Call tyro's parser of all keys, which takes seconds. Raises SystemExit once it has printed.

    prog: the command whose options they are
    """
    _run_tyro(JobConfig, args, default=JobConfig(), prog=prog, description=_ABOUT)


def completion(prog: str, shell: str) -> str:
    """Return the completion of all keys as a script.

    prog: the command to complete
    shell: "bash" or "zsh"
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        _run_all_keys(prog, ["--tyro-print-completion", shell])
    return printed.getvalue()


_REGISTRY = ConstructorRegistry()


@_REGISTRY.primitive_rule
def _lists_and_tables(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Tell tyro how to parse lists (`a,b` as in torchtitan, or a TOML array) and tables."""
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
    """Tell tyro how to parse [[table.key]]: a TOML array of inline tables."""
    kind: Any = info.type
    row = row_type(kind)
    if row is None:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="TABLES",
        instance_from_str=lambda texts: _rows(kind, row, parse_value(texts[0]), ""),
        is_instance=lambda value: isinstance(value, list),
        str_from_instance=lambda rows: [json.dumps([dataclasses.asdict(row) for row in rows])],
    )


def _rows(kind: Any, row: type, tables: Any, where: str) -> list[Any]:
    if not matches(tables, kind):
        raise ValueError(str(tables))
    rows = enumerate(tables, start=1)
    return [make_row(row, table, f"{where} {n}") for n, table in rows]


# ---------------------------------------------------------------------------------------------
# Model arguments
# ---------------------------------------------------------------------------------------------


def parse_value(text: str) -> Any:
    """Parse text as a TOML value; None, True and False as in Python; anything else is a string."""
    if text in ("None", "True", "False"):
        return {"None": None, "True": True, "False": False}[text]
    try:
        table = tomli.loads(f"value = {text}")
    except (ValueError, RecursionError):  # also an integer of thousands of digits
        return text
    return table["value"] if list(table) == ["value"] and not is_deep(table) else text


def is_deep(value: Any) -> bool:
    """Tell whether tables and lists are nested more than DEEPEST deep."""
    level = [value]
    for _ in range(DEEPEST + 1):
        tables = [item for item in level if isinstance(item, dict | list)]
        level = [i for t in tables for i in (t.values() if isinstance(t, dict) else t)]
    return bool(level)


def _model_arg(path: str, text: str | bool) -> dict[str, Any]:
    """Convert `model.args.moe_args.top_k` and "2" to {"moe_args": {"top_k": 2}}."""
    assert isinstance(text, str), f"{path} is no switch"
    value = parse_value(text)
    names = path.split(".")[2:]
    if len(names) > DEEPEST:
        raise UserError(f"command line: --{path} is not a model argument; --help shows examples.")
    for name in reversed(names):
        value = {name: value}
    if not matches(value, KEYS[_MODEL_ARGS].type):
        raise UserError(f"command line: --{path} {text} {requirement(_MODEL_ARGS, value)}")
    return value


def deep_merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merge two tables; of two values `above` wins, two tables are merged the same way."""
    merged = dict(below)
    for name, value in above.items():
        if isinstance(value, dict) and isinstance(merged.get(name), dict):
            value = deep_merge(merged[name], value)
        merged[name] = value
    return merged
