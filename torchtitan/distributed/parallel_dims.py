"""The degrees of parallelism, and the device meshes that they span.

Ranks are laid out as (pp, dp_replicate, dp_shard, cp, tp), the last fastest. Dense weights and
experts are spread over the same ranks in two ways:

    dense     (pp, dp_replicate, fsdp, tp)        fsdp = dp_shard · cp
    experts   (pp, dp_replicate, fsdp, ep, etp)   the ranks of each EP group together hold all
                                                  experts, and FSDP shards over the remaining ranks

Sums of a step run over those ranks whose values differ:

    valid tokens, skipped documents   dp: ranks that read different sequences
    losses                            the last pipeline stage, the only one with a loss, and of it
                                      one rank of each TP group, whose ranks compute the same
    expert load, traffic              a stage, dp x cp x tp: between layers TP splits the sequence,
                                      so over a stage each token meets each router exactly once
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from torchtitan.distributed.groups import group_of, make_mesh


@dataclass(frozen=True, kw_only=True)
class ParallelDims:
    """Degrees of parallelism, checked by `torchtitan.config.resolve_degrees`, and their meshes.

    node_size: consecutive ranks that share a node.
    last_stage: pp rank of the stage with the output; −1 = the last rank (another one only with
        V-shaped schedules).
    """

    world_size: int
    device_type: str
    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    etp: int = 1
    node_size: int = 1
    last_stage: int = -1

    def __post_init__(self) -> None:
        dense = self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp
        assert dense == self.world_size, self
        assert self.stage_size % (self.ep * self.etp) == 0, self

    @property
    def stage_size(self) -> int:
        """Ranks of a pipeline stage."""
        return self.world_size // self.pp

    @property
    def dp_degree(self) -> int:
        """Data-parallel ranks: they read different sequences."""
        return self.dp_replicate * self.dp_shard

    def dp_rank(self, rank: int) -> int:
        return rank % self.stage_size // (self.cp * self.tp)

    @property
    def fsdp(self) -> int:
        """Ranks over which FSDP splits dense weights."""
        return self.dp_shard * self.cp

    @property
    def expert_fsdp(self) -> int:
        """Ranks over which FSDP splits the experts of an EP rank; 1 where EP spans all of them."""
        return max(1, self.fsdp * self.tp // (self.ep * self.etp))

    @property
    def nodes_per_ep_group(self) -> int:
        return max(1, self.ep * self.etp // self.node_size)

    @cached_property
    def mesh(self) -> DeviceMesh:
        """Mesh of the dense weights, axes of any size: `pp`, `dp_replicate`, `fsdp`, `tp`."""
        return make_mesh(
            self.device_type,
            (self.pp, self.dp_replicate, self.fsdp, self.tp),
            ("pp", "dp_replicate", "fsdp", "tp"),
        )

    @cached_property
    def expert_mesh(self) -> DeviceMesh | None:
        """Mesh of the experts, axes of any size: `pp`, `dp_replicate`, `fsdp`, `ep`, `etp`; None
        where experts are spread as dense weights are.

        An EP group larger than a replica (DDP: dp_shard = 1) spans several replicas.
        """
        if self.ep == 1 and self.tp == 1:
            return None
        spread = self.expert_fsdp * self.ep * self.etp
        return make_mesh(
            self.device_type,
            (self.pp, self.stage_size // spread, self.expert_fsdp, self.ep, self.etp),
            ("pp", "dp_replicate", "fsdp", "ep", "etp"),
        )

    @cached_property
    def data_mesh(self) -> DeviceMesh:
        """Mesh of the tokens, axes of any size: `pp`, `dp`, `cp`, `tp`."""
        return make_mesh(
            self.device_type,
            (self.pp, self.dp_degree, self.cp, self.tp),
            ("pp", "dp", "cp", "tp"),
        )

    @property
    def dp_group(self) -> dist.ProcessGroup:
        """Ranks that read different sequences and share this rank's place on pp, cp and tp."""
        return self.data_mesh["dp"].get_group()

    @cached_property
    def sequence_group(self) -> dist.ProcessGroup:
        """Ranks that hold (and route) parts of the same sequences."""
        return group_of("numbers", self._block_of_this_rank(self.cp * self.tp))

    @property
    def loss_ranks(self) -> list[int]:
        """Ranks whose losses add up to the step's loss; see the top of the file."""
        ranks = torch.arange(self.world_size).view(self.pp, -1, self.tp)
        return ranks[self.last_stage, :, 0].tolist()

    @cached_property
    def stage_group(self) -> dist.ProcessGroup:
        """All ranks of this rank's pipeline stage."""
        return group_of("numbers", self._block_of_this_rank(self.stage_size))

    def _block_of_this_rank(self, size: int) -> list[int]:
        """List the ranks of this rank's block, where consecutive blocks have `size` ranks each."""
        first = dist.get_rank() // size * size
        return list(range(first, first + size))

    def make_groups(self) -> None:
        """Make all process groups now.

        If each were made at its first use, pipeline stages with and without experts would ask for
        them in different orders and deadlock.
        """
        _ = self.mesh, self.expert_mesh, self.data_mesh, self.stage_group, self.sequence_group

    @property
    def ep_groups(self) -> torch.Tensor:
        """Ranks of every EP group, by node: (groups, nodes, ranks of a node) int64."""
        ranks = torch.arange(self.world_size).view(-1, self.ep, self.etp).transpose(1, 2)
        return ranks.reshape(self.world_size // self.ep, self.nodes_per_ep_group, -1)

    @cached_property
    def node_groups(self) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        """Two groups within this rank's EP group: the ranks at its place on each node, and the
        ranks of its node."""
        groups = self.ep_groups
        group, node, place = (groups == dist.get_rank()).nonzero()[0].tolist()
        between, within = groups[group, :, place].tolist(), groups[group, node].tolist()
        return group_of("experts", between), group_of("experts", within)

    def describe(self) -> str:
        """Name this layout for log lines."""
        if self.world_size == 1:
            return "one process"
        degrees = {"PP": self.pp, "CP": self.cp, "TP": self.tp}
        others = [f"{name} {degree}" for name, degree in degrees.items() if degree > 1]
        return ", ".join([*others, self._describe_data_parallel()])

    def _describe_data_parallel(self) -> str:
        if self.dp_replicate * self.fsdp == 1:
            return "no data parallelism"
        if self.fsdp == 1:
            return f"DDP: weights on each of {self.dp_replicate} ranks"
        if self.dp_replicate == 1:
            return f"FSDP: weights split over {self.fsdp} ranks"
        return f"HSDP: {self.dp_replicate} replicas, weights of each split over {self.fsdp} ranks"
