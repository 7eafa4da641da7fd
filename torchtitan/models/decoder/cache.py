"""Attention with a cache, for generation: the narrow tensors of earlier tokens are kept."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from torchtitan.models.decoder.attention import Narrow, SelfAttention
from torchtitan.ops.attention import AttentionMask


class CachedAttend:
    """An `Attend` with a cache: it adds the narrow tensors of new tokens, and attends to all.

    length: tokens of a sequence at most.
    """

    def __init__(self, attention: SelfAttention, batch_size: int, length: int) -> None:
        self.attention = attention
        self.shape = batch_size, length
        self.kept: list[Tensor] = []  # narrow tensors, (B, length, ...)
        self.filled = 0

    def __call__(self, q_BSHC: Tensor, narrow: Narrow, mask: AttentionMask) -> Tensor:
        """Add new tokens to the cache, and attend to all tokens in it.

        mask: bool (B, 1, S, cached tokens including these), True = may be seen.
        """
        return self.attend(q_BSHC, self._append(narrow), mask)

    def attend(self, q_BSHC: Tensor, narrow: Narrow, mask: AttentionMask) -> Tensor:
        return self.attention.attend_here(q_BSHC, narrow, mask)

    def _append(self, new: Narrow) -> Narrow:
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
    """Let these layers use caches inside of this context; see `BaseModel.caching`."""
    for attention in attentions:
        attention.attend_with = make(attention)
    try:
        yield
    finally:
        for attention in attentions:
            attention.attend_with = None
