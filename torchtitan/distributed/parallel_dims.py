"""The degrees of parallelism, and the device meshes that they span."""

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class ParallelDims:
    """dp_replicate × dp_shard = world_size. Checked before, by `torchtitan.config.validate`."""

    dp_replicate: int
    dp_shard: int
    world_size: int
    device_type: str

    def __post_init__(self) -> None:
        assert self.dp_replicate * self.dp_shard == self.world_size, self

    @property
    def dp_degree(self) -> int:
        """Ranks that see different data."""
        return self.dp_replicate * self.dp_shard

    def build_mesh(self) -> DeviceMesh:
        """Axes `dp_replicate` (weights copied) and `dp_shard` (weights split), of any size."""
        return init_device_mesh(
            self.device_type,
            (self.dp_replicate, self.dp_shard),
            mesh_dim_names=("dp_replicate", "dp_shard"),
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
