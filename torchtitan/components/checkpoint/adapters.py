"""Low-rank adapters of a running model in and out: PEFT folders, and merged weights.

Everything here is collective: all ranks call it.
"""

import json
import shutil
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchtitan.components.finetuning import peft
from torchtitan.components.finetuning.lora import AdapterSize, adapter_sizes
from torchtitan.components.huggingface.folder import (
    CONFIG,
    HFFolder,
    HFWriter,
    plan_layout,
    read_json,
)
from torchtitan.components.huggingface.load_save import (
    all_or_none,
    local_part,
    part_of_piece,
    replace_folder,
    save_hf,
    tensors_of,
    write_piece,
    writes,
)
from torchtitan.config import JobConfig, LoRA
from torchtitan.ops.lora import A, B, LowRank, product, weight_of
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.protocols.state_dict_adapter import StateDictAdapter
from torchtitan.protocols.train_spec import TrainSpec
from torchtitan.tools.errors import UserError, some
from torchtitan.tools.logging import logger

Sizes = Mapping[str, AdapterSize]


@dataclass(frozen=True)
class AdapterFiles:
    """Adapters of a run, for its exports and its start.

    settings: the table [lora].
    sizes: of the adapters, by matrix.
    """

    settings: LoRA
    sizes: Sizes

    def export(
        self,
        model: nn.Module,
        adapter: StateDictAdapter,
        path: Path,
        dtype: torch.dtype,
        group: dist.ProcessGroup | None,
    ) -> None:
        """Write the adapters alone, or the merged weights, as lora.save_merged says."""
        if not self.settings.save_merged:
            save_adapters(model, adapter, self.sizes, path, dtype=dtype, group=group)
            return
        assets = adapter.hf_assets_path
        merge = Merge(self.sizes)
        save_hf(model, adapter, path, dtype=dtype, assets_path=assets, group=group, merge=merge)

    def load(
        self, model: nn.Module, adapter: StateDictAdapter, group: dist.ProcessGroup | None
    ) -> None:
        """Fill the adapters from lora.initial_load_path, where it is set."""
        if self.settings.initial_load_path is not None:
            path = Path(self.settings.initial_load_path)
            load_adapters(model, adapter, self.sizes, path, group=group)


def adapter_files(
    config: JobConfig, spec: TrainSpec, model_args: BaseModelArgs
) -> AdapterFiles | None:
    """Describe the adapters of a run; None where it has none."""
    if "lora" not in config.model.converters:
        return None
    with torch.device("meta"):
        model = spec.model_cls(model_args)
    return AdapterFiles(config.lora, adapter_sizes(model, config.lora))


