"""Text datasets: named sources, dealt to lanes, packed to seq_len, shuffled, blended, resumable."""

from torchtitan.data.catalog import NAMES, check_dataset, open_source
from torchtitan.data.text_datasets import TextDataset, build_text_dataloader
from torchtitan.data.training import (
    build_training_dataloader,
    check_training_data,
    data_numbers,
)

__all__ = [
    "NAMES",
    "TextDataset",
    "build_text_dataloader",
    "build_training_dataloader",
    "check_dataset",
    "check_training_data",
    "data_numbers",
    "open_source",
]
