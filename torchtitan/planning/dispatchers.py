"""Dispatchers compared on networks of several speeds: one copy of a token per rank, or per node."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torchtitan.planning.hardware import REACHED, Hardware
from torchtitan.planning.pipeline import actions_of
from torchtitan.planning.ranks import PlannedRun
from torchtitan.planning.routing import Routing
from torchtitan.planning.state import State
from torchtitan.planning.timing import exchange_seconds, step_time
from torchtitan.planning.trace import trace_run
from torchtitan.planning.traffic import rows_as_bytes
from torchtitan.tools.errors import UserError

DISPATCHERS = ("all_to_all", "node_limited")


@dataclass(frozen=True)
class Dispatched:
    """A run with one dispatcher on one network.

    gbits: of each GPU's network, in Gbit/s.
    exchange_seconds: of a layer and micro-batch, forward and backward, where nothing is recomputed.
    """

    dispatcher: str
    gbits: float
    exchange_seconds: float
    step_seconds: float


def check_networks(run: PlannedRun, networks: Sequence[Hardware]) -> None:
    """Raise `UserError` for networks that would change nothing."""
    given = "--network-gbits " + " ".join(f"{each.network_gbits:g}" for each in networks)
    if networks and run.world_size <= run.node_size:
        raise UserError(
            f"{given}: all {run.world_size} GPUs are on one node, so nothing crosses a network; "
            "leave it out, or plan more GPUs (--world-size)."
        )
    if len(networks) > 1 and run.nodes_per_ep_group == 1:
        raise UserError(
            f"{given} compares dispatchers between nodes, but the EP group of "
            f"{run.degrees.ep} is inside a node of {run.node_size}; name one speed, or raise "
            "parallelism.expert_parallel_degree."
        )


def compare_dispatchers(
    run: PlannedRun, states: dict[int, State], networks: Sequence[Hardware], skew: float
) -> list[Dispatched]:
    """Plan a run whose EP group spans nodes with each dispatcher on each network.

    states: of each distinct place of the pipeline.
    networks: the hardware on each.
    skew: largest load of an expert over the mean.
    """
    by_rank = actions_of(run.pipeline) if run.pipeline else []
    found = []
    for dispatcher in DISPATCHERS:
        parallelism = replace(run.config.parallelism, expert_parallel_dispatch=dispatcher)
        other = replace(run, config=replace(run.config, parallelism=parallelism))
        traces = trace_run(other, skew)
        assert traces.routing is not None
        for hardware in networks:
            exchange = exchange_seconds(other, traces.routing, hardware)
            step = step_time(other, traces, states, hardware, by_rank)
            found.append(Dispatched(dispatcher, hardware.network_gbits, exchange, step.seconds))
    return found


def break_even(run: PlannedRun, routing: Routing, hardware: Hardware) -> float:
    """Return the network's speed, in Gbit/s a GPU, at which both dispatchers' exchange takes as
    long: node-limited is the faster one below it, and never where this is 0."""
    by_rank, by_node = (rows_as_bytes(run, routing, way) for way in ("rank", "node"))
    saved = (by_rank.between - by_node.between) * routing.rank_skew
    if saved <= 0:
        return 0.0
    inside = by_node.inside * routing.rank_skew / (hardware.nvlink_gb_s * 1e9)
    return saved / (inside + hardware.second_hop_ms / 1e3) * 8 / 1e9 / REACHED
