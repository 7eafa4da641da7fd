"""Conversations read from rows: OpenAI's messages, ShareGPT's, prompt and completion."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torchtitan.data.chat import problems
from torchtitan.data.chat.problems import ChatProblem
from torchtitan.data.documents import KINDS, keys_there

ROLES = ("system", "developer", "user", "assistant", "tool")
# Roles of ShareGPT's `from`.
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
# Names of a message's reasoning; the first is the one that templates read.
REASONING = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Conversation:
    """Messages in the form that templates read.

    messages: role, content (always text), and reasoning_content, tool_calls (arguments as in the
        row, JSON text or an object), tool_call_id and further keys where the row has them
    weights: whether each message may be trained; only the assistant's can be
    tools: descriptions of the functions on offer, or None
    template_kwargs: variables of the template for this conversation
    """

    messages: tuple[dict[str, Any], ...]
    weights: tuple[bool, ...]
    tools: list[dict] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    def check_answered(self) -> None:
        """Raise `ChatProblem` where no assistant turn ends the conversation. A trailing user turn
        isn't cut off: a row without its answer is most often a cut one."""
        roles = [message["role"] for message in self.messages]
        if "assistant" not in roles:
            raise ChatProblem(problems.NO_ASSISTANT)
        if roles[-1] != "assistant":
            raise ChatProblem(problems.UNANSWERED, f"it is the role '{roles[-1]}'")


def read_conversation(row: Mapping) -> Conversation:
    """Conversation of a row with `messages` (OpenAI) or `conversations` (ShareGPT), and optional
    `tools`, `system` (ShareGPT) and `chat_template_kwargs`. Raises `ChatProblem`."""
    if row.get("messages") is not None:
        messages = row["messages"]
    elif row.get("conversations") is not None:
        messages = [_from_sharegpt(entry) for entry in _objects(row["conversations"])]
        if row.get("system"):
            messages.insert(0, {"role": "system", "content": row["system"]})
    else:
        raise ChatProblem(problems.NO_MESSAGES, keys_there(row))
    return conversation_of(messages, row.get("tools"), row.get("chat_template_kwargs"))


def read_pair(row: Mapping) -> Conversation | tuple[str, str]:
    """Prompt and completion of a row: two texts as they are, two lists of messages as one
    conversation of which the prompt isn't trained. Raises `ChatProblem`."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise ChatProblem(problems.EMPTY_TURN, "the completion")
        return prompt, completion
    if not (isinstance(prompt, list | tuple) and isinstance(completion, list | tuple)):
        raise ChatProblem(problems.NO_PAIR, keys_there(row))
    context = [{**message, "weight": 0} for message in _objects(prompt)]
    messages = context + _objects(completion)
    return conversation_of(messages, row.get("tools"), row.get("chat_template_kwargs"))


def conversation_of(messages: Any, tools: Any = None, template_kwargs: Any = None) -> Conversation:
    """Check and normalise messages. Raises `ChatProblem`."""
    read = [_message(message) for message in _objects(messages)]
    if not read:
        raise ChatProblem(problems.NO_ASSISTANT, "there is no message")
    if template_kwargs is not None and not isinstance(template_kwargs, Mapping):
        raise ChatProblem(problems.WRONG_KWARGS, _kind(template_kwargs))
    return Conversation(
        messages=tuple(message for message, _ in read),
        weights=tuple(weight for _, weight in read),
        tools=_tools(tools),
        template_kwargs=dict(template_kwargs or {}),
    )


def _objects(values: Any) -> list[dict]:
    if not isinstance(values, list | tuple) or not all(isinstance(v, Mapping) for v in values):
        raise ChatProblem(problems.WRONG_MESSAGES, _kind(values))
    return [dict(value) for value in values]


def _from_sharegpt(entry: dict) -> dict:
    """Message of OpenAI's form; a function_call's value is {"name": ..., "arguments": ...}."""
    role, value = entry.get("from"), entry.get("value")
    message = {key: entry[key] for key in entry.keys() - {"from", "value"}}
    if not isinstance(role, str) or role not in SHAREGPT_ROLES:
        raise ChatProblem(problems.UNKNOWN_ROLE, repr(role))
    message |= {"role": SHAREGPT_ROLES[role], "content": value}
    if role == "function_call":
        calls = _json(value, problems.WRONG_CALLS)
        calls = calls if isinstance(calls, list) else [calls]
        message |= {"content": "", "tool_calls": [{"function": call} for call in calls]}
    return message


def _message(message: dict) -> tuple[dict[str, Any], bool]:
    """Message as templates read it, and whether it may be trained."""
    # Tables fill absent keys with null, and templates ask whether a key is there.
    message = {key: value for key, value in message.items() if value is not None}
    role, weight = message.get("role"), message.pop("weight", 1)
    if not isinstance(role, str) or role not in ROLES:
        raise ChatProblem(problems.UNKNOWN_ROLE, repr(role))
    if weight not in (0, 1) or isinstance(weight, str):
        raise ChatProblem(problems.WRONG_WEIGHT, repr(weight))
    message["content"] = _text(message.get("content"))
    reasoning = [message.pop(key) for key in REASONING if key in message]
    if reasoning and _text(reasoning[0]).strip():
        message["reasoning_content"] = _text(reasoning[0])
    calls = _calls(message.pop("tool_calls", None))
    if calls:
        message["tool_calls"] = calls
    if role in ("user", "assistant") and not message["content"].strip() and not calls:
        raise ChatProblem(problems.EMPTY_TURN, role)
    return message, role == "assistant" and weight == 1


def _text(content: Any) -> str:
    """Text of a content: a string, a list of text parts, or null beside tool calls."""
    if content is None:
        return ""
    if isinstance(content, list | tuple):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise ChatProblem(problems.WRONG_CONTENT, "a part is no text")
        content = "".join(texts)
    if not isinstance(content, str):
        raise ChatProblem(problems.WRONG_CONTENT, _kind(content))
    return content


def _calls(calls: Any) -> list[dict]:
    """Tool calls, each {"type": "function", "function": {"name", "arguments"}} and its other keys.
    Arguments keep their form; as text they must be the JSON of an object."""
    if calls is None:
        return []
    if not isinstance(calls, list | tuple):
        raise ChatProblem(problems.WRONG_CALLS, _kind(calls))
    checked = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ChatProblem(problems.WRONG_CALLS, "a call has no function with a name")
        arguments = function.get("arguments")
        arguments = {} if arguments is None else arguments
        given = arguments
        if isinstance(arguments, str):
            given = _json(arguments, problems.BROKEN_ARGUMENTS)
        if not isinstance(given, Mapping):
            raise ChatProblem(problems.BROKEN_ARGUMENTS, f"they are {_kind(given)}")
        kept = {key: value for key, value in call.items() if value is not None}
        function = {**function, "arguments": arguments}
        checked.append({"type": "function", **kept, "function": function})
    return checked


def _tools(tools: Any) -> list[dict] | None:
    if isinstance(tools, str):
        tools = _json(tools, problems.WRONG_TOOLS) if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list | tuple) or not all(isinstance(t, Mapping) for t in tools):
        raise ChatProblem(problems.WRONG_TOOLS, f"they are {_kind(tools)}")
    return [dict(tool) for tool in tools]


def _json(text: Any, problem: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatProblem(problem, str(error)) from None


def _kind(value: Any) -> str:
    return KINDS.get(type(value), f"a {type(value).__name__}")
