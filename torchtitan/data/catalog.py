"""From the names in the TOML (training.dataset, training.dataset_path) to a source of documents."""

import difflib
import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchtitan.data.documents import Skips
from torchtitan.data.files import (
    DocumentFile,
    GroupedFile,
    IndexedFile,
    TextFile,
    open_file,
)
from torchtitan.data.folders import Found, search
from torchtitan.data.parquet import GroupedFiles
from torchtitan.data.sources import HubStream, IndexedFiles, Source, StreamedFiles
from torchtitan.data.whole_files import (
    PROBED_DOCUMENTS,
    format_problem,
    refuse_wrong_files,
)
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger

SAMPLE = Path(__file__).parent / "sample/sample.jsonl"
# torchtitan's TOMLs name a small excerpt of C4 that its repository carries; ours carries this.
SAMPLE_ALIASES = ("c4_test", "c4_validation_test")


@dataclass(frozen=True)
class HubDataset:
    """Where a named dataset lies on the hub, and which files of a local copy are its split."""

    repository: str
    config: str | None = None
    split: str = "train"
    local_files: str | None = None
    revision: str | None = None  # branch, tag or commit; else the newest


HUB_DATASETS = {
    "c4": HubDataset("allenai/c4", "en", "train", "en/c4-train.*.json.gz"),
    "c4_validation": HubDataset("allenai/c4", "en", "validation", "en/c4-validation.*.json.gz"),
}
LOCAL = "text"  # the name to write when dataset_path says it all
NAMES = ("sample", *SAMPLE_ALIASES, *HUB_DATASETS, LOCAL)


def check_dataset(name: str, path: str | None) -> None:
    """Raise UserError for a name or path that means nothing; reads no document, asks no hub."""
    known = name in NAMES or name.partition("@")[0] in HUB_DATASETS
    if path:
        if not known and not _is_on_hub(name):
            near = difflib.get_close_matches(name, NAMES, n=1)
            raise UserError(
                f"training.dataset = '{name}' is not known; did you mean "
                f"'{near[0] if near else LOCAL}'? (With training.dataset_path the usual name is "
                f"'{LOCAL}'; all: {', '.join(NAMES)}.)"
            )
        _find_local(name, path)
    elif name == LOCAL or (not known and not _is_on_hub(name)):
        raise _unknown(name)


def open_source(name: str, path: str | None, text_key: str, label: str | None = None) -> Source:
    """Find the documents and make sure that some are usable; every failure is a UserError.

    With a path the documents are local files, whatever the name. Without one the name is one of
    NAMES, or "organisation/name" (or "organisation/name:config") on the Hugging Face hub; a name on
    the hub may end in "@revision". `label` is what the log calls local files instead.
    """
    plain, _, revision = name.partition("@")
    if path:
        source = _open_files(label or name, _find_local(name, path), text_key)
    elif name == "sample" or name in SAMPLE_ALIASES:
        if name != "sample":
            logger.info(f"training.dataset '{name}' is read from the shipped sample, {SAMPLE}")
        source = _open_files(label or name, Found(SAMPLE.parent, [SAMPLE]), "text")
    elif plain in HUB_DATASETS:
        where = replace(HUB_DATASETS[plain], revision=revision or None)
        source = _open_hub(plain, where, text_key)
    elif _is_on_hub(name):
        repository, _, config = plain.partition(":")
        where = HubDataset(repository, config or None, revision=revision or None)
        source = _open_hub(plain, where, text_key)
    else:
        raise _unknown(name)
    _check_usable(source)
    refuse_wrong_files(source.files)
    return source


def _find_local(name: str, path: str) -> Found:
    named = HUB_DATASETS.get(name.partition("@")[0])
    return search(path, named.local_files if named else None)


def _is_on_hub(name: str) -> bool:
    """Whether an unknown name is "organisation/name": the hub knows whether it exists."""
    return name.partition("@")[0].count("/") == 1 and not Path(name).exists()


def _unknown(name: str) -> UserError:
    if name == LOCAL:
        return UserError(
            f"training.dataset = '{LOCAL}' reads local files and training.dataset_path is not set; "
            "set it to a file, a folder or a glob."
        )
    if Path(name).expanduser().exists():
        return UserError(
            f"training.dataset = '{name}' is a path, but the key takes a name; write it as "
            f"training.dataset_path, with training.dataset = '{LOCAL}'."
        )
    near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.0)[0]
    return UserError(
        f"training.dataset = '{name}' is not known; the nearest name is '{near}' (all: "
        f"{', '.join(NAMES)}, 'organisation/name' on the hub)."
    )


