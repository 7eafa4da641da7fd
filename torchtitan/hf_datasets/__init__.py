"""Text datasets: named sources, packed to seq_len, split by rank, shuffled, resumable."""

from torchtitan.hf_datasets.catalog import NAMES, check_dataset, open_source
from torchtitan.hf_datasets.text_datasets import TextDataset, build_text_dataloader

__all__ = ["NAMES", "TextDataset", "build_text_dataloader", "check_dataset", "open_source"]
