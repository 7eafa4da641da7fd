"""A Hugging Face folder of safetensors: read parts of its tensors, write it in any order.

Reading goes through safetensors' slices, so a rank reads only what it keeps. Writing begins with a
plan, made from names, shapes and dtypes alone and so the same on every rank: the file and the byte
position of each tensor. The files are created at their full size first; after that every process
writes its parts of tensors to their positions, and no process ever holds a whole tensor for
another. (All of them must see the same file system, as for any checkpoint.)
"""

import json
import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from torchtitan.components.huggingface import MAX_FILE_BYTES
from torchtitan.components.huggingface.packed import Packed, find_packed, unpacked_shape
from torchtitan.ops.block_fp8 import FP8, dequantize_blocks, scale_shape
from torchtitan.ops.mxfp4 import GROUP, dequantize_mxfp4
from torchtitan.protocols.state_dict_adapter import Piece
from torchtitan.tools.disk import check_readable
from torchtitan.tools.errors import UserError, some
from torchtitan.tools.near_path import near_path

INDEX, CONFIG = "model.safetensors.index.json", "config.json"
SCALE = "_scale_inv"
QUANTIZED = ("fp8", "mxfp4")  # see `HFFolder.form`
_TYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    FP8: "F8_E4M3",
}

# ------------------------------------------------------------------ reading


