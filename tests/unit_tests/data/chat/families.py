"""Chat families for tests: a small tokenizer with all their tokens, templates, what they write."""

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from torchtitan.config import Chat
from torchtitan.data.chat import ChatExample, ChatRenderer
from torchtitan.data.tokenizer import Tokenizer, load_tokenizer

ASSETS = Path(__file__).resolve().parents[3] / "assets/chat"
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
SPECIALS = [
    *(BOS, EOS, "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
    *(f"<｜tool▁{part}｜>" for part in ("calls▁begin", "calls▁end", "call▁begin", "call▁end")),
    *(f"<｜tool▁{part}｜>" for part in ("output▁begin", "output▁end", "outputs▁begin")),
    *("<｜tool▁outputs▁end｜>", "<｜tool▁sep｜>", "｜DSML｜"),
    *(f"<|im_{part}|>" for part in ("system", "user", "assistant", "middle", "start", "end")),
    *(f"<|tool_call{part}|>" for part in ("s_section_begin", "s_section_end", "_begin", "_end")),
    *("<|tool_call_argument_begin|>", "[gMASK]", "<sop>", "<tool_call>", "</tool_call>"),
    *("<tool_response>", "</tool_response>", "<arg_key>", "</arg_key>", "<arg_value>"),
    "</arg_value>",
    *(f"<|{role}|>" for role in ("system", "user", "assistant", "observation", "endoftext")),
]
# Tokens that merge across the borders of turns: ":\n", "\n\n", " H", ...
MERGES = [": Ċ", ":Ċ Ċ", "Ċ Ċ", "Ġ H", "Ċ H", "i n", "t h", "th e", "t Ċ", "> Ċ"]


def write_tokenizer(folder: Path, eos: str = EOS) -> Path:
    """Write a byte-level tokenizer with the special tokens of all families."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = alphabet + [merge.replace(" ", "") for merge in MERGES]
    vocab = {name: number for number, name in enumerate(names)}
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    built = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(SPECIALS)
    built.save(str(folder / "tokenizer.json"))
    config = {"bos_token": BOS, "eos_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@dataclass(frozen=True)
class Family:
    """How a family writes what an assistant says.

    template: file of tests/assets/chat, or a built-in renderer
    end, end_calls: token that ends a turn without and with calls
    lead: white space between the prompt or the thought and the answer
    thought: reasoning of the last turn as the model says it; "" where the template drops it
    needs_thought: the family refuses a last turn without reasoning and calls
    """

    template: str
    end: str = EOS
    end_calls: str = EOS
    lead: str = ""
    thought: str = ""
    needs_thought: bool = False
    kwargs: dict = field(default_factory=dict)

    @property
    def path(self) -> str:
        jinja = ASSETS / f"{self.template}.jinja"
        return str(jinja) if jinja.is_file() else self.template

    @property
    def is_built_in(self) -> bool:
        return self.path == self.template

    def answer(self, text: str, thought: str = "") -> str:
        said = self.thought.format(thought) if thought and self.thought else ""
        return said + self.lead + text + self.end


IM_END = "<|im_end|>"
THINKING = {"thinking": True}
GLM = {"end": "<|user|>", "end_calls": "<|observation|>"}
FAMILIES = {
    "V3": Family("deepseek_v3"),
    "V3.1": Family("deepseek_v31"),
    "V3.2": Family("deepseek_v32"),
    "V3.2 thinking": Family(
        "deepseek_v32", thought="{}</think>", needs_thought=True, kwargs=THINKING
    ),
    "V4": Family("deepseek_v4"),
    "V4 thinking": Family("deepseek_v4", thought="{}</think>", kwargs=THINKING),
    "Kimi K2": Family("kimi_k2", end=IM_END, end_calls=IM_END),
    "K2-Thinking": Family("kimi_k2_thinking", end=IM_END, end_calls=IM_END),
    "GLM-4.5": Family("glm45", **GLM, lead="\n", thought="\n<think>{}</think>"),
    "GLM-5": Family("glm5", **GLM, thought="{}</think>"),
    "Qwen3": Family("qwen3", end=IM_END, end_calls=IM_END, thought="<think>\n{}\n</think>\n\n"),
}


@functools.cache
def load(folder: Path) -> Tokenizer:
    return load_tokenizer(str(folder))


def renderer(folder: Path, family: Family, **settings) -> ChatRenderer:
    chosen = Chat(template=family.path, template_kwargs=family.kwargs, **settings)
    return ChatRenderer(load(folder), str(folder), chosen)


def runs(tokenizer: Tokenizer, example: ChatExample) -> list[str]:
    """Texts of the runs of trained tokens."""
    found, before = [], False
    for token, trained in zip(example.tokens, example.trained, strict=True):
        if trained and not before:
            found.append([])
        if trained:
            found[-1].append(token)
        before = trained
    return [tokenizer.decode(ids) for ids in found]


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, thought: str = "", calls: int = 0) -> dict:
    message: dict = {"role": "assistant", "content": text}
    if thought:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = [call(f"find_{n}", {"word": f"w{n}"}) for n in range(calls)]
    return message


def call(name: str, arguments: dict) -> dict:
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"id": name, "type": "function", "function": function}


def result(text: str, name: str) -> dict:
    return {"role": "tool", "content": text, "tool_call_id": name}
