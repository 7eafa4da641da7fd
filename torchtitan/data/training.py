"""The training set: one dataset or a blend, with the middle to be filled in where asked for."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from torchtitan.config import JobConfig, Training, run_schedule
from torchtitan.config.blend import Stretch, blend_stretches
from torchtitan.data.blend import BlendedDataset, Turns
from torchtitan.data.catalog import check_dataset, open_source
from torchtitan.data.dataloader import ParallelAwareDataLoader, Share, build_dataloader
from torchtitan.data.fim import FillInTheMiddle, check_fim_tokens
from torchtitan.data.sources import Source
from torchtitan.data.text_datasets import TextDataset, build_text_dataloader, report_lanes
from torchtitan.data.tokenizer import Tokenizer
from torchtitan.distributed.utils import sum_over_ranks
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger


def check_training_data(training: Training, tokenizer: Tokenizer) -> None:
    """Raise `UserError` for what can be known to be wrong before a run."""
    if training.fim_rate > 0:
        check_fim_tokens(tokenizer, training.fim_tokens)
    if not training.blend:
        check_dataset(training.dataset, training.dataset_path)
    for part in training.blend:
        with _keys_of(part.name):
            check_dataset(part.dataset, part.dataset_path)


def build_training_dataloader(
    config: JobConfig, tokenizer: Tokenizer, *, dp_rank: int, dp_degree: int, seed: int
) -> ParallelAwareDataLoader:
    """As the run begins; phases may `resize` it."""
    training = config.training
    if training.fim_rate > 0:
        rate, tokens = training.fim_rate, training.fim_tokens
        tokenizer = FillInTheMiddle(tokenizer, rate=rate, tokens=tokens, seed=seed)
    if training.blend:
        size, workers = training.local_batch_size, training.dataset_num_workers
        return _build_blended(config, tokenizer, Share(dp_rank, dp_degree, size, workers), seed)
    return build_text_dataloader(
        dataset_name=training.dataset,
        dataset_path=training.dataset_path,
        text_key=training.dataset_text_key,
        tokenizer=tokenizer,
        seq_len=training.seq_len,
        batch_size=training.local_batch_size,
        dp_rank=dp_rank,
        dp_degree=dp_degree,
        seed=seed,
        num_workers=training.dataset_num_workers,
        num_lanes=training.dataset_lanes,
    )


def _build_blended(
    config: JobConfig, tokenizer: Tokenizer, share: Share, seed: int
) -> ParallelAwareDataLoader:
    """All datasets have as many lanes as suit the one that suits the fewest."""
    training = config.training
    stretches = blend_stretches(config, run_schedule(config, share.dp_degree))
    logger.info("Blend: %s", describe_blend(stretches, training))
    sources: dict[str, Source] = {}
    for part in training.blend:
        with _keys_of(part.name):
            sources[part.name] = open_source(
                part.dataset, part.dataset_path, part.dataset_text_key, label=part.name
            )
    num_lanes = training.dataset_lanes or min(source.num_lanes() for source in sources.values())
    datasets = {}
    for name, source in sources.items():
        with _keys_of(name):
            datasets[name] = TextDataset(
                source, tokenizer, training.seq_len, share=share, num_lanes=num_lanes, seed=seed
            )
    loader = build_dataloader(BlendedDataset(datasets, Turns(stretches)))
    report_lanes("blend", num_lanes, share, list(sources.values()))
    return loader


def data_numbers(
    loader: ParallelAwareDataLoader, device: torch.device, group: dist.ProcessGroup
) -> dict[str, object]:
    """For the log: what the loaders of all data-parallel ranks have counted; in every step that is
    logged, all of them call it."""
    local = [loader.skipped_documents, *loader.tokens_of.values()]
    skipped, *tokens = sum_over_ranks(torch.tensor(local, device=device), group).tolist()
    numbers: dict[str, object] = {"skipped_documents": skipped}
    if tokens:
        numbers["blend_tokens"] = dict(zip(loader.tokens_of, tokens, strict=True))
    return numbers


def describe_blend(stretches: list[Stretch], training: Training) -> str:
    """For the log: "web 70 %, code 30 %; from token 1,000,000 on web 50 %, code 50 %"."""
    texts = []
    for stretch in stretches:
        whole = sum(stretch.parts)
        pairs = zip((data.name for data in training.blend), stretch.parts, strict=True)
        shares = ", ".join(f"{name} {100 * part / whole:.4g} %" for name, part in pairs if part)
        begin = f"from token {stretch.tokens:,} on " if stretch.first else ""
        texts.append(begin + shares)
    return "; ".join(texts)


@contextmanager
def _keys_of(name: str) -> Iterator[None]:
    """The data layer speaks of training.dataset…; in a blend each dataset has keys of its own."""
    try:
        yield
    except UserError as error:
        text = re.sub(r"training\.(dataset(?!_lanes))", rf"training.blend.{name}.\1", str(error))
        raise UserError(text) from None
