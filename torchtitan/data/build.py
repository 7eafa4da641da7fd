"""Construction of a loader from settings, the same for plain, blended and validation data."""

from collections.abc import Sequence
from dataclasses import replace

from torchtitan.config.blend import BlendSegment
from torchtitan.data.blend import BlendedDataset, BlendOrder
from torchtitan.data.catalog import open_source
from torchtitan.data.chat import ChatRenderer
from torchtitan.data.chat.dataset import ChatDataset
from torchtitan.data.dataloader import ParallelAwareDataLoader, build_dataloader
from torchtitan.data.fim import FillInTheMiddle
from torchtitan.data.rank_slice import RankSlice
from torchtitan.data.settings import DataSettings
from torchtitan.data.sources import Source
from torchtitan.data.stream_dataset import StreamDataset
from torchtitan.data.text_datasets import TextDataset
from torchtitan.data.tokenizer import Tokenizer
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger


def build_text_dataloader(
    settings: DataSettings,
    tokenizer: Tokenizer,
    *,
    dp_rank: int,
    dp_degree: int,
    segments: Sequence[BlendSegment] = (),
    assets_path: str = "",
    fim: FillInTheMiddle | None = None,
    batches_at_once: int = 1,
) -> ParallelAwareDataLoader:
    """Loader of ({"input": int64 [batch_size, seq_len]}, labels int64 [batch_size, seq_len]).

    All datasets of a blend have as many streams as suit the one that suits the fewest.

    settings: which data, and how it is cut
    tokenizer: text to token ids
    dp_rank: data-parallel rank
    dp_degree: number of data-parallel ranks
    segments: weights of a blend over the run; empty without a blend
    assets_path: folder of the tokenizer and its chat template
    fim: encodes texts in place of the tokenizer
    batches_at_once: batches that are asked for in a row
    """
    rank_slice = RankSlice(dp_rank, dp_degree, settings.batch_size, settings.num_workers)
    sources = [open_source(dataset) for dataset in settings.datasets]
    num_streams = settings.num_streams or min(source.num_streams() for source in sources)
    settings = replace(settings, num_streams=num_streams)
    renderer = ChatRenderer(tokenizer, assets_path, settings.chat)
    datasets = [
        TextDataset(source, fim or tokenizer, settings, rank_slice)
        if source.settings.format == "text"
        else ChatDataset(source, tokenizer, settings, rank_slice, renderer)
        for source in sources
    ]
    heading = sources[0].settings.heading
    dataset: StreamDataset = datasets[0]
    if settings.blended:
        names = [each.label for each in settings.datasets]
        by_name = dict(zip(names, datasets, strict=True))
        heading, dataset = "Data blend", BlendedDataset(by_name, BlendOrder(segments))
    loader = build_dataloader(dataset, batches_at_once)
    report_streams(heading, num_streams, rank_slice, sources, settable=settings.infinite)
    return loader


def report_streams(
    heading: str,
    num_streams: int,
    rank_slice: RankSlice,
    sources: Sequence[Source] = (),
    settable: bool = True,
) -> None:
    """Log how many streams there are, if a key sets it, and (on the first rank) where this layout
    makes them several times, which number a new run could have instead.

    heading: beginning of the log lines
    num_streams: number of streams
    rank_slice: layout of the loaders
    sources: the advised number is one that these accept
    settable: whether a key of the TOML sets the number; validation has none
    """
    streams = f"{num_streams} stream{'s' if num_streams > 1 else ''}"
    if settable:
        logger.info(f"{heading}: read as {streams} (training.dataset_lanes)")
    times = rank_slice.times_made(num_streams)
    if times < 2 or rank_slice.dp_rank > 0:
        return
    advice = _advice(num_streams, rank_slice, sources) if settable else ""
    tell = logger.warning if settable else logger.info  # only a warning where a key can help
    tell(
        f"{heading}: {rank_slice.processes} processes read {streams}, so each "
        f"document is tokenized {times:.1f} times, which costs time and changes no number{advice}"
    )


def _advice(num_streams: int, rank_slice: RankSlice, sources: Sequence[Source]) -> str:
    # Without workers only the ranks share; with them each batch is another process's.
    per_batch = rank_slice.processes * rank_slice.batch_size
    good = rank_slice.dp_degree if rank_slice.num_workers < 2 else per_batch
    instead = good * max(1, round(num_streams / good))
    advice = f"; a new run avoids it with training.dataset_lanes = {instead}"
    try:
        for source in sources:
            source.check_streams(instead)
    except UserError:  # there are too few documents for it
        advice = ""
    return f"{advice}; a run that resumes from a checkpoint keeps its streams"
