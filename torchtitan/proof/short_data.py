"""Short copies of the user's first documents, so that 16 tokens hold ends of some.

Data that is not on this machine is replaced by the shipped sample.
"""

import itertools
import json
from dataclasses import replace
from pathlib import Path

from torchtitan.config import Training
from torchtitan.data import DatasetSettings, check_dataset, open_source
from torchtitan.data.catalog import SAMPLE_ALIASES
from torchtitan.data.settings import training_datasets

DOCUMENTS, CHARACTERS = 320, 48


def short_data(training: Training, folder: Path) -> tuple[Training, list[str]]:
    """Return [training] that reads short copies in `folder`, and sentences on replaced data.

    Raises `UserError` for a dataset that is wrong on every machine.
    """
    sentences: list[str] = []
    files = []
    for n, settings in enumerate(training_datasets(training)):
        settings, replaced = _on_this_machine(settings)
        sentences += replaced
        files.append(_write(settings, folder / f"data-{n}.jsonl"))
    local = {"dataset": "text", "dataset_text_key": "text", "format": "text"}
    if not training.blend:
        return replace(training, dataset_path=str(files[0]), **local), sentences
    blend = [
        replace(part, dataset_path=str(file), **local)
        for part, file in zip(training.blend, files, strict=True)
    ]
    return replace(training, blend=blend), sentences


def _on_this_machine(settings: DatasetSettings) -> tuple[DatasetSettings, list[str]]:
    sample = replace(settings, name="sample", path=None, text_key="text", format="text")
    if settings.format != "text":
        where = f'{settings.toml_key("format")} = "{settings.format}" has rows too long for a proof'
        return sample, [f"{where}: texts of the shipped sample take their place"]
    if settings.path is None:
        check_dataset(settings)
        if settings.name in ("sample", *SAMPLE_ALIASES):
            return sample, []
        where = f"{settings.toml_key('dataset')} '{settings.name}' is on the Hugging Face hub"
    elif _exists(settings.path):
        return settings, []
    else:
        where = f"{settings.toml_key('dataset_path')} {settings.path} is not on this machine"
    return sample, [f"{where}: the shipped sample takes its place"]


def _exists(path: str) -> bool:
    """Return whether a file, a folder or a match of a glob is there."""
    found = Path(path).expanduser()
    if found.exists():
        return True
    return any(Path(found.anchor or ".").glob(str(found.relative_to(found.anchor))))


def _write(settings: DatasetSettings, file: Path) -> Path:
    usable = (record.text for record in open_source(settings).probe() if not record.problem)
    texts = [text.strip()[:CHARACTERS] for text in itertools.islice(usable, DOCUMENTS)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file
