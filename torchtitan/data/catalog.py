"""Sources of documents by the names in the TOML (dataset, dataset_path)."""

import difflib
import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchtitan.data.documents import Rows, Skips
from torchtitan.data.files import (
    DocumentFile,
    GroupedFile,
    IndexedFile,
    TextFile,
    open_file,
)
from torchtitan.data.folders import Found, search
from torchtitan.data.parquet import GroupedFiles
from torchtitan.data.settings import DatasetSettings
from torchtitan.data.sources import HubStream, IndexedFiles, Source, StreamedFiles
from torchtitan.data.whole_files import (
    PROBED_DOCUMENTS,
    format_problem,
    refuse_wrong_files,
)
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger
from torchtitan.tools.progress_bar import track

# Fewer documents are hardly an order to shuffle.
_FEW_DOCUMENTS = 32
SAMPLE = Path(__file__).parent / "sample/sample.jsonl"
# torchtitan's TOMLs name a small excerpt of C4 that its repository carries; ours carries this.
SAMPLE_ALIASES = ("c4_test", "c4_validation_test")


@dataclass(frozen=True)
class HubDataset:
    """A dataset on the hub.

    repository: "organisation/name"
    config: its configuration; None takes the default
    split: which split to read
    local_files: glob of the split's files in a local copy
    revision: branch, tag or commit; None takes the newest
    """

    repository: str
    config: str | None = None
    split: str = "train"
    local_files: str | None = None
    revision: str | None = None


HUB_DATASETS = {
    "c4": HubDataset("allenai/c4", "en", "train", "en/c4-train.*.json.gz"),
    "c4_validation": HubDataset("allenai/c4", "en", "validation", "en/c4-validation.*.json.gz"),
}
LOCAL = "text"  # the name to write when dataset_path says it all
CHAT_SAMPLE = "chat_sample"  # a few conversations, to try a set-up with
NAMES = ("sample", *SAMPLE_ALIASES, CHAT_SAMPLE, *HUB_DATASETS, LOCAL)


def check_dataset(settings: DatasetSettings) -> None:
    """Raise `UserError` for a name or path that means nothing; reads no document, asks no hub."""
    name = settings.name
    known = name in NAMES or name.partition("@")[0] in HUB_DATASETS
    if settings.path:
        if not known and not _is_on_hub(name):
            near = difflib.get_close_matches(name, NAMES, n=1)
            raise UserError(
                f"{settings.toml_key('dataset')} = '{name}' is not known; did you mean "
                f"'{near[0] if near else LOCAL}'? (With {settings.toml_key('dataset_path')} the "
                f"usual name is '{LOCAL}'; all: {', '.join(NAMES)}.)"
            )
        _find_local(settings)
    elif name == LOCAL or (not known and not _is_on_hub(name)):
        raise _unknown(settings)


def open_source(settings: DatasetSettings) -> Source:
    """Find the documents and make sure that some are usable; every failure is a `UserError`.

    With a path the documents are local files, whatever the name. Without one the name is one of
    NAMES, or "organisation/name" (or "organisation/name:config") on the Hugging Face hub; a name on
    the hub may end in "@revision".
    """
    name = settings.name
    plain, _, revision = name.partition("@")
    if settings.path:
        source = _open_files(settings, _find_local(settings))
    elif name == "sample" or name in SAMPLE_ALIASES:
        if name != "sample":
            key = settings.toml_key("dataset")
            logger.info(f"{key} '{name}' is read from the shipped sample, {SAMPLE}")
        source = _open_files(replace(settings, text_key="text"), Found(SAMPLE.parent, [SAMPLE]))
    elif name == CHAT_SAMPLE:
        source = _open_files(settings, Found(SAMPLE.parent, [SAMPLE.with_name("chat.jsonl")]))
    elif plain in HUB_DATASETS:
        source = _open_hub(settings, replace(HUB_DATASETS[plain], revision=revision or None))
    elif _is_on_hub(name):
        repository, _, config = plain.partition(":")
        where = HubDataset(repository, config or None, revision=revision or None)
        source = _open_hub(settings, where)
    else:
        raise _unknown(settings)
    _check_usable(source)
    refuse_wrong_files(settings, source.files)
    return source


def _find_local(settings: DatasetSettings) -> Found:
    named = HUB_DATASETS.get(settings.name.partition("@")[0])
    return search(settings, named.local_files if named else None)


def _is_on_hub(name: str) -> bool:
    """Return whether an unknown name is "organisation/name"; the hub knows whether it exists."""
    return name.partition("@")[0].count("/") == 1 and not Path(name).exists()


def _unknown(settings: DatasetSettings) -> UserError:
    name, key, path_key = settings.name, *map(settings.toml_key, ("dataset", "dataset_path"))
    if name == LOCAL:
        return UserError(
            f"{key} = '{LOCAL}' reads local files and {path_key} is not set; "
            "set it to a file, a folder or a glob."
        )
    if Path(name).expanduser().exists():
        return UserError(
            f"{key} = '{name}' is a path, but the key takes a name; write it as "
            f"{path_key}, with {key} = '{LOCAL}'."
        )
    near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.0)[0]
    return UserError(
        f"{key} = '{name}' is not known; the nearest name is '{near}' (all: "
        f"{', '.join(NAMES)}, 'organisation/name' on the hub)."
    )


