"""The model's own chat template: where it is, and the text that it gives."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jinja2

from torchtitan.data.chat import deepseek_v4, deepseek_v32, problems
from torchtitan.data.chat.problems import ChatProblem
from torchtitan.data.chat.sandbox import EndlessTemplate, compile_template, run_template
from torchtitan.data.tokenizer_files import one_line, read_json, read_text
from torchtitan.tools.errors import UserError

KEY = "chat.template"
# Families whose models come without a Jinja template, by model_type of config.json.
BUILT_IN = {"deepseek_v32": deepseek_v32.render, "deepseek_v4": deepseek_v4.render}
SPECIALS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class Template(Protocol):
    """A way to write conversations; pickles."""

    @property
    def name(self) -> str:
        """File or built-in renderer, for sentences."""
        ...

    def render(
        self,
        messages: Sequence[dict],
        tools: list[dict] | None,
        variables: Mapping[str, Any],
        generation: bool,
    ) -> str:
        """Text of the messages; generation: with the opener of the next assistant turn. Raises
        `ChatProblem`."""
        ...


@dataclass(frozen=True)
class JinjaTemplate:
    """A Jinja template, rendered to the letter as transformers' apply_chat_template does.

    name: the file
    source: template
    tool_source: template for conversations with tools
    specials: bos_token, eos_token, ... -> text
    """

    name: str
    source: str
    tool_source: str
    specials: dict[str, str]

    def __post_init__(self) -> None:
        for source in (self.source, self.tool_source):
            try:
                compile_template(source)
            except (jinja2.TemplateSyntaxError, RecursionError) as error:
                line = getattr(error, "lineno", None)
                where = f"line {line}: " if line else ""
                raise UserError(
                    f"{self.name} holds a chat template that doesn't parse ({where}"
                    f"{one_line(error)}); correct it, or name another file as {KEY}."
                ) from None

    def render(
        self,
        messages: Sequence[dict],
        tools: list[dict] | None,
        variables: Mapping[str, Any],
        generation: bool,
    ) -> str:
        shown = [_with_thinking(message) for message in messages]
        values = {**self.specials, "documents": None, **variables}
        values |= {"messages": shown, "tools": tools, "add_generation_prompt": generation}
        try:
            return run_template(self.tool_source if tools else self.source, values)
        except (EndlessTemplate, MemoryError):
            raise ChatProblem(problems.TEMPLATE_ENDLESS, self.name) from None
        except Exception as error:  # a template is a program, which may raise anything
            found = one_line(error) or type(error).__name__
            raise ChatProblem(problems.TEMPLATE_REFUSED, found) from None


@dataclass(frozen=True)
class BuiltIn:
    """A renderer in Python, named by its model_type."""

    name: str

    def render(
        self,
        messages: Sequence[dict],
        tools: list[dict] | None,
        variables: Mapping[str, Any],
        generation: bool,
    ) -> str:
        # These formats write the opener right behind each user turn, asked or not.
        return BUILT_IN[self.name](messages, tools, variables)


def _with_thinking(message: dict) -> dict:
    """Message with its reasoning under the older name too, which gpt-oss's template reads."""
    if "reasoning_content" not in message:
        return message
    return {"thinking": message["reasoning_content"], **message}


def load_template(folder: Path, given: str | None) -> Template:
    """Find the chat template.

    folder: of the tokenizer
    given: file, or name of a built-in renderer; None searches the folder

    Raises `UserError` for one that is missing or doesn't parse.
    """
    if given in BUILT_IN:
        return BuiltIn(given)
    if given is not None:
        path = Path(given).expanduser()
        return JinjaTemplate(str(path), *_twice(_read(path)), _specials(folder))
    if (path := folder / "chat_template.jinja").is_file():
        other = folder / "additional_chat_templates/tool_use.jinja"
        sources = _read(path), _read(other if other.is_file() else path)
        return JinjaTemplate(str(path), *sources, _specials(folder))
    path = folder / "tokenizer_config.json"
    if (value := read_json(path).get("chat_template")) is not None:
        return JinjaTemplate(str(path), *_sources(path, value), _specials(folder))
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type in BUILT_IN:
        return BuiltIn(model_type)
    raise UserError(
        f"{folder} has no chat template (chat_template.jinja, or chat_template in "
        f"tokenizer_config.json); fetch the model's, or name a file as {KEY}, or one of "
        f"{', '.join(BUILT_IN)}."
    )


def _twice(source: str) -> tuple[str, str]:
    return source, source


def _sources(path: Path, value: Any) -> tuple[str, str]:
    """Template without and with tools, of a text or a list of named ones."""
    if isinstance(value, str):
        return _twice(value)
    named: dict = {}
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        named = {entry.get("name"): entry.get("template") for entry in value}
    default = named.get("default")
    sources = default, named.get("tool_use", default)
    if not all(isinstance(source, str) for source in sources):
        shown = json.dumps(value)[:80]
        raise UserError(
            f"{path} has chat_template = {shown}, which must be a template, or a list of named "
            f"ones with 'default' among them; correct it, or name a file as {KEY}."
        )
    return sources  # type: ignore[return-value]


def _read(path: Path) -> str:
    try:
        return read_text(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{KEY} = '{path}' could not be read ({one_line(error)}); name a Jinja file, or one "
            f"of {', '.join(BUILT_IN)}, or leave it out for the tokenizer folder's."
        ) from None


def _specials(folder: Path) -> dict[str, str]:
    """Special tokens that templates may write, by role."""
    found: dict[str, str] = {}
    for name in ("tiktoken.json", "tokenizer_config.json", "special_tokens_map.json"):
        config = read_json(folder / name)
        for key in (f"{role}_token" for role in SPECIALS):
            value = config.get(key)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found.setdefault(key, text)
    return found
