"""Validation during a run: the loss on other data, and a few texts that the model generates.

The loss is the sum over all valid tokens of the validation data, divided once by their number, so
it is the same for any layout and batch size; each set of [[validation.sets]] has its own beside it.
A single pass over a set may give ranks different numbers of batches; ranks that have finished
process padding until all have, because the collectives need all of them.
"""

import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchtitan.components.generation import Sampling, check_prompts, encode_prompts, generate
from torchtitan.config import JobConfig, Validation
from torchtitan.config.data_tables import Format
from torchtitan.data.chat import ChatProblem, ChatRenderer
from torchtitan.data.settings import validation_datasets
from torchtitan.data.tokenizer import Tokenizer
from torchtitan.data.validation import ValidationSet, identity_of_sets
from torchtitan.distributed.utils import sum_over_ranks
from torchtitan.ops.cross_entropy import IGNORE_INDEX
from torchtitan.protocols.model import BaseModel, BaseModelArgs
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger

Batch = tuple[dict[str, Tensor], Tensor]


class Prompts(NamedTuple):
    """Token ids of `sample_prompts`, and the tokens that end an answer."""

    ids: list[list[int]]
    stop_ids: Collection[int]


def sample_prompts(config: JobConfig, tokenizer: Tokenizer) -> Prompts:
    """Make the prompts: texts to continue or, where the (first) set has format "chat", questions
    of a user."""
    texts = config.validation.sample_prompts
    first = next(iter(validation_datasets(config.validation).values()))
    if first.format != "chat":
        return Prompts(encode_prompts(tokenizer, texts), tokenizer.end_ids)
    renderer = ChatRenderer(tokenizer, config.model.hf_assets_path, config.chat)
    ids = [renderer.prompt([{"role": "user", "content": text}]) for text in texts]
    return Prompts(ids, renderer.stop_ids)


def check_samples(config: JobConfig, tokenizer: Tokenizer, model_args: BaseModelArgs) -> None:
    """Raise `UserError` where the model can't continue `sample_prompts`."""
    settings = config.validation
    if settings.enable and settings.sample_prompts:
        try:
            prompts = sample_prompts(config, tokenizer).ids
            check_prompts(prompts, _sampling(settings), model_args)
        except (UserError, ChatProblem) as error:
            raise UserError(f"validation.sample_prompts, sample_tokens: {error}") from None


def _sampling(settings: Validation) -> Sampling:
    return Sampling(max_new_tokens=settings.sample_tokens)


class Totals(NamedTuple):
    """Sums over the valid tokens of a set, and what follows from them.

    hits: tokens that are the model's first choice; NaN: unknown.
    """

    loss_sum: float
    tokens: float
    hits: float

    @property
    def loss(self) -> float:
        return self.loss_sum / max(1, self.tokens)

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf  # e^710 is beyond fp64

    @property
    def accuracy(self) -> float:
        return self.hits / max(1, self.tokens)

    def __str__(self) -> str:
        perplexity = f"perplexity {self.perplexity:.2f}"
        return f"loss {self.loss:.5f}, {perplexity} over {self.tokens:,.0f} tokens"


def _by_set(names: list[str], of_set: list[Totals]) -> dict[str, dict[str, float]]:
    pairs = list(zip(names, of_set, strict=True))
    accuracies = {name: each.accuracy for name, each in pairs if not math.isnan(each.hits)}
    losses = {"validation_set_loss": {name: each.loss for name, each in pairs}}
    return losses | ({"validation_set_accuracy": accuracies} if accuracies else {})


