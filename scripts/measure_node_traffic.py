"""Measure each dispatcher's traffic between nodes by the kernel's counters: table, JSON, picture.

    sudo python scripts/measure_node_traffic.py        (Linux, iproute2, root; two minutes)

Emulates nodes as network namespaces (emulated_nodes.py), runs one MoE layer forward and backward on
all of their ranks (node_traffic_rank.py) with a plain all-to-all, ours, and the node-limited one,
and reads how many bytes left each node. The dispatcher's own meter and arithmetic (rows times
bytes) are compared with the counters. Leaves nothing behind, even on Ctrl-C.
"""

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from operator import itemgetter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripts import entry


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=entry.about(__doc__))
    parser.add_argument("--nodes", type=positive, default=4, help="emulated ones")
    parser.add_argument("--ranks_per_node", type=positive, default=2, help="processes of each")
    parser.add_argument("--num_experts", type=positive, default=64, help="of the layer")
    parser.add_argument("--top_k", type=positive, default=8, help="experts of a token")
    parser.add_argument(
        "--routings",
        nargs="+",
        type=routing,
        default=[(0, 0), (8, 4), (8, 2), (4, 2)],
        help="num_expert_groups:num_limited_groups of each measurement; 0:0 = no groups",
    )
    parser.add_argument("--dim", type=positive, default=512, help="channels of a token")
    parser.add_argument("--hidden_dim", type=positive, default=16, help="small: links matter here")
    parser.add_argument("--tokens", type=positive, default=512, help="of each rank")
    parser.add_argument("--steps", type=positive, default=5, help="measured, after one to warm up")
    parser.add_argument(
        "--rate_mbit", type=float, default=200, help="of a node's link; 0 = no limit"
    )
    parser.add_argument("--seconds", type=float, default=300, help="after which to give up")
    parser.add_argument("--out", type=Path, default=Path("outputs/node_traffic"), help="a folder")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def routing(text: str) -> tuple[int, int]:
    groups, limited = text.split(":")
    return int(groups), int(limited)


if __name__ == "__main__":
    entry.check_first(parse)

# isort: split
import torch
from emulated_nodes import LINK, EmulatedNodes, check_can_emulate

from torchtitan.distributed.token_dispatch import bytes_per_row
from torchtitan.models.moe.args import RoutingRule
from torchtitan.tools.errors import RunError, UserError
from torchtitan.tools.logging import init_logger, logger

REPO = Path(__file__).parents[1]
TITLES = {"plain": "plain", "all_to_all": "all-to-all", "node_limited": "node-limited"}
COLOURS = {"plain": "#b9c6d6", "all_to_all": "#5b8db8", "node_limited": "#1f4e79"}


def check(options: argparse.Namespace) -> None:
    """Raise `UserError` for impossible options, and where nodes can't be emulated."""
    world_size = options.nodes * options.ranks_per_node
    if not 2 <= options.nodes <= 250:
        raise UserError(f"--nodes ({options.nodes}) must lie between 2 and 250.")
    if options.num_experts % world_size:
        raise UserError(
            f"--num_experts ({options.num_experts}) must be a multiple of the {world_size} ranks "
            f"(--nodes {options.nodes} times --ranks_per_node {options.ranks_per_node})."
        )
    for groups, limited in options.routings:
        RoutingRule(  # raises for impossible values
            num_experts=options.num_experts,
            top_k=options.top_k,
            num_expert_groups=groups or None,
            num_limited_groups=limited or None,
        )
    check_can_emulate()


# ------------------------------------------------------------------------------------- running


