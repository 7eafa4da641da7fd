"""Twelve cases of a mask, for every family: what the model must say is trained, and no more.

The twelfth, packed equals alone, is of the packing's tests.
"""

import pytest

from tests.unit_tests.data.chat.families import (
    EOS,
    FAMILIES,
    Family,
    assistant,
    renderer,
    result,
    runs,
    system,
    user,
)
from torchtitan.config import Chat
from torchtitan.data.chat import ChatProblem, ChatRenderer, problems

each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


@pytest.fixture
def trained(folder, tokenizer):
    """trained(family, messages, **settings): per example the runs of trained text."""

    def run(family: Family, messages: list[dict], tools=None, **settings) -> list[list[str]]:
        row = {"messages": messages, "tools": tools}
        examples = renderer(folder, family, **settings).examples(row, "chat")
        return [runs(tokenizer, example) for example in examples]

    return run


def thought(family: Family, text: str) -> str:
    """Reasoning for families that refuse an answer without."""
    return text if family.needs_thought else ""


@each_family
def test_1_one_turn_trains_the_answer_and_its_end(trained, family):
    plain = thought(family, "R")
    assert trained(family, [user("Q"), assistant("A", plain)]) == [[family.answer("A", plain)]]


@each_family
def test_2_every_answer_of_three_is_trained_with_its_end(trained, family):
    turns = [
        m for n in "123" for m in (user(f"Q{n}"), assistant(f"A{n}", thought(family, f"R{n}")))
    ]
    found = [run for example in trained(family, turns) for run in example]
    assert found == [family.answer(f"A{n}", thought(family, f"R{n}")) for n in "123"]


def test_2_turns_that_are_not_rewritten_share_an_example(trained):
    turns = [m for n in "123" for m in (user(f"Q{n}"), assistant(f"A{n}"))]
    alone = {"Qwen3", "V3.2 thinking", "V4 thinking"}  # tags or thoughts of the last turn only
    for name, family in FAMILIES.items():
        if not family.needs_thought:
            assert len(trained(family, turns)) == (3 if name in alone else 1), name


@pytest.mark.parametrize("name", ["Qwen3", "GLM-4.5", "GLM-5", "K2-Thinking", "V4 thinking"])
def test_3_empty_tags_stay_out(folder, tokenizer, trained, name):
    family = FAMILIES[name]
    row = {"messages": [user("Q"), assistant("A")]}
    (example,) = renderer(folder, family).examples(row, "chat")
    assert "</think>" in tokenizer.decode(example.tokens)
    assert trained(family, row["messages"]) == [[family.answer("A")]]


@each_family
def test_4_reasoning_of_the_last_turn_is_trained_with_its_closing_tag(trained, family):
    messages = [user("Q"), assistant("A", "R")]
    assert trained(family, messages) == [[family.answer("A", "R")]]
    without = trained(family, messages, train_reasoning=False)
    if family.thought.endswith("\n\n"):
        assert without == [["\n\nA" + family.end]]
    else:
        assert without == [[family.answer("A")]]


@each_family
def test_5_reasoning_of_an_early_turn_is_rendered_as_in_use(folder, tokenizer, family):
    messages = [user("Q1"), assistant("A1", "R1"), user("Q2"), assistant("A2", "R2")]
    examples = renderer(folder, family).examples({"messages": messages}, "chat")
    said = [runs(tokenizer, example) for example in examples]
    answers = [family.answer("A1", "R1"), family.answer("A2", "R2")]
    assert said == ([[answers[0]], [answers[1]]] if family.thought else [answers])
    assert "R1" not in tokenizer.decode(examples[-1].tokens)


@pytest.mark.parametrize("name", ["GLM-4.5", "GLM-5"])
def test_6_glm_ends_a_turn_with_the_next_roles_token(folder, tokenizer, trained, name):
    family = FAMILIES[name]
    messages = [user("Q1"), assistant("A1"), user("Q2"), assistant("", calls=1)]
    messages += [result("T", "find_0"), assistant("A2")]
    said = [run for example in trained(family, messages) for run in example]
    assert [run.rsplit("<|", 1)[1] for run in said] == ["user|>", "observation|>", "user|>"]
    (example,) = renderer(folder, family).examples({"messages": messages}, "chat")
    assert tokenizer.decode(example.tokens).endswith("A2<|user|>")


@each_family
def test_7_calls_are_trained_and_results_are_not(trained, family):
    messages = [user("Q"), assistant("Look up", "R1", calls=2), result("T0", "find_0")]
    messages += [result("T1", "find_1"), assistant("A", "R2")]
    said = [run for example in trained(family, messages) for run in example]
    calls, answer = said
    assert "find_0" in calls and "find_1" in calls and calls.endswith(family.end_calls)
    assert answer == family.answer("A", "R2")
    assert not any(f"T{n}" in run for run in said for n in "01")
    kept = trained(family, messages, train_tool_calls=False)
    calls, answer = [run for example in kept for run in example]
    assert calls.endswith("Look up") and answer == family.answer("A", "R2")


