"""Muon for the matrices, AdamW for the rest, as one optimizer.

Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon) replaces a matrix's momentum
by the nearest matrix with orthonormal rows or columns, found by five Newton-Schulz steps. A stack
of experts (E, F, D) is E matrices. Embedding, output and all vectors keep AdamW.

The step size: such an update has root-mean-square 1/sqrt(max(rows, columns)). `match_rms_adamw`
(Moonlight, arXiv 2502.16982) multiplies it by 0.2 · sqrt(max(rows, columns)), which gives the size
of AdamW's updates, so that both share one learning rate; `original` multiplies by
sqrt(max(1, rows / columns)).

**Split weights.** The Newton-Schulz steps need whole matrices. Experts that are whole on their
ranks need no communication. Matrices that are split over n ranks are handled in rounds of n, one
matrix for each rank: every part is sent once to the rank of its matrix and once back, and no work
is repeated. (Where two axes split a matrix, tensor and data parallel, it is gathered on all ranks
instead.) Replicas (HSDP) each do the same.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Optimizer

# Quintic, tuned for the slope at zero: singular values end between 0.7 and 1.2, not at 1.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_EPS = 1e-7


def orthogonalise(x: Tensor, *, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Approximate the nearest semi-orthogonal matrix of every matrix in (..., rows, columns).

    dtype: of the computation and the result; None = bf16 on accelerators, as published, and fp32 on
        CPUs, which are slower in bf16.
    """
    a, b, c = _COEFFICIENTS
    dtype = dtype or (torch.float32 if x.device.type == "cpu" else torch.bfloat16)
    tall = x.size(-2) > x.size(-1)
    x = (x.mT if tall else x).to(dtype)
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=_EPS)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def step_size(shape: Sequence[int], adjust: str) -> float:
    """Factor of the orthogonal update, beside the learning rate.

    shape: (..., rows, columns) of the whole matrix.
    adjust: "match_rms_adamw" or "original".
    """
    rows, columns = shape[-2:]
    if adjust == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


class Muon(Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, for plain tensors and DTensors.

    Momentum has the dtype and placement of its parameter.

    groups: those with "muon": True are updated by Muon, the others by AdamW.
    adjust: see `step_size`.
    adamw: arguments of torch's AdamW.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        momentum: float,
        adjust: str,
        adamw: dict[str, Any],
    ):
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "muon": False})
        self.momentum, self.adjust = momentum, adjust
        others = [group for group in self.param_groups if not group["muon"]]
        self._adamw = AdamW(others or [{"params": []}], lr=lr, **adamw)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        # The inner optimizer shares our state, set at each step because loading replaces it.
        self._adamw.state = self.state
        self._adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
        self._adamw.step()
        for group in self.param_groups:
            if group["muon"]:
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        updates = [self._momentum_of(p, p.grad) for p in params]
        for p, update in zip(params, _orthogonalise_parts(params, updates), strict=True):
            local = _local(p)
            local.mul_(1 - group["lr"] * group["weight_decay"])
            local.add_(update, alpha=-group["lr"] * step_size(p.shape, self.adjust))

    def _momentum_of(self, p: nn.Parameter, grad: Tensor) -> Tensor:
        """Update the momentum of this rank's part; return it with Nesterov's look-ahead."""
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        momentum, grad = _local(state["momentum"]), _local(grad)
        momentum.lerp_(grad, 1 - self.momentum)
        return grad.lerp(momentum, self.momentum)


# ---------------------------------------------------------------------------------------------
# Matrices split over ranks
# ---------------------------------------------------------------------------------------------


class _Split(NamedTuple):
    """Split of a matrix.

    group: the ranks that hold its parts.
    dim: the split dim, 0 = rows or 1 = columns.
    """

    group: dist.ProcessGroup
    dim: int


class _Part(NamedTuple):
    """This rank's part of one matrix.

    local: the part, with the split dim first.
    length: of that dim in the whole matrix.
    """

    local: Tensor
    length: int


