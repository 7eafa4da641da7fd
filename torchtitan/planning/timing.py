"""The time of a step: computation by part, communication that nothing hides, the pipeline's idle
time, the optimizer."""

from collections import Counter
from dataclasses import dataclass, field

from torchtitan.planning.hardware import Hardware
from torchtitan.planning.ledger import Work
from torchtitan.planning.pipeline import Action, Pass, length, play
from torchtitan.planning.ranks import PlannedRun
from torchtitan.planning.state import State
from torchtitan.planning.trace import Traced, Traces
from torchtitan.planning.traffic import (
    Bytes,
    exchange_bytes,
    gather_bytes,
    layer_bytes,
    names_at,
    names_of,
    reduce_bytes,
    replica_bytes,
    send_bytes,
)

# Of a pipeline's half backward pass for the inputs; the rest is for the weights.
SHARE_FOR_INPUTS = 0.55


@dataclass(frozen=True)
class StepTime:
    """seconds: of the step. parts: of the rank that the step waits for, by name, which add up to
    it. timeline: of each rank of the pipeline, over one pass of all micro-batches."""

    seconds: float
    parts: dict[str, float]
    timeline: list[list[Pass]] = field(default_factory=list)


@dataclass(frozen=True)
class Speed:
    """What a step time comes to. model_flops: what MFU counts, of a GPU and step."""

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
    """To train on so many tokens."""
    return tokens / speed.tokens_per_second_per_gpu / 3600


def step_time(
    run: PlannedRun,
    traces: Traces,
    states: dict[int, State],
    hardware: Hardware,
    by_rank: list[list[Action]],
) -> StepTime:
    """states: of each distinct place of the pipeline. by_rank: actions of its schedule."""
    clock = _Clock(run, traces, hardware)
    if run.pipeline is None:
        parts = clock.whole_step()
        timeline: list[list[Pass]] = []
    else:
        parts, timeline = clock.pipelined_step(by_rank)
    parts["optimizer"] = max(clock.optimizer(state) for state in states.values())
    return StepTime(sum(parts.values()), dict(parts), timeline)


