"""What a step came to, and the numbers that are told of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchtitan.components.metrics.expert_load import (
    Numbers,
    balance_numbers,
    cross_node_percent,
    routing_numbers,
)
from torchtitan.components.metrics.expert_traffic import traffic_numbers
from torchtitan.components.metrics.loss_guard import Verdict
from torchtitan.distributed.expert_parallel import bytes_per_row
from torchtitan.models.decoder.args import DecoderArgs


@dataclass
class StepResult:
    """Numbers of one optimizer step, the same on all ranks of a pipeline stage.

    loss: mean over the valid tokens of all ranks.
    max_loss: the same of the worst rank (exact when all have as many valid tokens).
    grad_norm: before clipping.
    loads: tokens per expert (E,), by layer.
    traffic: see `TokenDispatcher.dispatch`, by layer.
    watched: see models/moe/router_stats.py, by layer; empty without metrics.log_routing.
    side_losses: means over the valid tokens, by name.
    valid_tokens: of the step, over all ranks.
    verdict: what became of the step.
    asked_by: number of the signal that asked some rank to end the run, 0 for none.
    """

    loss: float
    max_loss: float
    grad_norm: float
    lr: float
    loads: dict[int, Tensor]
    traffic: dict[int, Tensor]
    watched: dict[int, Tensor]
    side_losses: dict[str, float]
    valid_tokens: int
    verdict: Verdict
    asked_by: int


@dataclass
class Interval:
    """What adds up between two log lines."""

    tokens: int = 0
    flops: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    data_seconds: float = 0.0


def traffic_of(result: StepResult, model_args: DecoderArgs, dtype: torch.dtype) -> Numbers:
    """What expert parallelism sent in this step, over all ranks. dtype: of what is sent."""
    row = bytes_per_row(model_args.dim, model_args.moe_args.top_k, dtype)
    return traffic_numbers(result.traffic, row)


def balance_of(
    result: StepResult,
    biases: Mapping[int, Tensor | None],
    traffic: Mapping[str, Any],
    num_groups: int | None,
) -> Numbers:
    """How evenly the step used the experts; the same on all ranks."""
    numbers = balance_numbers(result.loads, biases, num_groups)
    if result.watched:
        numbers |= routing_numbers(result.watched, result.valid_tokens, result.loads)
    return numbers | cross_node_percent(traffic)
