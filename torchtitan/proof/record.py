"""Record of a run: its compared tensors by (step, kind, name), in the order of the step.

    output                        of each layer's modules, as sums over all tokens
    load                          tokens of each expert
    loss, side loss, router       the router's: sums of router_stats.py
    gradient, gradient norm       before clipping
    expert bias                   after the step
    weight, average, optimizer state    after the last step, and where the run was saved

A rank keeps its own piece of what is split over ranks: all of them together are the whole, and
nothing need be gathered.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from torchtitan.config import JobConfig
from torchtitan.ops.cross_entropy import IGNORE_INDEX
from torchtitan.trainer import Trainer
from torchtitan.trainer.forward_backward import Batch
from torchtitan.trainer.step_log import Interval, StepResult

Key = tuple[int, str, str]


class Piece(NamedTuple):
    """A rank's part of a tensor: from `offset` on, of one that has `shape` as a whole."""

    tensor: Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    def of(self, whole: Tensor) -> Tensor:
        """Return the same part of another tensor of this shape."""
        ends = zip(self.offset, self.tensor.shape, strict=True)
        return whole[tuple(slice(start, start + length) for start, length in ends)]


Record = dict[Key, Piece]
_KIND_OF_PART = {"model": "weight", "ema": "average", "optimizer": "optimizer state"}


class RecordedTrainer(Trainer):
    """A trainer that keeps the gradients and the layers' outputs of the step."""

    def __init__(self, config: JobConfig):
        self.gradients: dict[str, Piece] = {}
        super().__init__(config)
        self.outputs = OutputSums(self)

    def _clip(self) -> Tensor:
        self.gradients = {
            name: piece_of(p.grad if p.grad is not None else torch.zeros_like(p))
            for name, p in self.model.named_parameters()
        }
        return super()._clip()

    def steps(self, until: int) -> Iterator[Record]:
        """Train up to step `until`; yield the record of each step."""
        batches = _padded(iter(self.dataloader))
        while self.step < until:
            self.step += 1
            self.outputs.begin()
            yield self._record(self.train_step(batches, Interval()))

    def _record(self, result: StepResult) -> Record:
        found: list[tuple[str, str, Any]] = []
        found += [("output", name, sums) for name, sums in self.outputs.take().items()]
        found += [("load", f"layers.{i}", load) for i, load in result.loads.items()]
        found.append(("loss", "loss", result.loss))
        found += [("side loss", name, value) for name, value in result.side_losses.items()]
        found += [("router", f"layers.{i}", x) for i, x in result.router_stats.items()]
        found += [("gradient", name, grad) for name, grad in self.gradients.items()]
        found.append(("gradient norm", "gradient norm", result.grad_norm))
        for i, moe in self.moes.items():
            if moe.expert_bias is not None:
                found.append(("expert bias", f"layers.{i}.moe.expert_bias", moe.expert_bias))
        return {(self.step, kind, name): piece_of(x) for kind, name, x in found}

    def state(self) -> Record:
        """Record weights, optimizer state and average after this step."""
        record = {}
        for name, tensor in self.run_state.tensors({"model", "ema", "optimizer"}).items():
            part, _, rest = name.partition(".")
            record[self.step, _KIND_OF_PART[part], rest] = piece_of(tensor)
        return record


class OutputSums:
    """Sums over tokens of each module's outputs, over all ranks of a pipeline stage.

    Between layers each token is on exactly one rank of its stage. Absolute values of four fixed
    projections are summed: nothing cancels, and the order of tokens doesn't matter.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._group = trainer.dims.stage_group
        self._sums: dict[str, Tensor] = {}
        self._names: list[str] = []
        if trainer.config.compile.enable:  # hooks would be compiled in
            return
        model = trainer.model
        if model.tok_embeddings is not None:
            self._watch("tok_embeddings", model.tok_embeddings)
        for name, block in model.blocks().items():
            for part, module in block.named_modules():
                if part.rpartition(".")[2] in ("attention", "feed_forward", "moe"):
                    layer = f"layers.{name}" if name.isdecimal() else name
                    self._watch(f"{layer}.{part}", module)
        if model.norm is not None:
            self._watch("norm", model.norm)

    def _watch(self, name: str, module: nn.Module) -> None:
        self._names.append(name)
        module.register_forward_hook(lambda _, args, out: self._add(name, out))

    def begin(self) -> None:
        self._sums = {name: torch.zeros(4, dtype=torch.float64) for name in self._names}

    def _add(self, name: str, out: Any) -> None:
        out = out[0] if isinstance(out, tuple) else out
        again = torch._C._current_graph_task_id() != -1  # recomputed in a backward pass
        if again or not torch.is_grad_enabled() or out.is_meta or name not in self._sums:
            return
        x = out.detach().double().flatten(0, -2)
        # No matrix product: recomputation by operation counts those, and this one isn't repeated.
        self._sums[name] += (x.unsqueeze(2) * _projections(x.size(-1))).sum(1).abs().sum(0)

    def take(self) -> dict[str, Tensor]:
        if not self._sums:
            return {}
        sums = torch.stack(list(self._sums.values()))
        dist.all_reduce(sums, group=self._group)
        return dict(zip(self._sums, sums, strict=True))


@cache
def _projections(channels: int) -> Tensor:
    numbers = torch.arange(1, channels + 1, dtype=torch.float64)
    return torch.stack([torch.cos(n * numbers) for n in range(1, 5)], dim=1)


def piece_of(value: Piece | Tensor | float) -> Piece:
    """Copy this rank's piece of a tensor."""
    if isinstance(value, Piece):
        return value
    if not isinstance(value, DTensor):
        tensor = torch.as_tensor(value).detach().clone()
        return Piece(tensor, (0,) * tensor.ndim, tuple(tensor.shape))
    mesh, placements = value.device_mesh, value.placements
    assert not any(placement.is_partial() for placement in placements), placements
    _, offset = compute_local_shape_and_global_offset(value.shape, mesh, placements)
    return Piece(value.to_local().detach().clone(), tuple(offset), tuple(value.shape))


def _padded(batches: Iterator[Batch]) -> Iterator[Batch]:
    """End sequences in paddings of different lengths, which depend on their tokens: ranks then
    count different numbers of valid tokens, as they do where documents end."""
    for inputs, labels in batches:
        labels, length = labels.clone(), labels.size(1)
        for row, tokens in zip(labels, inputs["input"], strict=True):
            row[length - int(tokens.sum()) % (length - 1) :] = IGNORE_INDEX
        yield inputs, labels