@torch.no_grad()
def save_adapters(
    model: nn.Module,
    adapter: StateDictAdapter,
    sizes: Sizes,
    path: Path,
    *,
    dtype: torch.dtype,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write the adapters alone as a folder in PEFT's format, which appears when it is complete.

    sizes: of the adapters, by matrix.
    group: all ranks.
    """
    state, pieces = tensors_of(model), adapter.pieces()
    tmp = path.with_name(path.name + ".tmp")
    own = peft.adapter_pieces(pieces, sizes)
    with all_or_none(group):
        adapter.check_export()
        peft.check_peft(sizes)
        refuse_other_rows(adapter, sizes)
        writer = HFWriter(tmp, plan_layout(own, dtype, file_name=peft.WEIGHTS))
        if _is_first():
            shutil.rmtree(tmp, ignore_errors=True)
            tmp.mkdir(parents=True)
            writer.create()
    with all_or_none(group), closing(writer):
        for piece in own:
            if piece.ours in state and writes(state[piece.ours]):
                write_piece(writer, piece, state[piece.ours])
    with all_or_none(group):
        if _is_first():
            write_peft_config(tmp, adapter, sizes)
            replace_folder(tmp, path)


def refuse_other_rows(adapter: StateDictAdapter, sizes: Sizes) -> None:
    """Raise `UserError` where the model's folder orders the rows of an adapted matrix otherwise
    than the model here: its adapters would be those of other rows."""
    config = read_json(Path(adapter.hf_assets_path or ".") / CONFIG)
    for piece in adapter.pieces():
        if peft.matrix_of(piece) in sizes and adapter.row_order(piece, config) is not None:
            raise UserError(
                f"model.hf_assets_path ({adapter.hf_assets_path}) has rope_interleave = false, "
                f"which orders the rows of {piece.name} otherwise than here, so that PEFT's "
                "adapters don't fit; set lora.save_merged to true (convert_to_hf.py: --merged)."
            )


def write_peft_config(folder: Path, adapter: StateDictAdapter, sizes: Sizes) -> None:
    config = peft.peft_config(adapter.pieces(), sizes, adapter.hf_assets_path)
    (folder / peft.CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def load_adapters(
    model: nn.Module,
    adapter: StateDictAdapter,
    sizes: Sizes,
    path: Path,
    *,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Fill the adapters of `model` (or this rank's part of them) from a folder in PEFT's format.

    Raises `UserError` for a folder of other adapters; the model is then unchanged.
    """
    state = tensors_of(model)
    with all_or_none(group):
        folder, pieces = check_adapter_folder(path, adapter, sizes)
    with all_or_none(group):
        for piece in pieces:
            if piece.ours in state and (part := part_of_piece(piece, state[piece.ours])):
                local, offset = part
                local.copy_(folder.read(piece.name, offset, tuple(local.shape)))
    folder.close()
    logger.info("LoRA: %d tensors of %s", len(pieces), path)


def check_adapter_folder(path: Path, adapter: StateDictAdapter, sizes: Sizes) -> tuple:
    """Return the folder, and its tensors. Raises `UserError` unless they are those of `sizes`."""
    refuse_other_rows(adapter, sizes)
    folder = HFFolder(path)
    pieces = peft.adapter_pieces(adapter.pieces(), sizes)
    wanted = {piece.name: piece.shape for piece in pieces}
    problems = [f"lacks {name}" for name in sorted(wanted.keys() - folder.file_of.keys())]
    problems += [f"also has {name}" for name in sorted(folder.file_of.keys() - wanted.keys())]
    problems += [
        f"has {name} {folder.shape(name)} instead of {shape}"
        for name, shape in wanted.items()
        if name in folder.file_of and folder.shape(name) != shape
    ]
    theirs = read_json(path / peft.CONFIG)
    ours = peft.peft_config(adapter.pieces(), sizes, None)
    for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"):
        there = theirs.get(key) or ours[key].__class__()
        if not problems and there != ours[key]:
            problems.append(f"has {key} {there} instead of {ours[key]} in {peft.CONFIG}")
    if problems:
        raise UserError(
            f"lora.initial_load_path = {path} does not hold the adapters of this run's [lora]: it "
            f"{some(problems)}. Set lora.rank, lora.alpha and lora.fqns as in that folder, or name "
            "another one."
        )
    return folder, pieces


class Merge:
    """Computes weight + scale · B A in fp32, for this rank's part of a weight.

    The product is that of the whole factors, of which the part is cut, so that its bits don't
    depend on the layout.

    sizes: of the adapters, by matrix.
    """

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes

    @torch.no_grad()
    def __call__(self, name: str, state: dict[str, Tensor]) -> Tensor:
        """Return the merged tensor; one without an adapter as it is."""
        tensor = state[name]
        adapter = self._adapter_of(name, state)
        if adapter is None:
            return tensor
        local, offset = local_part(tensor)
        merged = local.to(torch.float32, copy=True)
        if local.numel():
            of_stack = tensor.ndim == 3
            for i in range(local.size(0)) if of_stack else [None]:
                whole = adapter if i is None else _of_expert(adapter, offset[0] + i)
                part, start = (merged, offset) if i is None else (merged[i], offset[1:])
                part += product(whole)[_box(start, part.shape)]
        if not isinstance(tensor, DTensor):
            return merged
        return DTensor.from_local(
            merged,
            tensor.device_mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )

    def _adapter_of(self, name: str, state: dict[str, Tensor]) -> LowRank | None:
        for matrix, between in ((name, "_"), (name.removesuffix(".weight"), ".")):
            first = f"{matrix}{between}{A}"
            if first in state and weight_of(first) == name:
                factors = (_whole(state[f"{matrix}{between}{end}"]) for end in (A, B))
                return LowRank(*factors, scale=self._sizes[matrix].alpha / self._sizes[matrix].rank)
        return None


def _of_expert(adapter: LowRank, expert: int) -> LowRank:
    return LowRank(adapter.A[expert], adapter.B[expert], adapter.scale)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _box(start: tuple[int, ...], shape: Any) -> tuple[slice, ...]:
    return tuple(slice(s, s + n) for s, n in zip(start, shape, strict=True))


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0
