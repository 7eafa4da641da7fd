"""The forward and backward pass of a step as one CUDA graph, for models whose kernels are shorter
than their launches.

The first passes run as usual (kernels are compiled, buffers are made); then one is recorded, and
replayed from then on: into the same memory, gradients included, so gradients must stay in place
between steps.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_WARMUP = 3


class GraphedPass:
    """Runs a function as a CUDA graph.

    run: takes and returns tensors, at every call of the same shapes.
    """

    def __init__(self, run: Callable[..., tuple[Tensor, ...]]):
        self._run = run
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._outputs: tuple[Tensor, ...] = ()

    @property
    def holds_grads(self) -> bool:
        """Tell whether gradients are in the graph's memory, which is not to be freed."""
        return self._graph is not None

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        self._calls += 1
        if self._calls <= _WARMUP:
            return self._run_on_side_stream(*inputs)
        if self._graph is None:
            self._graph = self._record(*inputs)
        for static, fresh in zip(self._inputs, inputs, strict=True):
            static.copy_(fresh, non_blocking=True)
        self._graph.replay()
        return tuple(t.clone() for t in self._outputs)

    def _run_on_side_stream(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run on a side stream, as the recording does later: autograd remembers streams."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            outputs = self._run(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return outputs

    def _record(self, *inputs: Tensor) -> torch.cuda.CUDAGraph:
        self._inputs = tuple(t.clone() for t in inputs)
        graph = torch.cuda.CUDAGraph()
        # Other threads (NCCL's watchdog, the data loader's) may use the device meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._outputs = self._run(*self._inputs)
        return graph
