"""A whole plan: config → ranks → memory, traffic → time."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torchtitan.config import JobConfig
from torchtitan.planning.dispatchers import Dispatched, check_networks, compare_dispatchers
from torchtitan.planning.hardware import Hardware
from torchtitan.planning.memory import RankMemory, memory_of
from torchtitan.planning.pipeline import Action, actions_of
from torchtitan.planning.ranks import PlannedRun, built_rank, plan_run
from torchtitan.planning.state import State, state_of
from torchtitan.planning.timing import Speed, StepTime, gpu_hours, speed_of, step_time
from torchtitan.planning.trace import Traces, trace_run
from torchtitan.planning.traffic import Bytes, dispatch_table, step_traffic


@dataclass(frozen=True)
class Plan:
    """A planned run.

    memory: of each distinct place of the pipeline.
    traffic: of the first rank of each such place, by axis.
    dispatch: of one expert layer, see `dispatch_table`.
    dispatchers: the run with each of them on each network that was asked for.
    """

    run: PlannedRun
    hardware: Hardware
    traces: Traces
    memory: list[RankMemory]
    traffic: dict[int, dict[str, Bytes]]
    dispatch: dict[tuple[str, str], Bytes]
    time: StepTime
    speed: Speed
    dispatchers: list[Dispatched] = field(default_factory=list)

    @property
    def worst(self) -> RankMemory:
        return max(self.memory, key=lambda rank: rank.peak.total)

    @property
    def fits(self) -> bool:
        return self.hardware.fits(self.worst.peak.total)


@dataclass(frozen=True)
class PhasePlan:
    """The plan of phases whose steps have the same batch.

    numbers: of [[schedule.phase]]; empty = the run's first step, where no phase ends like it.
    tokens: of these phases together.
    """

    numbers: list[int]
    tokens: float
    plan: Plan

    @property
    def title(self) -> str:
        """Name them: "phase 2 'cosine'", "phases 3, 4"."""
        if not self.numbers:
            return "the first step"
        if len(self.numbers) > 1:
            return f"phases {', '.join(map(str, self.numbers))}"
        name = self.plan.run.config.schedule.phase[self.numbers[0] - 1].name
        return f"phase {self.numbers[0]}" + (f" '{name}'" if name else "")


def plan_phases(
    config: JobConfig, world_size: int, hardware: Hardware, *, skew: float
) -> list[PhasePlan]:
    """Plan the last step of each phase, and the run's first step. Raises `UserError`."""
    alike: dict[tuple, list[int]] = {}
    for number in range(len(config.schedule.phase) + 1):
        run = plan_run(config, world_size, gpus_per_node=hardware.gpus_per_node, phase=number)
        alike.setdefault((run.now.batch_size, run.now.batch_shape), []).append(number)
    return [
        PhasePlan(
            [number for number in numbers if number],
            sum(config.schedule.phase[number - 1].tokens for number in numbers if number),
            make_plan(config, world_size, hardware, skew=skew, phase=numbers[-1]),
        )
        for numbers in alike.values()
    ]


def fullest(phases: list[PhasePlan]) -> PhasePlan:
    """Return the phase that needs the most memory; of equals, the one with the most tokens."""
    return max(phases, key=lambda each: (each.plan.worst.peak.total, each.tokens))


def schedule_tokens(phases: list[PhasePlan]) -> float:
    return sum(each.tokens for each in phases)


def schedule_hours(phases: list[PhasePlan], tokens: float | None) -> float:
    """Return the GPU-hours of all phases.

    tokens: of the whole run, if other than the schedule's; the phases keep their shares.
    """
    hours = sum(gpu_hours(each.tokens, each.plan.speed) for each in phases)
    total = schedule_tokens(phases)
    return hours * (tokens or total) / total


def make_plan(
    config: JobConfig,
    world_size: int,
    hardware: Hardware,
    *,
    skew: float = 1.0,
    phase: int = 0,
    networks: Sequence[Hardware] = (),
) -> Plan:
    """Plan a run. Raises `UserError`.

    skew: largest load of an expert over the mean.
    phase: number of the planned phase, see `plan_run`.
    networks: the hardware on each network on which dispatchers are compared, if the EP group spans
        nodes.
    """
    run = plan_run(config, world_size, gpus_per_node=hardware.gpus_per_node, phase=phase)
    check_networks(run, networks)
    traces = trace_run(run, skew)
    states: dict[int, State] = {}
    for place in run.places():
        with built_rank(run, place * run.stage_size) as built:
            states[place] = state_of(run, built)
    plan = assemble(run, hardware, traces, states)
    if networks and run.nodes_per_ep_group > 1:
        plan = replace(plan, dispatchers=compare_dispatchers(run, states, networks, skew))
    return plan


def assemble(run: PlannedRun, hardware: Hardware, traces: Traces, states: dict[int, State]) -> Plan:
    """Make the plan of a run that was traced.

    states: of each distinct place of the pipeline.
    """
    by_rank: list[list[Action]] = actions_of(run.pipeline) if run.pipeline else []
    memory = [
        memory_of(run, traces, state, place, by_rank[place] if by_rank else [])
        for place, state in states.items()
    ]
    routing = traces.routing if run.degrees.ep > 1 else None
    time = step_time(run, traces, states, hardware, by_rank)
    return Plan(
        run=run,
        hardware=hardware,
        traces=traces,
        memory=memory,
        traffic={place: step_traffic(run, traces, place) for place in states},
        dispatch=dispatch_table(run, routing) if routing else {},
        time=time,
        speed=speed_of(run, hardware, time),
    )
