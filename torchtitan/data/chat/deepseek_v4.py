"""DeepSeek-V4's chat format, which comes as Python code with the model and not as a template.

Facts: encoding_dsv4.py of the model's repository (MIT). Tool results join the user turn, in the
order of the calls; with tools all reasoning stays, without them only that behind the last user
turn. The texts for a reasoning effort differ between releases, so none is written. The tools'
description is part of the interface and so word for word DeepSeek's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torchtitan.data.chat.dsml import (
    ASSISTANT,
    BOS,
    DSML,
    END_THINK,
    EOS,
    THINK,
    USER,
    calls_text,
    is_thinking,
    last_asker,
    schemas,
    with_tools,
)

TOOLS = f"""## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by \
writing a "<{DSML}tool_calls>" block like the following:

<{DSML}tool_calls>
<{DSML}invoke name="$TOOL_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>
...
</{DSML}invoke>
<{DSML}invoke name="$TOOL_NAME2">
...
</{DSML}invoke>
</{DSML}tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, \
booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by {THINK}), you MUST output your complete reasoning inside \
{THINK}...{END_THINK} BEFORE any tool calls or final response.

Otherwise, output directly after {END_THINK} with tool calls or final response.

### Available Tool Schemas

{{schemas}}

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""


def render(messages: Sequence[dict], tools: list[dict] | None, variables: Mapping[str, Any]) -> str:
    """Text of the conversation. Raises `ChatProblem`."""
    thinking = is_thinking(variables)
    described = TOOLS.replace("{schemas}", schemas(tools))
    shown = _merged(with_tools(list(messages), tools, described))
    last = last_asker(shown)
    keeps_all = bool(tools)
    if thinking and not keeps_all:  # developer turns before the last user turn go, too
        shown = [m for n, m in enumerate(shown) if m["role"] != "developer" or n >= last]
        last = last_asker(shown)
    parts = [BOS]
    for index, message in enumerate(shown):
        role = message["role"]
        if role == "assistant":
            reasoned = thinking and (keeps_all or index > last)
            reasoning = message.get("reasoning_content", "") + END_THINK if reasoned else ""
            calls = calls_text(message.get("tool_calls", []), "tool_calls")
            parts.append(reasoning + message["content"] + calls + EOS)
        elif role == "system":
            parts.append(message["content"])
        else:
            parts.append(USER + message["content"])
            if index + 1 == len(shown) or shown[index + 1]["role"] == "assistant":
                opens = thinking and (keeps_all or index >= last)
                parts.append(ASSISTANT + (THINK if opens else END_THINK))
    return "".join(parts)


def _merged(messages: list[dict]) -> list[dict]:
    """Messages with each run of tool results and user turns as one user turn."""
    merged: list[dict] = []
    order: dict[str, int] = {}
    blocks: list[tuple[str | None, str]] = []  # call id of a result or None for a text, content
    for message in messages:
        if message["role"] not in ("tool", "user"):
            if message.get("tool_calls"):
                ids = [call.get("id") for call in message["tool_calls"]]
                order = {name: number for number, name in enumerate(ids) if name}
            merged.append(message)
            blocks = []
            continue
        if not blocks:
            merged.append({"role": "user"})
        is_result = message["role"] == "tool"
        blocks.append((message.get("tool_call_id", "") if is_result else None, message["content"]))
        merged[-1] = {"role": "user", "content": _joined(blocks, order)}
    return merged


def _joined(blocks: list[tuple[str | None, str]], order: dict[str, int]) -> str:
    """Texts at their places and results in the order of the calls, empty lines between."""
    results = [(name, content) for name, content in blocks if name is not None]
    ordered = iter(sorted(results, key=lambda result: order.get(result[0], 0)))
    return "\n\n".join(
        content if name is None else f"<tool_result>{next(ordered)[1]}</tool_result>"
        for name, content in blocks
    )
