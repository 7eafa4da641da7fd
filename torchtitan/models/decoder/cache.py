"""Attention over remembered tokens, for generation: what keys and values are made of is kept."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from torchtitan.models.decoder.attention import Narrow, SelfAttention
from torchtitan.ops.attention import AttentionMask


class CachedAttend:
    """An `Attend` that remembers: narrow tensors of new tokens come in, and go on together with
    those of all earlier ones.

    length: the most tokens of a sequence.
    """

    def __init__(self, attention: SelfAttention, batch_size: int, length: int) -> None:
        self.attention = attention
        self.shape = batch_size, length
        self.kept: list[Tensor] = []  # narrow tensors, (B, length, ...)
        self.filled = 0

    def __call__(self, q_BSHC: Tensor, narrow: Narrow, mask: AttentionMask) -> Tensor:
        """mask: bool (B, 1, S, tokens remembered with these), True = may be seen."""
        return self.attend(q_BSHC, self._remember(narrow), mask)

    def attend(self, q_BSHC: Tensor, narrow: Narrow, mask: AttentionMask) -> Tensor:
        return self.attention.attend_here(q_BSHC, narrow, mask)

    def _remember(self, new: Narrow) -> Narrow:
        if not self.kept:
            self.kept = [each.new_empty(*self.shape, *each.shape[2:]) for each in new]
        begin, self.filled = self.filled, self.filled + new[0].size(1)
        for kept, each in zip(self.kept, new, strict=True):
            kept[:, begin : self.filled] = each
        return tuple(kept[:, : self.filled] for kept in self.kept)


@contextmanager
def caching(
    attentions: Sequence[SelfAttention], make: Callable[[SelfAttention], CachedAttend]
) -> Iterator[None]:
    """Inside, these layers remember; see `BaseModel.caching`."""
    for attention in attentions:
        attention.attend_with = make(attention)
    try:
        yield
    finally:
        for attention in attentions:
            attention.attend_with = None
