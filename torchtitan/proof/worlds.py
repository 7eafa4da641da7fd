"""Smaller worlds that keep each axis of a layout, and each pair of axes.

A world that this machine can start is kept as it is. From a larger one, worlds are made in which
every axis has the size 2 or is left out, the fewest that have each pair of the layout's axes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations, product

from torchtitan.config import Degrees, JobConfig, Parallelism, resolve_degrees
from torchtitan.config.degrees import divisors
from torchtitan.tools.errors import UserError
from torchtitan.tools.launcher import MOST_PROCESSES

# Names of the axes, in the order of the report.
PP, REPLICAS, FSDP, CP, TP = "PP", "replicas (DDP, HSDP)", "FSDP", "CP", "TP"
EP_BETWEEN, EP_WITHIN = "EP between nodes", "EP inside a node"
EXPERT_FSDP, ETP, EP_OVER_REPLICAS = "FSDP of experts", "split experts", "EP over replicas"
Axes = frozenset[str]


@dataclass(frozen=True)
class World:
    """Degrees of all axes, and the consecutive processes of a node."""

    degrees: Degrees
    node_size: int

    @property
    def size(self) -> int:
        d = self.degrees
        return d.pp * d.dp_replicate * d.dp_shard * d.cp * d.tp

    @property
    def dp_degree(self) -> int:
        return self.degrees.dp_replicate * self.degrees.dp_shard

    @property
    def nodes(self) -> int:
        """Nodes that an EP group spans."""
        return max(1, self.degrees.ep * self.degrees.etp // self.node_size)

    @property
    def axes(self) -> Axes:
        """Names of the axes that are larger than 1."""
        d = self.degrees
        replica, experts = d.dp_shard * d.cp * d.tp, d.ep * d.etp
        sizes = {
            PP: d.pp,
            REPLICAS: d.dp_replicate,
            FSDP: d.dp_shard,
            CP: d.cp,
            TP: d.tp,
            EP_BETWEEN: self.nodes,
            EP_WITHIN: d.ep // self.nodes,
            EXPERT_FSDP: replica // experts if experts > 1 else 1,
            ETP: d.etp,
            EP_OVER_REPLICAS: experts // replica,
        }
        return frozenset(name for name, size in sizes.items() if size > 1)

    def describe(self) -> str:
        parts = [f"{name} {n}" for name, n in self.degrees._asdict().items() if n > 1]
        if self.nodes > 1:
            parts.append(f"nodes of {self.node_size}")
        count = f"{self.size} process{'es' if self.size > 1 else ''}"
        return f"{count} ({', '.join(parts)})" if parts else count


def world_of(config: JobConfig, world_size: int | None, node_size: int) -> World:
    """Return the world of the user's run. Raises `UserError` for an impossible size.

    world_size: None takes the smallest that the degrees allow, with data parallelism.
    node_size: processes of a machine, where the TOML doesn't say it.
    """
    if world_size is None:
        world_size = _smallest(config)
    elif not 1 <= world_size <= MOST_PROCESSES:
        raise UserError(
            f"--world-size {world_size} must be a number of processes from 1 to "
            f"{MOST_PROCESSES:,}; give that of the run."
        )
    degrees = resolve_degrees(config.parallelism, world_size)
    told, span = config.parallelism.expert_parallel_node_size, degrees.ep * degrees.etp
    if told is not None:
        return World(degrees, told)
    local = min(node_size, world_size)
    # As trainer/build.py: an EP group that begins in the middle of a node counts in shared parts.
    whole = 0 in (local % span, span % local)
    return World(degrees, local if whole else max(n for n in divisors(span) if local % n == 0))


def _smallest(config: JobConfig) -> int:
    """Return the smallest number of processes that the degrees allow, with at least two
    data-parallel ranks where their number is left open. Raises `UserError` where there is none."""
    p = config.parallelism
    fixed = p.pipeline_parallel_degree * p.tensor_parallel_degree * p.context_parallel_degree
    fixed *= p.data_parallel_replicate_degree
    shards = [p.data_parallel_shard_degree]
    if shards == [-1]:
        shards = [*range(2, 1025), *(2**n for n in range(11, 17))]
    if fixed * shards[0] > MOST_PROCESSES:
        raise UserError(
            f"the degrees in [parallelism] multiply to {fixed * shards[0]:,} processes, but a run "
            f"has at most {MOST_PROCESSES:,}; lower the largest of them."
        )
    for shard in shards:
        try:
            resolve_degrees(p, max(1, fixed * shard))
        except UserError:
            continue
        return fixed * shard
    resolve_degrees(p, max(1, fixed * shards[0]))
    raise AssertionError("unreachable: the first of them is refused")


def targets_of(axes: Iterable[str]) -> set[Axes]:
    """Return each axis alone, and each pair."""
    names = sorted(axes)
    return {frozenset(c) for size in (1, 2) for c in combinations(names, size)}


def worlds_for(world: World, parallelism: Parallelism, most: int) -> tuple[list[World], set[Axes]]:
    """Return worlds of at most `most` processes to start in place of `world`, and what none has.

    parallelism: of the run; a schedule from a file keeps its pipeline's degree.
    """
    if world.size <= most:
        return [world], set()
    fixed_pp = bool(parallelism.pipeline_parallel_schedule_csv)
    candidates = [
        small
        for small in _smaller(world, world.degrees.pp if fixed_pp else 2)
        if small.size <= most and small.axes <= world.axes
    ]
    missing, chosen = targets_of(world.axes), []
    while missing:
        best = max(candidates, key=lambda each: _gain(each, missing), default=None)
        if best is None or not targets_of(best.axes) & missing:
            break
        chosen.append(best)
        missing -= targets_of(best.axes)
    return chosen, missing


def _gain(world: World, missing: set[Axes]) -> tuple[int, int, int]:
    """Rank a candidate: by what it adds, then the smaller, then the one with more axes."""
    return len(targets_of(world.axes) & missing), -world.size, len(world.axes)


def _smaller(world: World, pp: int) -> Iterator[World]:
    """Yield every world with degrees of 1 and 2, and as much data parallelism as experts' axes
    need."""
    d = world.degrees
    kept = [
        sorted({1, size} if size > 1 else {1})
        for size in (min(d.pp, pp), min(d.cp, 2), min(d.tp, 2))
    ]
    replicas = [1, 2, 4] if d.dp_replicate > 1 else [1]
    shards = [1, 2, 4, 8, 16] if d.dp_shard > 1 else [1]
    for (pp, cp, tp), replicate, shard in product(product(*kept), replicas, shards):
        size = pp * replicate * shard * cp * tp
        etps = {1, tp} if d.etp > 1 else {1}
        for ep, etp, nodes in product([1, 2, 4] if d.ep > 1 else [1], etps, [1, 2]):
            if ep % nodes:
                continue
            small = Parallelism(
                pipeline_parallel_degree=pp,
                data_parallel_replicate_degree=replicate,
                context_parallel_degree=cp,
                tensor_parallel_degree=tp,
                expert_parallel_degree=ep,
                expert_tensor_parallel_degree=etp,
                expert_parallel_node_size=ep * etp // nodes,
            )
            try:
                yield World(resolve_degrees(small, size), ep * etp // nodes)
            except UserError:
                continue