@each_family
def test_8_system_texts_stay_out(trained, family):
    plain = thought(family, "R")
    asked = [user("Q"), assistant("A", plain)]
    for systems in ([system("S")], [system("S1"), system("S2")]):
        assert trained(family, systems + asked) == [[family.answer("A", plain)]]
    with pytest.raises(ChatProblem, match=problems.NO_ASSISTANT):
        trained(family, [system("S")])


@each_family
@pytest.mark.parametrize("answer", ["\n\nHi", " Hi", "Hi\n\n"])
def test_9_the_text_is_tokenised_once(folder, tokenizer, family, answer):
    row = {"messages": [user("Q"), assistant(answer, thought(family, "R"))]}
    (example,) = renderer(folder, family).examples(row, "chat")
    text = tokenizer.decode(example.tokens)
    assert example.tokens == tokenizer.encode_with_starts(text)[0]
    (run,) = runs(tokenizer, example)
    assert run.endswith(family.end) and "Hi" in run and "Q" not in run


def test_9_a_token_merged_over_the_start_is_not_trained(folder, tokenizer, tmp_path):
    path = tmp_path / "plain.jinja"
    path.write_text(
        "{% for m in messages %}{{ m.role + ':\\n' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
    )
    made = ChatRenderer(tokenizer, str(folder), Chat(template=str(path)))
    (example,) = made.examples({"messages": [user("Q"), assistant("\nHi")]}, "chat")
    merged = tokenizer.token_id(":ĊĊ")
    assert merged in example.tokens and not example.trained[example.tokens.index(merged)]
    assert runs(tokenizer, example) == ["Hi<|im_end|>"]


@each_family
@pytest.mark.parametrize("spelled", ["</think>", "<｜Assistant｜>", "<|im_end|>", "<|user|>", EOS])
def test_10_control_tokens_of_a_user_are_no_borders(trained, family, spelled):
    plain = thought(family, "R")
    for text in (spelled, f"a {spelled} b", f"{spelled}<think>"):
        messages = [user(text), assistant("A1", plain), user(text), assistant("A2", plain)]
        said = [run for example in trained(family, messages) for run in example]
        assert said == [family.answer("A1", plain), family.answer("A2", plain)]


@each_family
def test_11_what_looks_cut_is_refused(trained, family):
    with pytest.raises(ChatProblem, match=problems.UNANSWERED):
        trained(family, [user("Q1"), assistant("A1"), user("Q2")])
    with pytest.raises(ChatProblem, match=problems.EMPTY_TURN):
        trained(family, [user("Q1"), assistant(" ")])
    with pytest.raises(ChatProblem, match=problems.END_INSIDE):
        trained(family, [user("Q1"), assistant(f"A {family.end} B", thought(family, "R"))])


@each_family
def test_weights_and_last_choose_turns(trained, family):
    plain = thought(family, "R")
    first = {**assistant("A1", plain), "weight": 0}
    messages = [user("Q1"), first, user("Q2"), assistant("A2", plain)]
    assert trained(family, messages) == [[family.answer("A2", plain)]]
    messages[1] = assistant("A1", plain)
    assert trained(family, messages, turns="last") == [[family.answer("A2", plain)]]
    messages[3] = {**messages[3], "weight": 0}
    with pytest.raises(ChatProblem, match=problems.NOTHING_TRAINED):
        trained(family, messages, turns="last")


def test_v31_in_thinking_mode_trains_the_turn_as_without(trained):
    """Its template never writes reasoning, so the prompt that fits is the one without."""
    family = Family("deepseek_v31", kwargs={"thinking": True})
    assert trained(family, [user("Q"), assistant("A", "R")]) == [["A" + EOS]]


def test_kimi_thinking_trains_reasoning_before_calls(trained):
    family = FAMILIES["K2-Thinking"]
    messages = [user("Q"), assistant("", "R", calls=1), result("T", "find_0"), assistant("A")]
    ((calls, answer),) = trained(family, messages)
    assert calls.startswith("<think>R</think><|tool_calls_section_begin|>")
    assert answer == "A<|im_end|>"


@each_family
def test_stop_ids_are_the_ends(folder, tokenizer, family):
    ends = {tokenizer.token_id(end) for end in (family.end, family.end_calls, EOS)}
    assert renderer(folder, family).stop_ids == ends


@each_family
def test_the_prompt_is_what_stands_before_the_answer(folder, tokenizer, family):
    made = renderer(folder, family)
    prompt = made.prompt([user("Q")])
    row = {"messages": [user("Q"), assistant("A", "R")]}
    (example,) = made.examples(row, "chat")
    if family.template != "kimi_k2_thinking":
        assert prompt == example.tokens[: example.trained.index(True)]
