"""Memory of each rank over a step, and the moment at which it is fullest.

State comes from state.py, layers' passes from trace.py. FSDP adds (fsdp2 of torch 2.11-2.13):

    forward    the gathered weights of a layer and, from the moment that it is asked for, the buffer
               in which the next one's arrive
    backward   the same, and of the layer behind it the buffer whose sum is under way
    pipeline   weights stay gathered over the step, and gradients add up, whole
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torchtitan.planning.closed import kept_gradients
from torchtitan.planning.pipeline import Action
from torchtitan.planning.ranks import PlannedRun
from torchtitan.planning.state import State
from torchtitan.planning.trace import Traced, Traces, names_at, names_of

# In the order in which they are shown.
PARTS = (
    "parameters",
    "optimizer state",
    "copies of weights",
    "gradients",
    "gathered weights",
    "activations",
    "temporaries",
    "buffers",
)


@dataclass(frozen=True)
class Moment:
    """Memory of a rank at a moment of the step.

    parts: bytes by name (PARTS).
    """

    what: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class RankMemory:
    """Memory of one rank.

    alike: ranks of its place along the pipeline, from it on.
    others: number of places that are like it.
    peak: the moment that needs the most.
    """

    rank: int
    alike: int
    others: int
    stages: list[int]
    state: State
    peak: Moment
    most_in_flight: int


def memory_of(
    run: PlannedRun, traces: Traces, state: State, place: int, actions: list[Action]
) -> RankMemory:
    """Walk through a step of a rank, and find its peak.

    place: of the rank along the pipeline.
    actions: of its schedule, empty without a pipeline.
    """
    whole = state
    if run.config.training.enable_cpu_offload:  # it lives on the host
        state = replace(state, parameters=0, gradients=0, optimizer=0)
    walk = _Walk(run, traces, state, place)
    if actions:
        walk = _Pipelined(run, traces, state, place, actions)
    peak = max(walk.moments(), key=lambda moment: moment.total)
    return RankMemory(
        rank=place * run.stage_size,
        alike=run.stage_size,
        others=len(run.places()[place]) - 1,
        stages=run.pipeline.stages_of(place) if run.pipeline else [],
        state=whole,
        peak=peak,
        most_in_flight=walk.most_in_flight,
    )


class _Walk:
    """Walks through one step of a rank without a pipeline."""

    most_in_flight = 1

    def __init__(self, run: PlannedRun, traces: Traces, state: State, place: int) -> None:
        self.run, self.state = run, state
        self.names = names_at(run, traces, place)
        self.traced = [traces.of_layer[name] for name in self.names]

    def moments(self) -> Iterator[Moment]:
        """Yield the moments of the fullest micro-batch: the last, where several are added up."""
        grads = self.state.gradients if self.run.sums_gradients else 0
        kept = 0
        last = len(self.traced) - 1
        for i, one in enumerate(self.traced):
            arriving = self._gathered(i + 1) if i < last else 0
            gathered = self._held(i, forward=True) + arriving
            passing = max(0, one.forward_peak - one.kept)
            yield self._moment(
                f"forward pass, {self._title(i)}", kept + one.kept, passing, grads, gathered
            )
            kept += one.kept
        summing = 0
        for i in range(last, -1, -1):
            one = self.traced[i]
            kept -= one.kept
            arriving = self._gathered_again(i - 1) if i else 0
            gathered = self._held(i, forward=False) + arriving
            passing = one.backward_peak - one.kept + summing
            yield self._moment(
                f"backward pass, {self._title(i)}", kept + one.kept, passing, grads, gathered
            )
            grads += self._new_gradients(one)
            # The whole gradients, and their copy in the dtype of the sum or what other ranks send.
            summing = self.run.bytes_of_sums * one.trained.gathered - one.saved_sums.gathered
            whole = one.gathered_gradients + summing + self._output(i - 1)
            yield self._moment(f"sum of gradients, {self._title(i)}", kept, whole, grads, gathered)
        yield self._moment("optimizer step", 0, self.state.step_peak, self.state.gradients, 0)

    def _title(self, i: int) -> str:
        name = self.names[i]
        return f"layer {name}" if name.isdecimal() else name

    def _output(self, i: int) -> int:
        return self.traced[i].output if i >= 0 else 0

    def _gathered(self, i: int) -> int:
        """Bytes that arrive for a layer: none where nothing is gathered anew."""
        return self.traced[i].gathered if self.run.reshards else 0

    def _gathered_again(self, i: int) -> int:
        return self.traced[i].gathered_again.gathered if self.run.reshards else 0

    def _held(self, i: int, *, forward: bool) -> int:
        if not self.run.reshards:
            return sum(one.gathered for one in self.traced)
        # The head's stay between the passes.
        stays = i == len(self.traced) - 1
        return self.traced[i].gathered if forward or stays else self._gathered_again(i)

    def _new_gradients(self, one: Traced) -> int:
        if self.run.sums_gradients or self.run.config.optimizer.early_step_in_backward:
            return 0
        return kept_gradients(self.run, one)

    def _moment(
        self, what: str, activations: int, passing: int, grads: int, gathered: int
    ) -> Moment:
        state = self.state
        parts = (
            state.parameters,
            state.optimizer,
            state.copies,
            min(grads, state.gradients),
            gathered,
            activations,
            passing,
            state.buffers,
        )
        return Moment(what, dict(zip(PARTS, parts, strict=True)))


class _Pipelined(_Walk):
    """Walks through the actions of a rank's schedule."""

    def __init__(
        self, run: PlannedRun, traces: Traces, state: State, place: int, actions: list[Action]
    ) -> None:
        super().__init__(run, traces, state, place)
        assert run.pipeline is not None
        self.actions = actions
        self.stages = {
            stage: [traces.of_layer[name] for name in names_of(run, stage)]
            for stage in run.pipeline.stages_of(place)
        }
        self.most_in_flight = 0

    def moments(self) -> Iterator[Moment]:
        every = [one for stage in self.stages.values() for one in stage]
        gathered = sum(one.gathered for one in every)
        size = self.run.bytes_of_sums
        whole_grads = size * sum(one.trained.gathered for one in every)
        grads = self.state.gradients if self.run.passes > 1 else 0
        whole = 0
        in_flight: dict[tuple[int, int], int] = {}
        for action in self.actions:
            stage = self.stages[action.stage]
            kept = sum(one.kept for one in stage) + self._handed_over(action.stage)
            held = sum(in_flight.values())
            here = action.stage, action.microbatch
            where = f"stage {action.stage}, micro-batch {action.microbatch}"
            if action.kind == "F":
                passing = max(one.forward_peak - one.kept for one in stage)
                in_flight[here] = kept
                self.most_in_flight = max(self.most_in_flight, len(in_flight))
                yield self._moment(
                    f"forward pass of {where}", held + kept, passing, grads + whole, gathered
                )
            elif action.kind in "BI":
                whole = max(whole, sum(size * one.trained.gathered for one in stage))
                whole = min(whole_grads, whole if len(self.stages) == 1 else whole_grads)
                passing = max(one.backward_peak - one.kept for one in stage)
                yield self._moment(
                    f"backward pass of {where}", held, passing, grads + whole, gathered
                )
            if action.kind in "BW":
                in_flight.pop(here, None)
        largest = max(size * one.trained.gathered for one in every)
        yield self._moment("sum of gradients", 0, largest, grads + whole_grads, gathered)
        yield self._moment(
            "optimizer step", 0, self.state.step_peak, self.state.gradients, gathered
        )

    def _handed_over(self, stage: int) -> int:
        """Bytes that came from the stage before, and of what else goes to the next one."""
        run = self.run
        assert run.pipeline is not None
        came = run.bytes_between_stages if stage > 0 else 0
        goes = run.bytes_between_stages if stage < len(run.pipeline.stages) - 1 else 0
        extra = goes if run.model_args.stage_channels > run.model_args.dim else 0
        return came + extra

    def _moment(
        self, what: str, activations: int, passing: int, grads: int, gathered: int
    ) -> Moment:
        moment = super()._moment(what, activations, passing, 0, gathered)
        return Moment(what, moment.parts | {"gradients": grads})
