"""Rows of every form, and one constant phrase for each that can't be used."""

import json
import pickle

import pytest

from tests.unit_tests.data.chat.families import (
    EOS,
    FAMILIES,
    assistant,
    call,
    renderer,
    result,
    runs,
    user,
)
from torchtitan.data.chat import ChatProblem, ChatRenderer, problems
from torchtitan.data.chat.conversation import read_conversation


@pytest.fixture(scope="module")
def made(folder) -> ChatRenderer:
    return renderer(folder, FAMILIES["V3.1"])


CALLS = [user("Q"), {**assistant("", calls=1)}, result("T", "find_0"), assistant("A")]
SHAREGPT = {
    "system": "S",
    "tools": json.dumps([{"type": "function", "function": {"name": "find_0"}}]),
    "conversations": [
        {"from": "human", "value": "Q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "T"},
        {"from": "gpt", "value": "A"},
    ],
}


def test_sharegpt_is_the_same_conversation(made):
    messages = [
        {"role": "system", "content": "S"},
        user("Q"),
        {"role": "assistant", "content": None, "tool_calls": [call("f", {"x": 1})]},
        result("T", "f"),
        assistant("A"),
    ]
    ours = made.examples({"messages": messages}, "chat")
    assert made.examples(SHAREGPT, "chat") == ours
    assert read_conversation(SHAREGPT).tools == json.loads(SHAREGPT["tools"])


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_several_names(folder, key):
    qwen = renderer(folder, FAMILIES["Qwen3"])
    row = {"messages": [user("Q"), {"role": "assistant", "content": "A", key: "R"}]}
    plain = {"messages": [user("Q"), assistant("A", "R")]}
    assert qwen.examples(row, "chat") == qwen.examples(plain, "chat")


def test_parts_are_joined_and_nulls_are_absent(made):
    parts = [{"type": "text", "text": "Q"}, {"type": "text", "text": "1"}]
    empty = {"tool_calls": None, "reasoning_content": None, "tool_call_id": None, "name": None}
    row = {"messages": [{**user("?"), "content": parts, **empty}, {**assistant("A"), **empty}]}
    assert made.examples(row, "chat") == made.examples(
        {"messages": [user("Q1"), assistant("A")]}, "chat"
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_arguments_may_be_text_or_objects(folder, name):
    made = renderer(folder, FAMILIES[name])
    rows = []
    for arguments in ({"word": "w0"}, '{"word": "w0"}'):
        asked = call("find_0", {})
        asked["function"]["arguments"] = arguments
        turns = [user("Q"), {**assistant("", "R"), "tool_calls": [asked]}, *CALLS[2:]]
        turns[-1] = assistant("A", "R")
        rows.append({"messages": turns})
    assert made.examples(rows[0], "chat") == made.examples(rows[1], "chat")


def test_a_rows_variables_reach_the_template(folder):
    made = renderer(folder, FAMILIES["V3.2"])
    row = {"messages": [user("Q"), assistant("A", "R")]}
    (chat,) = made.examples(row, "chat")
    (thinking,) = made.examples({**row, "chat_template_kwargs": {"thinking": True}}, "chat")
    assert len(thinking.tokens) > len(chat.tokens)


def test_pairs_of_texts_are_text(folder, tokenizer, tmp_path):
    from tests.unit_tests.data.chat.families import write_tokenizer

    bare = ChatRenderer(tokenizer, str(write_tokenizer(tmp_path / "bare")))
    row = {"prompt": "Say <|im_end|>:\n", "completion": "\nHi"}
    (example,) = bare.examples(row, "prompt_completion")
    assert tokenizer.decode(example.tokens[1:-1]) == row["prompt"] + row["completion"]
    assert example.tokens[0] == tokenizer.bos_id and not example.trained[0]
    assert tokenizer.token_id("<|im_end|>") not in example.tokens
    # ":\n\n" is one token, which begins in the prompt.
    assert runs(tokenizer, example) == ["Hi" + EOS]


def test_pairs_of_messages_train_the_completion(made, tokenizer):
    row = {"prompt": [user("Q1"), assistant("A1"), user("Q2")], "completion": [assistant("A2")]}
    (example,) = made.examples(row, "prompt_completion")
    assert runs(tokenizer, example) == ["A2" + EOS]


def answered(**changes) -> dict:
    return {"messages": [user("Q"), {**assistant("A"), **changes}]}


def called(function: object) -> dict:
    return answered(tool_calls=[{"function": function}])


BAD = {
    problems.NO_MESSAGES: [{"text": "a"}, {"messages": None}],
    problems.WRONG_MESSAGES: [{"messages": "a"}, {"messages": ["a"]}, {"conversations": {}}],
    problems.UNKNOWN_ROLE: [
        answered(role="bot"),
        answered(role=None),
        answered(role=["user"]),
        {"conversations": [{"from": "x", "value": "a"}]},
    ],
    problems.WRONG_CONTENT: [answered(content=3), answered(content=[{"type": "image_url"}])],
    problems.WRONG_ENCODING: [answered(content="\ud800"), answered(name="x", content="a\udfff")],
    problems.EMPTY_TURN: [answered(content=""), answered(content=None), {"messages": [user(" ")]}],
    problems.NO_ASSISTANT: [{"messages": []}, {"messages": [user("Q")]}],
    problems.UNANSWERED: [{"messages": [user("Q"), assistant("A"), user("Q")]}],
    problems.WRONG_CALLS: [answered(tool_calls="x"), called(None), called({"name": 3})],
    problems.BROKEN_ARGUMENTS: [
        called({"name": "f", "arguments": '{"x": '}),
        called({"name": "f", "arguments": "[1]"}),
        called({"name": "f", "arguments": 3}),
        called({"name": "f", "arguments": "[" * 100_000}),
    ],
    problems.WRONG_TOOLS: [{**answered(), "tools": "["}, {**answered(), "tools": ["x"]}],
    problems.WRONG_WEIGHT: [answered(weight=2), answered(weight="1"), answered(weight=[])],
    problems.WRONG_KWARGS: [{**answered(), "chat_template_kwargs": "x"}],
    problems.NOTHING_TRAINED: [answered(weight=0)],
}


@pytest.mark.parametrize(
    ("problem", "row"), [(problem, row) for problem, rows in BAD.items() for row in rows]
)
def test_a_bad_row_is_one_constant_phrase(made, problem, row):
    with pytest.raises(ChatProblem) as caught:
        made.examples(row, "chat")
    assert caught.value.problem == problem
    assert str(caught.value).startswith(problem) and "\n" not in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.problem, again.found) == (problem, caught.value.found)


@pytest.mark.parametrize("row", [{}, {"prompt": "a"}, {"prompt": "a", "completion": [user("b")]}])
def test_a_bad_pair_is_one_constant_phrase(made, row):
    with pytest.raises(ChatProblem, match=problems.NO_PAIR):
        made.examples(row, "prompt_completion")
    with pytest.raises(ChatProblem, match=problems.EMPTY_TURN):
        made.examples({"prompt": "a", "completion": " "}, "prompt_completion")


def test_renderers_pickle(made):
    row = {"messages": [user("Q"), assistant("A")]}
    ours = made.examples(row, "chat")
    assert pickle.loads(pickle.dumps(made)).examples(row, "chat") == ours
