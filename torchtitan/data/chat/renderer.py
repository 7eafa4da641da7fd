"""Rows in, examples out: the one interface to chat templates and masks."""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torchtitan.config import Chat
from torchtitan.data.chat import problems
from torchtitan.data.chat.arguments import ArgumentForm, argument_form, in_form
from torchtitan.data.chat.conversation import (
    Conversation,
    conversation_of,
    read_conversation,
    read_pair,
)
from torchtitan.data.chat.ending import Ending, find_ending
from torchtitan.data.chat.mask import Marked, mark_turns, mask_of
from torchtitan.data.chat.problems import ChatProblem
from torchtitan.data.chat.template import Template, load_template
from torchtitan.data.tokenizer import Tokenizer, locate

QUIET = {"enable_thinking": False, "thinking": False}


@dataclass(frozen=True)
class ChatExample:
    """Tokens to train on.

    tokens: ids
    trained: whether the model must produce each token, unshifted
    """

    tokens: list[int]
    trained: list[bool]


@dataclass(frozen=True)
class _Loaded:
    """A template, and what probes found about it.

    form: in which tool calls' arguments are shown to it
    stops: ids that end an assistant turn
    """

    template: Template
    form: ArgumentForm
    ending: Ending
    stops: frozenset[int]


class ChatRenderer:
    """Conversations as the model sees them; pickles, for loader workers.

    tokenizer: the model's
    assets_path: folder or file of the tokenizer (model.hf_assets_path)
    settings: template and what is trained

    The template is read at the first use, as pairs of texts need none: ask for `stop_ids` to have
    the `UserError` for a missing or wrong one at the start.
    """

    def __init__(
        self, tokenizer: Tokenizer, assets_path: str, settings: Chat | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._settings = settings or Chat()
        path = locate(assets_path)
        self._folder = path if path.is_dir() else path.parent
        self._loaded: _Loaded | None = None

    def _load(self) -> _Loaded:
        if self._loaded is None:
            template = load_template(self._folder, self._settings.template)
            form = argument_form(functools.partial(self._probe, template, "given"))
            write = functools.partial(self._probe, template, form)
            ending = find_ending(write, self._tokenizer, template.name)
            texts = sorted({ending.after_answer, ending.after_calls} - {""})
            stops = {self._tokenizer.encode_with_starts(text)[0][0] for text in texts}
            if self._tokenizer.eos_id is not None:
                stops.add(self._tokenizer.eos_id)
            self._loaded = _Loaded(template, form, ending, frozenset(stops))
        return self._loaded

    def _probe(self, template: Template, form: ArgumentForm, messages: Sequence[dict]) -> str:
        variables = self._settings.template_kwargs
        return template.render(in_form(messages, form), None, variables, generation=False)

    def examples(
        self, row: Mapping, kind: Literal["chat", "prompt_completion"]
    ) -> list[ChatExample]:
        """Examples of a row, most often one. Raises `ChatProblem`."""
        read = read_conversation(row) if kind == "chat" else read_pair(row)
        if isinstance(read, tuple):
            return [self._pair(*read)]
        read.check_answered()
        marked = mark_turns(
            read.messages,
            read.weights,
            functools.partial(self._render, read),
            self._load().ending,
            self._settings,
        )
        if not marked:
            raise ChatProblem(problems.NOTHING_TRAINED)
        return [self._example(example) for example in marked]

    def prompt(self, messages: Sequence[Mapping], tools: list[dict] | None = None) -> list[int]:
        """Ids of a conversation with the opener of the answer to come. Raises `ChatProblem`."""
        read = conversation_of(messages, tools)
        return self._encode(self._render(read, read.messages, "prompt"))[0]

    def check_template(self) -> None:
        """Raise `UserError` for a template that is missing or can't be used."""
        self._load()

    @property
    def identity(self) -> str:
        """Digest of what the template writes; the tokens of a conversation depend on it."""
        messages = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
        loaded = self._load()
        return hashlib.sha256(
            self._probe(loaded.template, loaded.form, messages).encode()
        ).hexdigest()

    @property
    def stop_ids(self) -> set[int]:
        """Tokens that end an assistant turn: the template's, and the tokenizer's end token."""
        return set(self._load().stops)

    def _render(
        self,
        read: Conversation,
        messages: Sequence[dict],
        mode: Literal["plain", "prompt", "quiet"],
    ) -> str:
        loaded = self._load()
        variables = {**self._settings.template_kwargs, **read.template_kwargs}
        variables |= QUIET if mode == "quiet" else {}
        shown = in_form(messages, loaded.form)
        return loaded.template.render(shown, read.tools, variables, generation=mode != "plain")

    def _example(self, marked: Marked) -> ChatExample:
        tokens, starts = self._encode(marked.text)
        for answer in marked.answers:
            self._check_end(tokens, mask_of(starts, [answer]))
        example = ChatExample(tokens, mask_of(starts, marked.trained))
        if not any(example.trained):
            raise ChatProblem(problems.NOTHING_TRAINED)
        return example

    def _check_end(self, tokens: list[int], answer: list[bool]) -> None:
        """Raise `ChatProblem` unless the last token of the answer ends it, and no other does."""
        said = [token for token, inside in zip(tokens, answer, strict=True) if inside]
        ends = [n for n, token in enumerate(said, 1) if token in self._load().stops]
        if not ends or ends[-1] != len(said):
            raise ChatProblem(problems.NO_END, "it merged with its neighbour")
        if len(ends) > 1:
            raise ChatProblem(problems.END_INSIDE, self._tokenizer.decode([said[ends[0] - 1]]))

    def _pair(self, prompt: str, completion: str) -> ChatExample:
        """Texts without a template: special tokens spelled out in them are text."""
        tokenizer = self._tokenizer
        ids, starts = self._encode(prompt + completion, special=False)
        trained = mask_of(starts, [(len(prompt), len(prompt + completion))])
        begin = tokenizer.encode("", add_bos=tokenizer.bos_id is not None)
        end = tokenizer.encode("", add_eos=True)
        return ChatExample(begin + ids + end, [False] * len(begin) + trained + [True])

    def _encode(self, text: str, special: bool = True) -> tuple[list[int], list[int]]:
        try:
            text.encode()  # JSON can spell half a surrogate pair, which is not a character
        except UnicodeEncodeError:
            raise ChatProblem(problems.WRONG_ENCODING) from None
        return self._tokenizer.encode_with_starts(text, special)