def _orthogonalise_parts(params: list[nn.Parameter], updates: list[Tensor]) -> list[Tensor]:
    """Orthogonalise whole matrices; return this rank's part of each, in the dtype of its update."""
    results: dict[int, Tensor] = {}
    rounds: dict[_Split, list[int]] = defaultdict(list)
    for n, (p, update) in enumerate(zip(params, updates, strict=True)):
        split = _split_of(p)
        if split is None:
            results[n] = orthogonalise(update)
        elif isinstance(split, _Split):
            rounds[split].append(n)
        else:
            results[n] = _orthogonalise_gathered(cast(DTensor, p), update)  # split: a DTensor
    for split, members in rounds.items():
        parts = [(n, part) for n in members for part in _matrices(params[n], updates[n], split)]
        done = defaultdict(list)
        for (n, _), each in zip(parts, _in_rounds([p for _, p in parts], split.group), strict=True):
            done[n].append(each.transpose(0, split.dim))
        for n, matrices in done.items():
            results[n] = torch.stack(matrices) if params[n].ndim == 3 else matrices[0]
    return [results[n].to(update.dtype) for n, update in enumerate(updates)]


def _split_of(p: nn.Parameter) -> _Split | str | None:
    """Find the split of a parameter's matrices.

    None where this rank holds whole ones, "twice" where several axes split them.
    """
    if not isinstance(p, DTensor):
        return None
    splits = []
    for axis, placement in enumerate(p.placements):
        dim = getattr(placement, "dim", None)  # of Shard and _StridedShard
        if dim is not None and dim >= p.ndim - 2 and p.device_mesh.size(axis) > 1:
            splits.append(_Split(p.device_mesh.get_group(axis), dim - (p.ndim - 2)))
    if len(splits) > 1:
        return "twice"
    return splits[0] if splits else None


def _matrices(p: nn.Parameter, update: Tensor, split: _Split) -> list[_Part]:
    """List the matrices of this rank's stack (E, F, D), or the single matrix of a 2-D parameter."""
    length = p.shape[p.ndim - 2 + split.dim]
    stack = update if p.ndim == 3 else update.unsqueeze(0)
    return [_Part(matrix.transpose(0, split.dim), length) for matrix in stack]


def _in_rounds(parts: list[_Part], group: dist.ProcessGroup) -> list[Tensor]:
    """Orthogonalise whole matrices in rounds of one a rank; return this rank's part of each."""
    size = dist.get_world_size(group)
    # Large ones first, so that those of a round cost about the same. The order is the same on all
    # ranks.
    order = sorted(range(len(parts)), key=lambda n: -parts[n].length * parts[n].local.size(1))
    results: dict[int, Tensor] = {}
    for start in range(0, len(order), size):
        members = order[start : start + size]
        done = _one_round([parts[n] for n in members], group)
        for n, result in zip(members, done, strict=True):
            results[n] = result
    return [results[n] for n in range(len(parts))]


def _one_round(parts: list[_Part], group: dist.ProcessGroup) -> list[Tensor]:
    """Orthogonalise matrix n on rank n; return this rank's part of each.

    parts: at most one for each rank.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    like = parts[0].local
    dtype = torch.float32 if like.device.type == "cpu" else torch.bfloat16
    sent = [part.local.numel() for part in parts] + [0] * (size - len(parts))
    mine = parts[rank] if rank < len(parts) else None
    columns = mine.local.size(1) if mine else 0
    received = [rows * columns for rows in _rows_by_rank(mine.length if mine else 0, size)]
    flat = torch.cat([part.local.to(dtype).flatten() for part in parts])
    whole = torch.empty(sum(received), dtype=dtype, device=like.device)
    dist.all_to_all_single(whole, flat, received, sent, group=group)
    if mine:
        whole = orthogonalise(whole.view(mine.length, columns), dtype=dtype).flatten()
    dist.all_to_all_single(flat, whole, sent, received, group=group)
    pieces = flat.split(sent[: len(parts)])
    return [piece.view(part.local.shape) for piece, part in zip(pieces, parts, strict=True)]


def _rows_by_rank(length: int, size: int) -> list[int]:
    """Rows of each rank where `Shard` splits `length` rows, which is as torch.chunk does."""
    most = -(-length // size)
    return [max(0, min(most, length - rank * most)) for rank in range(size)]


def _orthogonalise_gathered(p: DTensor, update: Tensor) -> Tensor:
    like = p if p.grad is None else p.grad
    whole = DTensor.from_local(
        update, p.device_mesh, p.placements, shape=like.shape, stride=like.stride()
    ).full_tensor()
    done = orthogonalise(whole).to(update.dtype)
    return distribute_tensor(done, p.device_mesh, p.placements, src_data_rank=None).to_local()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
