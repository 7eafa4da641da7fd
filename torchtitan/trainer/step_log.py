"""The result of a step, and the numbers of it that are logged."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchtitan.components.metrics import MetricsLogger
from torchtitan.components.metrics.alarms import Action, Alarms
from torchtitan.components.metrics.expert_load import (
    Numbers,
    balance_numbers,
    cross_node_percent,
    routing_numbers,
    violation_numbers,
)
from torchtitan.components.metrics.expert_traffic import traffic_line, traffic_numbers
from torchtitan.components.metrics.loss_guard import LossGuard, Verdict
from torchtitan.components.quantize.float8 import dispatches_float8
from torchtitan.config import JobConfig
from torchtitan.config.phases import StepSettings
from torchtitan.data import data_numbers
from torchtitan.data.dataloader import ParallelAwareDataLoader
from torchtitan.data.settings import training_datasets
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.pipeline_parallel import Pipeline
from torchtitan.distributed.token_dispatch import bytes_per_row
from torchtitan.models.decoder.args import DecoderArgs
from torchtitan.models.moe.load import RoutingLoad
from torchtitan.protocols.layers import MoELayer
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.tools.logging import logger
from torchtitan.tools.progress_bar import progress_bar
from torchtitan.tools.utils import TORCH_DTYPES
from torchtitan.trainer.progress import Progress


@dataclass
class StepResult:
    """Numbers of one optimizer step, the same on all ranks of a pipeline stage.

    loss: mean over the labels (or conversations) of all ranks.
    max_loss: the same of the worst rank (exact when all have as many labels).
    grad_norm: before clipping.
    loads: tokens per expert (E,), by layer.
    traffic: see `TokenDispatcher.dispatch`, by layer.
    router_stats: sums in the order of `ROUTER_STATS`, by layer; empty without metrics.log_routing.
    side_losses: means over the labels (or conversations), by name.
    labels, tokens: see `StepCounts`.
    verdict: whether the step was applied, skipped, or leads to a rewind.
    asked_by: number of the signal that asked some rank to end the run, 0 for none.
    """

    loss: float
    max_loss: float
    grad_norm: float
    lr: float
    loads: dict[int, Tensor]
    traffic: dict[int, Tensor]
    router_stats: dict[int, Tensor]
    side_losses: dict[str, float]
    labels: int
    tokens: int
    verdict: Verdict
    asked_by: int


class Outcome(NamedTuple):
    """Result of a step's passes, before weights change; the same on all ranks of a stage.

    load: of the step; None without experts.
    rank_losses: each rank's part of the loss, of those that have one.
    grad_norm: before clipping.
    labels, tokens, weight: see `StepCounts`.
    asked_by: see `StepResult`.
    overflow: rows over the mean that some rank's experts needed, if that was more than they had
        room for, else 0.
    """

    load: RoutingLoad | None
    rank_losses: list[float]
    grad_norm: float
    labels: float
    tokens: float
    weight: float
    asked_by: int
    overflow: float


@dataclass
class Interval:
    """Sums between two log lines."""

    tokens: int = 0
    flops: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    data_seconds: float = 0.0


class StepBar:
    """Progress bar of a run: step, loss, tokens per second, time left."""

    def __init__(self, steps: int, done: int, tokens_seen: int) -> None:
        self._bar = progress_bar(steps, "training", "step", done)
        self._before = time.perf_counter(), tokens_seen
        self.close = self._bar.close

    def show(self, step: int, loss: float, tokens_seen: int) -> None:
        """step: done; smaller than before after a rewind."""
        (then, tokens), now = self._before, time.perf_counter()
        speed = max(0, tokens_seen - tokens) / max(now - then, 1e-9)
        self._before = now, tokens_seen
        self._bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s", refresh=False)
        self._bar.update(step - self._bar.n)


class StepLog:
    """Logs the numbers of steps, and checks the alarms.

    pipeline: gathers the numbers of layers on all stages; None = all layers are on this rank.
    """

    def __init__(
        self,
        config: JobConfig,
        dims: ParallelDims,
        device: torch.device,
        *,
        metrics: MetricsLogger,
        dataloader: ParallelAwareDataLoader,
        moes: Mapping[int, MoELayer],
        pipeline: Pipeline | None,
        loss_guard: LossGuard,
    ) -> None:
        self.config, self.dims, self.device = config, dims, device
        self.metrics, self.dataloader, self.moes = metrics, dataloader, moes
        self.pipeline, self.loss_guard = pipeline, loss_guard
        self.alarms = Alarms(config.metrics.alarm)

    def log(
        self,
        result: StepResult,
        interval: Interval,
        *,
        progress: Progress,
        now: StepSettings,
        model_args: BaseModelArgs,
        more: Mapping[str, Any],
    ) -> Action:
        """Write one record. Returns the action that the alarms ask for; called on all ranks.

        more: numbers that only some records have (validation, waiting).
        """
        counted = data_numbers(self.dataloader, self.device, self.dims.dp_group)
        biases = {layer: moe.expert_bias for layer, moe in self.moes.items()}
        if self.pipeline is not None:  # of the layers on all stages
            result.loads, result.traffic, result.router_stats, biases = self.pipeline.gather(
                (result.loads, result.traffic, result.router_stats, biases)
            )
        traffic, balance = self._routing_numbers(result, biases, model_args)
        self.metrics.log(
            step=progress.step,
            loss=result.loss,
            max_loss=result.max_loss,
            grad_norm=result.grad_norm,
            lr=result.lr,
            tokens=interval.tokens,
            tokens_seen=progress.tokens_seen,
            flops=interval.flops,
            step_seconds=interval.step_seconds,
            data_seconds=interval.data_seconds,
            expert_loads=result.loads,
            extra={
                "skipped_steps": self.loss_guard.skipped_steps,
                "rewinds": self.loss_guard.rewinds,
                **counted,
                **self._shares(result, now),
                **result.side_losses,
                **now.numbers(),
                **traffic,
                **balance,
                **more,
            },
        )
        if self.config.metrics.log_traffic and traffic:
            logger.info("%s", traffic_line(traffic, now.batch_size * now.seq_len))
        watched = balance | violation_numbers(result.loads)
        watched |= {"loss": result.loss, "grad_norm": result.grad_norm}
        action = self.alarms.check(progress.step, watched)
        for reason in self.alarms.reasons:
            self.metrics.event(progress.step, "alarm", why=reason)
        return action

    def _shares(self, result: StepResult, now: StepSettings) -> Numbers:
        """Shares of a step with conversations: places that are no padding, tokens with a label."""
        if all(each.format == "text" for each in training_datasets(self.config.training)):
            return {}
        places = now.batch_size * now.seq_len
        return {
            "filled_percent": 100 * result.tokens / places,
            "trained_percent": 100 * result.labels / result.tokens,
        }

    def _routing_numbers(
        self, result: StepResult, biases: Mapping[int, Tensor | None], model_args: BaseModelArgs
    ) -> tuple[Numbers, Numbers]:
        """Numbers about expert parallelism's traffic, and about the experts' balance."""
        traffic: Numbers = {}
        balance: Numbers = {}
        if not isinstance(model_args, DecoderArgs):
            return traffic, balance
        if self.dims.ep > 1:
            traffic = traffic_of(result, model_args, self.config)
        if result.loads:
            groups = model_args.moe_args.num_expert_groups
            balance = balance_of(result, biases, traffic, groups)
        return traffic, balance


def traffic_of(result: StepResult, model_args: DecoderArgs, config: JobConfig) -> Numbers:
    """Numbers about expert parallelism's traffic in this step, over all ranks."""
    row = bytes_per_row(
        model_args.dim,
        model_args.moe_args.top_k,
        TORCH_DTYPES[config.training.mixed_precision_param],
        fp8=dispatches_float8(config),
    )
    return traffic_numbers(result.traffic, row)


def balance_of(
    result: StepResult,
    biases: Mapping[int, Tensor | None],
    traffic: Mapping[str, object],
    num_groups: int | None,
) -> Numbers:
    """Numbers about the experts' balance in this step, the same on all ranks."""
    numbers = balance_numbers(result.loads, biases, num_groups)
    if result.router_stats:
        numbers |= routing_numbers(result.router_stats, result.tokens, result.loads)
    return numbers | cross_node_percent(traffic)