def _open_files(name: str, found: Found, text_key: str) -> Source:
    if found.left_out:
        logger.warning(f"Data {name}: not read: {', '.join(found.left_out)}")
    files: list[DocumentFile] = []
    empty: list[Path] = []
    broken: list[str] = []
    with ThreadPoolExecutor(16) as threads:  # most of it is waiting for the disk
        opened = list(threads.map(lambda path: _open(path, text_key), found.files))
    for path, file in zip(found.files, opened, strict=True):
        if isinstance(file, str):
            broken.append(f"{path}: {file}")
        elif file.size == 0 or file.length == 0:
            empty.append(path)
        else:
            file.name = str(path.relative_to(found.root))
            files.append(file)
    if empty:
        which = f"Skipped {len(empty)} of {len(opened)} files"
        logger.warning(f"{which}, first {empty[0]}: it is empty")
    if not files:
        first = broken[0] if broken else f"{empty[0]}: it is empty"
        raise UserError(
            f"None of the {len(opened)} file(s) of training.dataset '{name}' can be read "
            f"(first: {first}); mend them or correct training.dataset_path."
        )
    if broken:
        raise UserError(
            f"{broken[0]}; mend the file (and {len(broken) - 1} more of training.dataset "
            f"'{name}'), or leave it out of training.dataset_path."
        )
    return _source_of(name, files)


def _open(path: Path, text_key: str) -> DocumentFile | str:
    """Or why not."""
    try:
        return open_file(path, text_key)
    except OSError as error:
        wrong = path.name.endswith(".parquet") and format_problem(path)
        return wrong or f"it can't be read ({error.strerror or error})"


def _source_of(name: str, files: list[DocumentFile]) -> Source:
    size = sum(file.size for file in files)
    grouped = [file for file in files if isinstance(file, GroupedFile)]
    indexed = [file for file in files if isinstance(file, IndexedFile)]
    if len(grouped) < len(files):
        logger.info(f"Data {name}: {len(files)} files, {size:,} bytes, read as a stream (gzip)")
        return StreamedFiles(name, files)
    all_indexed = len(indexed) == len(files)
    source = IndexedFiles(name, indexed) if all_indexed else GroupedFiles(name, grouped)
    texts = sum(isinstance(file, TextFile) for file in files)
    counts = f"{len(source):,} documents, {len(files)} files, {size:,} bytes"
    as_one = f" (each of the {texts} .txt files is one document)" if texts else ""
    logger.info(f"Data {name}: {counts}{as_one}")
    return source


def _open_hub(name: str, where: HubDataset, text_key: str) -> Source:
    """Streaming through `datasets`. Nothing is downloaded but what is read."""
    from datasets import load_dataset  # takes a second to import, and only this needs it

    pinned: dict[str, Any] = {"revision": where.revision} if where.revision else {}
    try:
        dataset = load_dataset(
            where.repository, name=where.config, split=where.split, streaming=True, **pinned
        )
    except Exception as error:  # its many ways to fail have no common class
        raise _hub_failed(name, where, error) from error
    return HubStream(name, dataset, text_key)


def _hub_failed(name: str, where: HubDataset, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(
        f"training.dataset = '{name}' could not be read from the Hugging Face hub as "
        f"'{where.repository}', split '{where.split}' ({type(error).__name__}: {reason}); check "
        "the name and the network, or download it and set training.dataset_path to the files."
    )


def _check_usable(source: Source) -> None:
    skips = Skips()
    for record in itertools.islice(source.probe(), PROBED_DOCUMENTS):
        if not record.problem:
            return
        skips.add(record)
    first = f"{skips.first.where}: {skips.first.details}" if skips.first else "there is none"
    wrong = format_problem(source.files[0].path) if source.files else None
    hint = f"{source.files[0].path}: {wrong}; " if wrong else ""
    raise UserError(
        f"training.dataset '{source.name}' has no usable document among the first "
        f"{skips.counts.total():,} ({skips or 'none found'}; first {first}); {hint}correct "
        "training.dataset_path or training.dataset_text_key, or mend the files."
    )
