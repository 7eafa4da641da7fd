"""Process groups, each made once per use and set of ranks, for as long as the process lives.

A group is expensive: NCCL keeps buffers on the GPU for it, gloo sockets and three threads, one of
which wakes a hundred times a second. Axes of meshes that span the same ranks for the same use share
a group, and a second run in a process reuses the groups of the first. Uses whose communication runs
in parallel have separate groups: in one group each would have to wait for the other.
"""

from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

# Use of each axis of a mesh.
USE_OF_AXIS = {
    "pp": "layers",
    "dp_replicate": "weights",
    "fsdp": "weights",
    "ep": "experts",
    "etp": "experts",
    "cp": "tensors",
    "tp": "tensors",
    "dp": "numbers",
}


def make_mesh(device_type: str, shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """Make a mesh over all ranks, the last axis fastest.

    All ranks must make the same meshes in the same order.
    """
    ranks = torch.arange(dist.get_world_size()).view(shape)
    here = (ranks == dist.get_rank()).nonzero()[0].tolist()
    groups = []
    for axis, name in enumerate(names):
        line = [slice(None) if other == axis else place for other, place in enumerate(here)]
        groups.append(group_of(USE_OF_AXIS[name], ranks[tuple(line)].tolist()))
    return DeviceMesh.from_group(groups, device_type, mesh=ranks, mesh_dim_names=names)


def world_group() -> dist.ProcessGroup:
    """Return the default group. Raises ValueError before `init_process_group`."""
    return dist.distributed_c10d._get_default_group()


def group_of(use: str, ranks: list[int], **settings: Any) -> dist.ProcessGroup:
    """Return the group of these ranks for this use; made at the first call.

    Every rank of the group must call this, in the same order as for its other groups; other ranks
    need not.

    use: a value of `USE_OF_AXIS`, or any other name.
    ranks: global ranks, this one among them.
    settings: arguments of `dist.new_group`, the same for every group of a use.
    """
    if len(ranks) == 1 and not settings:
        use = "alone"  # nothing travels
    made = _made.setdefault(world_group(), {})
    if (use, *ranks) not in made:
        group = dist.new_group(
            ranks,
            use_local_synchronization=True,
            group_desc=use,  # as the flight recorder names it
            **settings,
        )
        made[use, *ranks] = cast(dist.ProcessGroup, group)  # a number for other ranks only
    return made[use, *ranks]


# Groups by default group: when that is destroyed, its groups are forgotten.
_made: WeakKeyDictionary[dist.ProcessGroup, dict[tuple, dist.ProcessGroup]] = WeakKeyDictionary()
