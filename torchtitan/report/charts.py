"""Charts of a report: plotly's figures, from the curves of one or several runs.

Colours that must be readable on both backgrounds are here; texts and grids take theirs from the
page's style.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchtitan.report.read import Curve, Run

COLOURS = ["#3f7fd0", "#e08a2e", "#2f9e6e", "#c9506a", "#8f6fd0", "#2b9fb0", "#b0952f", "#7d8794"]
_POINTS = 1000  # of a curve: more than a screen is wide
_GRID = "rgba(128,128,128,0.25)"


@dataclass(frozen=True)
class Line:
    """One curve of a chart.

    name: of the number in the record.
    label: in the legend.
    factor: on the values, for the unit.
    how: "line", "points" (measured seldom), "faint", or "stack".
    """

    name: str
    label: str
    factor: float = 1.0
    how: str = "line"


@dataclass(frozen=True)
class Chart:
    """lines: those that no run has are left out, a chart without any as well.
    note: below the chart.
    log: logarithmic axis.
    """

    title: str
    unit: str
    lines: Sequence[Line]
    note: str = ""
    log: bool = False


_GIB = 2.0**-30
CHARTS = [
    Chart(
        "Loss",
        "nats per token",
        [
            Line("loss", "training"),
            Line("max_loss", "worst rank", how="faint"),
            Line("validation_loss", "validation", how="points"),
            Line("mtp_loss_1", "multi-token prediction"),
        ],
    ),
    Chart("Gradient norm", "before clipping", [Line("grad_norm", "gradient norm")], log=True),
    Chart(
        "Throughput",
        "tokens per second and device",
        [Line("tps", "tokens/s")],
        "Dips at regular intervals: checkpoints, validation, or the search for slow ranks.",
    ),
    Chart("MFU", "% of the device's peak", [Line("mfu_percent", "MFU")]),
    Chart("Useful work", "TFLOP/s per device", [Line("tflops", "TFLOP/s")]),
    Chart(
        "Time of a step",
        "seconds",
        [
            Line("data_seconds", "waiting for data", how="stack"),
            Line("rest_seconds", "all the rest", how="stack"),
            Line("max_step_seconds", "slowest step", how="faint"),
            Line("exposed_communication_ms", "exposed communication", 1e-3, "points"),
            Line("waited_ms", "waiting for the slowest rank", 1e-3, "points"),
        ],
        "The last two are measured every metrics.waiting_freq steps, on CUDA.",
    ),
    Chart(
        "Memory",
        "GiB, peak of this rank",
        [Line("memory_gib", "reserved"), Line("memory_active_gib", "active")],
    ),
    Chart(
        "Violation of balance",
        "largest load over the mean, minus 1",
        [Line("max_violation", "worst layer"), Line("mean_max_violation", "mean of layers")],
        "0 is even. High in the first steps; below 1 after some hundred.",
    ),
    Chart("Experts without a token", "of all layers", [Line("dead_experts", "experts")]),
    Chart(
        "Traffic of dispatch and combine",
        "GiB a step, all ranks",
        [
            Line("bytes_sent_remote", "to other nodes", _GIB),
            Line("bytes_sent_node", "inside nodes", _GIB),
        ],
    ),
    Chart(
        "Traffic saved",
        "% of one copy per expert",
        [
            Line("traffic_saved_percent", "to other nodes"),
            Line("traffic_saved_off_rank_percent", "to other ranks"),
            Line("cross_node_percent", "share of rows that cross nodes"),
        ],
    ),
    Chart("Learning rate", "", [Line("lr", "learning rate")]),
    Chart(
        "Sequences of a step",
        "",
        [Line("batch_size", "sequences"), Line("seq_len", "tokens of each")],
        log=True,
    ),
]


def charts_of(runs: Sequence[Run]) -> list[Chart]:
    """List the charts, with those of the datasets that these runs validate on and blend."""
    return [
        CHARTS[0],
        Chart(
            "Validation loss of each data set",
            "nats per token",
            _by_dataset(runs, "validation_set_loss/", how="points"),
        ),
        Chart(
            "Validation accuracy of each data set",
            "share of the answers' tokens",
            _by_dataset(runs, "validation_set_accuracy/", how="points"),
        ),
        *CHARTS[1:],
        Chart(
            "Tokens read from each dataset",
            "millions",
            _by_dataset(runs, "blend_tokens/", factor=1e-6),
        ),
    ]


def _by_dataset(
    runs: Sequence[Run], prefix: str, factor: float = 1.0, how: str = "line"
) -> list[Line]:
    names = dict.fromkeys(name for run in runs for name in run.curves if name.startswith(prefix))
    return [Line(name, name.removeprefix(prefix), factor, how) for name in names]


def figure(chart: Chart, runs: Sequence[Run]) -> Any | None:
    """Draw a chart; None where no run has any of its numbers."""
    import plotly.graph_objects as go

    traces: list[dict[str, Any]] = []
    for n, run in enumerate(runs):
        for k, line in enumerate(chart.lines):
            curve = _curve(run, line.name)
            if curve is None or (len(runs) > 1 and line.how in ("faint", "stack")):
                continue
            colour = COLOURS[(n if len(runs) > 1 else k) % len(COLOURS)]
            label = f"{run.name}: {line.label}" if len(runs) > 1 else line.label
            traces.append(_trace(curve, line, label, colour, dash=len(runs) > 1 and k > 0))
    if len(runs) > 1 and any(line.how == "stack" for line in chart.lines):
        whole = Line("step_seconds", "whole step")
        for n, run in enumerate(runs):
            if (curve := run.curve(whole.name)) is not None:
                label = f"{run.name}: {whole.label}"
                traces.append(_trace(curve, whole, label, COLOURS[n % len(COLOURS)], dash=False))
    if not traces:
        return None
    layout = base_layout(chart.unit)
    layout["showlegend"] = len(traces) > 1
    if chart.log and all(np.nanmin(trace["y"]) > 0 for trace in traces):
        layout["yaxis"]["type"] = "log"
    if len(runs) == 1:
        layout["shapes"] = _marks(runs[0])
    return go.Figure(traces, layout)


def base_layout(unit: str, height: int = 300) -> dict[str, Any]:
    axis = {"gridcolor": _GRID, "zerolinecolor": _GRID, "automargin": True}
    return {
        "template": "none",
        "height": height,
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hovermode": "x unified",
        "hoverlabel": {"font": {"color": "#1c2430"}, "bgcolor": "#ffffff"},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "bgcolor": "rgba(0,0,0,0)"},
        "xaxis": {**axis, "title": {"text": "step", "standoff": 4}},
        "yaxis": {**axis, "title": {"text": unit, "standoff": 4, "font": {"size": 12}}},
    }


def _curve(run: Run, name: str) -> Curve | None:
    if name != "rest_seconds":
        return run.curve(name)
    step, data = run.curve("step_seconds"), run.curve("data_seconds")
    if step is None or data is None or len(step.steps) != len(data.steps):
        return None
    return Curve(step.steps, step.values - data.values)


def _trace(curve: Curve, line: Line, label: str, colour: str, *, dash: bool) -> dict[str, Any]:
    seldom = line.how == "points"
    thin = curve if seldom else thinned(curve, largest=line.how == "faint")
    values = np.where(np.isfinite(thin.values), thin.values * line.factor, np.nan)
    style: dict[str, Any] = {"color": colour, "width": 1 if line.how == "faint" else 1.8}
    style |= {"dash": "dot"} if dash and not seldom else {}
    trace = {
        "type": "scatter",
        "name": label,
        "x": thin.steps,
        "y": values,
        "mode": "lines+markers" if seldom or len(thin.steps) == 1 else "lines",
        "line": style,
        "marker": {"color": colour, "size": 6},
        "opacity": 0.45 if line.how == "faint" else 1.0,
    }
    return trace | ({"stackgroup": "time"} if line.how == "stack" else {})


def thinned(curve: Curve, points: int = _POINTS, *, largest: bool = False) -> Curve:
    """Take the mean (or the largest value) of neighbouring points, so that `points` are left."""
    every = math.ceil(len(curve.steps) / points)
    if every <= 1:
        return curve
    starts = np.arange(0, len(curve.steps), every)
    sizes = np.diff(np.append(starts, len(curve.steps)))
    if largest:
        values = np.fmax.reduceat(curve.values, starts)
    else:
        finite = np.isfinite(curve.values)
        sums = np.add.reduceat(np.where(finite, curve.values, 0.0), starts)
        counts = np.add.reduceat(finite.astype(float), starts)
        values = np.divide(sums, counts, out=np.full(len(starts), np.nan), where=counts > 0)
    return Curve(curve.steps[starts + sizes - 1], values)


def _marks(run: Run) -> list[dict[str, Any]]:
    """Vertical lines: incidents in red, phases and restarts in grey."""
    found = []
    for n, event in enumerate(run.events):
        kind = event["event"]
        restart = kind == "start" and any(e["event"] == "start" for e in run.events[:n])
        if kind in ("skip", "rewind", "alarm", "checkpoint_failed"):
            colour = "rgba(201,60,80,0.55)"
        elif kind == "phase" or restart:
            colour = "rgba(128,128,128,0.7)"
        else:
            continue
        line = {"color": colour, "width": 1, "dash": "dash"}
        at = {"x0": event["step"], "x1": event["step"], "y0": 0, "y1": 1}
        found.append({"type": "line", "xref": "x", "yref": "paper", "line": line, **at})
    return found[-200:]
