"""Conversion between Hugging Face folders and our checkpoints, on one process without the model.

It goes tensor by tensor: memory holds one tensor and the file that it comes from. Both directions
work in a folder `<target>.tmp` that records the progress, so an interrupted conversion resumes
where it stopped; the target appears under its name when it is complete.
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
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from torchtitan.components.checkpoint.audit import (
    Record,
    audit_checkpoint,
    audit_folder,
    make_record,
)
from torchtitan.components.checkpoint.dcp_storage import HashingStream, raising_write_errors
from torchtitan.components.checkpoint.folder import (
    MANIFEST,
    META,
    NUMBERS,
    TENSOR_INDEX,
    FileChecksum,
    damage,
    publish,
    require_checkpoint,
)
from torchtitan.components.checkpoint.meta import WEIGHTS, Identity, make_meta
from torchtitan.components.checkpoint.progress import ConversionProgress
from torchtitan.components.checkpoint.stored_tensors import PREFIX, StoredTensors
from torchtitan.components.huggingface import MAX_FILE_BYTES
from torchtitan.components.huggingface.assets import write_assets
from torchtitan.components.huggingface.checks import check_shapes, copies_that_differ
from torchtitan.components.huggingface.folder import (
    INDEX,
    QUANTIZED,
    SCALE,
    HFFolder,
    HFWriter,
    Layout,
    plan_layout,
)
from torchtitan.components.huggingface.load_save import (
    check_folder,
    log_differences,
    log_notes,
    log_routing_changes,
    read_rows,
    replace_folder,
)
from torchtitan.ops.block_fp8 import dequantize_blocks, quantize_blocks
from torchtitan.protocols.state_dict_adapter import Piece, StateDictAdapter, warn_of_copies
from torchtitan.tools.disk import reason, whole_or_none
from torchtitan.tools.errors import UserError, some
from torchtitan.tools.folder_lock import FolderLock
from torchtitan.tools.progress_bar import progress_bar


def _work_folder(target: Path) -> Path:
    if target.exists():
        raise UserError(f"{target} already exists; name another folder, or remove it.")
    return target.with_name(target.name + ".tmp")


def _explaining_disk_errors(convert: Callable[..., None]) -> Callable[..., None]:
    """Decorate: lock the target, and turn `OSError` into `UserError`; finished work is kept."""

    @functools.wraps(convert)
    def locked(source: Any, target: Path, *args: Any, **options: Any) -> None:
        lock = target.with_name(f"{target.name}.lock")
        folder = source.path if isinstance(source, HFFolder) else source
        if target.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"{target} lies inside of {folder}, which it is made from and which a run may "
                "replace or remove; name a folder beside it."
            )
        try:
            with FolderLock(lock, str(target), "name another folder"):
                convert(source, target, *args, **options)
        except OSError as error:
            why = reason(error, target.parent) + (f": {error.filename}" if error.filename else "")
            raise UserError(
                f"{target} could not be made ({why}); free some space or name another folder, and "
                "run the same command again: it resumes where it stopped."
            ) from None

    return locked


# ------------------------------------------------------------------ from Hugging Face


@_explaining_disk_errors
def hf_to_checkpoint(
    source: HFFolder,
    target: Path,
    adapter: StateDictAdapter,
    *,
    model: str,
    flavor: str,
    dtype: torch.dtype | None = None,
    read_back: bool = True,
) -> None:
    """Make a checkpoint with weights only, for use as `checkpoint.initial_load_path`.

    Raises `UserError` that names the reason, or missing, surplus and misshapen tensors.

    model, flavor: names for meta.json.
    dtype: of the weights; None = unchanged, quantized ones as bf16 (as DeepSeek's own conversion).
    read_back: read the checkpoint again and compare checksums, before it gets its name.
    """
    check_folder(source, adapter, quantized=source.quantized)
    log_differences(source, adapter)
    by_file: dict[str, list[Piece]] = defaultdict(list)
    for piece in adapter.pieces():
        if not piece.copy:
            by_file[source.file_of[piece.name]].append(piece)
    check_shapes(source, adapter, [piece for pieces in by_file.values() for piece in pieces])
    warn_of_copies(source.path, copies_that_differ(source, adapter))
    tmp = _work_folder(target)
    sizes = {file: (source.path / file).stat().st_size for file in sorted(by_file)}
    key = {"files": sizes, "dtype": str(dtype), "args": asdict(adapter.model_args), "audit": 1}
    progress = ConversionProgress(tmp, key)
    _convert_files(source, tmp, adapter, by_file, dtype, progress, sizes)
    checksums = {info["file"]: FileChecksum(*info["sum"]) for info in progress.done.values()}
    index = pickle.dumps(_tensor_index(progress, adapter))
    (tmp / TENSOR_INDEX).write_bytes(index)
    checksums[TENSOR_INDEX] = FileChecksum(len(index), hashlib.sha256(index).hexdigest())
    records = [record for info in progress.done.values() for record in info["audit"]]
    audit_checkpoint(source, tmp, target, adapter, records, read_back=read_back)
    identity = Identity(
        model=model,
        flavor=flavor,
        model_args=json.loads(json.dumps(adapter.model_args.weights_identity())),
        all_args=asdict(adapter.model_args),
        layout={},
        config_hash="",
    )
    meta = make_meta(identity, step=0, content=WEIGHTS, tokens_seen=0, seed=0)
    progress.remove()
    publish(tmp, {META: json.dumps(meta, indent=2) + "\n", NUMBERS: "{}\n"}, checksums)


def _convert_files(
    source: HFFolder,
    tmp: Path,
    adapter: StateDictAdapter,
    by_file: dict[str, list[Piece]],
    dtype: torch.dtype | None,
    progress: ConversionProgress,
    sizes: dict[str, int],
) -> None:
    """Make a file of ours of each of theirs that is not finished yet.

    sizes: bytes by file.
    """
    finished = sum(sizes[file] for file in progress.done)
    with progress_bar(sum(sizes.values()), "converting", "B", finished) as bar:
        for number, file in enumerate(sorted(by_file)):
            if file not in progress.done:
                out = tmp / f"__0_{number}.distcp"
                with whole_or_none(out):
                    written = _write_chunks(out, source, adapter, by_file[file], dtype)
                progress.add(file, written)
                bar.update(sizes[file])
            source.close()


def _write_chunks(
    path: Path,
    source: HFFolder,
    adapter: StateDictAdapter,
    pieces: list[Piece],
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    """Write the tensors of one of their files to one of ours; return its checksum and the position
    of each chunk."""
    chunks, audit = [], []
    with path.open("wb") as opened, raising_write_errors(file := HashingStream(opened)):
        for piece in pieces:
            read = read_rows(source, adapter, piece, (0,) * len(piece.shape), piece.shape)
            form = source.form(piece.name)
            unchanged = torch.bfloat16 if form in QUANTIZED else read.dtype
            tensor = read.to(torch.float32 if piece.fp32 else dtype or unchanged)
            audit.append(make_record(piece.name, piece, form, read, tensor))
            offset = [0] * len(piece.shape)
            if piece.index is not None:
                tensor, offset = tensor.unsqueeze(0), [piece.index, *offset]
            begin = file.tell()
            # `file` has the methods that torch.save calls.
            torch.save(tensor.contiguous().clone(), cast(IO[bytes], file))
            name = str(tensor.dtype).removeprefix("torch.")
            length = file.tell() - begin
            chunks.append([piece.ours, offset, list(tensor.shape), name, begin, length])
        os.fsync(file.fileno())
    return {
        "file": path.name,
        "sum": [file.size, file.digest.hexdigest()],
        "chunks": chunks,
        "audit": audit,
    }


def _tensor_index(progress: ConversionProgress, adapter: StateDictAdapter) -> Metadata:
    """Make DCP's index, as its own writer does."""
    sizes = {}
    for piece in adapter.pieces():
        count = [] if piece.index is None else [piece.index + 1]  # the last expert's wins
        sizes[piece.ours] = torch.Size([*count, *piece.shape])
    tensors: dict[str, TensorStorageMetadata] = {}
    storage = {}
    for info in progress.done.values():
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


@_explaining_disk_errors
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
    reader: Callable[..., StoredTensors] = StoredTensors,
    read_back: bool = True,
) -> None:
    """Write the weights of a checkpoint as a Hugging Face folder; see `load_save.save_hf`.

    Raises `UserError` for a damaged checkpoint, and one of another model.

    dtype: of the weights.
    fp8: write the matrices that DeepSeek publishes in FP8 in block-wise FP8, the rest in `dtype`.
    averaged: write the moving average of the parameters; the expert bias is that of the step.
    assets_path: folder of the tokenizer's files, which are copied.
    reader: called as `StoredTensors`, reads the checkpoint.
    read_back: read the folder again and compare checksums, before it gets its name.
    """
    adapter.check_export()
    log_notes(target, adapter.notes())
    require_checkpoint(checkpoint)
    stored = reader(checkpoint, averaged=averaged)
    pieces = adapter.pieces()
    _check_stored(checkpoint, stored, pieces)
    tmp = _work_folder(target)
    layout = plan_layout(pieces, dtype, fp8=fp8, max_file_bytes=max_file_bytes)
    manifest = (checkpoint / MANIFEST).read_text()
    key = {"from": manifest, "layout": layout.index(), "dtype": str(dtype), "averaged": averaged}
    key["audit"] = 1
    progress = ConversionProgress(tmp, key)
    if not progress.continues and (problem := damage(checkpoint)):
        shutil.rmtree(tmp)
        raise UserError(f"checkpoint {checkpoint} is damaged: {problem}; take another one.")
    writer = HFWriter(tmp, layout)
    if not progress.continues:
        writer.create()
        progress.add("files")
    for unit in _units_with_progress(pieces, layout, progress):
        with closing(writer):
            records = [r for piece in unit for r in _write_piece(writer, piece, stored, fp8=fp8)]
        progress.add(unit[0].ours, records)
    (tmp / INDEX).write_text(layout.index() + "\n", encoding="utf-8")
    records = [record for unit in progress.done.values() for record in unit or ()]
    audit = audit_folder(stored, tmp, target, adapter, records, dtype, read_back=read_back)
    log_routing_changes(audit.routing, dtype)
    write_assets(adapter.hf_config(), tmp, assets_path=assets_path, dtype=dtype, fp8=fp8)
    progress.remove()
    replace_folder(tmp, target)


