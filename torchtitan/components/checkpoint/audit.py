"""Audit of a conversion: every tensor accounted for, read back, and reported beside the result.

While tensors are converted, each leaves a record. `Audit` then compares the records with the
tensors of the source and with the model, reads the result back, and compares checksums.
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

import torchtitan
from torchtitan.components.checkpoint.stored_tensors import Box, StoredTensors
from torchtitan.components.huggingface.folder import SCALE, HFFolder
from torchtitan.components.huggingface.load_save import read_rows, routing_changes
from torchtitan.protocols.state_dict_adapter import Piece, StateDictAdapter
from torchtitan.tools.errors import UserError, some
from torchtitan.tools.logging import logger
from torchtitan.tools.progress_bar import progress_bar

_AT_ONCE = 2**22  # values compared at a time: 16 MB


class Record(TypedDict):
    """One tensor that was written.

    theirs: name in the Hugging Face folder.
    ours: name in our state dict.
    index: along our dim 0 (an expert of a stack); None = the whole tensor.
    before: form in which it was read: a type, fp8, or mxfp4.
    after: type in which it was written.
    values: numbers in it.
    rounded: how many of them the written type changes.
    sha256: of the bytes that were written.
    """

    theirs: str
    ours: str
    index: int | None
    shape: list[int]
    before: str
    after: str
    values: int
    rounded: int
    sha256: str


def checksum(tensor: Tensor) -> str:
    """SHA-256 of a tensor's values, in hexadecimal."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def make_record(
    theirs: str,
    piece: Piece,
    before: str,
    read: Tensor,
    written: Tensor,
    dequantized: Tensor | None = None,
) -> Record:
    """Describe one tensor.

    read: as it was read, dequantised.
    written: in the type that is written.
    dequantized: what `written` stands for, where that is FP8.
    """
    return Record(
        theirs=theirs,
        ours=piece.ours,
        index=piece.index,
        shape=list(written.shape),
        before=before,
        after=name_of(written.dtype),
        values=written.numel(),
        rounded=_differing(read, written if dequantized is None else dequantized),
        sha256=checksum(written),
    )


def _differing(one: Tensor, other: Tensor) -> int:
    """Count the values that differ, in pieces: the tensors may fill half of the memory."""
    pieces = zip(one.reshape(-1).split(_AT_ONCE), other.reshape(-1).split(_AT_ONCE), strict=True)
    pairs = ((a.float(), b.float()) for a, b in pieces)
    return sum(int(((a != b) & ~(a.isnan() & b.isnan())).sum()) for a, b in pairs)


