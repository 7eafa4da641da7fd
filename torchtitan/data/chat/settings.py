"""Settings of how conversations become training examples."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class ChatSettings:
    """Choice of the template and of the tokens that are trained.

    template: chat template file, or "deepseek_v32" or "deepseek_v4" for a built-in renderer;
        None takes the tokenizer folder's
    template_kwargs: variables of the template, such as {"enable_thinking": False}; a row's
        chat_template_kwargs come on top
    turns: "all" trains every assistant turn, "last" only the last message
    train_reasoning: whether reasoning with its closing tag is trained
    train_tool_calls: whether tool calls, with the token that ends their turn, are trained
    """

    template: str | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    turns: Literal["all", "last"] = "all"
    train_reasoning: bool = True
    train_tool_calls: bool = True
