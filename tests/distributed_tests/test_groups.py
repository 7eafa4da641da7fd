"""Process groups are made once for a use and a set of ranks, and never shared between uses."""

import torch
import torch.distributed as dist

from torchtitan.distributed.groups import group_of, make_mesh


def groups_of_this_rank() -> dict[str, bool]:
    rank = dist.get_rank()
    names = ("pp", "dp_replicate", "fsdp", "tp")
    replicas = make_mesh("cpu", (1, 2, 2, 1), names)
    experts = make_mesh("cpu", (1, 2, 1, 2, 1), ("pp", "dp_replicate", "fsdp", "ep", "etp"))
    before = len(dist.distributed_c10d._world.pg_map)
    again = make_mesh("cpu", (1, 2, 2, 1), names)
    fsdp, ep = replicas["fsdp"].get_group(), experts["ep"].get_group()
    sums = torch.tensor([1.0 * rank])
    dist.all_reduce(sums, group=fsdp)
    return {
        "a second mesh makes none": len(dist.distributed_c10d._world.pg_map) == before,
        "and has the first one's": again["fsdp"].get_group() is fsdp,
        "weights and experts of the same ranks stay apart": ep is not fsdp
        and dist.get_process_group_ranks(ep) == dist.get_process_group_ranks(fsdp),
        "axes of one rank share theirs": replicas["pp"].get_group() is replicas["tp"].get_group(),
        "neighbours are together": sums.item() == (1.0 if rank < 2 else 5.0),
        "only those who are in it ask": rank > 1
        or dist.get_world_size(group_of("numbers", [0, 1])) == 2,
    }


def test_groups_are_made_once_for_a_use_and_a_set_of_ranks(ranks) -> None:
    for found in ranks(4).run(groups_of_this_rank):
        assert all(found.values()), found
