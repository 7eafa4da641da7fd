"""Text generation: prompts of unequal lengths in one batch, token by token.

Prompts are padded on the left, so that all of them end, and continue, in the same column; masks and
positions skip the padding. With several ranks all of them call this with the same prompts, and use
the tokens that the first one draws.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from torchtitan.data.tokenizer import Tokenizer
from torchtitan.protocols.model import BaseModel, BaseModelArgs
from torchtitan.tools.errors import UserError

PREFILL = 512  # prompt columns a forward pass: bounds the scores, H · PREFILL · all columns


@dataclass(frozen=True)
class Sampling:
    """Settings of generation. Raises `UserError` for impossible values.

    max_new_tokens: tokens generated for a prompt at most.
    temperature: divides the logits; 0 = take the likeliest token.
    top_p: draw from the fewest tokens that together have this probability.
    seed: of the random numbers; each prompt has a stream of its own, so its text does not depend on
        the other prompts.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
            "temperature": (0 <= self.temperature < float("inf"), "a finite number, 0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "seed": (0 <= self.seed < 2**62, "between 0 and 2**62"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise UserError(f"{name} = {getattr(self, name)} must be {rule}.")


@torch.no_grad()
def generate(
    model: BaseModel,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    *,
    stop_ids: Collection[int],
    device: torch.device,
) -> list[list[int]]:
    """Generate the new tokens of each prompt, up to and without one of `stop_ids`, in eval mode.

    Raises `UserError` for an empty prompt, and where prompt and new tokens exceed max_seq_len.

    prompts: token ids.
    """
    longest = check_prompts(prompts, sampling, model.model_args)
    batch = _Batch(prompts, longest + sampling.max_new_tokens, device)
    draw = _Draw(sampling, len(prompts))
    out: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        with model.caching(len(prompts), batch.length):
            tokens = batch.prompts
            while True:
                for columns in tokens.split(PREFILL, dim=1):
                    logits = batch.forward(model, columns)
                drawn = draw(logits).to(device)
                if dist.is_initialized():
                    dist.broadcast(drawn, src=0)
                for row, token in enumerate(drawn.tolist()):  # host sync: the host stores the text
                    running[row] = running[row] and token not in stop_ids
                    if running[row]:
                        out[row].append(token)
                        running[row] = len(out[row]) < sampling.max_new_tokens
                if not any(running):
                    return out
                tokens = drawn.unsqueeze(1)
    finally:
        model.train(was_training)


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Tokenise prompts, with a begin token where the tokenizer has one.

    Raises `UserError` for bytes of a command line that are not UTF-8, which Python passes on as
    halves of surrogate pairs.
    """
    for number, prompt in enumerate(prompts, start=1):
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise UserError(f"prompt {number}, {prompt!a}, must be text in UTF-8.") from None
    begin = tokenizer.bos_id is not None
    return [tokenizer.encode(prompt, add_bos=begin) for prompt in prompts]


def check_prompts(
    prompts: Sequence[list[int]], sampling: Sampling, model_args: BaseModelArgs
) -> int:
    """Return the number of tokens of the longest prompt. Raises `UserError` as `generate` does."""
    longest = max(map(len, prompts))
    wanted, most = longest + sampling.max_new_tokens, model_args.max_seq_len
    if not all(prompts):
        raise UserError(
            f"prompt {list(map(bool, prompts)).index(False) + 1} has no tokens (the tokenizer has "
            "no begin token to start with): write something."
        )
    if wanted > most:
        raise UserError(
            f"the longest prompt and max_new_tokens make {wanted} tokens, but the model has "
            f"positions for {most} (max_seq_len): shorten the prompt, or lower max_new_tokens."
        )
    return longest


class _Batch:
    """Left-padded prompts (B, S), the column where each row begins, and the columns seen so far."""

    def __init__(self, prompts: Sequence[list[int]], length: int, device: torch.device) -> None:
        longest = max(map(len, prompts))
        padded = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
        self.prompts = torch.tensor(padded, device=device)
        starts = [longest - len(prompt) for prompt in prompts]
        self.start_B1 = torch.tensor(starts, device=device).unsqueeze(1)
        self.length = length
        self.seen = 0

    def forward(self, model: BaseModel, tokens_BS: Tensor) -> Tensor:
        """Run the model on the next columns; return the logits of the last one: (B, V)."""
        end = self.seen + tokens_BS.size(1)
        column_S = torch.arange(self.seen, end, device=tokens_BS.device)
        column_T = torch.arange(end, device=tokens_BS.device)
        earlier_ST = column_T <= column_S.unsqueeze(1)
        own_BT = column_T >= self.start_B1
        # Padding sees itself: a softmax over nothing would be NaN.
        itself_ST = column_T == column_S.unsqueeze(1)
        mask_BST = (earlier_ST & own_BT.unsqueeze(1)) | itself_ST
        positions_BS = (column_S - self.start_B1).clamp(min=0)
        self.seen = end
        logits = model(tokens_BS, attention_masks=mask_BST.unsqueeze(1), positions=positions_BS)
        return logits[:, -1]


# Below it logits overflow fp32 when divided by it, and only the likeliest token has a probability.
_COLDEST = 1e-30


class _Draw:
    """Draws the next token of each row, (B,) int64, on the CPU: the same numbers on any device."""

    def __init__(self, sampling: Sampling, rows: int) -> None:
        self.sampling = sampling
        # Far apart, so that rows of neighbouring seeds have different streams.
        seeds = [sampling.seed + row * 1_000_003 for row in range(rows)]
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, logits_BV: Tensor) -> Tensor:
        if self.sampling.temperature < _COLDEST:
            return logits_BV.argmax(dim=-1).cpu()
        probs_BV = (logits_BV.float().cpu() / self.sampling.temperature).softmax(dim=-1)
        probs_BV, ids_BV = probs_BV.sort(dim=-1, descending=True)
        before_BV = probs_BV.cumsum(dim=-1) - probs_BV
        probs_BV = probs_BV.masked_fill(before_BV >= self.sampling.top_p, 0)  # keeps the first
        rows = zip(probs_BV, ids_BV, self.generators, strict=True)
        return torch.stack(
            [ids[torch.multinomial(p, 1, generator=g)].squeeze() for p, ids, g in rows]
        )
