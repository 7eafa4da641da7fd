"""Pictures as SVG text: bars made of parts, and a pipeline's timeline.

They are 360 units wide, so that letters of 11 units are readable on a phone; colours are classes,
c0 to c7, that the page's style sheet sets for light and dark.
"""

from collections.abc import Mapping, Sequence
from html import escape

from torchtitan.planning.pipeline import Pass

WIDTH = 360
_ROW, _BAR = 34, 14


def bars(
    rows: Mapping[str, Mapping[str, float]],
    unit: str,
    *,
    limit: float | None = None,
    digits: int = 1,
) -> str:
    """Draw a bar for each row, made of its parts; a part has the same colour in every row.

    rows: values of the parts, by title and name.
    limit: value at which a line is drawn through all bars.
    """
    names = list(dict.fromkeys(name for parts in rows.values() for name in parts))
    most = max([sum(parts.values()) for parts in rows.values()] + [limit or 0.0, 1e-12])
    scale = (WIDTH - 2) / most
    drawn = []
    for i, (title, parts) in enumerate(rows.items()):
        y, x = i * _ROW, 0.0
        total = f"{sum(parts.values()):,.{digits}f} {unit}"
        drawn.append(f'<text x="0" y="{y + 12}">{escape(title)}</text>')
        drawn.append(f'<text x="{WIDTH}" y="{y + 12}" text-anchor="end">{total}</text>')
        for name, value in parts.items():
            if value > 0:
                told = f"{name}: {value:,.{digits}f} {unit}"
                shape = _rect(x, y + 16, value * scale, _BAR, names.index(name), told)
                drawn.append(shape)
            x += value * scale
    height = len(rows) * _ROW
    if limit:
        at = f'x1="{limit * scale:.1f}" x2="{limit * scale:.1f}"'
        drawn.append(f'<line class="limit" {at} y1="0" y2="{height}"/>')
    return _svg("".join(drawn), height) + legend(names)


def legend(names: Sequence[str]) -> str:
    if len(names) < 2:
        return ""
    items = "".join(
        f'<li><i class="b{i % 8}"></i>{escape(name)}</li>' for i, name in enumerate(names)
    )
    return f'<ul class="legend">{items}</ul>'


def timeline(played: Sequence[Sequence[Pass]], most: int) -> str:
    """Draw a line for each rank of the pipeline, a box for each pass.

    most: micro-batches shown.
    """
    shown = [[one for one in rank if one.action.microbatch < most] for rank in played]
    end = max(rank[-1].end for rank in shown if rank)
    scale, height = WIDTH / end, max(4, min(10, 160 // len(shown)))
    drawn = []
    for rank, passes in enumerate(shown):
        y = rank * (height + 1)
        drawn.append(f'<rect class="wait" x="0" y="{y}" width="{WIDTH}" height="{height}"/>')
        for one in passes:
            kind, stage, microbatch = one.action
            told = f"rank {rank}, stage {stage}, micro-batch {microbatch}: {_KINDS[kind]}"
            colour = list(_KINDS).index(kind)
            x, width = one.start * scale, (one.end - one.start) * scale
            drawn.append(_rect(x, y, width, height, colour, told))
    used = {one.action.kind for rank in shown for one in rank}
    names = [name for kind, name in _KINDS.items() if kind in used]
    colours = [i for i, kind in enumerate(_KINDS) if kind in used]
    items = "".join(
        f'<li><i class="b{i}"></i>{name}</li>' for i, name in zip(colours, names, strict=True)
    )
    return _svg("".join(drawn), len(shown) * (height + 1)) + f'<ul class="legend">{items}</ul>'


_KINDS = {
    "F": "forward",
    "B": "backward",
    "I": "backward, for inputs",
    "W": "backward, for weights",
}


def _rect(x: float, y: float, width: float, height: float, colour: int, told: str) -> str:
    place = f'x="{x:.2f}" y="{y:g}" width="{max(width, 0.2):.2f}" height="{height}"'
    return f'<rect class="c{colour % 8}" {place}><title>{escape(told)}</title></rect>'


def _svg(inside: str, height: float) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img">{inside}</svg>'
