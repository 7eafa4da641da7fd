"""Weights of a running model from and to a Hugging Face folder, in any layout.

Loading: a rank reads, of each tensor, the part that it holds. Saving: each part is written to its
position by the first rank that holds it, in files laid out beforehand (folder.py), so the folder is
bitwise the one that a single process writes. Both are collective: all ranks call them, and when one
of them finds a problem, all of them raise the same `UserError`.
"""

import itertools
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from torchtitan.components.huggingface.assets import write_assets
from torchtitan.components.huggingface.checks import (
    check_names,
    check_shapes,
    check_sizes,
    copies_that_differ,
)
from torchtitan.components.huggingface.folder import (
    CONFIG,
    INDEX,
    HFFolder,
    HFWriter,
    plan_layout,
)
from torchtitan.protocols.state_dict_adapter import Piece, StateDictAdapter, warn_of_copies
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger

Offset = tuple[int, ...]


# ------------------------------------------------------------------ loading


@torch.no_grad()
def load_hf(
    model: nn.Module,
    adapter: StateDictAdapter,
    path: str | Path,
    *,
    quantized: bool = False,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Fill `model` (or this rank's part of it) in place; parameters keep their dtype.

    Raises `UserError` that names the reason, or missing, surplus and misshapen tensors; the model
    is then unchanged. Warns of copies in the layers of multi-token prediction that differ.

    quantized: the folder has weights in block-wise FP8 (`weight_scale_inv`) or MXFP4.
    group: all ranks.
    """
    state = tensors_of(model)
    with all_or_none(group):
        folder = HFFolder(path)
        check_folder(folder, adapter, quantized=quantized)
        log_differences(folder, adapter)
    by_file = defaultdict(list)
    for piece in adapter.pieces():
        if piece.ours in state and not piece.copy:
            by_file[folder.file_of[piece.name]].append(piece)
    mine = [piece for pieces in by_file.values() for piece in pieces]
    with all_or_none(group):
        check_shapes(folder, adapter, mine)
    with all_or_none(group):
        for piece in mine:
            _read_piece(folder, adapter, piece, state[piece.ours])
        readers = dist.get_world_size(group) if dist.is_initialized() else 1
        differing = copies_that_differ(folder, adapter, reader=_rank(), readers=readers)
    warn_of_copies(path, {name for names in _gather(differing, group) for name in names})
    folder.close()
    set_model_state_dict(model, {**state})  # a state dict need not be the model's own memory
    logger.info("Weights: %d tensors of %s, %d on this rank", len(folder.file_of), path, len(mine))


def check_folder(folder: HFFolder, adapter: StateDictAdapter, *, quantized: bool) -> None:
    """Raise `UserError` unless it has all of the model's tensors, and beside them only such as may
    be left out.

    Its config.json is checked first: differences in the tensors would only follow from it.
    """
    check_sizes(folder, adapter)
    if quantized != folder.quantized:
        have, way_out = ("has", "true") if folder.quantized else ("has no", "false")
        form = "MXFP4 weights" if folder.packed else "FP8 weights (weight_scale_inv)"
        raise UserError(
            f"{folder.path} {have} {form}; set "
            f"checkpoint.initial_load_in_hf_quantized to {way_out}."
        )
    check_names(folder, adapter)


def log_differences(folder: HFFolder, adapter: StateDictAdapter) -> None:
    """Log the tensors that are left out, and values of config.json that differ from the run's
    arguments without changing a shape."""
    wanted = {piece.name for piece in adapter.pieces() if not piece.copy}
    reasons = [adapter.left_out(name) for name in folder.file_of if name not in wanted]
    for reason, count in Counter(filter(None, reasons)).items():
        logger.info("%s: %d tensors left out (%s)", folder.path, count, reason)
    log_notes(folder.path, adapter.notes())
    if not folder.config:
        return
    log_notes(folder.path / CONFIG, adapter.notes_on(folder.config))
    theirs = type(adapter)(adapter.args_of(folder.config)).hf_config()
    # The number of prediction layers shows in the tensors that are missing or left out.
    free = ("max_position_embeddings", "initializer_range", "num_nextn_predict_layers")
    differing = [
        f"{name} {theirs.get(name)} ({value} here)"
        for name, value in adapter.hf_config().items()
        if theirs.get(name) != value and name not in free
    ]
    if differing:
        logger.warning(
            "%s differs from model.args in %s; the weights are loaded nevertheless",
            folder.path / CONFIG,
            ", ".join(differing),
        )


def log_notes(path: Path, notes: list[str]) -> None:
    """Warn, on one rank, of values that readers of the folder interpret differently."""
    for note in notes if _rank() == 0 else []:
        logger.warning("%s: %s", path, note)


def _read_piece(folder: HFFolder, adapter: StateDictAdapter, piece: Piece, tensor: Tensor) -> None:
    """Read this rank's part of one piece."""
    if part := part_of_piece(piece, tensor):
        local, offset = part
        local.copy_(read_rows(folder, adapter, piece, offset, tuple(local.shape)))


def part_of_piece(piece: Piece, tensor: Tensor) -> tuple[Tensor, Offset] | None:
    """This rank's part of a piece, and the index in it at which it begins; None = it has none."""
    local, offset = local_part(tensor)
    if piece.index is not None:
        mine = piece.index - offset[0]
        if not 0 <= mine < local.shape[0]:
            return None
        local, offset = local[mine], offset[1:]
    return (local, offset) if local.numel() else None


def read_rows(
    folder: HFFolder, adapter: StateDictAdapter, piece: Piece, offset: Offset, shape: Offset
) -> Tensor:
    """Read a part of a piece, in our order of rows."""
    order = adapter.row_order(piece, folder.config)
    if order is None:
        return folder.read(piece.name, offset, shape)
    rows = folder.read(piece.name, (0, *offset[1:]), (piece.shape[0], *shape[1:]))
    return rows[order[offset[0] : offset[0] + shape[0]]]


def local_part(tensor: Tensor) -> tuple[Tensor, Offset]:
    """This rank's part of a tensor, and the index in the whole at which it begins."""
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.ndim
    local = tensor.to_local()
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    assert local.numel() == 0 or tuple(shape) == tuple(local.shape), (
        f"{tensor.placements} of {tuple(tensor.shape)} is not one box on this rank"
    )
    return local, tuple(offset)


# ------------------------------------------------------------------ saving


@torch.no_grad()
def save_hf(
    model: nn.Module,
    adapter: StateDictAdapter,
    path: str | Path,
    *,
    dtype: torch.dtype,
    assets_path: str | Path | None = None,
    group: dist.ProcessGroup | None = None,
    merge: Callable[[str, dict[str, Tensor]], Tensor] = lambda name, state: state[name],
) -> None:
    """Write `model` as a Hugging Face folder: safetensors, index, config.json, tokenizer files.

    The folder appears under its name when it is complete, and replaces an existing one. Raises
    `UserError` where Hugging Face has no such model, `OSError` where the folder can't be written.

    dtype: of the weights; the router's bias stays fp32, written minus its minimum.
    assets_path: folder with the tokenizer (assets.py lists the files that are copied).
    group: all ranks; its timeout must allow for the slowest disk.
    merge: called with a name and the state dict, returns the tensor to write; all ranks that have
        the tensor call it, in one order.
    """
    path = Path(path)
    tmp = path.with_name(path.name + ".tmp")
    state = tensors_of(model)
    pieces = adapter.pieces()
    with all_or_none(group):
        adapter.check_export()
        log_notes(path, adapter.notes())
        writer = HFWriter(tmp, plan_layout(pieces, dtype))
        if _rank() == 0:
            shutil.rmtree(tmp, ignore_errors=True)
            tmp.mkdir(parents=True)
            writer.create()
    with all_or_none(group), closing(writer):
        for ours, of_tensor in itertools.groupby(pieces, key=lambda piece: piece.ours):
            if ours in state:
                tensor = merge(ours, state)
                for piece in of_tensor if writes(tensor) else ():
                    write_piece(writer, piece, tensor)
    _report_routing(adapter, state, dtype, group)
    with all_or_none(group):
        if _rank() == 0:
            (tmp / INDEX).write_text(writer.layout.index() + "\n", encoding="utf-8")
            write_assets(adapter.hf_config(), tmp, assets_path=assets_path, dtype=dtype, fp8=False)
            replace_folder(tmp, path)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    # torch allows numbers and lists in a state dict; no module of ours has any
    return cast(dict[str, Tensor], get_model_state_dict(model))


def writes(tensor: Tensor) -> bool:
    """Tell whether this rank writes its part: it is the first of the ranks with the same part.

    A plain tensor is the same on all ranks that have it, and small: a buffer. All of them write the
    same bytes.
    """
    if not isinstance(tensor, DTensor):
        return True
    where = zip(tensor.placements, tensor.device_mesh.get_coordinate() or (), strict=True)
    return all(coordinate == 0 for placement, coordinate in where if placement.is_replicate())


def write_piece(writer: HFWriter, piece: Piece, tensor: Tensor) -> None:
    if part := part_of_piece(piece, tensor):
        local, offset = part
        writer.write(piece.name, piece.written(local), offset)


def replace_folder(tmp: Path, path: Path) -> None:
    """Rename a finished folder to its final name, and remove the folder that had it."""
    former = path.with_name(path.name + ".old")
    shutil.rmtree(former, ignore_errors=True)
    if path.exists():
        path.rename(former)
    tmp.rename(path)
    shutil.rmtree(former, ignore_errors=True)


def _report_routing(
    adapter: StateDictAdapter,
    state: dict[str, Tensor],
    dtype: torch.dtype,
    group: dist.ProcessGroup | None,
) -> None:
    names = [name for name in adapter.router_names() if name in state]
    whole = {n: t.full_tensor() if isinstance(t := state[n], DTensor) else t for n in names}
    gathered = _gather(routing_changes(adapter, whole, dtype), group)
    log_routing_changes({k: v for each in gathered for k, v in each.items()}, dtype)


def routing_changes(
    adapter: StateDictAdapter, state: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, float]:
    """Estimate the share of tokens whose experts change when weights are rounded to the written
    dtype, by layer."""
    pieces = {p.ours: p for p in adapter.pieces() if p.ours in state}
    written = {
        name: pieces[name].written(tensor) if pieces[name].fp32 else tensor.to(dtype)
        for name, tensor in state.items()
    }
    return adapter.routing_changes(state, written)


def log_routing_changes(changes: dict[str, float], dtype: torch.dtype) -> None:
    if not changes:
        return
    worst = max(changes, key=lambda layer: changes[layer])
    logger.info(
        "Routers in %s: %.2f %% of tokens get other experts than in training precision (mean over "
        "%d layers; most in %s: %.2f %%; estimated with Gaussian tokens)",
        str(dtype).removeprefix("torch."),
        100 * sum(changes.values()) / len(changes),
        len(changes),
        worst,
        100 * changes[worst],
    )


# ------------------------------------------------------------------ ranks


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _gather(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Gather the value of every rank; without a process group, of this process alone."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


@contextmanager
def all_or_none(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Raise a `UserError` or `OSError` of one rank on all ranks, at the end of the block.

    No rank is left waiting then.
    """
    error: Exception | None = None
    try:
        yield
    except (UserError, OSError) as caught:
        error = caught
    mine = None
    if isinstance(error, UserError):
        mine = UserError, (str(error),)
    elif error is not None:
        mine = OSError, (error.errno, error.strerror or str(error), error.filename)
    first = next((each for each in _gather(mine, group) if each), None)
    if first is not None:
        kind, arguments = first
        raise kind(*arguments) from error