class Audit:
    """Records of a conversion, and what follows from them.

    source, target: folders.
    """

    def __init__(self, source: Path, target: Path, records: Iterable[Record]) -> None:
        self.source, self.target = source, target
        self.records = list(records)
        self.left_out: dict[str, list[str]] = {}
        self.routing: dict[str, float] = {}
        self.read_back = 0

    def check_consumed(self, folder: HFFolder, adapter: StateDictAdapter) -> None:
        """Raise `UserError` for a tensor of the folder that is neither converted nor left out for a
        reason."""
        consumed = {record["theirs"] for record in self.records}
        lost = []
        for name in folder.file_of:
            if name in consumed or name.removesuffix(SCALE) in consumed:
                continue
            if reason := adapter.left_out(name):
                self.left_out.setdefault(reason, []).append(name)
            else:
                lost.append(name)
        self._refuse(lost, "were not converted")

    def check_written(self, pieces: Iterable[Piece]) -> None:
        """Raise `UserError` for a tensor that was written in part, twice, or that nobody asked for.

        pieces: all that should be written.
        """
        wanted = Counter((p.name, p.ours, p.index, p.shape) for p in pieces)
        written = Counter(
            (r["theirs"], r["ours"], r["index"], tuple(r["shape"]))
            for r in self.records
            if not r["theirs"].endswith(SCALE)
        )
        wrong = {name for name, *_ in (wanted - written) + (written - wanted)}
        self._refuse(sorted(wrong), "were not written whole, once")

    def check_bytes(self, read: Callable[[Record], Tensor]) -> None:
        """Read all tensors back. Raise `UserError` where other bytes come than were written.

        read: returns the tensor of a record from the target.
        """
        wrong = []
        with progress_bar(len(self.records), "reading back", " tensors") as bar:
            for record in self.records:
                tensor = read(record)
                same = name_of(tensor.dtype) == record["after"]
                if not same or checksum(tensor) != record["sha256"]:
                    wrong.append(record["theirs"])
                bar.update(1)
        self._refuse(wrong, "came back with other bytes than were written")
        self.read_back = len(self.records)

    def _refuse(self, names: list[str], what: str) -> None:
        if names:
            raise UserError(
                f"the conversion of {self.source} to {self.target} failed its audit: {some(names)} "
                f"{what}; remove {self.target}.tmp and convert again, and report it if that "
                "happens twice."
            )

    # -------------------------------------------------------------------------------- report

    def write(self) -> None:
        """Write TARGET.audit.json and TARGET.audit.txt, and log the text."""
        totals = {
            "tensors": len(self.records),
            "values": sum(r["values"] for r in self.records if not r["theirs"].endswith(SCALE)),
            "rounded": sum(record["rounded"] for record in self.records),
            "read_back": self.read_back,
        }
        forms = Counter(f"{record['before']} -> {record['after']}" for record in self.records)
        data = {
            "source": str(self.source),
            "target": str(self.target),
            "versions": {"torchtitan": torchtitan.__version__, "torch": torch.__version__},
            "totals": totals,
            "forms": dict(forms),
            "left_out": self.left_out,
            "routing_changes": self.routing,
            "tensors": self.records,
        }
        lines = self._lines(totals, forms)
        self._file("json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        self._file("txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        for line in lines:
            logger.info("%s", line)

    def _file(self, ending: str) -> Path:
        return self.target.with_name(f"{self.target.name}.audit.{ending}")

    def _lines(self, totals: dict[str, Any], forms: Mapping[str, int]) -> list[str]:
        share = 100 * totals["rounded"] / max(1, totals["values"])
        lines = [
            f"Audit of {self.source} -> {self.target}: all {totals['tensors']:,} tensors accounted "
            f"for, {totals['values']:,} values",
            "Types: " + ", ".join(f"{form} ({count:,})" for form, count in forms.items()),
            f"Rounded: {totals['rounded']:,} values ({share:.3g} %)",
        ]
        for reason, names in self.left_out.items():
            lines.append(f"Left out: {len(names):,} ({reason}): {some(names, ', ', 3)}")
        if self.routing:
            worst = max(self.routing, key=lambda layer: self.routing[layer])
            mean = 100 * sum(self.routing.values()) / len(self.routing)
            lines.append(
                f"Changed top-k: {mean:.2f} % of tokens, most in {worst}: "
                f"{100 * self.routing[worst]:.2f} % (routers alone, Gaussian tokens)"
            )
        checked = f"all {self.read_back:,} checksums match" if self.read_back else "left out"
        return [*lines, f"Read back: {checked}"]


# ------------------------------------------------------------------ both directions


def audit_checkpoint(
    source: HFFolder,
    made: Path,
    target: Path,
    adapter: StateDictAdapter,
    records: list[Record],
    *,
    read_back: bool,
) -> None:
    """Check a converted checkpoint against the folder and the model, and write the report.

    made: the checkpoint, before it has its name.
    target: its name.
    """
    audit = Audit(source.path, target, records)
    audit.check_consumed(source, adapter)
    pieces = {piece.ours: piece for piece in adapter.pieces() if not piece.copy}
    audit.check_written(piece for piece in adapter.pieces() if not piece.copy)
    stored = StoredTensors(made)
    if read_back:
        audit.check_bytes(lambda record: stored.read(record["ours"], _box_of(record)))
    for names in _by_layer(adapter):
        shapes = {name: pieces[name].shape for name in names}
        before = {
            name: read_rows(source, adapter, pieces[name], (0,) * len(shape), shape)
            for name, shape in shapes.items()
        }
        after = {name: stored.read(name) for name in names}
        audit.routing |= adapter.routing_changes(before, after)
    source.close()
    audit.write()


def audit_folder(
    stored: StoredTensors,
    made: Path,
    target: Path,
    adapter: StateDictAdapter,
    records: list[Record],
    dtype: torch.dtype,
    *,
    read_back: bool,
) -> Audit:
    """Check a converted folder against the model, write the report, and return the audit.

    made: the folder, before it has its name.
    target: its name.
    dtype: of the written weights.
    """
    audit = Audit(stored.checkpoint, target, records)
    audit.check_written(adapter.pieces())
    if read_back:
        folder = HFFolder(made)
        audit.check_bytes(lambda record: folder.read_stored(record["theirs"]))
        folder.close()
    for names in _by_layer(adapter):
        audit.routing |= routing_changes(adapter, {n: stored.read(n) for n in names}, dtype)
    audit.write()
    return audit


def _by_layer(adapter: StateDictAdapter) -> Iterator[list[str]]:
    """Yield the names of the routers' tensors, a layer at a time: so many are in memory."""
    for _, names in itertools.groupby(adapter.router_names(), key=lambda n: n.split(".")[:2]):
        yield list(names)


def _box_of(record: Record) -> Box | None:
    if record["index"] is None:
        return None
    shape = tuple(record["shape"])
    return (record["index"], *(0 for _ in shape)), (1, *shape)
