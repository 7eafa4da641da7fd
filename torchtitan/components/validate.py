"""Loss on other data during a run, and a few lines that the model writes.

The loss is the sum over all valid tokens of the validation set, divided once by their number, so it
is the same for any layout and batch size. A single pass may give ranks different numbers of
batches; those that are through take part with padding until all are, for the collectives' sake.
"""

import math
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from torchtitan.components.generation import Sampling, check_prompts, encode_prompts, generate
from torchtitan.config import Validation
from torchtitan.data.dataloader import ParallelAwareDataLoader
from torchtitan.data.tokenizer import Tokenizer
from torchtitan.distributed.utils import sum_over_ranks
from torchtitan.ops.cross_entropy import IGNORE_INDEX
from torchtitan.protocols.model import BaseModel, BaseModelArgs
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger

Batch = tuple[dict[str, Tensor], Tensor]


def check_samples(settings: Validation, tokenizer: Tokenizer, model_args: BaseModelArgs) -> None:
    """Raise `UserError` where `sample_prompts` can't be gone on with."""
    if settings.enable and settings.sample_prompts:
        try:
            prompts = encode_prompts(tokenizer, settings.sample_prompts)
            check_prompts(prompts, _sampling(settings), model_args)
        except UserError as error:
            raise UserError(f"validation.sample_prompts, sample_tokens: {error}") from None


def _sampling(settings: Validation) -> Sampling:
    return Sampling(max_new_tokens=settings.sample_tokens)


class Validator:
    """loader: iterates once over this rank's share of the set each time it is asked to; its last
    batch may have fewer sequences.

    loss_sum: over this rank's valid labels of a batch, and how many these are, on the device.
    """

    def __init__(
        self,
        settings: Validation,
        loader: ParallelAwareDataLoader,
        loss_sum: Callable[[Batch], tuple[Tensor, Tensor]],
        *,
        device: torch.device,
    ) -> None:
        self.settings = settings
        self.loader = loader
        self.data_identity = loader.identity()
        self.loss_sum = loss_sum
        self.device = device

    def is_due(self, step: int, last_step: int) -> bool:
        return step == 1 or step % self.settings.freq == 0 or step == last_step

    @torch.no_grad()
    def run(self, model: BaseModel, step: int) -> dict[str, float]:
        """Numbers for the step's record; the same on all ranks, all of which call this."""
        began = time.perf_counter()
        # Loss and tokens in fp64: a set of 10^8 tokens adds up exactly enough.
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        was_training = model.training
        model.eval()
        try:
            for batch in self._in_step():
                totals += torch.stack([number.double() for number in self.loss_sum(batch)])
        finally:
            model.train(was_training)
        loss_sum, tokens = sum_over_ranks(totals).tolist()
        loss = loss_sum / tokens
        perplexity = math.exp(loss) if loss < 700 else math.inf  # e^710 is beyond fp64
        seconds = time.perf_counter() - began
        logger.info(
            "Validation of step %d: loss %.5f, perplexity %.2f over %s tokens, in %.1f s",
            step,
            loss,
            perplexity,
            f"{tokens:,.0f}",
            seconds,
        )
        return {
            "validation_loss": loss,
            "validation_perplexity": perplexity,
            "validation_tokens": int(tokens),
            "validation_seconds": seconds,
        }

    def samples(self, model: BaseModel, tokenizer: Tokenizer, step: int) -> dict[str, str]:
        """Each of `sample_prompts` with what the model writes behind it (its likeliest tokens)."""
        prompts = self.settings.sample_prompts
        if not prompts:
            return {}
        ids, sampling = encode_prompts(tokenizer, prompts), _sampling(self.settings)
        # What is written token by token would be compiled anew for every length.
        with torch.compiler.set_stance("force_eager"):
            texts = generate(model, ids, sampling, eos_id=tokenizer.eos_id, device=self.device)
        written = dict(zip(prompts, map(tokenizer.decode, texts), strict=True))
        for prompt, text in written.items():
            logger.info("Sample of step %d: %r goes on %r", step, prompt, text)
        return written

    def _in_step(self) -> Iterable[Batch]:
        """This rank's batches, and padding as long as another rank has any."""
        batches = iter(self.loader)
        count = 0
        while count != self.settings.steps:
            batch = next(batches, None)
            # host sync: whether another batch comes is for all ranks to know
            going_on = torch.tensor(float(batch is not None), device=self.device)
            if not sum_over_ranks(going_on).item():
                return
            yield self._filled(batch)
            count += 1

    def _filled(self, batch: Batch | None) -> Batch:
        """With padding up to the batch size, which a pipeline needs, and a compiler prefers."""
        shape = self.settings.local_batch_size, self.settings.seq_len
        tokens, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORE_INDEX)
        if batch is not None:
            tokens[: len(batch[1])], labels[: len(batch[1])] = batch[0]["input"], batch[1]
        return {"input": tokens}, labels
