"""What is compared of a run: whole tensors by (step, kind, name), in the order of their making.

output          of each layer's parts in the forward pass, as four sums over all tokens
load            tokens of each expert
loss, side loss, router statistics
gradient        of each parameter, before clipping; gradient norm
expert bias     after the step
weight, average, optimizer state    after the last step, and where the run was saved
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchtitan.config import JobConfig
from torchtitan.ops.cross_entropy import IGNORE_INDEX
from torchtitan.trainer import Trainer
from torchtitan.trainer.forward_backward import Batch
from torchtitan.trainer.step_log import Interval, StepResult

Key = tuple[int, str, str]
Record = dict[Key, Tensor]
_KIND_OF_PART = {"model": "weight", "ema": "average", "optimizer": "optimizer state"}


class RecordedTrainer(Trainer):
    """A trainer that keeps the gradients and the layers' outputs of the step."""

    def __init__(self, config: JobConfig):
        self.gradients: dict[str, Tensor] = {}
        super().__init__(config)
        self.outputs = OutputSums(self)

    def _clip(self) -> Tensor:
        self.gradients = {
            name: whole(p.grad if p.grad is not None else torch.zeros_like(p))
            for name, p in self.model.named_parameters()
        }
        return super()._clip()

    def steps(self, until: int) -> Iterator[Record]:
        """Train up to step `until`; gives the record of each step."""
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
        return {(self.step, kind, name): torch.as_tensor(x).clone() for kind, name, x in found}

    def state(self) -> Record:
        """Weights, optimizer state and average, after this step."""
        record = {}
        for name, tensor in self.run_state.tensors({"model", "ema", "optimizer"}).items():
            part, _, rest = name.partition(".")
            record[self.step, _KIND_OF_PART[part], rest] = whole(tensor)
        return record


class OutputSums:
    """Sums over tokens of what each part of a layer puts out, over all ranks of a pipeline stage.

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
                    self._watch(f"layers.{name}.{part}", module)
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
        channels = torch.arange(1, x.size(-1) + 1, dtype=torch.float64)
        projections = torch.stack([torch.cos(n * channels) for n in range(1, 5)], dim=1)
        self._sums[name] += (x @ projections).abs().sum(0)

    def take(self) -> dict[str, Tensor]:
        for sums in self._sums.values():
            dist.all_reduce(sums, group=self._group)
        return self._sums


def whole(tensor: Tensor) -> Tensor:
    """A copy of all of it, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def _padded(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Sequences that end in paddings of different lengths, by their tokens: ranks then count
    different numbers of valid tokens, as they do where documents end."""
    for inputs, labels in batches:
        labels, length = labels.clone(), labels.size(1)
        for row, tokens in zip(labels, inputs["input"], strict=True):
            row[length - int(tokens.sum()) % (length - 1) :] = IGNORE_INDEX
        yield inputs, labels