class _Clock:
    def __init__(self, run: PlannedRun, traces: Traces, hardware: Hardware) -> None:
        self.run, self.traces, self.hardware = run, traces, hardware
        self._times: dict[int, tuple[Counter[str], Counter[str]]] = {}

    def whole_step(self) -> Counter[str]:
        """FSDP's communication runs beside the layers' work, layer by layer."""
        run, parts = self.run, Counter[str]()
        reshards = run.config.parallelism.fsdp_reshard_after_forward != "never"
        replicas = Bytes()
        for name in names_at(run, self.traces, 0):
            one = self.traces.of_layer[name]
            forward, backward = self.times(one)
            gather, reduce = (
                self.sending(gather_bytes(run, one)),
                self.sending(reduce_bytes(run, one)),
            )
            hidden = (max(0.0, gather - forward.total()), 0.0)
            again = gather * reshards + reduce
            hidden = hidden[0], max(0.0, again - backward.total())
            parts += forward + backward + Counter({"weights sent": sum(hidden)})
            parts["elementwise"] += self._adding(one)
            replicas += replica_bytes(run, one)
        for name in parts:
            parts[name] *= run.passes
        parts["weights sent"] += self.sending(replicas)
        return parts

    def pipelined_step(self, by_rank: list[list[Action]]) -> tuple[Counter[str], list[list[Pass]]]:
        """Of the rank that works the most; the rest of the schedule's length is idle time."""
        run = self.run
        assert run.pipeline is not None
        stages = {s: self._stage_times(s) for s in range(len(run.pipeline.stages))}
        seconds = {s: (f.total(), b.total()) for s, (f, b) in stages.items()}
        played = play(by_rank, lambda one: _seconds(one, seconds), self.sending(send_bytes(run)))
        n = run.pipeline.num_microbatches
        busiest, work = Counter[str](), 0.0
        for place in range(run.degrees.pp):
            mine = Counter[str]()
            for stage in run.pipeline.stages_of(place):
                for part in stages[stage]:
                    mine += Counter({name: n * t for name, t in part.items()})
            if mine.total() > work:
                busiest, work = mine, mine.total()
        parts = Counter({name: t * run.passes for name, t in busiest.items()})
        parts["pipeline idle"] = (length(played) - work) * run.passes
        weights = max(self._weights_sent(place) for place in run.places())
        parts["weights sent"] += weights
        return parts, played

    def _weights_sent(self, place: int) -> float:
        """A pipeline gathers its weights before the first micro-batch, and sums gradients behind
        the last: nothing runs beside that."""
        total = Bytes()
        for name in names_at(self.run, self.traces, place):
            one = self.traces.of_layer[name]
            each = gather_bytes(self.run, one) + reduce_bytes(self.run, one)
            total += each.times(self.run.passes) + replica_bytes(self.run, one)
        return self.sending(total)

    def _adding(self, one: Traced) -> float:
        """Seconds to add a micro-batch's gradients to those before, beside what the trace has: read
        and written in fp32."""
        if not self.run.sums_gradients:
            return 0.0
        whole = self.run.world_size == 1 or self.run.pipeline is not None
        elements = one.gradients / 4 if self.run.world_size == 1 else one.gathered_elements
        return 8 * elements / self.hardware.bytes_per_second if whole else 0.0

    def _stage_times(self, stage: int) -> tuple[Counter[str], Counter[str]]:
        forward, backward = Counter[str](), Counter[str]()
        for name in names_of(self.run, stage):
            f, b = self.times(self.traces.of_layer[name])
            forward, backward = forward + f, backward + b
            backward["elementwise"] += self._adding(self.traces.of_layer[name])
        return forward, backward

    def times(self, one: Traced) -> tuple[Counter[str], Counter[str]]:
        """Seconds of the forward and backward pass of a part, by what takes them."""
        if id(one) not in self._times:
            h = self.hardware
            exchange = exchange_bytes(self.run, self.traces, one)
            others = layer_bytes(self.run, self.traces, one)
            both = []
            for way, work in enumerate((one.forward, one.backward)):
                seconds = self._work(work, h.attention_backward if way else h.attention_forward)
                sent = exchange[way]
                skew = self.traces.routing.rank_skew if self.traces.routing else 1.0
                seconds["experts' exchange"] = self.sending(sent) * skew * (1 - h.hidden)
                for axis, pair in others.items():
                    seconds[f"{axis} communication"] = self.sending(pair[way])
                both.append(+seconds)
            self._times[id(one)] = both[0], both[1]
        return self._times[id(one)]

    def _work(self, work: Work, attention: float) -> Counter[str]:
        h = self.hardware
        rates = {"gemm": h.gemm, "grouped": h.grouped, "attention": attention}
        seconds = {
            _NAMES[kind]: flops / (h.peak_flops * rates[kind]) * (1 + h.host)
            for kind, flops in work.flops.items()
        }
        moved = work.bytes_moved + work.bytes_fused
        seconds["elementwise"] = moved / h.bytes_per_second * (1 + h.host)
        return Counter(seconds)

    def sending(self, sent: Bytes) -> float:
        """Both kinds of links work at the same time."""
        h = self.hardware
        return max(sent.inside / (h.nvlink_gb_s * 1e9), sent.between / (h.network_gb_s * 1e9))

    def optimizer(self, state: State) -> float:
        """Everything is read once and all but gradients written, gradients read once more for the
        norm."""
        moved = 2 * (state.parameters + state.optimizer) + state.copies + 2 * state.gradients
        return moved / self.hardware.bytes_per_second


_NAMES = {"gemm": "matrix products", "grouped": "experts", "attention": "attention"}


def _seconds(one: Action, seconds: dict[int, tuple[float, float]]) -> float:
    forward, backward = seconds[one.stage]
    if one.kind == "F":
        return forward
    return backward * {"B": 1, "I": SHARE_FOR_INPUTS, "W": 1 - SHARE_FOR_INPUTS}[one.kind]