def measure(options: argparse.Namespace) -> list[dict]:
    """Run all ranks on emulated nodes; return their results, by rank."""
    with (
        tempfile.TemporaryDirectory() as folder,
        EmulatedNodes(options.nodes, options.rate_mbit) as nodes,
    ):
        settings = {
            name: value for name, value in vars(options).items() if name not in ("rate_mbit", "out")
        }
        settings |= {
            "warmup_steps": 1,
            "link": LINK,
            "store": f"tcp://{nodes.address(0)}:29500",
            "folder": folder,
        }
        command = [sys.executable, "-m", "scripts.node_traffic_rank", json.dumps(settings)]
        env = os.environ | {"PYTHONPATH": str(REPO), "GLOO_SOCKET_IFNAME": LINK}
        processes = []
        for rank in range(options.nodes * options.ranks_per_node):
            with open(f"{folder}/rank{rank}.log", "wb") as log:
                node = rank // options.ranks_per_node
                processes.append(
                    nodes.start(node, [*command, str(rank)], cwd=REPO, env=env, stderr=log)
                )
        logger.info("Started %d ranks on %d nodes", len(processes), options.nodes)
        wait_for(processes, Path(folder), options.seconds)
        files = [Path(folder, f"rank{rank}.json") for rank in range(len(processes))]
        return [json.loads(file.read_text()) for file in files]


def wait_for(processes: list[subprocess.Popen], folder: Path, seconds: float) -> None:
    """Wait until all processes are done. Raises `RunError` at the first failure, or on timeout."""
    deadline = time.monotonic() + seconds
    while None in (codes := [process.poll() for process in processes]) or any(codes):
        for rank, code in enumerate(codes):
            if code:
                log = (folder / f"rank{rank}.log").read_text().splitlines()
                raise RunError("\n".join([f"Rank {rank} ended with code {code}:", *log[-20:]]))
        if time.monotonic() > deadline:
            raise RunError(
                f"The measurement was not done after --seconds {seconds:g}: give it more, or fewer "
                "--tokens or --steps."
            )
        time.sleep(0.1)


# ----------------------------------------------------------------------------------- reporting


def check_probe(ranks: list[dict], ranks_per_node: int) -> None:
    """Raise `RunError` unless traffic inside a node stays off the link."""
    for rank in ranks[::ranks_per_node]:
        probe = rank["probe"]
        if probe["inside"] < probe["payload"] or probe["link"] > 64 * 1024:
            raise RunError(
                f"Ranks of node {rank['node']} exchanged {probe['payload']} bytes; lo counted "
                f"{probe['inside']} and the link {probe['link']}: traffic inside a node is not "
                "kept off the link, so the link's counter doesn't tell what leaves the node."
            )


def payload_per_row(dispatcher: str, dim: int, top_k: int) -> int:
    """Bytes of a row that leaves its node: dispatch and combine, forward and backward.

    The baseline sends four hidden states and nothing else.
    """
    if dispatcher == "plain":
        return 4 * dim * torch.float32.itemsize
    return bytes_per_row(dim, top_k, torch.float32)


def summarise(ranks: list[dict], options: argparse.Namespace) -> list[dict]:
    """Make a line for each routing and dispatcher, in the order of the measurement."""
    lines: list[dict] = []
    plain: dict = {}  # the first of each routing
    for index, (groups, limited, dispatcher, _) in enumerate(ranks[0]["cases"]):
        line = {
            "num_expert_groups": groups,
            "num_limited_groups": limited,
            "dispatcher": dispatcher,
            **measured([rank["cases"][index][3] for rank in ranks], options),
        }
        per_row = payload_per_row(dispatcher, options.dim, options.top_k)
        line["payload_bytes"] = line["rows"] * per_row
        plain = line if dispatcher == "plain" else plain
        for what in ("rows", "link_bytes", "step_seconds"):
            line[f"{what}_of_plain"] = line[what] / plain[what]
        lines.append(line)
    return lines