def _open_files(settings: DatasetSettings, found: Found) -> Source:
    name = settings.label or settings.name
    if found.left_out:
        logger.warning(f"{settings.heading}: not read: {', '.join(found.left_out)}")
    files: list[DocumentFile] = []
    empty: list[Path] = []
    broken: list[str] = []
    with ThreadPoolExecutor(16) as threads:  # most of it is waiting for the disk
        opening = threads.map(lambda path: _open(path, settings.rows), found.files)
        opened = list(track(opening, len(found.files), "opening the data", "file"))
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
    key, path_key = settings.toml_key("dataset"), settings.toml_key("dataset_path")
    if not files:
        first = broken[0] if broken else f"{empty[0]}: it is empty"
        raise UserError(
            f"None of the {len(opened)} file(s) of {key} '{name}' can be read "
            f"(first: {first}); mend them or correct {path_key}."
        )
    if broken:
        more = f" (and {len(broken) - 1} more of {key} '{name}')" if broken[1:] else ""
        raise UserError(f"{broken[0]}; mend the file{more}, or leave it out of {path_key}.")
    return _source_of(settings, files)


def _open(path: Path, rows: Rows) -> DocumentFile | str:
    """The file, or the reason why it can't be opened."""
    try:
        return open_file(path, rows)
    except OSError as error:
        wrong = path.name.endswith(".parquet") and format_problem(path)
        return wrong or f"it can't be read ({error.strerror or error})"


def _source_of(settings: DatasetSettings, files: list[DocumentFile]) -> Source:
    size = sum(file.size for file in files)
    number = f"{len(files):,} file{'s' if len(files) > 1 else ''}"
    grouped = [file for file in files if isinstance(file, GroupedFile)]
    indexed = [file for file in files if isinstance(file, IndexedFile)]
    if len(grouped) < len(files):
        logger.info(f"{settings.heading}: {number}, {size:,} bytes, read as a stream (gzip)")
        return StreamedFiles(settings, files)
    all_indexed = len(indexed) == len(files)
    source = IndexedFiles(settings, indexed) if all_indexed else GroupedFiles(settings, grouped)
    texts = sum(isinstance(file, TextFile) for file in files)
    counts = f"{len(source):,} documents, {number}, {size:,} bytes"
    as_one = f" (each of the {texts} .txt files is one document)" if texts else ""
    logger.info(f"{settings.heading}: {counts}{as_one}")
    if texts and len(source) < _FEW_DOCUMENTS and settings.key.startswith("training"):
        logger.warning(
            f"{settings.heading}: the order is shuffled by document, and {len(source)} are few: "
            "cut the files into more of them, or training sees one text after the other"
        )
    return source


def _open_hub(settings: DatasetSettings, where: HubDataset) -> Source:
    """Stream through `datasets`. Nothing is downloaded but what is read."""
    from datasets import load_dataset  # takes a second to import, and only this needs it

    pinned: dict[str, Any] = {"revision": where.revision} if where.revision else {}
    try:
        dataset = load_dataset(
            where.repository, name=where.config, split=where.split, streaming=True, **pinned
        )
    except Exception as error:  # its many ways to fail have no common class
        raise _hub_failed(settings, where, error) from error
    return HubStream(settings, dataset)


def _hub_failed(settings: DatasetSettings, where: HubDataset, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    name = settings.name.partition("@")[0]
    return UserError(
        f"{settings.toml_key('dataset')} = '{name}' could not be read from the Hugging Face hub as "
        f"'{where.repository}', split '{where.split}' ({type(error).__name__}: {reason}); check "
        f"the name and the network, or download it and set {settings.toml_key('dataset_path')} to "
        "the files."
    )


def _check_usable(source: Source) -> None:
    skips = Skips()
    for record in itertools.islice(source.probe(), PROBED_DOCUMENTS):
        if not record.problem:
            return
        skips.add(record)
    key = source.settings.toml_key
    if not skips.counts:
        where = f" in {source.files[0].path}" if source.files else ""
        raise UserError(
            f"{key('dataset')} '{source.name}' has no document at all{where}; correct "
            f"{key('dataset_path')}."
        )
    first = f"{skips.first.where}: {skips.first.details}" if skips.first else "there is none"
    wrong = format_problem(source.files[0].path) if source.files else None
    hint = f"{source.files[0].path}: {wrong}; " if wrong else ""
    raise UserError(
        f"{key('dataset')} '{source.name}' has no usable document among the first "
        f"{skips.counts.total():,} ({skips or 'none found'}; first {first}); {hint}correct "
        f"{key('dataset_path')} or {key(source.settings.rows_key)}, or mend the files."
    )
