"""The state of a run, as a checkpoint holds it: tensors by name, and numbers.

Nothing here depends on the layout: a tensor has its whole shape and a name made of its parameter's
name, the data position is one for all ranks, and random states, which differ between ranks, are
loaded only by a run of the same layout.

    model.<name>             weights and persistent buffers (expert bias)
    ema.<name>               the average of the parameters, fp32, once averaging has begun
    optimizer.<name>.<slot>  such as exp_avg; rates and decay come from the config instead
    rng.rank_<r>.<device>    states of torch's generators
    numbers                  {"lr_scheduler": steps, "dataloader": position, "train_state": {...}}
"""

from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from torchtitan.components.optimizer.ema import WeightAverage
from torchtitan.components.optimizer.lr_scheduler import resume_lr_scheduler
from torchtitan.config import CHECKPOINT_PARTS
from torchtitan.data.dataloader import ParallelAwareDataLoader, merge_states

Numbers = dict[str, Any]


class Progress(Protocol):
    """Counters of a run: values of JSON, the same on all ranks. The trainer implements it."""

    def state_dict(self) -> Numbers: ...

    def load_state_dict(self, numbers: Numbers, /) -> None: ...


class RunState:
    """Parts of a run that a checkpoint holds, named as in `config.CHECKPOINT_PARTS`."""

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        lr_scheduler: LambdaLR,
        dataloader: ParallelAwareDataLoader,
        progress: Progress,
        average: WeightAverage | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.dataloader = dataloader
        self.progress = progress
        self.average = average

    def parts(self) -> set[str]:
        """List the parts that the run has now."""
        has_average = self.average is not None and self.average.has_begun
        return set[str](CHECKPOINT_PARTS) - (set() if has_average else {"ema"})

    # -------------------------------------------------------------- tensors

    def tensors(self, parts: set[str]) -> dict[str, Tensor]:
        """Collect this rank's live tensors (DTensors where sharded); loading into them restores the
        run."""
        tensors: dict[str, Tensor] = {}
        if "model" in parts:
            tensors |= _prefixed("model", self._model_tensors())
        if "ema" in parts and self.average is not None:
            tensors |= _prefixed("ema", self.average.tensors())
        if "optimizer" in parts:
            tensors |= _prefixed("optimizer", self._optimizer_tensors())
        if "rng" in parts:
            tensors |= _prefixed(f"rng.rank_{dist.get_rank()}", _random_states())
        return tensors

    def weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Copy the weights for use elsewhere, parameters and their average in `dtype`.

        Buffers keep their dtype: a rounded expert bias would route differently.
        """
        parameters = {name for name, _ in self.model.named_parameters()}
        weights = self._model_tensors()
        exported = {
            name: tensor.detach().to(dtype) if name in parameters else tensor
            for name, tensor in weights.items()
        }
        begun = self.average if "ema" in self.parts() else None
        average = {} if begun is None else begun.tensors()
        averaged = {name: tensor.to(dtype) for name, tensor in average.items()}
        return _prefixed("model", exported) | _prefixed("ema", averaged)

    def take_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Apply those of `tensors` that are not live, after they have been filled."""
        model = _without_prefix("model", tensors)
        if model:  # a model whose state dict is not its memory (fused weights) needs it set
            set_model_state_dict(self.model, {**model})
        states = _without_prefix(f"rng.rank_{dist.get_rank()}", tensors)
        if "cpu" in states:
            torch.set_rng_state(states["cpu"])
        if "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"])

    def _model_tensors(self) -> dict[str, Tensor]:
        # torch allows numbers and lists in a state dict; no module of ours has any
        return cast(dict[str, Tensor], get_model_state_dict(self.model))

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        # torch initialises the state of an optimizer that has not stepped yet (with a step of rate
        # 0), so that tensors to load into exist.
        if not any(group["params"] for group in self.optimizer.param_groups):
            return {}  # a pipeline's stage of which nothing is trained, which torch refuses
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        flat = get_optimizer_state_dict(self.model, self.optimizer, options=options)
        return _without_prefix("state", {k: v for k, v in flat.items() if isinstance(v, Tensor)})

    # -------------------------------------------------------------- numbers

    def numbers(self, group: dist.ProcessGroup | None) -> Numbers:
        """Collect the numbers, ready for JSON, the same on all ranks.

        Every rank of `group` (None: the default one) must call this.
        """
        positions: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(positions, self.dataloader.local_state(), group=group)
        return {
            "lr_scheduler": self.lr_scheduler.last_epoch,
            "dataloader": merge_states(positions),
            "train_state": self.progress.state_dict(),
        }

    def load_numbers(self, numbers: Numbers, parts: set[str]) -> None:
        if self.average is not None:
            self.average.has_begun = "ema" in parts
        if "lr_scheduler" in parts:
            resume_lr_scheduler(self.lr_scheduler, numbers["lr_scheduler"])
        if "dataloader" in parts:
            self.dataloader.load_state_dict(numbers["dataloader"])
        if "train_state" in parts:
            self.progress.load_state_dict(numbers["train_state"])


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _prefixed(prefix: str, tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _without_prefix(prefix: str, tensors: dict[str, Any]) -> dict[str, Tensor]:
    start = prefix + "."
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