def measured(steps_of_rank: list[list[dict]], options: argparse.Namespace) -> dict[str, float]:
    """Compute rows and bytes that left their node, per token; seconds of a step (median), of the
    busiest link alone, and of all ranks' work spread over all processors. Raises `RunError` where
    the dispatcher's meter is wrong.
    """
    steps_of_node = steps_of_rank[:: options.ranks_per_node]  # one rank reports a node's counters
    everyones = [step for steps in steps_of_rank for step in steps]
    tokens = options.tokens * len(everyones)
    meter = sum(step["meter"][0][2] for step in everyones)
    rows = sum(step["counted_rows"] for step in everyones)
    if meter != rows:
        raise RunError(
            f"A dispatcher's meter counted {meter} rows to other nodes, but from the router's "
            f"choices there must be {rows}."
        )
    busiest = [max(at_once, key=itemgetter("link")) for at_once in zip(*steps_of_node, strict=True)]
    rate = options.rate_mbit * 1e6 / 8 or math.inf
    return {
        "rows": rows / tokens,
        "link_bytes": sum(step["link"] for steps in steps_of_node for step in steps) / tokens,
        "step_seconds": statistics.median(step["seconds"] for step in steps_of_rank[0]),
        "link_seconds": statistics.median(step["link"] for step in busiest) / rate,
        "cpu_seconds": sum(step["cpu"] for step in everyones) / options.steps / os.cpu_count(),
    }


def routing_title(line: dict) -> str:
    groups, limited = line["num_expert_groups"], line["num_limited_groups"]
    return f"{limited} of {groups} groups" if groups else "no groups"


def table(lines: list[dict]) -> str:
    rows = [
        "| routing | dispatcher | rows | payload | on the wire | of plain "
        "| step | of plain | link | processors |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for line in lines:
        rows.append(
            f"| {routing_title(line)} | {TITLES[line['dispatcher']]} | {line['rows']:.2f} "
            f"| {line['payload_bytes'] / 1000:.1f} kB | {line['link_bytes'] / 1000:.1f} kB "
            f"| **{line['link_bytes_of_plain']:.3f}** | {line['step_seconds']:.2f} s "
            f"| {line['step_seconds_of_plain']:.2f} | {line['link_seconds']:.2f} s "
            f"| {line['cpu_seconds']:.2f} s |"
        )
    return "\n".join(rows) + "\n"


def draw(lines: list[dict], rate_mbit: float, path: Path) -> None:
    try:
        import matplotlib  # nothing else here needs it
    except ImportError:
        logger.warning("No picture, as matplotlib is missing: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    routings = list(dict.fromkeys(routing_title(line) for line in lines))
    speed = f"{rate_mbit:g} Mbit/s" if rate_mbit else "unlimited"
    panels = (
        ("link_bytes", 1e-3, "kB between nodes, a token", "forward + backward, kernel's counters"),
        ("step_seconds", 1, "seconds a step", f"step time, {speed} link of each node"),
    )
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.4), dpi=120)
    for axis, (what, scale, label, title) in zip(axes, panels, strict=True):
        for i, (name, colour) in enumerate(COLOURS.items()):
            bars = [line[what] * scale for line in lines if line["dispatcher"] == name]
            places = [place + (i - 1) * 0.27 for place in range(len(routings))]
            drawn = axis.bar(places, bars, width=0.25, color=colour, label=TITLES[name])
            axis.bar_label(drawn, fmt="%.1f" if scale < 1 else "%.2f", fontsize=7, padding=1)
        axis.set(ylabel=label, title=title)
        axis.set_xticks(range(len(routings)), routings)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path)


def main(argv: list[str] | None = None) -> int:
    """Run the script. Returns the exit code: 0 done, 1 failed, 2 user error or unsuitable machine,
    130 interrupted."""
    init_logger()
    options = parse(argv)
    # SIGTERM ends it as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        check(options)
        ranks = measure(options)
        check_probe(ranks, options.ranks_per_node)
        lines = summarise(ranks, options)
    except (UserError, RunError) as error:
        logger.error("%s", error)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        logger.error("Interrupted; the nodes are removed")
        return 130
    options.out.mkdir(parents=True, exist_ok=True)
    settings = vars(options) | {"out": str(options.out), "torch": ranks[0]["torch"]}
    record = {"settings": settings, "probe": [r["probe"] for r in ranks], "lines": lines}
    (options.out / "node_traffic.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / "node_traffic.md").write_text(table(lines))
    draw(lines, options.rate_mbit, options.out / "node_traffic.png")
    logger.info("Per token, over all nodes; also in %s:\n%s", options.out, table(lines))
    return 0


if __name__ == "__main__":
    entry.run(main)
