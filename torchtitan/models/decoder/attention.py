"""The part of attention that all families share: the core between their projections.

Letters: B batch, S sequence, H heads, C channels.
"""

from collections.abc import Callable

from torch import Tensor

from torchtitan.ops.attention import AttentionMask, attention
from torchtitan.protocols.layers import AttentionLayer

# The narrowest tensors (B, S, ...) from which keys and values can be computed. They travel between
# ranks, and are kept in a cache.
Narrow = tuple[Tensor, ...]
Attend = Callable[[Tensor, Narrow, AttentionMask], Tensor]


class SelfAttention(AttentionLayer):
    """Base class. A family defines `forward`, which calls `attend`, and `expand`.

    attend_with: replaces `attend_here` where further keys and values are on other ranks
        (distributed/context_parallel.py) or in a cache (cache.py).
    """

    softmax_scale: float
    attend_with: Attend | None = None

    def attend(self, q_BSHC: Tensor, narrow: Narrow, mask: AttentionMask) -> Tensor:
        """Attend to the keys and values that `narrow` expands to: (B, S, H, C)."""
        if self.attend_with is not None:
            return self.attend_with(q_BSHC, narrow, mask)
        return self.attend_here(q_BSHC, narrow, mask)

    def attend_here(self, q_BSHC: Tensor, narrow: Narrow, mask: AttentionMask) -> Tensor:
        """Attend where `narrow` has all keys and values: (B, S, H, C)."""
        k_BSHC, v_BSHC = self.expand(narrow)
        return attention(q_BSHC, k_BSHC, v_BSHC, scale=self.softmax_scale, mask=mask)

    def expand(self, narrow: Narrow) -> tuple[Tensor, Tensor]:
        """Convert to keys and values for `ops.attention.attention`; they may have fewer heads."""
        raise NotImplementedError
