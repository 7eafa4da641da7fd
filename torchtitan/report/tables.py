"""Tables of a report: facts, incidents, checkpoints, sample texts, settings; as HTML."""

import time
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np

from torchtitan.config import JobConfig, to_dict
from torchtitan.report.health import health
from torchtitan.report.read import Run, flat

_MOST_ROWS = 200
_SAMPLES = 6  # validations whose texts are shown: the newest, and the first


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def folded(summary: str, inside: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{inside}</details>"


# ------------------------------------------------------------------ facts


def facts(run: Run) -> dict[str, str]:
    """Facts of a run, by name; unknown ones are left out."""
    found = {"state": _state(run), "step": _steps_done(run)}
    found |= _lasts(run)
    starts = [event for event in run.events if event["event"] == "start"]
    if starts:
        last = starts[-1]
        found["devices"] = f"{last.get('devices', '?')} x {last.get('device', '?')}"
        found["layout"] = str(last.get("layout", "?"))
        found["versions"] = f"torch {last.get('torch')}, torchtitan-moe {last.get('version')}"
    if run.settings:
        names = [run.settings.get("model.name"), run.settings.get("model.flavor")]
        found["model"] = " ".join(map(str, names))
        found["purpose"] = str(run.settings.get("job.description", ""))
    return {name: text for name, text in found.items() if text}


def _state(run: Run) -> str:
    if not run.events:
        return ""
    last = run.events[-1]
    if last["event"] != "end":
        return f"running, or ended without a word after {_when(last['time'])}"
    return f"{last.get('how', 'ended')}, {_when(last['time'])}"


def _steps_done(run: Run) -> str:
    done = _last_step(run)
    whole = run.settings.get("training.steps")
    return f"{done:,} of {whole:,}" if isinstance(whole, int) else f"{done:,}"


def _last_step(run: Run) -> int:
    return max(int(curve.steps[-1]) for curve in run.curves.values())


def _lasts(run: Run) -> dict[str, str]:
    """The newest numbers; speeds as medians of the newest quarter of the records."""
    found = {}
    shown = {
        "loss": ("loss", "{:.4f}"),
        "validation_loss": ("validation loss", "{:.4f}"),
        "tokens_seen": ("tokens seen", "{:,.0f}"),
        "max_violation": ("max-violation", "{:.2f}"),
        "memory_gib": ("memory", "{:.1f} GiB"),
    }
    for name, (label, form) in shown.items():
        if (curve := run.curve(name)) is not None:
            found[label] = form.format(curve.last)
            if curve.steps[-1] < _last_step(run):
                found[label] += f" (step {curve.steps[-1]:,})"
    for name, form in (("tps", "{:,.0f} tokens/s/device"), ("mfu_percent", "{:.1f} % MFU")):
        if (curve := run.curve(name)) is not None:
            newest = curve.values[-max(1, len(curve.values) // 4) :]
            text = form.format(np.median(newest))
            found["speed"] = f"{found['speed']}, {text}" if "speed" in found else text
    return found


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def checks(run: Run) -> str:
    marks = {True: "fine", False: "look at it", None: "too early"}
    rows = [(c.what, c.value, c.usual, marks[c.fine]) for c in health(run)]
    return table(("number", "this run", "usual is", ""), rows) if rows else ""


# ------------------------------------------------------------------ events


def incidents(run: Run) -> str:
    """Events that went otherwise than planned, in the order in which it happened."""
    found = [
        (event["step"], _when(event["time"]), *text)
        for n, event in enumerate(run.events)
        if (text := _incident(run, n, event)) is not None
    ]
    found += _stragglers(run)
    found.sort(key=lambda row: row[0])
    if not found:
        known = bool(run.events) or "waited_ms" in run.curves
        return f"<p>{'None.' if known else 'Not recorded.'}</p>"
    shown = table(("step", "time", "what", "why"), found[-_MOST_ROWS:])
    left_out = len(found) - _MOST_ROWS
    return shown + (f"<p>{left_out:,} earlier ones are not shown.</p>" if left_out > 0 else "")


def _incident(run: Run, n: int, event: dict[str, Any]) -> tuple[str, str] | None:
    kind = event["event"]
    why = str(event.get("why", ""))
    if kind == "start" and any(before["event"] == "start" for before in run.events[:n]):
        devices = f"{event.get('devices', '?')} x {event.get('device', '?')}"
        return "restart", f"goes on after step {event['step']}, on {devices}"
    if kind == "end" and event.get("how") != "finished":
        return "end", str(event.get("how"))
    if kind in ("skip", "rewind"):
        what = "skipped" if kind == "skip" else "rewind to the last checkpoint"
        return what, f"loss {event.get('loss')}"
    if kind == "alarm":
        return "alarm", why.partition("alarm: ")[2] or why
    if kind == "checkpoint_failed":
        return "a checkpoint could not be saved", why
    return None


def _stragglers(run: Run) -> list[tuple[int, str, str, str]]:
    """Steps in which the others waited for one rank, for more than a tenth of the step."""
    needed = [run.curve(n) for n in ("waited_ms", "waited_for_rank", "step_seconds", "time")]
    waited, rank, step, clock = needed
    if waited is None or rank is None or step is None or clock is None:
        return []
    host, found = run.curve("waited_for_host_ms"), []
    rows = np.searchsorted(step.steps, waited.steps).clip(max=len(step.steps) - 1)
    for i in np.flatnonzero(waited.values >= 100 * step.values[rows]):
        at, milliseconds = waited.steps[i], waited.values[i]
        its = "host" if host is not None and host.values[i] > milliseconds / 2 else "device"
        why = f"the others waited {milliseconds:.0f} ms for its {its}"
        when = _when(float(clock.values[rows[i]]))
        found.append((int(at), when, f"rank {rank.values[i]:.0f} is late", why))
    return found


def checkpoints(run: Run) -> str:
    rows = [
        (event["step"], _when(event["time"]), f"{event.get('seconds', 0):.1f}", event.get("path"))
        for event in run.events
        if event["event"] == "checkpoint"
    ]
    if not rows:
        return "<p>None saved.</p>" if run.events else "<p>Not recorded.</p>"
    inside = table(("step", "time", "seconds", "folder"), rows[-_MOST_ROWS:])
    return folded(f"{len(rows):,} saved, the last after step {rows[-1][0]:,}", inside)


def phases(run: Run) -> str:
    rows = [
        (event["step"], event.get("title"), event.get("settings"))
        for event in run.events
        if event["event"] == "phase"
    ]
    return table(("from step", "phase", "settings"), rows) if rows else ""


def samples(run: Run) -> str:
    by_step: dict[int, list[str]] = {}
    for event in run.events:
        if event["event"] == "sample":
            prompt, text = escape(str(event.get("prompt"))), escape(str(event.get("text")))
            by_step.setdefault(event["step"], []).append(
                f'<p class="sample"><b>{prompt}</b>{text}</p>'
            )
    steps = list(by_step)
    chosen = sorted({*steps[:1], *steps[-_SAMPLES:]}, reverse=True)
    return "".join(
        f"<h3>step {step:,}</h3>{''.join(dict.fromkeys(by_step[step]))}" for step in chosen
    )


# ------------------------------------------------------------------ settings


def settings(run: Run) -> str:
    """Settings that differ from the defaults; all of them, folded."""
    if not run.settings:
        return "<p>Not found beside the records.</p>"
    defaults = dict(flat(to_dict(JobConfig())))
    changed = [
        (key, _text(value), _text(defaults.get(key)) if key in defaults else "")
        for key, value in run.settings.items()
        if key not in defaults or defaults[key] != value
    ]
    shown = table(("key", "value", "default"), changed)
    every = table(("key", "value"), [(k, _text(v)) for k, v in run.settings.items()])
    args = table(("argument", "value"), [(k, _text(v)) for k, v in run.model_args.items()])
    return shown + folded("All settings", every) + folded("Arguments of the model", args)


def settings_of_several(runs: Sequence[Run]) -> str:
    """Settings and model arguments in which the runs differ."""
    rows = []
    for what in ("settings", "model_args"):
        tables = [getattr(run, what) for run in runs]
        for key in dict.fromkeys(key for each in tables for key in each):
            values = [_text(each[key]) if key in each else "-" for each in tables]
            if len(set(values)) > 1:
                rows.append((key if what == "settings" else f"argument {key}", *values))
    if not rows:
        return "<p>They have the same settings.</p>"
    return table(("key", *(run.name for run in runs)), rows)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)
