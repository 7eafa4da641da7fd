"""Compare two records: tensors that differ by more than rounding, in the order of the step.

A tensor is compared by its norm: AdamW divides by |gradient|, so an element whose gradient is next
to nothing moves by its rounding error. A piece is measured by the norm of the whole.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torchtitan.proof.record import Key, Piece, Record

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
# From the second step on, weights differ by rounding already.
LATER = {"gradient": 10}
# B of an adapter begins at zero: its norm is that of its updates alone, gradients divided by their
# own size.
FROM_ZERO = {"weight": 10, "average": 10}
# bf16 means of gradients: one next to a rounding border goes the other way by 0.4 %.
WITH_BF16_STATE = {"weight": 10, "average": 10, "optimizer state": 100, "loss": 10}


@dataclass(frozen=True)
class Difference:
    """A tensor that differs.

    error: relative, inf where it is missing on one side.
    allowed: relative error that rounding may cause.
    """

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


def tolerance(key: Key, *, bf16_state: bool) -> float:
    """Return the relative error that rounding may cause."""
    step, kind, name = key
    factor = LATER.get(kind, 1) if step > 1 else 1
    if name.endswith("lora_B"):
        factor *= FROM_ZERO.get(kind, 1)
    if bf16_state:
        factor *= WITH_BF16_STATE.get(kind, 1)
    return TOLERANCES[kind] * factor


def error_of(piece: Piece, expected: Tensor) -> float:
    """Return the error relative to the norm of `expected`, the whole tensor.

    Other shapes and numbers that are not finite give inf.
    """
    if piece.shape != tuple(expected.shape):
        return float("inf")
    there, size = piece.of(expected), expected.double().norm()
    distance = (piece.tensor.double() - there.double()).norm()
    if distance == 0:
        return 0.0
    error = (distance / size.clamp(min=torch.finfo(torch.float32).tiny)).item()
    return error if error == error else float("inf")


def differences(
    record: Record, expected: Mapping[Key, Tensor], *, bf16_state: bool
) -> tuple[list[Difference], dict[str, float]]:
    """Return differences beyond rounding, in the record's order, and each kind's largest error.

    expected: whole tensors.
    bf16_state: the optimizer keeps its means in bf16.
    """
    found: list[Difference] = []
    worst: dict[str, float] = {}
    for key, piece in record.items():
        allowed = tolerance(key, bf16_state=bf16_state)
        error = error_of(piece, expected[key]) if key in expected else float("inf")
        worst[key[1]] = max(worst.get(key[1], 0.0), error)
        if error > allowed:
            found.append(Difference(key, error, allowed))
    return found, worst


def other_bits(record: Record, expected: Mapping[Key, Tensor]) -> list[Difference]:
    """Return tensors that are not the same to the last bit, in the record's order.

    expected: this rank's pieces.
    """
    found = []
    for key, (tensor, _, _) in record.items():
        whole = Piece(tensor, (0,) * tensor.ndim, tuple(tensor.shape))
        error = error_of(whole, expected[key]) if key in expected else float("inf")
        if error > 0:
            found.append(Difference(key, error, 0.0))
    return found
