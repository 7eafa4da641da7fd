"""The validation set: another dataset, read once from beginning to end each time."""

from collections.abc import Iterator
from contextlib import contextmanager

from torchtitan.config import Validation
from torchtitan.data.catalog import check_dataset
from torchtitan.data.dataloader import ParallelAwareDataLoader
from torchtitan.data.text_datasets import build_text_dataloader
from torchtitan.data.tokenizer import Tokenizer
from torchtitan.tools.errors import UserError


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
    with _its_own_keys():
        check_dataset(settings.dataset, settings.dataset_path)


def build_validation_dataloader(
    settings: Validation, tokenizer: Tokenizer, *, dp_rank: int, dp_degree: int
) -> ParallelAwareDataLoader:
    """Gives the same windows in any layout, and for any seed of the run."""
    with _its_own_keys():
        return build_text_dataloader(
            dataset_name=settings.dataset,
            dataset_path=settings.dataset_path,
            text_key=settings.dataset_text_key,
            tokenizer=tokenizer,
            seq_len=settings.seq_len,
            batch_size=settings.local_batch_size,
            dp_rank=dp_rank,
            dp_degree=dp_degree,
            seed=0,
            num_workers=0,
            infinite=False,
        )


@contextmanager
def _its_own_keys() -> Iterator[None]:
    """The data layer speaks of training.dataset…; the keys have the same names here."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("training.dataset", "validation.dataset")) from None
