"""Tool calls in DeepSeek's DSML, shared by V3.2 and V4."""

import json
from collections.abc import Mapping
from typing import Any

from torchtitan.data.chat import problems
from torchtitan.data.chat.problems import ChatProblem

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK = "<think>", "</think>"
DSML = "｜DSML｜"


def refused(found: str) -> ChatProblem:
    return ChatProblem(problems.TEMPLATE_REFUSED, found)


def is_thinking(variables: Mapping[str, Any]) -> bool:
    """Tell whether the next turn opens with `<think>`: thinking or enable_thinking, default False.
    Raises `ChatProblem` for variables that these formats don't have."""
    unknown = variables.keys() - {"thinking", "enable_thinking"}
    if unknown:
        raise refused(f"DeepSeek's format has no variable {sorted(unknown)[0]}")
    return bool(variables.get("thinking", variables.get("enable_thinking", False)))


def with_tools(messages: list[dict], tools: list[dict] | None, described: str) -> list[dict]:
    """Messages with the description of the tools behind the first system text, which is added
    empty where there is none."""
    if not tools:
        return messages
    systems = [n for n, message in enumerate(messages) if message["role"] == "system"]
    if not systems:
        messages, systems = [{"role": "system", "content": ""}, *messages], [0]
    first = messages[systems[0]]
    changed = {**first, "content": f"{first['content']}\n\n{described}"}
    return [changed if message is first else message for message in messages]


def schemas(tools: list[dict] | None) -> str:
    """JSON of each function, one a line."""
    functions = [tool.get("function", tool) for tool in tools or []]
    return "\n".join(json.dumps(function, ensure_ascii=False) for function in functions)


def calls_text(calls: list[dict], block: str) -> str:
    """Calls in DSML, with the empty line before them.

    block: name of the element around them
    """
    if not calls:
        return ""
    invoked = []
    for call in calls:
        arguments = call["function"]["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        written = "\n".join(_parameter(key, value) for key, value in arguments.items())
        name = call["function"]["name"]
        invoked.append(f'<{DSML}invoke name="{name}">\n{written}\n</{DSML}invoke>')
    return "\n\n<{0}>\n{1}\n</{0}>".format(DSML + block, "\n".join(invoked))


def _parameter(key: str, value: Any) -> str:
    is_text = isinstance(value, str)
    text = value if is_text else json.dumps(value, ensure_ascii=False)
    kind = "true" if is_text else "false"
    return f'<{DSML}parameter name="{key}" string="{kind}">{text}</{DSML}parameter>'


def last_asker(messages: list[dict]) -> int:
    """Index of the last user or developer turn, -1 without one."""
    askers = [n for n, message in enumerate(messages) if message["role"] in ("user", "developer")]
    return askers[-1] if askers else -1
