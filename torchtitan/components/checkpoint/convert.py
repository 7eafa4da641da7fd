"""Hugging Face folder ↔ our checkpoint folder, tensor by tensor, on one process without the model.

What is in memory is one tensor and the file that it comes from. Both ways work in a folder
`<target>.tmp` with a journal of what is done, so a conversion that was interrupted goes on where it
stopped; the target appears under its name when it is whole.
"""

import functools
import hashlib
import itertools
import json
import os
import pickle
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view
from tqdm import tqdm

from torchtitan.components.checkpoint.dcp_storage import (
    SummingStream,
    read_tensor_index,
    tells_of_the_disk,
)
from torchtitan.components.checkpoint.folder import (
    MANIFEST,
    META,
    NUMBERS,
    TENSOR_INDEX,
    FileSum,
    damage,
    publish,
    require_checkpoint,
)
from torchtitan.components.checkpoint.meta import WEIGHTS, Identity, make_meta
from torchtitan.components.checkpoint.progress import Journal
from torchtitan.components.huggingface.assets import write_assets
from torchtitan.components.huggingface.checks import check_shapes, copies_that_differ
from torchtitan.components.huggingface.folder import (
    INDEX,
    MAX_FILE_BYTES,
    SCALE,
    HFFolder,
    HFWriter,
    Layout,
    plan_layout,
)
from torchtitan.components.huggingface.load_save import (
    check_folder,
    log_routing_changes,
    read_rows,
    replace_folder,
    routing_changes,
    say_what_differs,
    tell_notes,
)
from torchtitan.components.optimizer.ema import PREFIX as EMA_PREFIX
from torchtitan.components.optimizer.ema import check_has_average
from torchtitan.ops.block_fp8 import quantize_blocks
from torchtitan.protocols.state_dict_adapter import Piece, StateDictAdapter, warn_of_copies
from torchtitan.tools.disk import reason, whole_or_none
from torchtitan.tools.errors import UserError, some
from torchtitan.tools.folder_lock import FolderLock

PREFIX = "model."  # of weights among the tensors of a checkpoint
Box = tuple[tuple[int, ...], tuple[int, ...]]  # offset, shape


def _work_folder(target: Path) -> Path:
    if target.exists():
        raise UserError(f"{target} is there already; name another folder, or remove it.")
    return target.with_name(target.name + ".tmp")


def _tells_of_the_disk(convert: Callable[..., None]) -> Callable[..., None]:
    """Where it can't be written to, is full or is made by another process: one sentence. What is
    done stays."""

    @functools.wraps(convert)
    def told(source: Any, target: Path, *args: Any, **options: Any) -> None:
        lock = target.with_name(f"{target.name}.lock")
        try:
            with FolderLock(lock, str(target), "name another folder"):
                convert(source, target, *args, **options)
        except OSError as error:
            why = reason(error, target.parent) + (f": {error.filename}" if error.filename else "")
            raise UserError(
                f"{target} could not be made ({why}); make room or name another folder, and call "
                "it again: it goes on where it stopped."
            ) from None

    return told


def _progress(total_bytes: int, done_bytes: int) -> tqdm:
    return tqdm(total=total_bytes, initial=done_bytes, unit="B", unit_scale=True, unit_divisor=1024)


# ------------------------------------------------------------------ from Hugging Face


