"""Text datasets: sources split into streams, packed to seq_len, shuffled, blended, resumable."""

from torchtitan.data.build import build_text_dataloader
from torchtitan.data.catalog import NAMES, check_dataset, open_source
from torchtitan.data.settings import DatasetSettings, DataSettings
from torchtitan.data.text_datasets import TextDataset
from torchtitan.data.training import (
    build_training_dataloader,
    check_training_data,
    data_numbers,
)

__all__ = [
    "NAMES",
    "DataSettings",
    "DatasetSettings",
    "TextDataset",
    "build_text_dataloader",
    "build_training_dataloader",
    "check_dataset",
    "check_training_data",
    "data_numbers",
    "open_source",
]
