"""Conversion of a checkpoint with adapters: to PEFT's format, or with merged weights."""

import shutil
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from torchtitan.components.checkpoint.adapters import refuse_other_rows, write_peft_config
from torchtitan.components.checkpoint.folder import require_checkpoint
from torchtitan.components.checkpoint.stored_tensors import Box, StoredTensors
from torchtitan.components.finetuning import peft
from torchtitan.components.finetuning.lora import AdapterSize
from torchtitan.components.huggingface.folder import HFWriter, plan_layout
from torchtitan.components.huggingface.load_save import replace_folder
from torchtitan.ops.lora import A, B, LowRank, is_adapter, product
from torchtitan.protocols.state_dict_adapter import StateDictAdapter
from torchtitan.tools.errors import UserError


class MergedTensors(StoredTensors):
    """Reads a checkpoint with adapters as one of merged weights, in fp32.

    sizes: of the adapters, by matrix.
    """

    def __init__(
        self, checkpoint: Path, sizes: Mapping[str, AdapterSize], *, averaged: bool = False
    ) -> None:
        super().__init__(checkpoint, averaged=averaged)
        self._sizes = sizes
        # Apart, because a reader keeps the chunks of its last read.
        self._factors = StoredTensors(checkpoint, averaged=averaged)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, shape in super().shapes().items() if not is_adapter(name)}

    def read(self, ours: str, box: Box | None = None) -> Tensor:
        weight = super().read(ours, box)
        matrix, between = ours.removesuffix(".weight"), "."
        if matrix == ours:
            between = "_"
        size = self._sizes.get(matrix)
        if size is None:
            return weight
        factors = (self._factor(f"{matrix}{between}{end}", box) for end in (A, B))
        merged = weight.float() + product(LowRank(*factors, scale=size.alpha / size.rank))
        return merged.view_as(weight)

    def _factor(self, name: str, box: Box | None) -> Tensor:
        """Read A or B of a matrix, or of one expert of a stack."""
        if box is None:
            return self._factors.read(name)
        start, (count, *_) = box
        assert count == 1, "experts are read one by one"
        shape = self._factors.shapes()[name]
        return self._factors.read(name, (start, (1, *shape[1:])))[0]


def checkpoint_to_peft(
    checkpoint: Path,
    target: Path,
    adapter: StateDictAdapter,
    sizes: Mapping[str, AdapterSize],
    *,
    dtype: torch.dtype,
    averaged: bool = False,
) -> None:
    """Write the adapters of a checkpoint as a folder in PEFT's format. Raises `UserError`."""
    adapter.check_export()
    peft.check_peft(sizes)
    refuse_other_rows(adapter, sizes)
    require_checkpoint(checkpoint)
    if target.exists():
        raise UserError(f"{target} already exists; name another folder, or remove it.")
    stored = StoredTensors(checkpoint, averaged=averaged)
    pieces = peft.adapter_pieces(adapter.pieces(), sizes)
    tmp = target.with_name(target.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    writer = HFWriter(tmp, plan_layout(pieces, dtype, file_name=peft.WEIGHTS))
    writer.create()
    with closing(writer):
        for piece in pieces:
            tensor = stored.read(piece.ours)
            writer.write(piece.name, tensor if piece.index is None else tensor[piece.index])
    write_peft_config(tmp, adapter, sizes)
    replace_folder(tmp, target)
