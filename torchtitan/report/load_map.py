"""Heat map of each expert's load over time: an overview by layer, and a map of each layer."""

from typing import Any

import numpy as np

from torchtitan.report.charts import base_layout
from torchtitan.report.read import Run

_MOST = 400  # percent; what is above has the colour of this
# Dark blue (idle) over teal (a fair share, 100 %) to pale yellow (overloaded); its brightness only
# rises. Positions are logarithmic in the load: 25, 50, 100, 200 and 400 %.
_COLOURS = [
    [0.0, "rgb(13,8,60)"],
    [0.0625, "rgb(13,8,60)"],
    [0.125, "rgb(40,60,130)"],
    [0.25, "rgb(40,130,140)"],
    [0.5, "rgb(130,200,100)"],
    [1.0, "rgb(255,250,190)"],
]


def load_figure(run: Run) -> Any | None:
    """Draw the maps, one of which is shown; None without records of loads."""
    import plotly.graph_objects as go

    if not run.loads:
        return None
    steps, layers = run.load_steps, run.loads
    fullest = np.stack([loads.max(axis=1) for loads in layers.values()])
    names = [f"layer {layer}" for layer in layers]
    hover = "layer %{y}, step %{x}: fullest expert %{z} %<extra></extra>"
    maps = [_map(steps, fullest, np.array(list(layers)), hover)]
    for layer, loads in layers.items():
        hover = f"layer {layer}, expert %{{y}}, step %{{x}}: %{{z}} %<extra></extra>"
        maps.append(_map(steps, loads.T, np.arange(loads.shape[1]), hover))
    shown = 1 if len(layers) == 1 else 0
    for n, trace in enumerate(maps):
        trace["visible"] = n == shown
    layout = base_layout("", height=420)
    layout |= {"hovermode": "closest", "margin": {"l": 8, "r": 8, "t": 48, "b": 8}}
    layout["yaxis"] |= {"autorange": "reversed", "title": {"text": _axis(shown)}, "tickformat": "d"}
    layout["updatemenus"] = [_menu(names, shown)]
    return go.Figure(maps, layout)


def _map(steps: np.ndarray, percent: np.ndarray, rows: np.ndarray, hover: str) -> dict[str, Any]:
    return {
        "type": "heatmap",
        "x": steps,
        "y": rows,
        "z": np.minimum(percent, _MOST).astype(np.uint16),
        "zmin": 0,
        "zmax": _MOST,
        "colorscale": _COLOURS,
        "colorbar": {
            "title": {"text": "% of a fair share", "side": "right"},
            "tickvals": [25, 50, 100, 200, 400],
            "ticktext": ["25", "50", "100", "200", "400+"],
            "thickness": 12,
        },
        "hovertemplate": hover,
    }


def _menu(names: list[str], shown: int) -> dict[str, Any]:
    """Plotly's drop-down list, which shows one of the maps."""
    labels = ["all layers: fullest expert", *names]
    buttons = [
        {
            "label": label,
            "method": "update",
            "args": [
                {"visible": [k == n for k in range(len(labels))]},
                {"yaxis.title.text": _axis(n)},
            ],
        }
        for n, label in enumerate(labels)
    ]
    place = {"x": 0, "xanchor": "left", "y": 1.0, "yanchor": "bottom", "pad": {"b": 8}}
    return {"buttons": buttons, "active": shown, "showactive": True, **place}


def _axis(n: int) -> str:
    return "expert" if n else "layer"
