"""From the names in the TOML (training.dataset, training.dataset_path) to a source of documents."""

import difflib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torchtitan.hf_datasets.files import (
    DocumentFile,
    GroupedFile,
    IndexedFile,
    find_files,
    open_file,
)
from torchtitan.hf_datasets.records import Skips
from torchtitan.hf_datasets.row_groups import GroupedFiles
from torchtitan.hf_datasets.sources import HubStream, IndexedFiles, Source, StreamedFiles
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger

SAMPLE = Path(__file__).parent / "sample/sample.jsonl"
# torchtitan's TOMLs name a small excerpt of C4 that its repository carries; ours carries this.
SAMPLE_ALIASES = ("c4_test", "c4_validation_test")
# When this many documents in a row are unusable, none will come.
PROBED_DOCUMENTS = 10_000


@dataclass(frozen=True)
class HubDataset:
    """Where a named dataset lies on the hub, and which files of a local copy are its split."""

    repository: str
    config: str | None = None
    split: str = "train"
    local_files: str | None = None


HUB_DATASETS = {
    "c4": HubDataset("allenai/c4", "en", "train", "en/c4-train.*.json.gz"),
    "c4_validation": HubDataset("allenai/c4", "en", "validation", "en/c4-validation.*.json.gz"),
}
LOCAL = "text"  # the name to write when dataset_path says it all
NAMES = ("sample", *SAMPLE_ALIASES, *HUB_DATASETS, LOCAL)


def check_dataset(name: str, path: str | None) -> None:
    """Raise UserError for a name or path that means nothing; reads no document, asks no hub."""
    if path:
        _find_local(name, path)
    elif name not in ("sample", *SAMPLE_ALIASES, *HUB_DATASETS) and not _is_on_hub(name):
        raise _unknown(name)


def open_source(name: str, path: str | None, text_key: str, label: str | None = None) -> Source:
    """Find the documents and make sure that some are usable; every failure is a UserError.

    With a path the documents are local files, whatever the name. Without one the name is one of
    NAMES, or "organisation/name" (or "organisation/name:config") on the Hugging Face hub. `label`
    is what the log calls local files instead.
    """
    if path:
        source = _open_files(label or name, _find_local(name, path), text_key)
    elif name == "sample" or name in SAMPLE_ALIASES:
        if name != "sample":
            logger.info(f"training.dataset '{name}' is read from the shipped sample, {SAMPLE}")
        source = _open_files(label or name, [SAMPLE], "text")
    elif name in HUB_DATASETS:
        source = _open_hub(name, HUB_DATASETS[name], text_key)
    elif _is_on_hub(name):
        repository, _, config = name.partition(":")
        source = _open_hub(name, HubDataset(repository, config or None), text_key)
    else:
        raise _unknown(name)
    _check_usable(source)
    return source


def _find_local(name: str, path: str) -> list[Path]:
    named = HUB_DATASETS.get(name)
    return find_files(path, named.local_files if named else None)


def _is_on_hub(name: str) -> bool:
    """Whether an unknown name is "organisation/name": the hub knows whether it exists."""
    return name.count("/") == 1 and not Path(name).exists()


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
        f"{', '.join(NAMES)}, 'organisation/name' on the hub, or any with training.dataset_path)."
    )


def _open_files(name: str, paths: Sequence[Path], text_key: str) -> Source:
    files: list[DocumentFile] = []
    trouble: list[str] = []
    for path in paths:
        try:
            file = open_file(path, text_key)
        except OSError as error:
            trouble.append(f"{path}: {error}")
            continue
        if file.size == 0 or file.length == 0:
            trouble.append(f"{path}: it is empty")
        else:
            files.append(file)
    if trouble:
        logger.warning(f"Skipped {len(trouble)} of {len(paths)} files, first {trouble[0]}")
    if not files:
        raise UserError(
            f"None of the {len(paths)} file(s) of training.dataset '{name}' can be read "
            f"(first: {trouble[0]}); mend them or correct training.dataset_path."
        )
    size = sum(file.size for file in files)
    grouped = [file for file in files if isinstance(file, GroupedFile)]
    indexed = [file for file in files if isinstance(file, IndexedFile)]
    if len(grouped) < len(files):
        logger.info(f"Data {name}: {len(files)} files, {size:,} bytes, read as a stream (gzip)")
        return StreamedFiles(name, files)
    all_indexed = len(indexed) == len(files)
    source = IndexedFiles(name, indexed) if all_indexed else GroupedFiles(name, grouped)
    logger.info(f"Data {name}: {len(source):,} documents, {len(files)} files, {size:,} bytes")
    return source


def _open_hub(name: str, where: HubDataset, text_key: str) -> Source:
    """Streaming through `datasets`. Nothing is downloaded but what is read."""
    from datasets import load_dataset  # takes a second to import, and only this needs it

    try:
        dataset = load_dataset(
            where.repository, name=where.config, split=where.split, streaming=True
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
    first = f"{skips.first.where}: {skips.first.problem}" if skips.first else "there is none"
    raise UserError(
        f"training.dataset '{source.name}' has no usable document among the first "
        f"{skips.counts.total():,} ({skips or 'none found'}; first {first}); correct "
        "training.dataset_path or training.dataset_text_key, or mend the files."
    )
