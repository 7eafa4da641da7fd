"""DeepSeek-V3.2's chat format, which comes as Python code with the model and not as a template.

Facts: encoding_dsv32.py of the model's repository (MIT). Reasoning stands only behind the last
user turn; the tools' description is part of the interface and so word for word DeepSeek's.
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
    refused,
    schemas,
    with_tools,
)

TOOLS = f"""## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<{DSML}function_calls>" block like the following as part of \
your reply to the user:
<{DSML}function_calls>
<{DSML}invoke name="$FUNCTION_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>
...
</{DSML}invoke>
<{DSML}invoke name="$FUNCTION_NAME2">
...
</{DSML}invoke>
</{DSML}function_calls>

String and scalar parameters should be specified as is without any escaping or quotes, while lists \
and objects should use JSON format. The "string" attribute should be set to "true" for string type \
parameters and "false" for other types (numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should strongly consider \
outputting a thinking block. Here is an example:

<{DSML}function_calls>
...
</{DSML}function_calls>

<function_results>
...
</function_results>

{THINK}...thinking about results{END_THINK}

Here are the functions available in JSONSchema format:
<functions>
{{schemas}}
</functions>
"""


def render(messages: Sequence[dict], tools: list[dict] | None, variables: Mapping[str, Any]) -> str:
    """Text of the conversation. Raises `ChatProblem`."""
    thinking = is_thinking(variables)
    described = TOOLS.replace("{schemas}", schemas(tools))
    shown = with_tools(list(messages), tools, described)
    last = last_asker(shown)
    parts = [BOS]
    for index, message in enumerate(shown):
        role, content = message["role"], message["content"]
        if role == "system":
            parts.append(content)
        elif role in ("user", "developer"):
            if role == "developer":
                content = f"\n\n# The user's message is: {content}"
            opener = THINK if thinking and index == last else END_THINK
            parts.append(USER + content + ASSISTANT + opener)
        elif role == "tool":
            opener = THINK if thinking and index >= last else END_THINK
            parts.append(_result(shown, index, opener))
        else:
            parts.append(_answer(message, thinking and index > last))
    return "".join(parts)


def _result(messages: list[dict], index: int, opener: str) -> str:
    """One tool result; the first opens the block, the last closes it and opens the next turn."""
    first = index
    while first > 0 and messages[first - 1]["role"] == "tool":
        first -= 1
    calls = messages[first - 1].get("tool_calls", []) if first else []
    number = index - first + 1
    if number > len(calls):
        raise refused("more tool results than calls")
    text = "\n\n<function_results>" if number == 1 else ""
    text += f"\n<result>{messages[index]['content']}</result>"
    if number == len(calls):
        return text + f"\n</function_results>\n\n{opener}"
    if index + 1 < len(messages) and messages[index + 1]["role"] != "tool":
        raise refused("fewer tool results than calls")
    return text


def _answer(message: dict, reasoned: bool) -> str:
    """Text of an assistant turn whose opener stands already."""
    reasoning, calls = message.get("reasoning_content", ""), message.get("tool_calls", [])
    if reasoned and not (reasoning or calls):
        raise refused("a turn in thinking mode has neither reasoning nor calls")
    before = reasoning + END_THINK if reasoned else ""
    return before + message["content"] + calls_text(calls, "function_calls") + EOS
