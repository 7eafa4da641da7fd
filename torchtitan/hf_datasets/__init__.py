"""Text datasets: named sources, dealt to lanes, packed to seq_len, shuffled, resumable."""

from torchtitan.hf_datasets.catalog import NAMES, check_dataset, open_source
from torchtitan.hf_datasets.text_datasets import TextDataset, build_text_dataloader

__all__ = ["NAMES", "TextDataset", "build_text_dataloader", "check_dataset", "open_source"]
