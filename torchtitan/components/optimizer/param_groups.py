"""The weight decay and the learning rate of each parameter, by its name and its dims.

Weight decay pulls weights towards zero; a norm's scale or a bias has no reason to be near zero, so
by default only tensors with two or more dimensions decay. The token embedding, the output
projection, the router's gate and the stacked expert weights (E, F, D) count as matrices.
`weight_decay_on = "all"` is torchtitan v0.2's rule. Tables [[optimizer.group]] override this for
the parameters that they match; where several match one, the first applies.

Patterns are matched against the names of the whole model: a pipeline stage that holds none of a
group's parameters doesn't have the group, which is not an error. Patterns that match no parameter
at all are found before the run starts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

from torch import nn
from torch.distributed.tensor import DTensor

from torchtitan.config import ParamGroup
from torchtitan.config.schema import as_text
from torchtitan.tools.errors import UserError, nearest_pattern
from torchtitan.tools.logging import logger


class Place(NamedTuple):
    """Settings that the parameters of one group share.

    number: 0 = matrices, 1 = other tensors, 2 and above = tables of the config, in order.
    lr_factor: multiplies the learning rate.
    muon: whether Muon updates them.
    """

    number: int
    weight_decay: float
    lr_factor: float
    muon: bool = False

    @property
    def order(self) -> tuple[object, ...]:
        return (self.number, not self.muon, self.weight_decay, self.lr_factor)


@dataclass(frozen=True)
class GroupRules:
    """Settings of [optimizer] from which each parameter's group follows.

    tables: [[optimizer.group]], in order.
    not_by_muon: prefixes of names whose matrices Muon leaves to AdamW; None = Muon is not used.
    """

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
        """Make groups for a `torch.optim.Optimizer`: each trainable parameter is in exactly one.

        Muon's matrices come first (with "muon"), then other matrices and other tensors, even where
        these groups are empty or have the same decay, then those of the tables. In groups that
        Muon doesn't update, plain tensors and DTensors are in separate groups where both exist:
        torch's fused and foreach kernels refuse mixed lists.

        lr: base learning rate.
        """
        params = trainable(model_parts)
        kinds = sorted({isinstance(p, DTensor) for _, p in params}) or [False]
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
        """Log a line for each group of the whole model, with its number of parameters."""
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
    """List the trainable parameters with their names, in order; tied parameters once."""
    name_of: dict[nn.Parameter, str] = {}
    for part in model_parts:
        for name, p in part.named_parameters():
            if p.requires_grad:
                name_of.setdefault(p, name)
    return [(name, p) for p, name in name_of.items()]


def check_groups(tables: Sequence[ParamGroup], model: nn.Module) -> None:
    """Raise `UserError` for a pattern that matches no parameter of `model` (the whole one), or only
    parameters of an earlier table."""
    names = {name for name, _ in trainable([model])}
    free = set(names)
    for n, table in enumerate(tables, start=1):
        taken: set[str] = set()
        for pattern in table.match:
            named = {name for name in names if fnmatchcase(name, pattern)}
            if not named:
                frozen = any(fnmatchcase(name, pattern) for name, _ in model.named_parameters())
                raise UserError(
                    f"optimizer.group {n}: match {as_text(pattern)} matches no "
                    f"{'trained ' if frozen else ''}parameter of this "
                    f"model{nearest_pattern(pattern, names)}"
                )
            if not named & free:
                raise UserError(
                    f"optimizer.group {n}: all parameters that match {as_text(pattern)} belong to "
                    "an earlier table already, and the first one applies; put this one before it, "
                    "or leave it out."
                )
            taken |= named
        free -= taken
