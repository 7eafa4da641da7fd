"""Draw the time of a step by parts, from the JSON of `bench.py step`: a bar for each breakdown.

    python scripts/plot_step_time.py rows.json --whole "before: 271.7" --out docs/step_time.png

--whole: a step of which only the total is known ("name: milliseconds"), drawn first.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripts import entry


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=entry.about(__doc__))
    parser.add_argument("rows", type=Path, help="JSON of bench.py step")
    parser.add_argument("--whole", nargs="*", default=[], metavar="NAME: MS", help="only totals")
    parser.add_argument("--out", type=Path, required=True, help="the file to draw into")
    return parser.parse_args(argv)


if __name__ == "__main__":
    entry.check_first(parse, "rows")


def bars(options: argparse.Namespace) -> list[tuple[str, dict[str, float]]]:
    """List name and milliseconds by part of every bar."""
    known = []
    for text in options.whole:
        name, _, milliseconds = text.rpartition(":")
        known.append((name, {"not measured by part": float(milliseconds)}))
    rows = json.loads(options.rows.read_text())
    measured = [row for row in rows if "breakdown" in row]
    return known + [(f"{row['case']}, {row['name']}", row["breakdown"]["ms"]) for row in measured]


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    import matplotlib.pyplot as plt

    everything = bars(options)
    parts = list(dict.fromkeys(part for _, times in everything for part in times))
    colors = dict(zip(parts, plt.colormaps["tab20"].colors * 2, strict=False))
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.7 * len(everything)))
    for y, (_, times) in enumerate(everything):
        left = 0.0
        for part, milliseconds in times.items():
            axes.barh(y, milliseconds, left=left, color=colors[part], label=part if y else None)
            left += milliseconds
        axes.text(left + 2, y, f"{left:.0f} ms", va="center")
    axes.set_yticks(range(len(everything)), [name for name, _ in everything])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds a step")
    axes.margins(x=0.1)
    handles = {
        label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    axes.legend(handles.values(), handles, ncols=4, loc="upper center", bbox_to_anchor=(0.4, -0.3))
    figure.savefig(options.out, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    entry.run(main)
