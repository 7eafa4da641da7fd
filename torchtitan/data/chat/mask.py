"""Which characters of a conversation the model must say, and from them which tokens.

Each trained turn stands behind the prompt that the model gets in use: the conversation up to the
turn, rendered with the generation prompt. The turn is what the rendering through it adds, up to
and with the token that ends it. Where later turns make the template rewrite a turn (reasoning
dropped, tags added or emptied), that turn gets an example of its own which ends with it; turns
whose rendering is a prefix of another's share one example. `{% generation %}` marks are not used:
most published templates have none, and those that do mark prefilled tags.

The text is tokenised once. **A token is trained if its first character is one that the model must
say.** A token merged across the start of an answer is thus not trained: in use the prompt already
holds its beginning, so the model can't say it. A token merged across an end inside the answer is:
all before it is there, so the model can.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torchtitan.config import Chat
from torchtitan.data.chat import problems
from torchtitan.data.chat.ending import Ending
from torchtitan.data.chat.problems import ChatProblem

THINK, END_THINK = "<think>", "</think>"
_EMPTY_PAIR = re.compile(rf"\s*{THINK}\s*{END_THINK}")
_EMPTY_REST = re.compile(rf"\s*{END_THINK}")

# Text of the messages: as they are, or with the prompt of the next turn, in the mode of the
# settings ("prompt") or in the mode without thinking ("quiet").
Render = Callable[[Sequence[dict], Literal["plain", "prompt", "quiet"]], str]
Span = tuple[int, int]


@dataclass
class Marked:
    """Text of an example.

    text: whole text
    trained: spans of characters that the model must say
    answers: spans of the turns that hold them, whole
    """

    text: str
    trained: list[Span]
    answers: list[Span]


def mark_turns(
    messages: Sequence[dict],
    weights: Sequence[bool],
    render: Render,
    ending: Ending,
    settings: Chat,
) -> list[Marked]:
    """Texts with their trained spans, in the order of their last turns. Raises
    `ChatProblem`.

    messages: the conversation
    weights: whether each message may be trained
    """
    turns = [n for n, may_train in enumerate(weights) if may_train]
    if settings.turns == "last":
        turns = [n for n in turns if n == len(messages) - 1]
    examples: list[Marked] = []
    for turn in reversed(turns):
        marked = _mark_turn(messages[: turn + 1], render, ending, settings)
        whole = next((e for e in examples if e.text.startswith(marked.text)), None)
        if whole is None:
            examples.append(marked)
        else:
            whole.trained += marked.trained
            whole.answers += marked.answers
    return [example for example in reversed(examples) if example.trained]


def _mark_turn(messages: Sequence[dict], render: Render, ending: Ending, settings: Chat) -> Marked:
    """Text through the last message, an assistant turn, with that turn marked. Raises
    `ChatProblem` where the prompt is no beginning of the text."""
    *history, message = messages
    through = render(messages, "plain")
    _check_calls(messages, render, through)
    start = _prompt_end(history, render, through)
    if start is None:
        # K2-Thinking: with the answer in place, the reasoning before calls is emptied. In use it
        # stands in the prompt, so the answer is taken from a history without it.
        bare = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in history]
        through = render([*bare, message], "plain")
        said_at = _prompt_end(bare, render, through)
        prompt = render(history, "prompt")
        if said_at is None or bare == history:
            raise ChatProblem(problems.PROMPT_DIFFERS, f"it ends in {prompt[-30:]!r}")
        through, start = prompt + through[said_at:], len(prompt)
    text, end = ending.close(through, message)
    empty = _empty_tags(text, start)
    said = empty.end() if empty else start
    trained = _parts(text, (said, end), message, settings)
    return Marked(text, [span for span in trained if span[0] < span[1]], [(start, end)])


def _check_calls(messages: Sequence[dict], render: Render, through: str) -> None:
    """Raise `ChatProblem` where the text of the last turn is the same without its calls: the model
    would learn to stop instead of calling."""
    *history, message = messages
    if "tool_calls" not in message:
        return
    without = {key: value for key, value in message.items() if key != "tool_calls"}
    try:
        dropped = render([*history, without], "plain") == through
    except ChatProblem:
        return  # the template asks for the calls
    if dropped:
        raise ChatProblem(problems.CALLS_DROPPED)


def _prompt_end(history: list[dict], render: Render, through: str) -> int | None:
    """Index behind the prompt of the turn that ends the text: the longer of the two modes' prompts
    that fit it, for the prompt without thinking may hold empty tags. None where none fits."""
    prompt = render(history, "prompt")
    fits = through.startswith(prompt)
    if fits and _empty_tags(through, len(prompt)) is None:
        return len(prompt)
    quiet = render(history, "quiet")
    if through.startswith(quiet) and not (fits and len(quiet) < len(prompt)):
        return len(quiet)
    return len(prompt) if fits else None


def _empty_tags(text: str, start: int) -> re.Match | None:
    """Tags without reasoning at the start of a turn, of which the prompt may hold the first: in
    use the prompt without thinking would hold them."""
    opened = text[:start].rstrip().endswith(THINK)
    return (_EMPTY_REST if opened else _EMPTY_PAIR).match(text, start)


def _parts(text: str, said: Span, message: dict, settings: Chat) -> Iterator[Span]:
    """Spans of an answer that the settings train."""
    start, end = said
    after_thought = _reasoning_end(text, said, message)
    if not settings.train_reasoning:
        start = after_thought
    if settings.train_tool_calls or not message.get("tool_calls"):
        yield start, end
        return
    content = message["content"].strip()
    at = text.find(content, after_thought, end)
    if at < 0:
        raise ChatProblem(problems.PARTS_UNKNOWN, "the content before the calls is rewritten")
    yield start, at + len(content) if content else after_thought


def _reasoning_end(text: str, said: Span, message: dict) -> int:
    """Index behind the reasoning and its closing tag; the start where a turn has none. Raises
    `ChatProblem` for reasoning in other tags."""
    start, end = said
    thought = message.get("reasoning_content", "").strip()
    opened = text[:start].rstrip().endswith(THINK) or text[start:end].lstrip().startswith(THINK)
    at = text.find(thought, start, end) if thought else -1
    if not opened:
        if at >= 0 and at < text.find(message["content"].strip() or "\0", start, end):
            raise ChatProblem(problems.PARTS_UNKNOWN, "the reasoning isn't in <think> tags")
        return start
    closing = text.find(END_THINK, max(start, at + len(thought)), end)
    return closing + len(END_THINK) if closing >= 0 else start


def mask_of(starts: Sequence[int], spans: Sequence[Span]) -> list[bool]:
    """Tell whether each token's first character is in a span.

    starts: index of the first character of each token, in order
    """
    ordered = iter(sorted(spans))
    span = next(ordered, None)
    mask = []
    for start in starts:
        while span is not None and start >= span[1]:
            span = next(ordered, None)
        mask.append(span is not None and span[0] <= start)
    return mask
