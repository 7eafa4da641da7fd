"""Which tensors of two records differ by more than rounding, in the order of their making.

A tensor is compared by its norm: AdamW divides by |gradient|, so an element whose gradient is next
to nothing moves by its rounding error.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchtitan.proof.record import Key, Record

# Relative errors. fp32 resolves 6e-8; sums over tokens, channels and ranks in another order cost
# ten times as much, and an update that divides by small numbers another ten. As in
# tests/distributed_tests/test_layouts.py, whose layouts keep to them.
TOLERANCES = {
    "output": 1e-5,
    "load": 0.0,
    "loss": 1e-6,
    "side loss": 1e-5,
    "router": 1e-5,
    "gradient": 1e-5,
    "gradient norm": 1e-5,
    "expert bias": 1e-6,
    "weight": 1e-5,
    "average": 1e-5,
    "optimizer state": 1e-4,
}


@dataclass(frozen=True)
class Difference:
    """error: relative, inf where a tensor is missing on one side."""

    key: Key
    error: float
    allowed: float

    def describe(self) -> str:
        step, kind, name = self.key
        what = name if name == kind else f"{kind} of {name}"
        if self.error == float("inf"):
            return f"step {step}: {what} is missing"
        allowed = f"{self.allowed:.0e} is rounding" if self.allowed else "it must be the same"
        return f"step {step}: {what} is off by {self.error:.1e} ({allowed})"


def error_of(value: Tensor, expected: Tensor) -> float:
    """Relative, by norm; inf for other shapes and for what is not finite."""
    if value.shape != expected.shape:
        return float("inf")
    value, expected = value.double(), expected.double()
    distance, size = (value - expected).norm(), expected.norm()
    if distance == 0:
        return 0.0
    error = (distance / size.clamp(min=torch.finfo(torch.float32).tiny)).item()
    return error if error == error else float("inf")


def differences(
    record: Record, expected: Record, keys: Iterable[Key], *, exact: bool = False
) -> list[Difference]:
    """Of these keys, in order. exact: not a bit may differ."""
    found = []
    for key in keys:
        allowed = 0.0 if exact else TOLERANCES[key[1]]
        error = error_of(record[key], expected[key]) if key in expected else float("inf")
        if error > allowed:
            found.append(Difference(key, error, allowed))
    return found


def worst_errors(record: Record, expected: Record) -> dict[str, float]:
    """The largest error of each kind."""
    worst: dict[str, float] = {}
    for key in record.keys() & expected.keys():
        worst[key[1]] = max(worst.get(key[1], 0.0), error_of(record[key], expected[key]))
    return worst
