"""What a run has written in its dump folder, read for its report."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan.components.metrics.history import EVENTS, EXPERT_LOAD
from torchtitan.tools.errors import UserError

METRICS, CONFIG, MODEL_ARGS = "metrics.jsonl", "config.json", "model_args.json"
# Numbers by layer are most of a record's bytes, and the report takes them from expert_load.jsonl.
_BY_LAYER = re.compile(rb', "layer_\w+": \{[^}]*\}')
# Of the largest models fewer records of loads are read: it takes less than half a second and keeps
# the page below some megabytes.
_MOST_LOADS = 1_000_000
_BY_DATASET = ("blend_tokens", "validation_set_loss", "validation_set_accuracy")
_GIVE_A_RUN = "give the job.dump_folder of a run, or a metrics.N.jsonl of an earlier run in it"


@dataclass(frozen=True)
class Curve:
    """One number of the records, where they have it. steps, values: (points,)."""

    steps: np.ndarray
    values: np.ndarray

    @property
    def last(self) -> float:
        return float(self.values[-1])


@dataclass(frozen=True)
class Run:
    """One run.

    curves: by name in the record; of tables by dataset, as `blend_tokens/name`.
    events: in order; see `History.event`.
    load_steps: (records,) of `loads`.
    loads: uint16 (records, E), percent of the layer's mean, by layer; of the largest models every
        second record or fewer.
    settings: by key, "optimizer.lr"; empty where they were not found.
    broken: lines that are no records, by file.
    """

    name: str
    path: Path
    curves: Mapping[str, Curve]
    events: list[dict[str, Any]] = field(default_factory=list)
    load_steps: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    loads: Mapping[int, np.ndarray] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    model_args: Mapping[str, Any] = field(default_factory=dict)
    broken: Mapping[str, int] = field(default_factory=dict)

    def curve(self, name: str) -> Curve | None:
        return self.curves.get(name)


def read_run(path: Path) -> Run:
    """Read a dump folder, or the curves alone of a metrics.N.jsonl. Raises `UserError`."""
    if not path.exists():
        raise UserError(f"{path} doesn't exist; {_GIVE_A_RUN}.")
    metrics = path / METRICS if path.is_dir() else path
    if not metrics.exists():
        raise UserError(f"{path} holds no {METRICS}, so it is no run's folder; {_GIVE_A_RUN}.")
    broken: dict[str, int] = {}
    curves = _curves(_records(metrics, broken))
    if not curves:
        why = "has no record of a step"
        why += f" ({broken[metrics.name]:,} broken lines)" if metrics.name in broken else " yet"
        raise UserError(f"{metrics} {why}; wait for the first one, or {_GIVE_A_RUN}.")
    if not path.is_dir():
        return Run(path.name, path, curves, broken=broken)
    events = list(_records(path / EVENTS, broken, needs=("step", "time", "event")))
    starts = [event for event in events if event["event"] == "start"]
    settings_file = starts[-1].get("settings_file", CONFIG) if starts else CONFIG
    records = _records(path / EXPERT_LOAD, broken, needs=("percent_of_mean",), most=_MOST_LOADS)
    load_steps, loads = _loads(records)
    return Run(
        name=path.resolve().name,
        path=path,
        curves=curves,
        events=events,
        load_steps=load_steps,
        loads=loads,
        settings=dict(flat(_table(path / settings_file))),
        model_args=dict(flat(_table(path / MODEL_ARGS))),
        broken=broken,
    )


def flat(table: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    """List the values of nested tables under keys with dots."""
    for name, value in table.items():
        key = f"{at}.{name}" if at else name
        if isinstance(value, Mapping) and value:
            yield from flat(value, key)
        else:
            yield key, value


def _records(
    path: Path,
    broken: dict[str, int],
    needs: tuple[str, ...] = ("step",),
    most: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the records of a file; count lines that are none. A missing file has no records.

    needs: keys without which a line is no record.
    most: values to read, about; of a longer file every second line is read, or fewer.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}); {_GIVE_A_RUN}.") from None
    lines = _BY_LAYER.sub(b"", content).splitlines()
    values = sum(line.count(b",") for line in lines) if most else 0
    for line in lines[:: max(1, math.ceil(values / (most or 1)))]:
        try:
            record = json.loads(line)
            whole = isinstance(record, dict) and all(name in record for name in needs)
        except ValueError:
            whole = False
        if whole:
            yield record
        elif line.strip():
            broken[path.name] = broken.get(path.name, 0) + 1


def _curves(records: Iterator[dict[str, Any]]) -> dict[str, Curve]:
    points: dict[str, tuple[list[int], list[float]]] = {}
    for record in records:
        step = record.pop("step")
        if not isinstance(step, int):
            continue
        for table in _BY_DATASET:
            if isinstance(numbers := record.pop(table, None), dict):
                record |= {f"{table}/{name}": number for name, number in numbers.items()}
        for name, value in record.items():
            if type(value) is not float and (value := _number(value)) is None:
                continue
            if name not in points:
                points[name] = [], []
            steps, values = points[name]
            steps.append(step)
            values.append(value)
    return {name: Curve(np.array(s), np.array(v)) for name, (s, v) in points.items()}


def _number(value: Any) -> float | None:
    """Read a number; "NaN" and "Infinity" are written as words."""
    if isinstance(value, int | float):
        return float(value)
    if value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    return None


def _loads(records: Iterator[dict[str, Any]]) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Read the loads by layer; records of another shape (another model) are left out."""
    steps: list[int] = []
    lines: list[dict[str, list[int]]] = []
    for record in records:
        loads = record["percent_of_mean"]
        same = not lines or {k: len(v) for k, v in loads.items()} == {
            k: len(v) for k, v in lines[0].items()
        }
        if same:
            steps.append(record["step"])
            lines.append(loads)
    layers = {
        int(layer): np.array([line[layer] for line in lines]).clip(0, 65535).astype(np.uint16)
        for layer in (lines[0] if lines else {})
    }
    return np.array(steps, np.int64), layers


def _table(path: Path) -> dict[str, Any]:
    """Read a file of settings; a missing one is empty."""
    try:
        table = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}); {_GIVE_A_RUN}.") from None
    except ValueError:
        table = None
    if not isinstance(table, dict):
        raise UserError(f"{path} is not the JSON that a run writes; delete it, or restore it.")
    return table
