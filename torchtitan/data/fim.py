"""Fill in the middle: some documents are rearranged, so that the model learns to insert text.

As DeepSeek-V3 was trained (arXiv 2412.19437, section 4.1; the form is from arXiv 2207.14255):
prefix, suffix, middle (PSM), in whole documents before packing, at a rate of 0.1:

    begin prefix hole suffix end middle eos

Which documents, and where they are cut, follows from the seed and the text alone. So it is the same
on every layout, after every resume, and in every epoch.
"""

import hashlib
import random
from typing import Any

from torchtitan.data.tokenizer import Tokenizer
from torchtitan.tools.errors import UserError


class FillInTheMiddle(Tokenizer):
    """A tokenizer that rearranges some of the texts. Raises `UserError` where a token is missing.

    tokenizer: text to token ids
    rate: share of the texts that are rearranged, in [0, 1]
    tokens: begin, hole, end, as the tokenizer spells them
    seed: decides, with the text, which texts and where they are cut
    """

    def __init__(self, tokenizer: Tokenizer, *, rate: float, tokens: list[str], seed: int):
        self._tokenizer, self._rate, self._seed = tokenizer, rate, seed
        self._marks = check_fim_tokens(tokenizer, tokens)
        self.vocab_size = tokenizer.vocab_size
        self.bos_id, self.eos_id, self.pad_id = (
            tokenizer.bos_id,
            tokenizer.eos_id,
            tokenizer.pad_id,
        )

    def identity(self) -> dict[str, Any]:
        fim = {"training.fim_rate": self._rate, "training.fim_tokens": self._marks}
        return self._tokenizer.identity() | fim

    def token_id(self, text: str) -> int | None:
        return self._tokenizer.token_id(text)

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)

    def _encode_with_starts(self, text: str, special: bool) -> tuple[list[int], list[int]]:
        """Conversations are never rearranged."""
        return self._tokenizer.encode_with_starts(text, special)

    def _encode(self, text: str) -> list[int]:
        encode = self._tokenizer.encode
        digest = hashlib.sha256(f"{self._seed}/{text}".encode(errors="surrogatepass")).digest()
        draw = random.Random(digest)
        if draw.random() >= self._rate:
            return encode(text)
        start, stop = sorted(draw.randint(0, len(text)) for _ in range(2))
        begin, hole, end = ([mark] for mark in self._marks)
        prefix, middle, suffix = text[:start], text[start:stop], text[stop:]
        return begin + encode(prefix) + hole + encode(suffix) + end + encode(middle)


def check_fim_tokens(tokenizer: Tokenizer, tokens: list[str]) -> list[int]:
    """Ids of begin, hole and end. Raises `UserError`."""
    if len(tokens) != 3:
        raise UserError(
            f"training.fim_tokens = {tokens} must be three tokens: begin, hole and end."
        )
    ids = []
    for token in tokens:
        number = tokenizer.token_id(token)
        if number is None:
            raise UserError(
                f"training.fim_rate is above 0, but the tokenizer has no token '{token}'; name its "
                "own begin, hole and end in training.fim_tokens, or set fim_rate to 0."
            )
        ids.append(number)
    return ids
