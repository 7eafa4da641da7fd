"""Bytes that a rank sends in a step, by axis of the layout, inside its node and between nodes.

Collectives of layers come from the traces, those of FSDP from the sizes of the weights, those of
the experts' exchange from the routing. Each of n ranks that gather a tensor in a ring sends
(n − 1)/n of it; the ranks of a node, each with its own network card, share what crosses nodes.
"""

from dataclasses import dataclass

from torchtitan.components.quantize.float8 import dispatches_float8
from torchtitan.distributed.token_dispatch import bytes_per_row
from torchtitan.planning.elements import Elements
from torchtitan.planning.ranks import PlannedRun
from torchtitan.planning.routing import Routing, copies, route, without_limit
from torchtitan.planning.trace import Traced, Traces, names_at
from torchtitan.tools.utils import TORCH_DTYPES

FP32 = 4


@dataclass(frozen=True)
class Bytes:
    """Bytes that a rank sends: to ranks of its node, and to other nodes."""

    inside: float = 0.0
    between: float = 0.0

    def __add__(self, other: "Bytes") -> "Bytes":
        return Bytes(self.inside + other.inside, self.between + other.between)

    def times(self, factor: float) -> "Bytes":
        return Bytes(self.inside * factor, self.between * factor)


@dataclass(frozen=True)
class Group:
    """Ranks that a collective joins.

    stride: from one to the next in the numbering of ranks.
    """

    size: int
    stride: int

    def spread(self, run: PlannedRun, sent: float) -> Bytes:
        """Return a rank's bytes by kind of link.

        sent: bytes by each rank in a ring of all.
        """
        near = max(1, min(self.size, run.node_size // self.stride))
        if self.size == 1:
            return Bytes()
        nodes = max(1, self.size // near)
        whole = sent * self.size / (self.size - 1)
        between = whole * (nodes - 1) / nodes / near
        return Bytes(whole * (near - 1) / near, between)


def groups(run: PlannedRun) -> dict[str, Group]:
    """Return the group of each axis.

    Ranks are numbered (pp, dp_replicate, dp_shard, cp, tp), the last fastest.
    """
    d = run.degrees
    fsdp = Group(*run.shards["dense"])
    return {
        "tp": Group(d.tp, 1),
        "cp": Group(d.cp, d.tp),
        "etp": Group(d.etp, 1),
        "ep": Group(d.ep, d.etp),
        "fsdp": fsdp,
        "expert fsdp": Group(*run.shards["experts"]),
        "replicas": Group(d.dp_replicate, fsdp.size * d.tp),
        "pp": Group(d.pp, run.stage_size),
    }


def gather_bytes(run: PlannedRun, one: Traced) -> Bytes:
    """Return the bytes to gather the weights of a layer once."""
    size = TORCH_DTYPES[run.compute_dtype].itemsize
    return _over_shards(run, one.weights.times(size) - one.saved)


def regather_bytes(run: PlannedRun, one: Traced) -> Bytes:
    """Return the bytes to gather the weights of a layer for the forward pass of a further
    micro-batch."""
    size = TORCH_DTYPES[run.compute_dtype].itemsize
    stay = one.outside - run.freed(one.outside)
    return _over_shards(run, (one.weights - stay).times(size) - one.saved)


def backward_gather_bytes(run: PlannedRun, one: Traced) -> Bytes:
    """Return the bytes to gather the weights of a layer for a backward pass."""
    return _over_shards(run, one.gathered_again) if run.reshards else Bytes()


def reduce_bytes(run: PlannedRun, one: Traced) -> Bytes:
    """Return the bytes to sum the gradients of a layer once."""
    return _over_shards(run, one.trained.times(run.bytes_of_sums) - one.saved_sums)


def _over_shards(run: PlannedRun, whole: Elements) -> Bytes:
    """Bytes to gather, or to sum, so many bytes of weights once."""
    found = Bytes()
    for name, count in (("fsdp", whole.dense), ("expert fsdp", whole.experts)):
        group = groups(run)[name]
        found += group.spread(run, count * (group.size - 1) / group.size)
    return found


def replica_bytes(run: PlannedRun, one: Traced) -> Bytes:
    """Return the bytes to sum a layer's split gradients over replicas."""
    d, trained = run.degrees, one.trained
    split = trained.dense / groups(run)["fsdp"].size
    split += trained.experts / groups(run)["expert fsdp"].size
    group = groups(run)["replicas"]
    return group.spread(run, 2 * run.bytes_of_sums * split * (d.dp_replicate - 1) / d.dp_replicate)


def layer_bytes(run: PlannedRun, traces: Traces, one: Traced) -> dict[str, tuple[Bytes, Bytes]]:
    """Return the bytes of tensor and context parallelism for one micro-batch, by axis: (forward,
    backward)."""
    found: dict[str, list[Bytes]] = {}
    for way, work in enumerate((one.forward, one.backward)):
        for (group, _), sent in work.sent.items():
            axis = traces.axis_of_group.get(group, "tp")
            if axis != "ep" and sent:
                pair = found.setdefault(axis, [Bytes(), Bytes()])
                pair[way] += groups(run)[axis].spread(run, sent)
    return {axis: (pair[0], pair[1]) for axis, pair in found.items()}


def exchange_bytes(run: PlannedRun, traces: Traces, one: Traced) -> tuple[Bytes, Bytes]:
    """Return the bytes of a layer's exchange between experts for one micro-batch: (forward,
    backward)."""
    if traces.routing is None:
        return Bytes(), Bytes()
    whole = rows_as_bytes(run, traces.routing, copies(run))
    forward, backward = exchange_shares(traces, one)
    return whole.times(forward), whole.times(backward)


def exchange_shares(traces: Traces, one: Traced) -> tuple[float, float]:
    """Return the shares of a layer's exchange, out and back for both passes, that its (forward,
    backward) pass sends: a half each, and once more the forward half where it is recomputed."""
    sent = [
        sum(n for (group, _), n in work.sent.items() if traces.axis_of_group.get(group) == "ep")
        for work in (one.forward, one.backward)
    ]
    return (0.5, round(2 * sent[1] / sent[0]) / 4) if sent[0] else (0.0, 0.0)


def rows_as_bytes(run: PlannedRun, routing: Routing, way: str) -> Bytes:
    """Return the bytes of a layer and micro-batch, of the mean rank: out and back, forward and
    backward.

    way: one copy of a token for each "expert", "rank" or "node" of it.
    """
    args, size = run.model_args, TORCH_DTYPES[run.compute_dtype]
    fp8 = dispatches_float8(run.config)
    each = bytes_per_row(args.dim, args.moe_args.top_k, size, fp8=fp8) / run.degrees.ep
    return Bytes(routing.rows[way, "node"] * each, routing.rows[way, "remote"] * each)


def send_bytes(run: PlannedRun) -> Bytes:
    """Return the bytes of a micro-batch from a pipeline stage to the next, one way."""
    if run.pipeline is None:
        return Bytes()
    size = run.bytes_between_stages
    return Bytes(0, size) if run.stage_size >= run.node_size else Bytes(size, 0)


def step_traffic(run: PlannedRun, traces: Traces, place: int) -> dict[str, Bytes]:
    """Return the bytes of a rank at this place of the pipeline, by axis, for a whole step."""
    total: dict[str, Bytes] = {}

    def add(axis: str, sent: Bytes) -> None:
        total[axis] = total.get(axis, Bytes()) + sent

    microbatches = run.passes * (run.pipeline.num_microbatches if run.pipeline else 1)
    for name in names_at(run, traces, place):
        one = traces.of_layer[name]
        add("fsdp", gather_bytes(run, one) + regather_bytes(run, one).times(run.passes - 1))
        each_pass = backward_gather_bytes(run, one) + reduce_bytes(run, one)
        add("fsdp", each_pass.times(run.passes))
        add("replicas", replica_bytes(run, one))
        for axis, (forward, backward) in layer_bytes(run, traces, one).items():
            add(axis, (forward + backward).times(microbatches))
        forward, backward = exchange_bytes(run, traces, one)
        add("ep", (forward + backward).times(microbatches))
    if run.pipeline:
        stages = len(run.pipeline.stages_of(place))
        add("pp", send_bytes(run).times(2 * stages * microbatches))
    return {axis: sent for axis, sent in total.items() if sent.inside or sent.between}


def dispatch_table(run: PlannedRun, routing: Routing) -> dict[tuple[str, str], Bytes]:
    """Return the bytes of a layer and micro-batch by dispatcher, with and without group limit.

    Keys: (copies, limit): one copy for each "expert", "rank" or "node"; "as configured", or "no
    groups" where the model has them.
    """
    found = {(way, "as configured"): rows_as_bytes(run, routing, way) for way in WAYS}
    args = run.model_args.moe_args
    if args.num_expert_groups:
        how = {"tokens": routing.tokens, "ep": run.degrees.ep, "nodes": run.nodes_per_ep_group}
        free = route(without_limit(args), **how)
        found |= {(way, "no groups"): rows_as_bytes(run, free, way) for way in WAYS}
    return found


WAYS = ("expert", "rank", "node")
