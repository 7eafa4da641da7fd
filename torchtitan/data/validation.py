"""The validation sets: other datasets, read once from beginning to end each time."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torchtitan.config import JobConfig, Validation
from torchtitan.config.data_tables import Format
from torchtitan.data.build import build_text_dataloader
from torchtitan.data.catalog import check_dataset
from torchtitan.data.dataloader import ParallelAwareDataLoader
from torchtitan.data.settings import validation_data, validation_datasets
from torchtitan.data.tokenizer import Tokenizer
from torchtitan.tools.errors import UserError


class ValidationSet(NamedTuple):
    """A set and its loader; each iteration is one pass over this rank's part.

    name: "" for that of [validation] alone.
    """

    name: str
    format: Format
    loader: ParallelAwareDataLoader


def check_validation_data(settings: Validation, max_seq_len: int) -> None:
    """Raise `UserError` for what can be known to be wrong before a run."""
    if not settings.enable:
        return
    if settings.seq_len > max_seq_len:
        raise UserError(
            f"validation.seq_len = {settings.seq_len} must be at most the model's max_seq_len "
            f"({max_seq_len}; it follows seq_len of [training], or of the phase with the shortest "
            "sequences); lower it, or set model.args.max_seq_len."
        )
    for dataset in validation_datasets(settings).values():
        check_dataset(dataset)


def open_validation_sets(
    config: JobConfig, tokenizer: Tokenizer, *, dp_rank: int, dp_degree: int
) -> list[ValidationSet]:
    """Open loaders of the same examples in any layout, and for any seed of the run."""
    sets = []
    for name, dataset in validation_datasets(config.validation).items():
        loader = build_text_dataloader(
            validation_data(dataset, config.validation, config.chat),
            tokenizer,
            dp_rank=dp_rank,
            dp_degree=dp_degree,
            assets_path=config.model.hf_assets_path,
        )
        sets.append(ValidationSet(name, dataset.format, loader))
    return sets


def identity_of_sets(sets: Sequence[ValidationSet]) -> dict[str, Any]:
    """Identities of all sets, with their names before the keys of each."""
    return {
        f"{each.name}: {key}" if each.name else key: value
        for each in sets
        for key, value in each.loader.identity().items()
    }
