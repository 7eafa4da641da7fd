"""Names of modules as lines of a log show them."""

from collections.abc import Iterable


def listed(names: Iterable[str]) -> str:
    """Join names without numbers of layers, each kind once: "layers.*.attention.wo (5), ..."."""
    counts: dict[str, int] = {}
    for name in names:
        kind = ".".join("*" if part.isdigit() else part for part in name.split("."))
        counts[kind] = counts.get(kind, 0) + 1
    return ", ".join(f"{kind} ({count})" if count > 1 else kind for kind, count in counts.items())
