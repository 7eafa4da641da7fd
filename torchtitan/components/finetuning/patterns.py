"""Patterns of names, in which * stands for anything, as in [[optimizer.group]]."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torchtitan.config.schema import as_text
from torchtitan.tools.errors import UserError, nearest_pattern


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_patterns(key: str, patterns: Sequence[str], names: set[str], things: str) -> None:
    """Raise `UserError` for a pattern that matches none of `names`.

    key: of the patterns, for the message.
    things: kind of the names in the message, such as "parameter".
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f"{key}: {as_text(pattern)} matches no {things} of this model"
                f"{nearest_pattern(pattern, names)}"
            )
