"""Time of a step: computation by part, exposed communication, the pipeline's idle time, the
optimizer."""

from dataclasses import dataclass, field
from functools import partial
from typing import Self

from torchtitan.planning.hardware import Hardware
from torchtitan.planning.pipeline import Action, Pass, length, play
from torchtitan.planning.ranks import PlannedRun
from torchtitan.planning.routing import Routing, copies
from torchtitan.planning.state import State
from torchtitan.planning.trace import Traced, Traces, names_at, names_of
from torchtitan.planning.traffic import (
    FP32,
    Bytes,
    backward_gather_bytes,
    exchange_shares,
    gather_bytes,
    layer_bytes,
    reduce_bytes,
    regather_bytes,
    replica_bytes,
    rows_as_bytes,
    send_bytes,
)

# Of a pipeline's half backward pass for the inputs; the rest is for the weights.
SHARE_FOR_INPUTS = 0.55


class Seconds(dict[str, float]):
    """Times by name, in seconds."""

    @property
    def total(self) -> float:
        return sum(self.values())

    def add(self, name: str, seconds: float) -> None:
        self[name] = self.get(name, 0.0) + seconds

    def plus(self, other: Self) -> "Seconds":
        names = dict.fromkeys((*self, *other))
        return Seconds({name: self.get(name, 0.0) + other.get(name, 0.0) for name in names})

    def times(self, factor: float) -> "Seconds":
        return Seconds({name: seconds * factor for name, seconds in self.items()})


@dataclass(frozen=True)
class StepTime:
    """Time of a step.

    seconds: the whole step.
    parts: seconds by name, of the rank that the step waits for; they add up to the step.
    timeline: of each rank of the pipeline, over one pass of all micro-batches.
    """

    seconds: float
    parts: dict[str, float]
    timeline: list[list[Pass]] = field(default_factory=list)


@dataclass(frozen=True)
class Speed:
    """Speed of a run, by its step time."""

    tokens_per_second: float
    tokens_per_second_per_gpu: float
    tflops_per_gpu: float
    mfu: float


def speed_of(run: PlannedRun, hardware: Hardware, time: StepTime) -> Speed:
    tokens = run.tokens_per_step / time.seconds
    per_gpu = tokens / run.world_size
    flops = per_gpu * run.model_args.train_flops_per_token(run.now.seq_len)
    return Speed(tokens, per_gpu, flops / 1e12, flops / hardware.peak_flops)


def gpu_hours(tokens: float, speed: Speed) -> float:
    """Return the cost of training on so many tokens."""
    return tokens / speed.tokens_per_second_per_gpu / 3600


def step_time(
    run: PlannedRun,
    traces: Traces,
    states: dict[int, State],
    hardware: Hardware,
    by_rank: list[list[Action]],
) -> StepTime:
    """Return the time of a step.

    states: of each distinct place of the pipeline.
    by_rank: actions of its schedule.
    """
    clock = _Clock(run, traces, hardware)
    if run.pipeline is None:
        parts = clock.whole_step()
        timeline: list[list[Pass]] = []
    else:
        parts, timeline = clock.pipelined_step(by_rank)
    parts.add("optimizer", max(clock.optimizer(state) for state in states.values()))
    return StepTime(parts.total, dict(parts), timeline)


def exchange_seconds(run: PlannedRun, routing: Routing, hardware: Hardware) -> float:
    """Return the time of a layer's exchange between experts for one micro-batch, out and back for
    both passes, on the rank that gets the most.

    All-to-all uses both kinds of links at the same time. Node-limited goes between nodes first and
    then inside the node, and its second hop costs time beyond its bytes.
    """
    way = copies(run)
    inside, between = _on_links(hardware, rows_as_bytes(run, routing, way))
    if way == "rank":
        return max(inside, between) * routing.rank_skew
    return (inside + between) * routing.rank_skew + hardware.second_hop_ms / 1e3


def _on_links(hardware: Hardware, sent: Bytes) -> tuple[float, float]:
    """Return the seconds that bytes take (inside the node, between nodes)."""
    inside, between = hardware.nvlink_gb_s * 1e9, hardware.network_gb_s * 1e9
    return sent.inside / inside, sent.between / between


