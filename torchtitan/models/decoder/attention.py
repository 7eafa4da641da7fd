"""What the attention layers of all families share: the core between their projections.

Letters: B batch, S sequence, H heads, C channels.
"""

from collections.abc import Callable

from torch import Tensor

from torchtitan.ops.attention import AttentionMask, attention
from torchtitan.protocols.layers import AttentionLayer

# The narrowest tensors (B, S, ...) that keys and values can be made of: what travels between ranks
# and what a cache keeps.
Narrow = tuple[Tensor, ...]
Attend = Callable[[Tensor, Narrow, AttentionMask], Tensor]


class SelfAttention(AttentionLayer):
    """A family defines `forward`, which calls `attend`, and `expand`.

    attend_with: takes the place of `attend_here` where keys and values are elsewhere, too: on other
        ranks (distributed/context_parallel.py), or in a cache (cache.py).
    """

    softmax_scale: float
    attend_with: Attend | None = None

    def attend(self, q_BSHC: Tensor, narrow: Narrow, mask: AttentionMask) -> Tensor:
        """Attention of queries on the keys and values that `narrow` expands to: (B, S, H, C)."""
        if self.attend_with is not None:
            return self.attend_with(q_BSHC, narrow, mask)
        return self.attend_here(q_BSHC, narrow, mask)

    def attend_here(self, q_BSHC: Tensor, narrow: Narrow, mask: AttentionMask) -> Tensor:
        """`attend` where all keys and values are at hand."""
        k_BSHC, v_BSHC = self.expand(narrow)
        return attention(q_BSHC, k_BSHC, v_BSHC, scale=self.softmax_scale, mask=mask)

    def expand(self, narrow: Narrow) -> tuple[Tensor, Tensor]:
        """Keys and values as `ops.attention.attention` takes them; keys' heads may be fewer."""
        raise NotImplementedError
