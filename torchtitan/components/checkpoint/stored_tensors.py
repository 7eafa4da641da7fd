"""Weights of a checkpoint, read whole or in parts without the model."""

from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from torchtitan.components.checkpoint.dcp_storage import read_tensor_index
from torchtitan.components.optimizer.ema import PREFIX as EMA_PREFIX
from torchtitan.components.optimizer.ema import check_has_average

PREFIX = "model."  # of weights among the tensors of a checkpoint
Box = tuple[tuple[int, ...], tuple[int, ...]]  # offset, shape


class StoredTensors:
    """Reads the weights of a checkpoint, whole or in parts.

    Chunks of the last read stay in memory: neighbouring experts are in the same chunk. Raises
    `UserError` where the average is asked for and the checkpoint has none.

    averaged: read the parameters' average (components/optimizer/ema.py); buffers have none.
    """

    def __init__(self, checkpoint: Path, *, averaged: bool = False) -> None:
        self.checkpoint = checkpoint
        self.index = read_tensor_index(checkpoint)
        self._chunks: dict[MetadataIndex, Tensor] = {}
        self._averaged = averaged
        if averaged:
            check_has_average(checkpoint, self.index)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            name.removeprefix(PREFIX): tuple(info.size)
            for name, info in self.index.state_dict_metadata.items()
            if name.startswith(PREFIX) and isinstance(info, TensorStorageMetadata)
        }

    def read(self, ours: str, box: Box | None = None) -> Tensor:
        """Read a tensor, or a part of it, in the dtype in which it was saved."""
        name = self._name(ours)
        info = cast(TensorStorageMetadata, self.index.state_dict_metadata[name])  # see `shapes`
        offset, shape = box or ((0,) * len(info.size), tuple(info.size))
        out = torch.empty(shape, dtype=info.properties.dtype)
        used = {}
        for chunk in info.chunks:
            begin = [max(o, c) for o, c in zip(offset, chunk.offsets, strict=True)]
            ends = zip(offset, shape, chunk.offsets, chunk.sizes, strict=True)
            size = [min(o + n, c + m) - b for (o, n, c, m), b in zip(ends, begin, strict=True)]
            if any(n <= 0 for n in size):
                continue
            key = MetadataIndex(name, chunk.offsets)
            used[key] = self._chunks[key] if key in self._chunks else self._load(key)
            in_chunk = _slices(begin, chunk.offsets, size)
            out[_slices(begin, offset, size)] = used[key][in_chunk]
        self._chunks = used
        return out

    def _name(self, ours: str) -> str:
        average = EMA_PREFIX + ours
        use_it = self._averaged and average in self.index.state_dict_metadata
        return average if use_it else PREFIX + ours

    def _load(self, key: MetadataIndex) -> Tensor:
        place = self.index.storage_data[key]
        with (self.checkpoint / place.relative_path).open("rb") as file:
            view = _create_file_view(file, place.offset, place.length)
            return torch.load(cast(IO[bytes], view), map_location="cpu", weights_only=True)


def _slices(begin: list[int], origin: Any, size: list[int]) -> tuple[slice, ...]:
    return tuple(slice(b - o, b - o + n) for b, o, n in zip(begin, origin, size, strict=True))
