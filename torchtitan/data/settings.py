"""Data settings of a run as values: which datasets, and how they are cut into batches.

Everything that opens a dataset takes `DatasetSettings` whole. It knows the TOML table it came from,
so that an error names the key its reader has to change.
"""

from dataclasses import dataclass, field

from torchtitan.config import Chat, Training, Validation
from torchtitan.config.data_tables import Format
from torchtitan.data.chat.rows import ConversationRows
from torchtitan.data.documents import Rows, TextRows


@dataclass(frozen=True)
class DatasetSettings:
    """One dataset, as a table of the TOML names it.

    key: the table; "training", "training.blend.web", "validation" or "validation.sets.web"
    name: value of `dataset`
    path: value of `dataset_path`; file, folder or glob of local documents
    text_key: value of `dataset_text_key`
    label: name of local files in log lines and errors; "" takes `name`
    format: value of `format`
    """

    key: str
    name: str
    path: str | None = None
    text_key: str = "text"
    label: str = ""
    format: Format = "text"

    @property
    def rows(self) -> Rows:
        """How its rows become records."""
        return TextRows(self.text_key) if self.format == "text" else ConversationRows(self.format)

    @property
    def rows_key(self) -> str:
        """Key that must fit the rows, for errors."""
        return "dataset_text_key" if self.format == "text" else "format"

    @property
    def heading(self) -> str:
        """Beginning of its log lines: "Data web", "Validation data web"."""
        what = "Validation data" if self.key.startswith("validation") else "Data"
        return f"{what} {self.label or self.name}"

    def identity(self) -> dict[str, str]:
        """Settings that the meaning of a position depends on."""
        if self.format == "text":
            return {"training.dataset_text_key": self.text_key}
        return {"training.format": self.format}

    def toml_key(self, name: str) -> str:
        """Full spelling of a key of this table: "validation.dataset_path"."""
        return f"{self.key}.{name}"


@dataclass(frozen=True)
class DataSettings:
    """All data of [training] or of [validation].

    datasets: one, or those of a blend
    blended: whether examples are drawn by the weights of a blend
    seq_len: tokens per example
    batch_size: examples per batch of a data-parallel rank
    seed: seed of the order of documents
    num_workers: loader processes per rank; 0 loads in the training process
    num_streams: streams that the documents form; None lets the data decide
    infinite: True repeats the data epoch after epoch; False reads it once
    chat: the table [chat]
    """

    datasets: tuple[DatasetSettings, ...]
    blended: bool
    seq_len: int
    batch_size: int
    seed: int = 0
    num_workers: int = 0
    num_streams: int | None = None
    infinite: bool = True
    chat: Chat = field(default_factory=Chat)

    @property
    def with_chat(self) -> bool:
        """Tell whether some dataset has conversations."""
        return any(dataset.format != "text" for dataset in self.datasets)


def training_datasets(training: Training) -> tuple[DatasetSettings, ...]:
    """The dataset of [training], or those of [[training.blend]]."""
    if not training.blend:
        plain = training
        return (
            DatasetSettings(
                "training",
                plain.dataset,
                plain.dataset_path,
                plain.dataset_text_key,
                format=plain.format,
            ),
        )
    return tuple(
        DatasetSettings(
            f"training.blend.{part.name}",
            part.dataset,
            part.dataset_path,
            part.dataset_text_key,
            label=part.name,
            format=part.format,
        )
        for part in training.blend
    )


def training_data(training: Training, chat: Chat, seed: int) -> DataSettings:
    """Data of [training] as the run begins; phases may `resize` its batches."""
    return DataSettings(
        datasets=training_datasets(training),
        blended=bool(training.blend),
        seq_len=training.seq_len,
        batch_size=training.local_batch_size,
        seed=seed,
        num_workers=training.dataset_num_workers,
        num_streams=training.dataset_lanes,
        chat=chat,
    )


def validation_datasets(validation: Validation) -> dict[str, DatasetSettings]:
    """The datasets of [[validation.sets]] by name, or that of [validation] under ""."""
    tables = {each.name: each for each in validation.sets} or {"": validation}
    return {
        name: DatasetSettings(
            f"validation.sets.{name}" if name else "validation",
            table.dataset,
            table.dataset_path,
            table.dataset_text_key,
            label=name,
            format=table.format,
        )
        for name, table in tables.items()
    }


def validation_data(dataset: DatasetSettings, validation: Validation, chat: Chat) -> DataSettings:
    """Data of a validation set: one pass, in the same order for any seed of the run."""
    return DataSettings(
        datasets=(dataset,),
        blended=False,
        seq_len=validation.seq_len,
        batch_size=validation.local_batch_size,
        infinite=False,
        chat=chat,
    )