def _check_stored(checkpoint: Path, stored: StoredTensors, pieces: list[Piece]) -> None:
    wanted = {}
    for piece in pieces:
        count = () if piece.index is None else (piece.index + 1,)
        wanted[piece.ours] = (*count, *piece.shape)
    found = stored.shapes()
    problems = [f"lacks {name}" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"also has {name}" for name in sorted(found.keys() - wanted.keys())]
    problems += [
        f"has {name} {found[name]} instead of {wanted[name]}"
        for name in sorted(wanted.keys() & found.keys())
        if found[name] != wanted[name]
    ]
    if problems:
        raise UserError(
            f"{checkpoint} does not hold the model that its meta.json describes: it "
            f"{some(problems)}. Take a checkpoint that this version wrote."
        )


def _units_with_progress(
    pieces: list[Piece], layout: Layout, progress: ConversionProgress
) -> Iterator[list[Piece]]:
    """Yield the pieces of each of our tensors that is not finished yet."""

    def size(unit: list[Piece]) -> int:
        places = [layout.places[piece.name] for piece in unit]
        return sum(torch.Size(place.shape).numel() * place.dtype.itemsize for place in places)

    units = [list(unit) for _, unit in itertools.groupby(pieces, key=lambda piece: piece.ours)]
    finished = sum(size(unit) for unit in units if unit[0].ours in progress.done)
    with progress_bar(sum(map(size, units)), "exporting", "B", finished) as bar:
        for unit in units:
            if unit[0].ours not in progress.done:
                yield unit
                bar.update(size(unit))


def _write_piece(
    writer: HFWriter, piece: Piece, stored: StoredTensors, *, fp8: bool
) -> list[Record]:
    box = None
    if piece.index is not None:
        start = (piece.index, *(0 for _ in piece.shape))
        box = start, (1, *piece.shape)
    tensor = stored.read(piece.ours, box)
    tensor = tensor if box is None else tensor[0]
    form = str(tensor.dtype).removeprefix("torch.")
    if not (fp8 and piece.fp8):
        exact = piece.written(tensor)
        written = exact.to(writer.layout.places[piece.name].dtype)
        writer.write(piece.name, written)
        return [make_record(piece.name, piece, form, exact, written)]
    if not tensor.isfinite().all():
        raise UserError(f"{piece.ours} is not finite, which FP8 can't express; use --dtype.")
    values, scale_inv = quantize_blocks(tensor)
    writer.write(piece.name, values)
    writer.write(piece.name + SCALE, scale_inv)
    meaning = dequantize_blocks(values, scale_inv)
    scales = make_record(piece.name + SCALE, piece, "computed", scale_inv, scale_inv)
    return [make_record(piece.name, piece, form, tensor, values, meaning), scales]
