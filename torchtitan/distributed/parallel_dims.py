"""The degrees of parallelism, and the device meshes that they span.

Dense weights and experts are spread over the same ranks in two ways:

    dense     (dp_replicate, dp_shard)
    experts   (dp_replicate, dp_shard / ep, ep): each EP group is `ep` consecutive ranks that hold
    all
              experts between them, and FSDP shards over what is left
"""

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class ParallelDims:
    """dp_replicate × dp_shard = world_size. Checked before, by `torchtitan.config.validate`.

    ep: ranks over which experts are spread. node_size: consecutive ranks that share a node.
    """

    dp_replicate: int
    dp_shard: int
    world_size: int
    device_type: str
    ep: int = 1
    node_size: int = 1

    def __post_init__(self) -> None:
        assert self.dp_replicate * self.dp_shard == self.world_size, self
        assert self.world_size % self.ep == 0, self

    @property
    def dp_degree(self) -> int:
        """Ranks that see different data."""
        return self.dp_replicate * self.dp_shard

    @property
    def expert_shard(self) -> int:
        """Ranks over which FSDP splits the experts of an EP rank; 1 where EP uses them all up."""
        return max(1, self.dp_shard // self.ep)

    @property
    def nodes_per_ep_group(self) -> int:
        return max(1, self.ep // self.node_size)

    def build_mesh(self) -> DeviceMesh:
        """Axes `dp_replicate` (weights copied) and `dp_shard` (weights split), of any size."""
        return init_device_mesh(
            self.device_type,
            (self.dp_replicate, self.dp_shard),
            mesh_dim_names=("dp_replicate", "dp_shard"),
        )

    def build_expert_mesh(self) -> DeviceMesh | None:
        """Axes `dp_replicate`, `dp_shard` and `ep`, of any size, over the same ranks; None = no EP.

        With DDP (dp_shard = 1) the EP groups are taken out of the replicas.
        """
        if self.ep == 1:
            return None
        replicate = self.world_size // (self.expert_shard * self.ep)
        return init_device_mesh(
            self.device_type,
            (replicate, self.expert_shard, self.ep),
            mesh_dim_names=("dp_replicate", "dp_shard", "ep"),
        )

    def describe(self) -> str:
        """What users call this layout."""
        if self.world_size == 1:
            return "one process"
        if self.dp_shard == 1:
            return f"DDP: weights on each of {self.dp_replicate} ranks"
        if self.dp_replicate == 1:
            return f"FSDP: weights split over {self.dp_shard} ranks"
        return (
            f"HSDP: {self.dp_replicate} replicas, weights of each split over {self.dp_shard} ranks"
        )
