"""Copies of tensors for saves in the background."""

import torch
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions


def build_stager(async_mode: str) -> DefaultStager:
    """Build a stager, which keeps the memory of its copies from save to save.

    async_mode: value of `checkpoint.async_mode`.
    """
    pinned = async_mode == "async_with_pinned_mem" and torch.cuda.is_available()
    # With pinned memory the copy overlaps with the next step, up to its weight update.
    stager = DefaultStager(
        StagingOptions(
            use_pinned_memory=pinned,
            use_shared_memory=False,
            use_async_staging=pinned,
            use_non_blocking_copy=pinned,
        )
    )
    # torch 2.11 (not 2.13) empties a stager after its first use: a second save would fail.
    stager._state_dict_stager.close = lambda: None
    return stager
