"""The training set: one dataset or a blend, with the middle to be filled in where asked for."""

import torch
import torch.distributed as dist

from torchtitan.config import JobConfig, Training, run_schedule
from torchtitan.config.blend import BlendSegment, blend_segments
from torchtitan.data.build import build_text_dataloader
from torchtitan.data.catalog import check_dataset
from torchtitan.data.chat import ChatRenderer
from torchtitan.data.dataloader import ParallelAwareDataLoader
from torchtitan.data.fim import FillInTheMiddle, check_fim_tokens
from torchtitan.data.settings import training_data, training_datasets, validation_datasets
from torchtitan.data.tokenizer import Tokenizer
from torchtitan.distributed.utils import sum_over_ranks
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger


def check_training_data(training: Training, tokenizer: Tokenizer) -> None:
    """Raise `UserError` for what can be known to be wrong before a run."""
    datasets = training_datasets(training)
    if training.fim_rate > 0:
        if all(dataset.format != "text" for dataset in datasets):
            raise UserError(
                f"training.fim_rate = {training.fim_rate} rearranges texts, but training.format = "
                f'"{datasets[0].format}" has none; set it to 0.'
            )
        check_fim_tokens(tokenizer, training.fim_tokens)
    for dataset in datasets:
        check_dataset(dataset)


def check_chat(config: JobConfig, tokenizer: Tokenizer, model_args: BaseModelArgs) -> None:
    """Raise `UserError` where the conversations of training or validation can't be used."""
    datasets = [*training_datasets(config.training)]
    if config.validation.enable:
        datasets += validation_datasets(config.validation).values()
    conversations = [dataset for dataset in datasets if dataset.format != "text"]
    if not conversations:
        if config.chat.loss_weight != "token":
            raise UserError(
                f'chat.loss_weight = "{config.chat.loss_weight}" weights conversations, but '
                'training.format is "text"; set it to "token".'
            )
        return
    if config.compile.cuda_graph:
        raise UserError(
            "compile.cuda_graph = true is for text, of whose tokens each has a label, but "
            f'{conversations[0].toml_key("format")} = "{conversations[0].format}" has '
            "conversations; set it to false."
        )
    if not model_args.keeps_documents_apart:
        raise UserError(
            f'{conversations[0].toml_key("format")} = "{conversations[0].format}" packs several '
            "conversations into a sequence, which must not see each other; set "
            'model.args.attn_mask_type = "block_causal".'
        )
    if any(dataset.format == "chat" for dataset in conversations):
        ChatRenderer(tokenizer, config.model.hf_assets_path, config.chat).check_template()


def build_training_dataloader(
    config: JobConfig, tokenizer: Tokenizer, *, dp_rank: int, dp_degree: int, seed: int
) -> ParallelAwareDataLoader:
    """Loader of the training data as the run begins; phases may `resize` it."""
    training = config.training
    fim = None
    if training.fim_rate > 0:
        rate, tokens = training.fim_rate, training.fim_tokens
        fim = FillInTheMiddle(tokenizer, rate=rate, tokens=tokens, seed=seed)
    schedule = run_schedule(config, dp_degree)
    segments = blend_segments(config, schedule) if training.blend else []
    of_steps = [step.accumulation(dp_degree) for step in (schedule.at(0), *schedule.ends)]
    if segments:
        logger.info("Blend: %s", describe_blend(segments, training))
    return build_text_dataloader(
        training_data(training, config.chat, seed),
        tokenizer,
        dp_rank=dp_rank,
        dp_degree=dp_degree,
        segments=segments,
        assets_path=config.model.hf_assets_path,
        fim=fim,
        batches_at_once=max(of_steps),
    )


def data_numbers(
    loader: ParallelAwareDataLoader, device: torch.device, group: dist.ProcessGroup
) -> dict[str, object]:
    """Counts of all data-parallel ranks' loaders, for the log. A collective: all ranks of `group`
    call it in every step that is logged."""
    tokens_of = loader.tokens_of
    local = [loader.skipped_documents, *tokens_of.values()]
    skipped, *tokens = sum_over_ranks(torch.tensor(local, device=device), group).tolist()
    numbers: dict[str, object] = {"skipped_documents": skipped}
    if tokens:
        numbers["blend_tokens"] = dict(zip(tokens_of, tokens, strict=True))
    return numbers


def describe_blend(segments: list[BlendSegment], training: Training) -> str:
    """Describe the blend: "web 70 %, code 30 %; from token 1,000,000 on web 50 %, code 50 %"."""
    texts = []
    for segment in segments:
        whole = sum(segment.parts)
        pairs = zip((data.name for data in training.blend), segment.parts, strict=True)
        shares = ", ".join(f"{name} {100 * part / whole:.4g} %" for name, part in pairs if part)
        begin = f"from token {segment.tokens:,} on " if segment.first else ""
        texts.append(begin + shares)
    return "; ".join(texts)
