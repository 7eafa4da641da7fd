"""A moving average of the weights, kept in CPU memory (DeepSeek-V3 report, section 3.2.2).

After every `interval`-th step the average moves towards the weights by 1 − decay^interval, so
`decay` is per step whatever the interval. The first of these steps from `start_step` on sets it to
the current weights; with 0 it begins with the weights that the run begins with. A skipped step
counts as one that changed nothing.

The master weights (fp32) are averaged, not their copies in the compute dtype. Buffers are not
averaged: the average is used with the expert bias of the same step. Nor are frozen parameters: they
don't change.

Each rank averages the parts that it holds, in fp32: DTensors stay DTensors, but on the CPU, so that
checkpoints reshard them as they do the weights. On a GPU the weights are copied to pinned memory on
a stream of their own, in parallel to the next forward and backward pass, and a thread does the
arithmetic.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.tensor import DTensor

from torchtitan.config import EMA
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger

PREFIX = "ema."  # of the average's names in a checkpoint


def has_average(index: Metadata) -> bool:
    """Tell whether a checkpoint with this index has an average."""
    return any(name.startswith(PREFIX) for name in index.state_dict_metadata)


def check_has_average(checkpoint: Path, index: Metadata) -> None:
    """Raise `UserError` for a checkpoint without an average."""
    if not has_average(index):
        raise UserError(
            f"{checkpoint} holds no average of the weights: its run keeps none (ema.enable), or "
            "had not begun it (ema.start_step); take another checkpoint, or leave --ema out."
        )


class WeightAverage:
    """Average of the trained parameters that this rank holds of `model`.

    has_begun: whether the average exists yet; set it after loading one into `tensors`.
    """

    def __init__(self, model: nn.Module, settings: EMA) -> None:
        self.settings = settings
        self.has_begun = False
        named = model.named_parameters()
        self._params = {name: param for name, param in named if param.requires_grad}
        self._average: dict[str, Tensor] = {}
        self._incoming: dict[str, Tensor] = {}  # pinned, for parameters on a GPU
        self._copied: torch.cuda.Event | None = None
        self._stream: torch.cuda.Stream | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future | None = None
        self._first = -(-settings.start_step // settings.interval) * settings.interval
        elements = sum(_local(param).numel() for param in self._params.values())
        logger.info(
            "Average of the weights: decay %g a step, every %d steps from step %d on; this rank "
            "keeps %.2f GiB of it in CPU memory",
            settings.decay,
            settings.interval,
            self._first,
            4 * elements / 2**30,
        )

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """Live tensors of the average, fp32, by the parameters' names; loading into them restores
        it."""
        self._wait()
        for name, param in self._params.items():
            if name not in self._average:
                self._average[name] = param.detach().to("cpu", torch.float32, copy=True)
        return dict(self._average)

    def enter(self, step: int) -> None:
        """Begin the average with the current weights, where it should exist by now and doesn't.

        Call it before the step that follows `step`.
        """
        if self.has_begun or step < self._first:
            return
        if step > self._first:
            logger.warning(
                "No average of the weights was loaded: it begins at the weights of step %d", step
            )
        self._begin()

    def before_update(self) -> None:
        """Finish pending copies of the weights before they change; only the GPU waits."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._copied = None

    def after_step(self, step: int) -> None:
        """Update the average, where it is due, with the weights that follow from `step`."""
        if step % self.settings.interval or step < self._first:
            return
        if step == self._first or not self.has_begun:
            self._begin()
            return
        self._wait()
        weights = self._weights()
        if self._copied is None:
            self._move(weights, None)
        else:
            self._pending = self._in_background(weights, self._copied)

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()

    @torch.no_grad()
    def _begin(self) -> None:
        for name, average in self.tensors().items():
            _local(average).copy_(_local(self._params[name]))
        self.has_begun = True

    @torch.no_grad()
    def _weights(self) -> dict[str, Tensor]:
        """This rank's parts on the CPU; copies from a GPU are complete after event `_copied`."""
        local = {name: _local(param.detach()) for name, param in self._params.items()}
        if not any(weight.is_cuda for weight in local.values()):
            return local
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for name, weight in local.items():
                if weight.is_cuda:
                    if name not in self._incoming:
                        self._incoming[name] = torch.empty_like(
                            weight, device="cpu", pin_memory=True
                        )
                    local[name] = self._incoming[name].copy_(weight, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        return local

    def _in_background(self, weights: dict[str, Tensor], copied: torch.cuda.Event) -> Future:
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="ema")
        return self._thread.submit(self._move, weights, copied)

    @torch.no_grad()
    def _move(self, weights: dict[str, Tensor], copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        towards = 1 - self.settings.decay**self.settings.interval
        for name, weight in weights.items():
            _local(self._average[name]).lerp_(weight.float(), towards)

    def _wait(self) -> None:
        """Wait until the arithmetic of the last update is done."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