class Validator:
    """Computes the validation loss, and generates sample texts.

    sets: the last batch of a pass may have fewer sequences.
    loss_sum: returns the sum of the losses of this rank's valid labels in a batch, their number,
        and the number of those that the model finds likeliest (NaN: unknown), as tensors on the
        device.
    """

    def __init__(
        self,
        config: JobConfig,
        tokenizer: Tokenizer,
        sets: Sequence[ValidationSet],
        loss_sum: Callable[[Batch], tuple[Tensor, Tensor, Tensor]],
        *,
        device: torch.device,
    ) -> None:
        self.settings = config.validation
        self.tokenizer = tokenizer
        self.prompts = sample_prompts(config, tokenizer)
        self.sets = sets
        self.data_identity = identity_of_sets(sets)
        self.loss_sum = loss_sum
        self.device = device

    def is_due(self, step: int, last_step: int) -> bool:
        return step == 1 or step % self.settings.freq == 0 or step == last_step

    @torch.no_grad()
    def run(self, model: BaseModel, step: int) -> dict[str, Any]:
        """Validate; return numbers for the step's record, the same on all ranks.

        Every rank must call this.
        """
        began = time.perf_counter()
        was_training = model.training
        model.eval()
        try:
            of_set = [self._totals(each) for each in self.sets]
        finally:
            model.train(was_training)
        whole = Totals(*map(sum, zip(*of_set, strict=True)))
        seconds = time.perf_counter() - began
        names = [each.name for each in self.sets]
        for name, totals in zip(names, of_set, strict=True) if len(names) > 1 else []:
            logger.info("Validation of step %d on %s: %s", step, name, totals)
        logger.info("Validation of step %d: %s, in %.1f s", step, whole, seconds)
        accuracy = {} if math.isnan(whole.hits) else {"validation_accuracy": whole.accuracy}
        return {
            "validation_loss": whole.loss,
            "validation_perplexity": whole.perplexity,
            "validation_tokens": int(whole.tokens),
            "validation_seconds": seconds,
            **accuracy,
            **(_by_set(names, of_set) if self.settings.sets else {}),
        }

    def _totals(self, data: ValidationSet) -> Totals:
        # Loss and tokens in fp64: accurate enough for a sum over 10^8 tokens.
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        for batch in self._in_step(data):
            totals += torch.stack([number.double() for number in self.loss_sum(batch)])
        return Totals(*sum_over_ranks(totals).tolist())

    def samples(self, model: BaseModel, step: int) -> dict[str, str]:
        """Generate a text for each of `sample_prompts` (its likeliest tokens), by prompt."""
        prompts = self.settings.sample_prompts
        if not prompts:
            return {}
        (ids, stop_ids), sampling = self.prompts, _sampling(self.settings)
        # Compiled, generation would be compiled again for every length.
        with torch.compiler.set_stance("force_eager"):
            texts = generate(model, ids, sampling, stop_ids=stop_ids, device=self.device)
        written = dict(zip(prompts, map(self.tokenizer.decode, texts), strict=True))
        for prompt, text in written.items():
            logger.info("Sample of step %d: %r is continued with %r", step, prompt, text)
        return written

    def _in_step(self, data: ValidationSet) -> Iterable[Batch]:
        """Yield this rank's batches, then padding while another rank has batches left."""
        batches = iter(data.loader)
        count = 0
        while count != self.settings.steps:
            batch = next(batches, None)
            # host sync: every rank must know whether any rank has another batch
            has_batch = torch.tensor(float(batch is not None), device=self.device)
            if not sum_over_ranks(has_batch).item():
                return
            yield self._padded(batch, data.format)
            count += 1

    def _padded(self, batch: Batch | None, format: Format) -> Batch:
        """Pad up to the batch size: a pipeline needs full batches, the compiler prefers them."""
        shape = self.settings.local_batch_size, self.settings.seq_len
        inputs = {"input": torch.zeros(shape, dtype=torch.int64)}
        if format != "text":
            inputs["documents"] = torch.full(shape, -1)
        labels = torch.full(shape, IGNORE_INDEX)
        if batch is not None:
            count = len(batch[1])
            labels[:count] = batch[1]
            for name, whole in inputs.items():
                whole[:count] = batch[0][name]
        return inputs, labels
