"""How a template ends an assistant turn, found by rendering probes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torchtitan.data.chat import problems
from torchtitan.data.chat.problems import ChatProblem
from torchtitan.data.tokenizer import Tokenizer
from torchtitan.tools.errors import UserError

# Text of conversations, without a generation prompt.
Write = Callable[[Sequence[dict]], str]

ANSWER = "probe answer"
ASKED = {"role": "user", "content": "probe question"}
ANSWERED = {"role": "assistant", "content": ANSWER}
# For templates in a mode that asks for reasoning.
THOUGHT = {**ANSWERED, "reasoning_content": "probe thought"}
CALL = {
    "id": "call_0",
    "type": "function",
    "function": {"name": "probe", "arguments": {"x": "1"}},
}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "probe result", "tool_call_id": "call_0"}


@dataclass(frozen=True)
class Ending:
    """End of assistant turns.

    tail: what the template writes behind an answer: the end token and perhaps white space; without
        an end token in it, the next role's token ends the turn
    after_answer: end token of a turn without calls
    after_calls: end token of a turn with calls; "" where the template has no calls
    """

    tail: str
    after_answer: str
    after_calls: str

    @property
    def next_role_ends(self) -> bool:
        return not self.tail.strip()

    def of(self, message: dict) -> str:
        return self.after_calls if message.get("tool_calls") else self.after_answer

    def close(self, text: str, message: dict) -> tuple[str, int]:
        """Text through a turn with the turn's end token in it, and the index behind that token.
        Raises `ChatProblem`.

        text: the template's, through the turn
        message: the turn
        """
        token = self.of(message)
        if self.next_role_ends and token:
            return text + token, len(text) + len(token)
        if not token or not text.endswith(self.tail):
            raise ChatProblem(problems.NO_END, repr(text[-20:]))
        return text, len(text) - len(self.tail) + len(token)


def find_ending(write: Write, tokenizer: Tokenizer, name: str) -> Ending:
    """Find a template's ending. Raises `UserError` where it has none that can be told.

    name: of the template, for sentences
    """
    try:
        through = write([ASKED, ANSWERED])
    except ChatProblem as problem:
        try:
            through = write([ASKED, THOUGHT])
        except ChatProblem:
            raise UserError(
                f"The chat template {name} can't write one question and one answer ({problem}); "
                "correct it, or name another file as chat_template."
            ) from None
    found, _, tail = through.rpartition(ANSWER)
    if not found:
        raise _no_end(name)
    if tail.strip():
        token = _first_token(tokenizer, tail)
        if token is None:
            raise _no_end(name)
        return Ending(tail, token, token)
    after = _first_token(tokenizer, _added(write, [ASKED, ANSWERED], ASKED))
    if after is None:
        raise _no_end(name)
    calls = _first_token(tokenizer, _added(write, [ASKED, CALLED], RESULT)) or ""
    return Ending(tail, after, calls)


def _no_end(name: str) -> UserError:
    return UserError(
        f"The chat template {name} ends an assistant turn with no token of its own, so no model "
        "could learn where to stop; add the tokenizer's end token behind the turn, or name another "
        "file as chat_template."
    )


def _added(write: Write, messages: Sequence[dict], following: dict) -> str:
    """Return the text that a template adds for one more message; "" where it can't."""
    try:
        before, after = write(messages), write([*messages, following])
    except ChatProblem:
        return ""
    return after[len(before) :] if after.startswith(before) else ""


def _first_token(tokenizer: Tokenizer, text: str) -> str | None:
    """Text of the first token, if it is a control token, which no text before it merges with."""
    ids, starts = tokenizer.encode_with_starts(text)
    if not ids:
        return None
    token = text[: next((start for start in starts if start), len(text))]
    as_text = tokenizer.encode_with_starts(token, special=False)[0]
    # Some files don't flag theirs as special.
    if as_text == ids[:1] and not (token.startswith("<") and token.endswith(">") and token[2:]):
        return None
    behind, starts = tokenizer.encode_with_starts("a" + token)
    return token if (behind[-1], starts[-1]) == (ids[0], 1) else None
