"""The report as one HTML page, which needs nothing beside itself."""

from collections.abc import Sequence
from html import escape
from typing import Any

from torchtitan.report import tables
from torchtitan.report.charts import charts_of, figure
from torchtitan.report.load_map import load_figure
from torchtitan.report.read import Run

# Plotly draws SVG, whose texts take the page's colours: they follow light and dark mode.
# A chart takes its width when the browser reads it, before the sections after it and the scroll bar
# are there: auto-fill, unlike auto-fit, and the stable gutter keep that width the final one.
_STYLE = """
:root { color-scheme: light dark; scrollbar-gutter: stable; --text: #1c2430; --page: #f6f7f9;
  --card: #ffffff; --line: #d5dae1; --soft: #5b6675; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ee; --page: #14181e; --card: #1d232b;
  --line: #39424e; --soft: #a3adba; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1320px; padding: 12px; background: var(--page);
  color: var(--text); font: 16px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.35rem; margin: 0 0 .5rem; } h2 { font-size: 1rem; margin: 0 0 .5rem; }
h3 { font-size: .9rem; margin: .8rem 0 .2rem; color: var(--soft); } p { margin: .2rem 0; }
main { display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 460px), 1fr)); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 12px; min-width: 0; }
.wide { grid-column: 1 / -1; } .note { font-size: .85rem; color: var(--soft); }
dl { display: grid; gap: 8px 20px; margin: 0 0 12px;
  grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); }
dt { font-size: .8rem; color: var(--soft); } dd { margin: 0; font-weight: 600; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 3px 10px 3px 0;
  border-bottom: 1px solid var(--line); overflow-wrap: normal; }
.sample { white-space: pre-wrap; max-height: 12em; overflow-y: auto; }
details { margin-top: .6rem; } summary { cursor: pointer; }
.js-plotly-plot text { fill: var(--text) !important; }
.js-plotly-plot .hoverlayer text { fill: #1c2430 !important; }
.js-plotly-plot .updatemenu-item-rect { fill: var(--card) !important;
  stroke: var(--line) !important; }
.js-plotly-plot .modebar { display: none; }
"""


def page(runs: Sequence[Run]) -> str:
    """Write the page of one run, or of several beside each other. Needs plotly."""
    from plotly.offline import get_plotlyjs

    title = " and ".join(run.name for run in runs)
    sections = [_health(run, len(runs)) for run in runs] + _charts(runs)
    sections += _tables_of_one(runs[0]) if len(runs) == 1 else _tables_of_several(runs)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Run {escape(title)}</title><style>{_STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head><body>"
        f"<h1>Run {escape(title)}</h1>{''.join(_head(run, len(runs)) for run in runs)}"
        f"<main>{''.join(sections)}</main></body></html>\n"
    )


def _head(run: Run, of: int) -> str:
    name = f"<h2>{escape(run.name)}</h2>" if of > 1 else ""
    facts = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(text)}</dd></div>"
        for label, text in tables.facts(run).items()
    )
    broken = "".join(
        f'<p class="note">{count:,} broken line{"s" if count > 1 else ""} of {escape(file)} '
        "left out.</p>"
        for file, count in run.broken.items()
    )
    return f"{name}<dl>{facts}</dl>{broken}"


def _health(run: Run, of: int) -> str:
    title = "Is it healthy?" + (f" {run.name}" if of > 1 else "")
    note = "A first look; docs/read_a_run.md explains every number."
    return _section(title, tables.checks(run), note, wide=True)


def _section(title: str, inside: str, note: str = "", *, wide: bool = False) -> str:
    if not inside:
        return ""
    below = f'<p class="note">{escape(note)}</p>' if note else ""
    kind = ' class="wide"' if wide else ""
    return f"<section{kind}><h2>{escape(title)}</h2>{inside}{below}</section>\n"


def _charts(runs: Sequence[Run]) -> list[str]:
    found = [
        _section(chart.title, _div(drawn), chart.note)
        for chart in charts_of(runs)
        if (drawn := figure(chart, runs)) is not None
    ]
    for run in runs:
        drawn = load_figure(run)
        title = "Load of each expert" + (f": {run.name}" if len(runs) > 1 else "")
        note = "100 % is a fair share of the layer's tokens; the list chooses a layer."
        found.append(_section(title, _div(drawn), note, wide=True) if drawn is not None else "")
    return found


def _div(drawn: Any) -> str:
    import plotly.io

    settings = {"responsive": True, "displayModeBar": False, "displaylogo": False}
    return plotly.io.to_html(
        drawn, config=settings, include_plotlyjs=False, full_html=False, validate=False
    )


def _tables_of_one(run: Run) -> list[str]:
    return [
        _section("Incidents", tables.incidents(run), wide=True),
        _section("Phases", tables.phases(run), wide=True),
        _section("Checkpoints", tables.checkpoints(run), wide=True),
        _section("Sample texts", tables.samples(run), "The prompt is in bold.", wide=True),
        _section("Settings that differ from the defaults", tables.settings(run), wide=True),
    ]


def _tables_of_several(runs: Sequence[Run]) -> list[str]:
    different = tables.settings_of_several(runs)
    found = [_section("Settings in which the runs differ", different, wide=True)]
    found += [_section(f"Incidents: {r.name}", tables.incidents(r), wide=True) for r in runs]
    return found