@_tells_of_the_disk
def hf_to_checkpoint(
    source: HFFolder,
    target: Path,
    adapter: StateDictAdapter,
    *,
    model: str,
    flavor: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Make a checkpoint with weights only, which runs take as `checkpoint.initial_load_path`.

    dtype: of the weights; None = as they are, FP8 as bf16 (what DeepSeek's own conversion gives).
    Raises `UserError` that names the reason, or missing, surplus and misshapen tensors.
    """
    check_folder(source, adapter, quantized=source.quantized)
    say_what_differs(source, adapter)
    by_file: dict[str, list[Piece]] = defaultdict(list)
    for piece in adapter.pieces():
        if not piece.copy:
            by_file[source.file_of[piece.name]].append(piece)
    check_shapes(source, adapter, [piece for pieces in by_file.values() for piece in pieces])
    warn_of_copies(source.path, copies_that_differ(source, adapter))
    tmp = _work_folder(target)
    sizes = {file: (source.path / file).stat().st_size for file in sorted(by_file)}
    journal = Journal(
        tmp, {"files": sizes, "dtype": str(dtype), "args": asdict(adapter.model_args)}
    )
    finished = sum(sizes[file] for file in journal.done)
    with _progress(sum(sizes.values()), finished) as progress:
        for number, file in enumerate(sorted(by_file)):
            if file not in journal.done:
                out = tmp / f"__0_{number}.distcp"
                with whole_or_none(out):
                    written = _write_chunks(out, source, adapter, by_file[file], dtype)
                journal.add(file, written)
                progress.update(sizes[file])
            source.close()
    sums = {info["file"]: FileSum(*info["sum"]) for info in journal.done.values()}
    index = pickle.dumps(_tensor_index(journal, adapter))
    (tmp / TENSOR_INDEX).write_bytes(index)
    sums[TENSOR_INDEX] = FileSum(len(index), hashlib.sha256(index).hexdigest())
    identity = Identity(
        model=model,
        flavor=flavor,
        model_args=json.loads(json.dumps(adapter.model_args.weights_identity())),
        all_args=asdict(adapter.model_args),
        layout={},
        config_hash="",
    )
    meta = make_meta(identity, step=0, content=WEIGHTS, tokens_seen=0, seed=0)
    journal.remove()
    publish(tmp, {META: json.dumps(meta, indent=2) + "\n", NUMBERS: "{}\n"}, sums)


def _write_chunks(
    path: Path,
    source: HFFolder,
    adapter: StateDictAdapter,
    pieces: list[Piece],
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    """One of our files with what one of theirs holds: its sum, and where each chunk lies in it."""
    chunks = []
    with path.open("wb") as opened, tells_of_the_disk(file := SummingStream(opened)):
        for piece in pieces:
            tensor = read_rows(source, adapter, piece, (0,) * len(piece.shape), piece.shape)
            quantized = piece.name + SCALE in source.file_of
            as_it_is = torch.bfloat16 if quantized else tensor.dtype
            tensor = tensor.to(torch.float32 if piece.fp32 else dtype or as_it_is)
            offset = [0] * len(piece.shape)
            if piece.index is not None:
                tensor, offset = tensor.unsqueeze(0), [piece.index, *offset]
            begin = file.tell()
            torch.save(tensor.contiguous().clone(), cast(IO[bytes], file))  # as far as it asks
            name = str(tensor.dtype).removeprefix("torch.")
            length = file.tell() - begin
            chunks.append([piece.ours, offset, list(tensor.shape), name, begin, length])
        os.fsync(file.fileno())
    return {
        "file": path.name,
        "sum": [file.size, file.digest.hexdigest()],
        "chunks": chunks,
    }


def _tensor_index(journal: Journal, adapter: StateDictAdapter) -> Metadata:
    """DCP's own, as its writer makes it."""
    sizes = {}
    for piece in adapter.pieces():
        count = [] if piece.index is None else [piece.index + 1]  # the last expert's stays
        sizes[piece.ours] = torch.Size([*count, *piece.shape])
    tensors: dict[str, TensorStorageMetadata] = {}
    storage = {}
    for info in journal.done.values():
        for ours, offset, shape, dtype, begin, length in info["chunks"]:
            name = PREFIX + ours
            if name not in tensors:
                properties = TensorProperties(dtype=getattr(torch, dtype))
                tensors[name] = TensorStorageMetadata(properties, sizes[ours], [])
            chunk = ChunkStorageMetadata(torch.Size(offset), torch.Size(shape))
            tensors[name].chunks.append(chunk)
            storage[MetadataIndex(name, offset)] = _StorageInfo(info["file"], begin, length)
    return Metadata(
        state_dict_metadata={**tensors},
        planner_data={name: (name,) for name in tensors},
        storage_data=storage,
    )


# ------------------------------------------------------------------ to Hugging Face


class StoredTensors:
    """Parts of the weights in a checkpoint. What the last read used stays in memory: neighbouring
    experts lie in the same chunk.

    averaged: read the parameters' average (components/optimizer/ema.py); buffers have none.
    Raises `UserError` where the checkpoint holds none.
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
        """The tensor, or a part of it, in the type that it was saved in."""
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
            there = _slices(begin, chunk.offsets, size)
            out[_slices(begin, offset, size)] = used[key][there]
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


@_tells_of_the_disk
def checkpoint_to_hf(
    checkpoint: Path,
    target: Path,
    adapter: StateDictAdapter,
    *,
    dtype: torch.dtype,
    fp8: bool = False,
    averaged: bool = False,
    assets_path: str | Path | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write the weights of a checkpoint as a Hugging Face folder; see `hf_checkpoint.save_hf`.

    averaged: the moving average of the parameters instead; the expert bias is that of the step.
    fp8: the matrices that DeepSeek publishes in FP8 in block-wise FP8, the rest in `dtype`. Raises
    `UserError` for a damaged checkpoint, and one of another model.
    """
    adapter.check_export()
    tell_notes(target, adapter.notes())
    require_checkpoint(checkpoint)
    stored = StoredTensors(checkpoint, averaged=averaged)
    pieces = adapter.pieces()
    _check_stored(checkpoint, stored, pieces)
    tmp = _work_folder(target)
    layout = plan_layout(pieces, dtype, fp8=fp8, max_file_bytes=max_file_bytes)
    manifest = (checkpoint / MANIFEST).read_text()
    key = {"from": manifest, "layout": layout.index(), "dtype": str(dtype), "averaged": averaged}
    journal = Journal(tmp, key)
    if not journal.continues and (problem := damage(checkpoint)):
        shutil.rmtree(tmp)
        raise UserError(f"checkpoint {checkpoint} is damaged: {problem}; take another one.")
    writer = HFWriter(tmp, layout)
    if not journal.continues:
        writer.create()
        journal.add("files")
    for unit in _units_with_progress(pieces, layout, journal):
        with closing(writer):
            for piece in unit:
                _write_piece(writer, piece, stored, fp8=fp8)
        journal.add(unit[0].ours)
    _report_routing(adapter, stored, dtype)
    (tmp / INDEX).write_text(layout.index() + "\n", encoding="utf-8")
    write_assets(adapter.hf_config(), tmp, assets_path=assets_path, dtype=dtype, fp8=fp8)
    journal.remove()
    replace_folder(tmp, target)


def _check_stored(checkpoint: Path, stored: StoredTensors, pieces: list[Piece]) -> None:
    wanted = {}
    for piece in pieces:
        count = () if piece.index is None else (piece.index + 1,)
        wanted[piece.ours] = (*count, *piece.shape)
    there = stored.shapes()
    problems = [f"lacks {name}" for name in sorted(wanted.keys() - there.keys())]
    problems += [f"has {name} beside it" for name in sorted(there.keys() - wanted.keys())]
    problems += [
        f"has {name} {there[name]} instead of {wanted[name]}"
        for name in sorted(wanted.keys() & there.keys())
        if there[name] != wanted[name]
    ]
    if problems:
        raise UserError(
            f"{checkpoint} does not hold the model that its meta.json describes: it "
            f"{some(problems)}. Take a checkpoint that this version has written."
        )


def _units_with_progress(
    pieces: list[Piece], layout: Layout, journal: Journal
) -> Iterator[list[Piece]]:
    """The pieces of each of our tensors that is not done yet."""

    def size(unit: list[Piece]) -> int:
        places = [layout.places[piece.name] for piece in unit]
        return sum(torch.Size(place.shape).numel() * place.dtype.itemsize for place in places)

    units = [list(unit) for _, unit in itertools.groupby(pieces, key=lambda piece: piece.ours)]
    finished = sum(size(unit) for unit in units if unit[0].ours in journal.done)
    with _progress(sum(map(size, units)), finished) as progress:
        for unit in units:
            if unit[0].ours not in journal.done:
                yield unit
                progress.update(size(unit))


def _write_piece(writer: HFWriter, piece: Piece, stored: StoredTensors, *, fp8: bool) -> None:
    box = None
    if piece.index is not None:
        start = (piece.index, *(0 for _ in piece.shape))
        box = start, (1, *piece.shape)
    tensor = stored.read(piece.ours, box)
    tensor = tensor if box is None else tensor[0]
    if fp8 and piece.fp8:
        if not tensor.isfinite().all():
            raise UserError(
                f"{piece.ours} is not finite, and FP8 has no such numbers; use --dtype."
            )
        values, scale_inv = quantize_blocks(tensor)
        writer.write(piece.name, values)
        writer.write(piece.name + SCALE, scale_inv)
    else:
        writer.write(piece.name, piece.written(tensor))


def _report_routing(adapter: StateDictAdapter, stored: StoredTensors, dtype: torch.dtype) -> None:
    changes = {}
    by_layer = itertools.groupby(adapter.router_names(), key=lambda name: name.split(".")[:2])
    for _, names in by_layer:  # one layer in memory at a time
        changes |= routing_changes(adapter, {name: stored.read(name) for name in names}, dtype)
    log_routing_changes(changes, dtype)
