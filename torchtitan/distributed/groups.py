"""Process groups, each made once: for one use and one set of ranks, as long as the process lives.

A group is dear: NCCL keeps buffers on the GPU for it, gloo sockets and three threads, one of which
wakes a hundred times a second. Axes of meshes that span the same ranks for the same use share
theirs, and a second run in a process meets the groups of the first. Uses stay apart where one's
communication runs beside another's: in one group it would have to wait for its turn.
"""

from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

# What an axis of a mesh is used for.
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
    """Over all ranks, the last axis fastest. All ranks make the same meshes in the same order."""
    ranks = torch.arange(dist.get_world_size()).view(shape)
    here = (ranks == dist.get_rank()).nonzero()[0].tolist()
    groups = []
    for axis, name in enumerate(names):
        line = [slice(None) if other == axis else place for other, place in enumerate(here)]
        groups.append(group_of(USE_OF_AXIS[name], ranks[tuple(line)].tolist()))
    return DeviceMesh.from_group(groups, device_type, mesh=ranks, mesh_dim_names=names)


def world_group() -> dist.ProcessGroup:
    """The default group. Raises ValueError before `init_process_group`."""
    return dist.distributed_c10d._get_default_group()


def group_of(use: str, ranks: list[int], **settings: Any) -> dist.ProcessGroup:
    """The group of these ranks, this one among them, for this use.

    All of them must ask for it, in the same order as for their other groups; others need not.
    settings: of `dist.new_group`, the same for every group of a use.
    """
    if len(ranks) == 1 and not settings:
        use = "alone"  # nothing travels
    made = _made.setdefault(world_group(), {})
    if (use, *ranks) not in made:
        group = dist.new_group(ranks, use_local_synchronization=True, **settings)
        made[use, *ranks] = cast(dist.ProcessGroup, group)  # a number for other ranks only
    return made[use, *ranks]


# By default group: one that is destroyed takes its groups along.
_made: WeakKeyDictionary[dist.ProcessGroup, dict[tuple, dist.ProcessGroup]] = WeakKeyDictionary()