class _Clock:
    def __init__(self, run: PlannedRun, traces: Traces, hardware: Hardware) -> None:
        self.run, self.traces, self.hardware = run, traces, hardware
        self._times: dict[int, tuple[Seconds, Seconds]] = {}

    def whole_step(self) -> Seconds:
        """Time without a pipeline: FSDP's communication hides behind its layer's work."""
        run, parts = self.run, Seconds()
        replicas, exposed = Bytes(), 0.0
        for name in names_at(run, self.traces, 0):
            one = self.traces.of_layer[name]
            forward, backward = self.times(one)
            again = self.sending(regather_bytes(run, one))
            back = self.sending(backward_gather_bytes(run, one) + reduce_bytes(run, one))
            for gather in (self.sending(gather_bytes(run, one)), *[again] * (run.passes - 1)):
                exposed += max(0.0, gather - forward.total) + max(0.0, back - backward.total)
            parts = parts.plus(forward).plus(backward)
            parts.add("elementwise", self._adding(one))
            replicas += replica_bytes(run, one)
        parts = parts.times(run.passes)
        parts.add("weights sent", exposed + self.sending(replicas))
        return parts

    def pipelined_step(self, by_rank: list[list[Action]]) -> tuple[Seconds, list[list[Pass]]]:
        """Time of the busiest rank; the rest of the schedule's length is idle time."""
        run = self.run
        assert run.pipeline is not None
        stages = {s: self._stage_times(s) for s in range(len(run.pipeline.stages))}
        played = play(by_rank, partial(_seconds, stages), self.sending(send_bytes(run)))
        busiest = Seconds()
        for place in range(run.degrees.pp):
            mine = Seconds()
            for stage in run.pipeline.stages_of(place):
                mine = mine.plus(stages[stage][0]).plus(stages[stage][1])
            busiest = max(busiest, mine, key=lambda seconds: seconds.total)
        parts = busiest.times(run.pipeline.num_microbatches)
        parts.add("pipeline idle", length(played) - parts.total)
        parts = parts.times(run.passes)
        parts.add("weights sent", max(self._weights_sent(place) for place in run.places()))
        return parts, played

    def _weights_sent(self, place: int) -> float:
        """Seconds to gather weights before the first micro-batch, and to sum gradients after the
        last: nothing runs beside that."""
        total = Bytes()
        for name in names_at(self.run, self.traces, place):
            one = self.traces.of_layer[name]
            each = gather_bytes(self.run, one) + reduce_bytes(self.run, one)
            total += each.times(self.run.passes) + replica_bytes(self.run, one)
        return self.sending(total)

    def _adding(self, one: Traced) -> float:
        """Seconds to read and write fp32 sums of gradients, which the trace doesn't have."""
        run = self.run
        if not run.sums_gradients or (run.world_size > 1 and run.pipeline is None):
            return 0.0  # FSDP adds up what a rank keeps, which is little
        elements = one.trained.gathered if run.pipeline else one.trained.alone
        return 2 * FP32 * elements / self.hardware.bytes_per_second

    def _stage_times(self, stage: int) -> tuple[Seconds, Seconds]:
        forward, backward = Seconds(), Seconds()
        for name in names_of(self.run, stage):
            one = self.traces.of_layer[name]
            f, b = self.times(one)
            forward, backward = forward.plus(f), backward.plus(b)
            backward.add("elementwise", self._adding(one))
        return forward, backward

    def times(self, one: Traced) -> tuple[Seconds, Seconds]:
        """Times of the forward and backward pass of a part of the model."""
        if id(one) not in self._times:
            self._times[id(one)] = self._pass(one, 0), self._pass(one, 1)
        return self._times[id(one)]

    def _pass(self, one: Traced, way: int) -> Seconds:
        """Time of one pass.

        way: 0 forward, 1 backward.
        """
        h, routing = self.hardware, self.traces.routing
        work = one.backward if way else one.forward
        rates = {
            "gemm": h.gemm,
            "grouped": h.grouped,
            "fp8 gemm": h.fp8_gemm or h.gemm,
            "fp8 grouped": h.fp8_grouped or h.grouped,
            "attention": h.attention_backward if way else h.attention_forward,
        }
        found = Seconds()
        for kind, flops in work.flops.items():
            found.add(_NAMES[kind], flops / (h.peak_flops * rates[kind]) * (1 + h.host))
        moved = work.bytes_moved + work.bytes_fused
        found.add("elementwise", moved / h.bytes_per_second * (1 + h.host))
        if routing:
            share = exchange_shares(self.traces, one)[way] * (1 - h.hidden)
            found.add("experts' exchange", share * exchange_seconds(self.run, routing, h))
        for axis, pair in layer_bytes(self.run, self.traces, one).items():
            found.add(f"{axis} communication", self.sending(pair[way]))
        return found

    def sending(self, sent: Bytes) -> float:
        """Seconds on both kinds of links, which work at the same time."""
        return max(_on_links(self.hardware, sent))

    def optimizer(self, state: State) -> float:
        """Seconds to read all that is trained once, gradients once more for the norm, and to write
        all but gradients."""
        moved = 2 * (state.trained + state.optimizer) + state.copies + 2 * state.gradients
        return moved / self.hardware.bytes_per_second


_NAMES = {
    "gemm": "matrix products",
    "grouped": "experts",
    "fp8 gemm": "matrix products in FP8",
    "fp8 grouped": "experts",
    "attention": "attention",
}


def _seconds(stages: dict[int, tuple[Seconds, Seconds]], one: Action) -> float:
    forward, backward = stages[one.stage]
    if one.kind == "F":
        return forward.total
    return backward.total * {"B": 1, "I": SHARE_FOR_INPUTS, "W": 1 - SHARE_FOR_INPUTS}[one.kind]
