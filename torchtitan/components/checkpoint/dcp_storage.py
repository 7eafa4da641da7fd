"""Tensors of a checkpoint on disk: torch.distributed.checkpoint's files, with two changes.

The writer hashes every file while it is written and publishes the folder as a checkpoint at the end
(folder.py), on the coordinator and inside DCP's own protocol: a failure on any rank is reported on
every rank, in synchronous and asynchronous saves alike.

The reader never runs code from a checkpoint. DCP keeps its index in a pickle, and a pickle may call
any function that it names; here it is read with an unpickler that accepts DCP's own record types
and torch's primitives only. (A checksum would not be enough: whoever changes a folder can change
its manifest too.)
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
    FileChecksum,
    begin,
    keep_latest,
    publish,
)
from torchtitan.tools.disk import free_bytes, reason
from torchtitan.tools.errors import UserError

# ------------------------------------------------------------------ writing


class CheckpointWriter(FileSystemWriter):
    """Writes `folder/step-N`.

    texts: contents of META and NUMBERS (used on the coordinator only).
    keep_latest_k: number of checkpoints to keep; 0 = all.
    needed: bytes of all tensors of all ranks; 0 before the plan is known, and on other ranks.
    """

    def __init__(self, folder: Path, step: int, texts: dict[str, str], keep_latest_k: int) -> None:
        super().__init__(folder / f"step-{step}.tmp", sync_files=True)
        self._folder, self._step = folder, step
        self._texts = texts
        self._keep_latest_k = keep_latest_k
        self.needed = 0
        self.fs = _HashingFileSystem()

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id)  # no path: the temporary folder is renamed

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan  # only the coordinator makes the folder

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        tensors = [item.tensor_data for plan in plans for item in plan.items if item.tensor_data]
        self.needed = sum(t.chunk.sizes.numel() * t.properties.dtype.itemsize for t in tensors)
        begin(self._folder, self._step)
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write; return DCP's results, then one result for each file with its checksum."""
        results = super().write_data(plan, planner).wait()
        checksums = [
            WriteResult(MetadataIndex(name), s.size, s) for name, s in self.fs.checksums.items()
        ]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results + checksums)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written = [result for of_rank in results for result in of_rank]
        tensors = [
            result for result in written if not isinstance(result.storage_data, FileChecksum)
        ]
        checksums = {
            r.index.fqn: r.storage_data for r in written if isinstance(r.storage_data, FileChecksum)
        }
        super().finish(metadata, [tensors])
        checksums[TENSOR_INDEX] = self.fs.checksums[f"{TENSOR_INDEX}.tmp"]
        publish(Path(self.path), self._texts, checksums)
        keep_latest(self._folder, self._keep_latest_k)


def reason_of_failure(error: CheckpointException, folder: Path, needed: int = 0) -> str:
    """Describe the failure of the first rank that failed to write or read `folder`, such as
    "rank 1: No space left on device (…)".

    Files in `folder` count as free space: they are removed after a failed save.

    needed: bytes that were to be written; 0 = unknown.
    """
    rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
    if not isinstance(cause, OSError):
        return f"rank {rank}: {cause if isinstance(cause, UserError) else repr(cause)}"
    free = free_bytes(folder)
    with contextlib.suppress(OSError):  # another rank may be removing them
        free = (free or 0) + sum(path.stat().st_size for path in folder.iterdir())
    place = f" ({cause.filename})" if cause.filename else ""
    return f"rank {rank}: {reason(cause, folder, free=free, needed=needed)}{place}"


class _HashingFileSystem(FileSystem):
    """Hashes files while they are written; checksums by file name."""

    def __init__(self) -> None:
        super().__init__()
        self.checksums: dict[str, FileChecksum] = {}

    @contextlib.contextmanager
    def create_stream(self, path: Path, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            summing = HashingStream(stream)
            with raising_write_errors(summing):
                yield summing
        self.checksums[Path(path).name] = FileChecksum(summing.size, summing.digest.hexdigest())


class HashingStream:
    """Append-only file that hashes the data written to it.

    size: bytes written.
    digest: SHA-256 of them.
    error: of a failed write.
    """

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
        self._stream.flush()  # for os.fsync, which does not see Python's buffer
        return self._stream.fileno()

    def close(self) -> None:
        self._stream.close()


@contextlib.contextmanager
def raising_write_errors(stream: HashingStream) -> Iterator[None]:
    """Raise the `OSError` of a failed write to `stream`, where the block fails.

    For `torch.save`, whose zip writer raises an error of its own instead, about positions in the
    file.
    """
    try:
        yield
    except Exception:
        if stream.error is not None:
            raise stream.error from None
        raise


# ------------------------------------------------------------------ reading


class CheckpointReader(FileSystemReader):
    """Reads a checkpoint's tensors. `read_metadata` raises `UserError` for an index that is damaged
    or of a foreign kind."""

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
    """Check that this is DCP's index, and that all its files are in the folder itself."""
    if not isinstance(metadata, Metadata):
        raise TypeError(f"a {type(metadata).__name__} instead of an index")
    for index, info in metadata.storage_data.items():
        if Path(info.relative_path).name != info.relative_path:
            raise ValueError(f"{index.fqn} is in {info.relative_path}, outside of the folder")


_METADATA = "torch.distributed.checkpoint.metadata"
_RECORDS = {
    _METADATA: (
        "Metadata MetadataIndex StorageMeta TensorStorageMetadata ChunkStorageMetadata "
        "BytesStorageMetadata TensorProperties _MEM_FORMAT_ENCODING"
    ).split(),
    "torch.distributed.checkpoint.filesystem": ["_StorageInfo"],
    "torch.serialization": ["_get_layout"],  # returns the layout of a name
    "torch": ["Size"],
    # Other writers of DCP's format store the path that they wrote to.
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
    """List the reasons why `wanted` can't be loaded, by name: missing tensors, other shapes."""
    problems = []
    for name, tensor in wanted.items():
        saved = metadata.state_dict_metadata.get(name)
        if saved is None:
            problems.append(f"{name} is missing")
        elif not isinstance(saved, TensorStorageMetadata):
            # DCP would unpickle it, without our unpickler.
            problems.append(f"{name} is not a tensor there")
        elif tuple(saved.size) != tuple(tensor.shape):
            problems.append(f"{name} is {_shape(saved.size)} there and {_shape(tensor.shape)} here")
    return problems


def _shape(size: torch.Size) -> str:
    return "x".join(map(str, size)) or "a scalar"
