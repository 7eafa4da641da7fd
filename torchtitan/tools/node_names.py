"""Names of the nodes of a run, for error messages: scripts/launch.py leaves them to its ranks."""

import json
import os
from collections.abc import Iterable, Sequence

# Environment variable with a list (JSON) of each node's name, by node rank; unset on one machine.
NODES = "TITAN_NODES"
# A message that is about more nodes than these names none.
_MOST = 3


def leave_names(names: Sequence[str]) -> None:
    """Make the names known to processes that this one starts."""
    os.environ[NODES] = json.dumps(names)


def nodes_of(ranks: Iterable[int]) -> str:
    """Name the nodes of these ranks: " (node 1: gpu-17, 10.0.0.2)".

    Returns "" on a single machine and for many nodes.
    """
    if NODES not in os.environ:
        return ""
    names = json.loads(os.environ[NODES])
    size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    nodes = sorted({rank // size for rank in ranks})
    if not nodes or len(nodes) > _MOST or nodes[-1] >= len(names):
        return ""
    return f" ({'; '.join(f'node {node}: {names[node]}' for node in nodes)})"
