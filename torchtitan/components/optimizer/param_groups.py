"""Which weight decay and which learning rate each parameter has, by its name and its dims.

Weight decay pulls weights towards zero; a norm's scale or a bias has no reason to be there, so by
default only tensors with two or more dimensions decay. The token embedding, the output projection,
the router's gate and the stacked expert weights (E, F, D) count as matrices.
`weight_decay_on = "all"` is torchtitan v0.2's rule. Tables [[optimizer.group]] say otherwise for
the parameters that they name; where several name one, the first holds.

Names are the whole model's: where a pipeline stage holds none of a group's parameters, it has no
such group, and that is no mistake. Whether a pattern names anything is asked of the whole model,
before anything is started.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

from torch import nn
from torch.distributed.tensor import DTensor

from torchtitan.config import ParamGroup
from torchtitan.config.schema import as_text
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger


class Place(NamedTuple):
    """What parameters of one group have in common. number: 0 matrices, 1 the others, 2 and on: of
    the tables. muon: whether Muon takes it."""

    number: int
    weight_decay: float
    lr_factor: float
    muon: bool = False

    @property
    def order(self) -> tuple[object, ...]:
        return (self.number, not self.muon, self.weight_decay, self.lr_factor)


@dataclass(frozen=True)
class GroupRules:
    """The settings of [optimizer] that decide it. not_by_muon: beginnings of names whose matrices
    Muon leaves to AdamW; None = Muon is not asked."""

    weight_decay: float
    weight_decay_on: Literal["matrices", "all"]
    tables: Sequence[ParamGroup] = ()
    not_by_muon: tuple[str, ...] | None = None

    def place_of(self, name: str, ndim: int) -> Place:
        number = 0 if ndim >= 2 else 1
        decay = self.weight_decay if ndim >= 2 or self.weight_decay_on == "all" else 0.0
        left = self.not_by_muon
        muon = left is not None and ndim >= 2 and not name.startswith(left)
        for n, table in enumerate(self.tables, start=2):
            if any(fnmatchcase(name, pattern) for pattern in table.match):
                decay = decay if table.weight_decay is None else table.weight_decay
                return Place(n, decay, table.lr_factor, muon)
        return Place(number, decay, 1.0, muon)

    def groups(self, model_parts: Iterable[nn.Module], lr: float) -> list[dict[str, Any]]:
        """For a `torch.optim.Optimizer`: every trainable parameter in exactly one group.

        Muon's matrices first (with "muon"), then other matrices and the rest, also where these are
        empty or decay alike, then the tables'. Beside Muon, plain tensors and DTensors stand apart
        where there are both: torch's fused and foreach kernels refuse a list of them.
        """
        params = trainable(model_parts)
        kinds = sorted({isinstance(p, DTensor) for _, p in params})
        members: dict[tuple[Place, bool], list[nn.Parameter]] = {}
        for place in self._always():
            members |= {(place, kind): [] for kind in ([False] if place.muon else kinds)}
        for name, p in params:
            # A DTensor's ndim is that of the whole tensor: sharding never changes a group.
            place = self.place_of(name, p.ndim)
            key = place, isinstance(p, DTensor) and not place.muon
            members.setdefault(key, []).append(p)
        groups = []
        for place, kind in sorted(members, key=lambda key: (key[0].order, key[1])):
            group: dict[str, Any] = {
                "params": members[place, kind],
                "weight_decay": place.weight_decay,
            }
            if place.lr_factor != 1.0:
                group["lr"] = lr * place.lr_factor
            groups.append(group | ({"muon": True} if place.muon else {}))
        return groups

    def _always(self) -> list[Place]:
        matrices = Place(0, self.weight_decay, 1.0)
        others = Place(1, self.weight_decay if self.weight_decay_on == "all" else 0.0, 1.0)
        by_muon = [] if self.not_by_muon is None else [matrices._replace(muon=True)]
        return [*by_muon, matrices, others]

    def log(self, model: nn.Module) -> None:
        """A line for each group of the whole model, with its parameters."""
        elements: dict[Place, list[int]] = {}
        for name, p in trainable([model]):
            elements.setdefault(self.place_of(name, p.ndim), []).append(p.numel())
        for place in sorted(elements, key=lambda place: place.order):
            counts = elements[place]
            logger.info(
                "Optimizer: %s parameters in %d tensors (%s): weight decay %g%s%s",
                f"{sum(counts):,}",
                len(counts),
                self._title(place.number),
                place.weight_decay,
                "" if place.lr_factor == 1 else f", {place.lr_factor:g} x the learning rate",
                ", by Muon" if place.muon else "",
            )

    def _title(self, number: int) -> str:
        if number < 2:
            return ("matrices", "norms and other vectors")[number]
        return ", ".join(self.tables[number - 2].match)


def trainable(model_parts: Iterable[nn.Module]) -> list[tuple[str, nn.Parameter]]:
    """With their names, in order, without the second sight of one that two modules share."""
    name_of: dict[nn.Parameter, str] = {}
    for part in model_parts:
        for name, p in part.named_parameters():
            if p.requires_grad:
                name_of.setdefault(p, name)
    return [(name, p) for p, name in name_of.items()]


def check_groups(tables: Sequence[ParamGroup], model: nn.Module) -> None:
    """Raise `UserError` for a pattern that names no parameter of `model` (the whole one), or only
    such as an earlier table has taken."""
    names = {name for name, _ in trainable([model])}
    free = set(names)
    for n, table in enumerate(tables, start=1):
        taken: set[str] = set()
        for pattern in table.match:
            named = {name for name in names if fnmatchcase(name, pattern)}
            if not named:
                raise UserError(
                    f"optimizer.group {n}: match {as_text(pattern)} names no parameter of this "
                    f"model{_example(pattern, names)}"
                )
            if not named & free:
                raise UserError(
                    f"optimizer.group {n}: all that match {as_text(pattern)} names belongs to an "
                    "earlier table already, and the first holds; put this one before it, or leave "
                    "it out."
                )
            taken |= named
        free -= taken


def _example(pattern: str, names: set[str]) -> str:
    near = difflib.get_close_matches(pattern, sorted(names), n=1)
    if near:
        return f"; did you mean '{near[0]}'?"
    longest = max(sorted(names), key=len)
    return f"; a whole name is meant, such as '{longest}', in which * stands for anything."
