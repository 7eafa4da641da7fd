"""Tensors of a checkpoint on disk: torch.distributed.checkpoint's files, with two changes.

The writer sums up every file while it is written and makes the folder a checkpoint at the end
(folder.py), on the coordinator and inside DCP's own protocol: whatever fails on any rank,
every rank learns of it, in synchronous and asynchronous saves alike.

The reader never runs anything. DCP keeps its index in a pickle, and a pickle may call whatever it
names; ours is read with an unpickler that knows DCP's own record types and torch's primitives only.
(A checksum would not do: whoever changes a folder can change its manifest too.)
"""

import contextlib
import hashlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from torchtitan.components.checkpoint.folder import (
    TENSOR_INDEX,
    FileSum,
    begin,
    keep_latest,
    publish,
)
from torchtitan.tools.disk import free_bytes, reason
from torchtitan.tools.errors import UserError

# ------------------------------------------------------------------ writing


class CheckpointWriter(FileSystemWriter):
    """Writes `folder/step-N`. texts: META and NUMBERS (used on the coordinator only).

    needed: bytes of all tensors of all ranks; 0 until they are known, and on other ranks.
    """

    def __init__(self, folder: Path, step: int, texts: dict[str, str], keep_latest_k: int) -> None:
        super().__init__(folder / f"step-{step}.tmp", sync_files=True)
        self._folder, self._step = folder, step
        self._texts = texts
        self._keep_latest_k = keep_latest_k
        self.needed = 0
        self.fs = _SummingFiles()

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id)  # without the temporary folder's name

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan  # the coordinator alone makes the folder

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        tensors = [item.tensor_data for plan in plans for item in plan.items if item.tensor_data]
        self.needed = sum(t.chunk.sizes.numel() * t.properties.dtype.itemsize for t in tensors)
        begin(self._folder, self._step)
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """DCP's results, and behind them one for each file with its sum."""
        results = super().write_data(plan, planner).wait()
        sums = [WriteResult(MetadataIndex(name), s.size, s) for name, s in self.fs.sums.items()]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results + sums)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written = [result for of_rank in results for result in of_rank]
        tensors = [result for result in written if not isinstance(result.storage_data, FileSum)]
        sums = {r.index.fqn: r.storage_data for r in written if isinstance(r.storage_data, FileSum)}
        super().finish(metadata, [tensors])
        sums[TENSOR_INDEX] = self.fs.sums[f"{TENSOR_INDEX}.tmp"]
        publish(Path(self.path), self._texts, sums)
        keep_latest(self._folder, self._keep_latest_k)


def reason_of_failure(error: CheckpointException, folder: Path, needed: int = 0) -> str:
    """ "rank 1: No space left on device (…)" of the first rank that failed to write or read
    `folder`. What lies there counts as free: it goes when a save has failed. needed: bytes."""
    rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
    if not isinstance(cause, OSError):
        return f"rank {rank}: {cause if isinstance(cause, UserError) else repr(cause)}"
    free = free_bytes(folder)
    with contextlib.suppress(OSError):  # another rank may be removing them
        free = (free or 0) + sum(path.stat().st_size for path in folder.iterdir())
    place = f" ({cause.filename})" if cause.filename else ""
    return f"rank {rank}: {reason(cause, folder, free=free, needed=needed)}{place}"


class _SummingFiles(FileSystem):
    """Sums up what is written, by file name, as it passes."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: dict[str, FileSum] = {}

    @contextlib.contextmanager
    def create_stream(self, path: Path, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            summing = SummingStream(stream)
            with tells_of_the_disk(summing):
                yield summing
        self.sums[Path(path).name] = FileSum(summing.size, summing.digest.hexdigest())


class SummingStream:
    """A file that is only ever appended to. error: what kept it from being written."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.size, self.digest = 0, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            count = self._stream.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        self.size += count
        return count

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        self._stream.flush()  # for os.fsync, which sees the file and not Python's buffer
        return self._stream.fileno()

    def close(self) -> None:
        self._stream.close()


@contextlib.contextmanager
def tells_of_the_disk(stream: SummingStream) -> Iterator[None]:
    """Around `torch.save` into `stream`: raise the `OSError` of a write that failed. torch's zip
    writer raises one of its own instead, about positions in the file."""
    try:
        yield
    except Exception:
        if stream.error is not None:
            raise stream.error from None
        raise


# ------------------------------------------------------------------ reading


class CheckpointReader(FileSystemReader):
    """Reads a checkpoint's tensors. `read_metadata` raises `UserError` for an index that is
    damaged, or not ours."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_tensor_index(Path(self.path))
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


def read_tensor_index(checkpoint: Path) -> Metadata:
    path = checkpoint / TENSOR_INDEX
    try:
        with path.open("rb") as file:
            metadata = _IndexUnpickler(file, path).load()
        _check_index(metadata)
    except UserError:
        raise
    except Exception as error:  # a damaged pickle fails in any way
        raise UserError(
            f"checkpoint {checkpoint} can't be read: its {TENSOR_INDEX} is missing or damaged "
            f"({type(error).__name__}: {error}); take another checkpoint."
        ) from None
    return metadata


def _check_index(metadata: Metadata) -> None:
    """The shape of DCP's index, and only files of the folder itself."""
    if not isinstance(metadata, Metadata):
        raise TypeError(f"a {type(metadata).__name__} instead of an index")
    for index, info in metadata.storage_data.items():
        if Path(info.relative_path).name != info.relative_path:
            raise ValueError(f"{index.fqn} lies in {info.relative_path}, outside of the folder")


_METADATA = "torch.distributed.checkpoint.metadata"
_RECORDS = {
    _METADATA: (
        "Metadata MetadataIndex StorageMeta TensorStorageMetadata ChunkStorageMetadata "
        "BytesStorageMetadata TensorProperties _MEM_FORMAT_ENCODING"
    ).split(),
    "torch.distributed.checkpoint.filesystem": ["_StorageInfo"],
    "torch.serialization": ["_get_layout"],  # from the name of a layout to the layout
    "torch": ["Size"],
    # Other writers of DCP's format note where they wrote to.
    "pathlib": ["PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"],
    "pathlib._local": ["PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"],
}


class _IndexUnpickler(pickle.Unpickler):
    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        known = name in _RECORDS.get(module, ())
        if known or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise UserError(
            f"{self._path} names {module}.{name}, which no checkpoint needs and which could run "
            "code, so it is not loaded; take a checkpoint from a source that you trust."
        )


def compare_tensors(metadata: Metadata, wanted: dict[str, torch.Tensor]) -> list[str]:
    """What keeps `wanted` from being loaded, by name: missing tensors, other shapes."""
    problems = []
    for name, tensor in wanted.items():
        saved = metadata.state_dict_metadata.get(name)
        if saved is None:
            problems.append(f"{name} is missing")
        elif not isinstance(saved, TensorStorageMetadata):
            # DCP would unpickle it, and ask no unpickler of ours.
            problems.append(f"{name} is no tensor there")
        elif tuple(saved.size) != tuple(tensor.shape):
            problems.append(f"{name} is {_shape(saved.size)} there and {_shape(tensor.shape)} here")
    return problems


def _shape(size: torch.Size) -> str:
    return "x".join(map(str, size)) or "a scalar"
