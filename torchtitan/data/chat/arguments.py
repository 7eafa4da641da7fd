"""The form of tool calls' arguments, JSON text or an object, that a template takes."""

import json
from collections.abc import Sequence
from typing import Any, Literal

from torchtitan.data.chat.ending import ASKED, CALLED, RESULT, Write
from torchtitan.data.chat.problems import ChatProblem

ArgumentForm = Literal["given", "text", "object"]


def argument_form(write: Write) -> ArgumentForm:
    """Form that a template takes, found by probes: DeepSeek-V3.1 takes only text, GLM only
    objects, Qwen3 both ("given": as in the row)."""
    takes: list[ArgumentForm] = []
    for form in ("text", "object"):
        try:
            write(in_form([ASKED, CALLED, RESULT], form))
            takes.append(form)
        except ChatProblem:
            pass
    return takes[0] if len(takes) == 1 else "given"


def in_form(messages: Sequence[dict], form: ArgumentForm) -> list[dict]:
    """Messages with all arguments in a form."""
    return [_in_form(message, form) for message in messages]


def _in_form(message: dict, form: ArgumentForm) -> dict:
    if form == "given" or "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": _argument(call, form)}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _argument(call: dict, form: ArgumentForm) -> Any:
    given = call["function"]["arguments"]
    if form == "text":
        return given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    return json.loads(given) if isinstance(given, str) else given
