"""Buffers that keep their dtype when a module is cast: `model.bfloat16()` must not round them.

A rotary table's cosines would be off by up to 2e-3, and neighbouring positions of the slow pairs
would become equal. In bf16 the updates of 1e-3 of an expert bias are lost once it has grown, and
most tokens of a model with biases near 7 change their experts. Sums over a step would stop growing.
"""

from torch import nn


class KeepsBufferDtypes(nn.Module):
    """Mixin that keeps the dtypes of the module's own buffers, not of its children's."""

    def _apply(self, fn, recurse: bool = True):
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.dtype != before[name].dtype:
                setattr(self, name, before[name].to(buffer.device))
        return self
