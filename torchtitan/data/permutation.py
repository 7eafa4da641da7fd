"""The order of an epoch: one permutation of all documents, a pure function of (seed, epoch)."""

import hashlib
from collections.abc import Iterator

_MASK64 = (1 << 64) - 1
# Below 2^8 values a Feistel network reaches too few of the possible orders.
_SMALLEST_HALF_BITS = 4


class Order:
    """A permutation of range(length) that is computed value by value and never stored.

    A Feistel network shuffles the smallest even-bit power of two that holds `length`; values that
    land outside are walked on until they land inside ("cycle walking", Black and Rogaway 2002).
    Unlike numpy's shuffle it takes no memory for billions of documents, any index can be asked for
    alone, and no library update can change it under a running experiment.
    """

    def __init__(self, length: int, *key: int) -> None:
        self.length = length
        self._half = max(_SMALLEST_HALF_BITS, ((length - 1).bit_length() + 1) // 2)
        digest = hashlib.blake2b(repr(key).encode()).digest()  # 64 bytes: eight round keys
        self._round_keys = [int.from_bytes(digest[i : i + 8], "little") for i in range(0, 64, 8)]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.length:
            raise IndexError(index)
        value = self._shuffle(index)
        while value >= self.length:
            value = self._shuffle(value)
        return value

    def __iter__(self) -> Iterator[int]:
        return (self[index] for index in range(self.length))

    def _shuffle(self, value: int) -> int:
        mask = (1 << self._half) - 1
        left, right = value >> self._half, value & mask
        for key in self._round_keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return left << self._half | right


def order(length: int, seed: int, epoch: int, window: int = 0) -> Order:
    """Order of `length` items in this epoch; `window` separates the shuffle windows of a stream."""
    return Order(length, seed, epoch, window)


def _mix(z: int) -> int:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014): each input bit moves every bit."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)