class HFFolder:
    """Tensors of a folder, by name. Raises `UserError` where the folder has none.

    A weight in MXFP4 counts as one tensor, under the name of the whole weight.

    repo: the model's name on the Hugging Face hub, for the error message.
    """

    def __init__(self, path: str | Path, repo: str | None = None) -> None:
        self.path = Path(path)
        check_readable("Hugging Face folder", path)
        self._repo = repo
        self._open: tuple[str, Any] | None = None
        self._stored = self._list_tensors()
        self.packed = find_packed(self._stored)
        parts = {name for pair in self.packed.values() for name in pair}
        self.file_of = {name: file for name, file in self._stored.items() if name not in parts}
        self.file_of |= {name: self._stored[pair.values] for name, pair in self.packed.items()}

    def _list_tensors(self) -> dict[str, str]:
        """Map each tensor to its file."""
        index = read_json(self.path / INDEX)
        files = sorted(file.name for file in self.path.glob("*.safetensors"))
        if index:
            file_of = index.get("weight_map")
            if not isinstance(file_of, dict) or {type(f) for f in file_of.values()} - {str}:
                raise UserError(
                    f"{self.path / INDEX} has no table weight_map from tensors to files; download "
                    "it again."
                )
            absent = sorted(set(file_of.values()) - set(files))
            if absent:
                raise UserError(
                    f"{self.path / INDEX} names files that are missing: {some(absent, ', ')}; "
                    "download them (scripts/download_hf_assets.py resumes where it stopped)."
                )
            return file_of
        if not self.path.exists():
            raise UserError(f"{self.path} does not exist; {near_path(self.path)}")
        if not files:
            script = f"python scripts/download_hf_assets.py {self._repo} --weights"
            fetch = f"fetch them with `{script}`, or " if self._repo else ""
            raise UserError(
                f"{self.path} is not a Hugging Face folder: it has no *.safetensors; {fetch}name "
                "the folder that holds the model's weights and config.json."
            )
        return {name: file for file in files for name in self._handle(file).keys()}

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_json(self.path / CONFIG)

    @property
    def quantized(self) -> bool:
        return bool(self.packed) or any(name.endswith(SCALE) for name in self.file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        if pair := self.packed.get(name):
            return unpacked_shape(tuple(self._slice(pair.values).get_shape()))
        return tuple(self._slice(name).get_shape())

    def is_fp8(self, name: str) -> bool:
        return name not in self.packed and self._slice(name).get_dtype() == _TYPE_NAMES[FP8]

    def form(self, name: str) -> str:
        """Name the form in which a tensor is stored: fp8, mxfp4, or safetensors' type."""
        if name in self.packed:
            return "mxfp4"
        return "fp8" if self.is_fp8(name) else str(self._slice(name).get_dtype()).lower()

    def packing_problem(self, name: str) -> str | None:
        """Describe what is wrong with the tensors of an MXFP4 weight; None = nothing."""
        pair = self.packed[name]
        values, scales = (self._slice(each) for each in pair)
        if values.get_dtype() not in ("U8", "I8"):
            return (
                f"{pair.values} of type {values.get_dtype()} instead of bytes beside {pair.scales}"
            )
        rows, columns = self.shape(name)
        wanted, found = [rows, columns // GROUP], list(scales.get_shape())
        if columns % GROUP or found != wanted or scales.get_dtype() not in ("U8", "I8", "F8_E8M0"):
            return f"{pair.scales} {found} of type {scales.get_dtype()} instead of {wanted}, bytes"
        return None

    def read(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """Read a part of a tensor; block-wise FP8 and MXFP4 are dequantised to fp32."""
        if pair := self.packed.get(name):
            return self._read_packed(pair, offset, shape)
        part = self._slice(name)
        if len(shape) == 0:
            return self._handle(self.file_of[name]).get_tensor(name)
        tensor = part[_box(offset, shape)]
        if tensor.dtype != FP8:
            return tensor
        scale = self._handle(self.file_of[name + SCALE]).get_tensor(name + SCALE)
        row, column = offset
        return dequantize_blocks(tensor, scale, (row, column))

    def read_stored(self, name: str) -> Tensor:
        """Read a whole tensor of the files as it is, FP8 and scales too."""
        self._slice(name)  # refuses a name that its file lacks
        return self._handle(self._stored[name]).get_tensor(name)

    def _read_packed(self, pair: Packed, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        (row, column), (rows, columns) = offset, shape
        first, last = column // GROUP, -(-(column + columns) // GROUP)
        scales = self._slice(pair.scales)[row : row + rows, first:last]
        values = self._slice(pair.values)
        if len(values.get_shape()) == 3:
            packed = values[row : row + rows, first:last].flatten(1)
        else:
            packed = values[row : row + rows, first * GROUP // 2 : last * GROUP // 2]
        whole = dequantize_mxfp4(packed, scales)
        return whole[:, column - first * GROUP :][:, :columns]

    def close(self) -> None:
        """Close the file that was read last; its pages count as this process's memory."""
        self._open = None

    def _slice(self, name: str) -> Any:
        file = self._stored[name]
        try:
            return self._handle(file).get_slice(name)
        except SafetensorError:
            raise UserError(
                f"{self.path / file} lacks {name}, which {INDEX} says it holds; download both "
                "again."
            ) from None

    def _handle(self, file: str) -> Any:
        """Open a file; one is open at a time, because tensors are read file by file."""
        if self._open is None or self._open[0] != file:
            check_readable("Hugging Face file", self.path / file)
            try:
                self._open = file, safe_open(self.path / file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"{self.path / file} can't be read ({error}); download it again."
                ) from None
        return self._open[1]


def _box(offset: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty where the file is missing. Raises `UserError` for anything else."""
    if not os.path.lexists(path):  # a dangling link counts as a file that was lost
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(content, dict):
            raise ValueError("it is not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read as JSON ({error}); download it again.") from None
    return content


# ------------------------------------------------------------------ writing


@dataclass(frozen=True)
class Place:
    """Position of a tensor.

    begin: first byte in the file.
    """

    file: str
    begin: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Layout:
    """Plan of the files.

    places: by tensor.
    headers: by file.
    sizes: bytes of whole files, by file.
    """

    places: dict[str, Place]
    headers: dict[str, bytes]
    sizes: dict[str, int]

    def index(self) -> str:
        weight_map = {name: place.file for name, place in sorted(self.places.items())}
        total = sum(self.sizes[file] - len(header) for file, header in self.headers.items())
        return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)


def plan_layout(
    pieces: Iterable[Piece],
    dtype: torch.dtype,
    *,
    fp8: bool = False,
    max_file_bytes: int = MAX_FILE_BYTES,
    file_name: str | None = None,
) -> Layout:
    """Plan files in the order of `pieces`, each filled up to `max_file_bytes` (or with one larger
    tensor).

    dtype: of all tensors but those that are kept in fp32 or, with `fp8`, become FP8 and scales.
    file_name: of the only file; None = Hugging Face's names for the files of a model.
    """
    files: list[dict[str, tuple[tuple[int, ...], torch.dtype]]] = [{}]
    filled = 0
    for piece in pieces:
        tensors = _tensors_of(piece, dtype, fp8)
        size = sum(_num_bytes(*tensor) for tensor in tensors.values())
        if file_name is None and files[-1] and filled + size > max_file_bytes:
            files.append({})
            filled = 0
        files[-1] |= tensors
        filled += size
    places, headers, sizes = {}, {}, {}
    for number, tensors in enumerate(files, start=1):
        file = file_name or f"model-{number:05d}-of-{len(files):05d}.safetensors"
        headers[file], begins, sizes[file] = _header(tensors)
        places |= {n: Place(file, begins[n], *tensor) for n, tensor in tensors.items()}
    return Layout(places, headers, sizes)


def _tensors_of(
    piece: Piece, dtype: torch.dtype, fp8: bool
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    if fp8 and piece.fp8:
        scale = scale_shape(piece.shape), torch.float32
        return {piece.name: (piece.shape, FP8), piece.name + SCALE: scale}
    return {piece.name: (piece.shape, torch.float32 if piece.fp32 else dtype)}


def _num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _header(
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]],
) -> tuple[bytes, dict[str, int], int]:
    """Return the header, the first byte of each tensor in the file, and the file's size.

    As in safetensors itself, wide dtypes come first, so that all are aligned; padded to 8 bytes.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name][1].itemsize, name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    begins = {}
    for name in order:
        shape, dtype = tensors[name]
        begins[name], end = end, end + _num_bytes(shape, dtype)
        entries[name] = {
            "dtype": _TYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [begins[name], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {n: len(header) + begin for n, begin in begins.items()}, len(header) + end


class HFWriter:
    """Writes parts of tensors into the files of a layout; one process must call `create` first."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder = folder
        self.layout = layout
        self._files: dict[str, int] = {}

    def create(self) -> None:
        """Create the files at full size, with headers (the rest is a hole until it is written)."""
        for file, header in self.layout.headers.items():
            with (self.folder / file).open("wb") as stream:
                stream.write(header)
                stream.truncate(self.layout.sizes[file])

    def write(self, name: str, tensor: Tensor, offset: tuple[int, ...] | None = None) -> None:
        """Write a part of tensor `name`.

        tensor: the part, of any dtype, on any device.
        offset: of the part in the whole; None = the whole.
        """
        place = self.layout.places[name]
        offset = offset or (0,) * len(place.shape)
        data = tensor.detach().to("cpu", place.dtype).contiguous()
        row = torch.Size(place.shape[1:]).numel()
        begin = place.begin + (offset[0] * row if offset else 0) * place.dtype.itemsize
        if tensor.shape[1:] == place.shape[1:]:  # whole rows are contiguous
            self._write_bytes(place.file, begin, data)
            return
        assert data.ndim == 2, f"{name} has rows in parts, but more than two dims"
        for i, part in enumerate(data):
            at = begin + (i * row + offset[1]) * place.dtype.itemsize
            self._write_bytes(place.file, at, part)

    def _write_bytes(self, file: str, begin: int, data: Tensor) -> None:
        if file not in self._files:
            self._files[file] = os.open(self.folder / file, os.O_WRONLY)
        view = data.reshape(-1).view(torch.uint8).numpy().data
        while view:  # a single call writes 2 GiB at most
            written = os.pwrite(self._files[file], view, begin)
            view, begin = view[written:], begin + written

    def close(self) -> None:
        """Sync the files to disk and close them.

        They are closed even where that fails: an open file takes up disk space even when deleted.
        """
        files, self._files = self._files, {}
        with ExitStack() as stack:
            for handle in files.values():
                stack.callback(os.close, handle)
            for handle in files.values():
                os.fsync(handle)
