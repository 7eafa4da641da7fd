"""Draw the way of one token in an EP group: one copy per expert, per rank, per node.

    python scripts/plot_dispatch.py docs/dispatch.png        (needs matplotlib)

The token is routed by the package's own router (64 experts on 4 nodes of 2 ranks, 8 groups of which
4, top-8); the arrows are what each dispatcher sends for it, as tests/distributed_tests counts it.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripts import entry


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=entry.about(__doc__))
    parser.add_argument("picture", help="the file to draw into, such as picture.png")
    return parser.parse_args(argv)


if __name__ == "__main__":
    entry.check_first(parse)

# isort: split
import matplotlib
import torch

from torchtitan.models.moe.moe import TokenChoiceTopKRouter

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

NODES, RANKS_PER_NODE, EXPERTS, HOME = 4, 2, 64, 2
RANKS = NODES * RANKS_PER_NODE
REMOTE, INSIDE = "#c0392b", "#1f4e79"
Arrow = tuple[int, int]  # from rank, to rank


def experts_of_a_token() -> list[int]:
    router = TokenChoiceTopKRouter(
        dim=EXPERTS, num_experts=EXPERTS, num_expert_groups=8, num_limited_groups=4, top_k=8
    )
    torch.nn.init.eye_(router.gate.weight)
    logits = torch.randn(1, EXPERTS, generator=torch.Generator().manual_seed(3))
    return router(logits)[1][0].tolist()


def ways(experts: list[int]) -> dict[str, list[Arrow]]:
    homes = [expert * RANKS // EXPERTS for expert in experts]
    relays = {rank // RANKS_PER_NODE: relay(rank // RANKS_PER_NODE) for rank in homes}
    fan_out = [(relays[rank // RANKS_PER_NODE], rank) for rank in sorted(set(homes))]
    return {
        "plain: one copy per expert": [(HOME, rank) for rank in homes],
        "all-to-all: one per rank": [(HOME, rank) for rank in sorted(set(homes))],
        "node-limited: one per node, then per rank": [(HOME, r) for r in relays.values()] + fan_out,
    }


def relay(node: int) -> int:
    """Rank of a node that is at the sender's own place on its node."""
    return node * RANKS_PER_NODE + HOME % RANKS_PER_NODE


def place(rank: int) -> tuple[float, float]:
    node, inside = divmod(rank, RANKS_PER_NODE)
    return inside * 1.0 + (node % 2) * 2.9, 1.9 - (node // 2) * 1.9


def draw(axis: Axes, title: str, arrows: list[Arrow], experts: list[int]) -> None:
    for node in range(NODES):
        x, y = place(node * RANKS_PER_NODE)
        axis.add_patch(plt.Rectangle((x - 0.55, y - 0.6), 2.1, 1.2, fc="#f2f4f7", ec="#b9c6d6"))
        axis.text(x - 0.48, y - 0.54, f"node {node}", fontsize=7, color="#66758a")
    for rank in range(RANKS):
        count = sum(expert * RANKS // EXPERTS == rank for expert in experts)
        colour = "#ffd27f" if count else "white"
        axis.add_patch(plt.Circle(place(rank), 0.25, fc=colour, ec="black", zorder=3))
        axis.text(*place(rank), str(count or ""), ha="center", va="center", fontsize=8, zorder=4)
    drawn: dict[Arrow, int] = {}
    for arrow in arrows:
        if arrow[0] == arrow[1]:
            continue
        drawn[arrow] = drawn.get(arrow, 0) + 1
        crosses = arrow[0] // RANKS_PER_NODE != arrow[1] // RANKS_PER_NODE
        bend = 0.12 + 0.14 * (drawn[arrow] - 1)
        style = {"arrowstyle": "-|>", "shrinkA": 11, "shrinkB": 11, "lw": 1.3}
        style |= {"color": REMOTE if crosses else INSIDE, "connectionstyle": f"arc3,rad={bend}"}
        axis.annotate("", place(arrow[1]), place(arrow[0]), arrowprops=style)
    remote = sum(a // RANKS_PER_NODE != b // RANKS_PER_NODE for a, b in arrows)
    x, y = place(HOME)
    axis.text(x, y + 0.36, "token", ha="center", fontsize=8)
    axis.set_title(f"{title}\n{remote} rows between nodes", fontsize=9)
    axis.set(xlim=(-0.75, 4.65), ylim=(-0.75, 2.65), aspect="equal")
    axis.axis("off")


def main(path: str) -> None:
    experts = experts_of_a_token()
    figure, axes = plt.subplots(1, 3, figsize=(11, 3), dpi=120)
    for axis, (title, arrows) in zip(axes, ways(experts).items(), strict=True):
        draw(axis, title, arrows, experts)
    figure.tight_layout()
    figure.savefig(Path(path))


if __name__ == "__main__":
    entry.run(main, parse(None).picture)
