"""A CUDA stream of its own for a layer: the shared experts, in parallel to dispatch and combine."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from torchtitan.tools.utils import eager


class SideStream:
    """Runs a layer on a CUDA stream of its own, in parallel to the main stream; on the CPU the
    layer runs at `end`.

    The compiler stays out: it would move kernels and free memory as if there were one stream. The
    layer itself may be compiled.
    """

    def __init__(self):
        self.stream: torch.cuda.Stream | None = None

    def begin(self, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return self._start(layer, x) if x.device.type == "cuda" else x

    def end(self, layer: Callable[[Tensor], Tensor], begun: Tensor) -> Tensor:
        return self._join(begun) if begun.device.type == "cuda" else layer(begun)

    @partial(eager, recursive=False)
    def _start(self, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        stream = self.stream = self.stream or torch.cuda.Stream(x.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            out = layer(x)
        x.record_stream(stream)
        return out

    @eager
    def _join(self, out: Tensor) -> Tensor:
        main = torch.cuda.current_stream()
        if self.stream is not None:
            main.wait_stream(self.stream)
        out.record_stream(main)
        return out
