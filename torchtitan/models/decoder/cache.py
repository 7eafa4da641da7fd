"""Attention over remembered tokens, for generation: what keys and values are made of is kept."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from torchtitan.ops.attention import AttentionMask
from torchtitan.protocols.layers import AttentionLayer


class CachedAttend:
    """Takes the place of an attention's `attend(q, a, b, mask)`: a and b of new tokens come in, and
    go on together with those of all earlier ones. They are the narrowest form that keys and values
    can be made of, see `TransformerBlock`.
    """

    def __init__(self, attention: AttentionLayer, batch_size: int, length: int) -> None:
        """length: the most tokens of a sequence."""
        self.attention = attention
        self.uncached = attention.attend
        self.shape = batch_size, length
        self.kept: list[Tensor] = []  # a and b, (B, length, …)
        self.filled = 0

    def __call__(self, q_BSHC: Tensor, a: Tensor, b: Tensor, mask: AttentionMask) -> Tensor:
        """mask: bool (B, 1, S, tokens remembered with these), True = may be seen."""
        whole_a, whole_b = self._remember(a, b)
        return self.attend(q_BSHC, whole_a, whole_b, mask)

    def attend(self, q_BSHC: Tensor, a: Tensor, b: Tensor, mask: AttentionMask) -> Tensor:
        return self.uncached(q_BSHC, a, b, mask)

    def _remember(self, *new: Tensor) -> list[Tensor]:
        if not self.kept:
            self.kept = [each.new_empty(*self.shape, *each.shape[2:]) for each in new]
        begin, self.filled = self.filled, self.filled + new[0].size(1)
        for kept, each in zip(self.kept, new, strict=True):
            kept[:, begin : self.filled] = each
        return [kept[:, : self.filled] for kept in self.kept]


@contextmanager
def caching(
    attentions: Sequence[AttentionLayer], make: Callable[[AttentionLayer], CachedAttend]
) -> Iterator[None]:
    """Inside, these layers remember; see `BaseModel.caching`."""
    for attention in attentions:
        attention.attend = make(attention)
    try:
        yield
    finally:
        for attention in attentions:
            del attention.attend  # the class's own again
