"""Where templates come from, and what happens to those that are missing, broken or endless."""

import base64
import json

import pytest

from tests.unit_tests.data.chat.families import (
    FAMILIES,
    assistant,
    load,
    renderer,
    result,
    user,
    write_tokenizer,
)
from torchtitan.config import Chat
from torchtitan.data.chat import ChatProblem, ChatRenderer, problems
from torchtitan.data.chat.ending import ASKED, CALL
from torchtitan.data.tokenizer import load_tokenizer
from torchtitan.tools.errors import UserError

PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ROW = {"messages": [user("Q"), assistant("A")]}
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def made_in(folder, template=None) -> ChatRenderer:
    return ChatRenderer(load_tokenizer(str(folder)), str(folder), Chat(template=template))


def text(made: ChatRenderer, row: dict = ROW) -> str:
    (example,) = made.examples(row, "chat")
    return made._tokenizer.decode(example.tokens)


@pytest.fixture
def fresh(tmp_path):
    return write_tokenizer(tmp_path / "model")


def write_config(folder, value) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": value}))


def test_the_folders_template_is_used(fresh):
    write_config(fresh, "config " + PLAIN)
    assert text(made_in(fresh)).startswith("config <|im_start|>user")
    (fresh / "chat_template.jinja").write_text("file " + PLAIN)
    assert text(made_in(fresh)).startswith("file ")
    other = fresh / "other.jinja"
    other.write_text("other " + PLAIN)
    assert text(made_in(fresh, str(other))).startswith("other ")
    assert text(made_in(fresh / "tokenizer.json")).startswith("file ")


def test_conversations_with_tools_use_the_template_for_tools(fresh):
    named = [{"name": "default", "template": PLAIN}]
    named += [{"name": "tool_use", "template": "tools " + PLAIN}]
    write_config(fresh, named)
    assert text(made_in(fresh)).startswith("<|im_start|>")
    assert text(made_in(fresh), {**ROW, "tools": TOOLS}).startswith("tools ")
    (fresh / "chat_template.jinja").write_text(PLAIN)
    (fresh / "additional_chat_templates").mkdir()
    (fresh / "additional_chat_templates/tool_use.jinja").write_text("more " + PLAIN)
    assert text(made_in(fresh), {**ROW, "tools": TOOLS}).startswith("more ")


def test_models_without_a_template_have_a_built_in_one(fresh):
    (fresh / "config.json").write_text('{"model_type": "deepseek_v32"}')
    assert "<｜Assistant｜></think>A" in text(made_in(fresh))


@pytest.mark.parametrize(
    ("template", "part"),
    [
        ("{% for %}", "doesn't parse"),
        ("{{ raise_exception('no') }}", "can't write one question"),
        ("{{ messages[0].content }}", "no token of its own"),
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}", "no token"),
    ],
)
def test_a_wrong_template_ends_the_start_with_a_sentence(fresh, template, part):
    path = fresh / "chat_template.jinja"
    path.write_text(template)
    with pytest.raises(UserError, match=part) as caught:
        _ = made_in(fresh).stop_ids
    assert str(path) in str(caught.value) and "chat_template" in str(caught.value)


def test_a_missing_template_is_told_when_it_is_needed(fresh):
    made = made_in(fresh)
    assert made.examples({"prompt": "a", "completion": "b"}, "prompt_completion")
    with pytest.raises(UserError, match="has no chat template"):
        made.examples(ROW, "chat")
    with pytest.raises(UserError, match="nowhere.jinja' could not be read"):
        _ = made_in(fresh, "nowhere.jinja").stop_ids
    write_config(fresh, [{"name": "rag", "template": PLAIN}])
    with pytest.raises(UserError, match="'default' among them"):
        _ = made_in(fresh).stop_ids


ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "long text": "{% for a in range(9999) %}{{ 'x' * 9999 }}{% endfor %}",
    "product": "{{ 'x' * 99999999999 }}",
    "doubling": "{% set n = namespace(t='xx') %}"
    "{% for a in range(60) %}{% set n.t = n.t + n.t %}{% endfor %}",
    "joining": "{% set n = namespace(t='xx') %}"
    "{% for a in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
    "power": "{{ 9 ** 99999999 }}",
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_template_that_never_ends_is_a_problem_of_the_row(fresh, kind):
    trap = "{% if messages[0].content == 'trap' %}" + ENDLESS[kind] + "{% endif %}"
    (fresh / "chat_template.jinja").write_text(trap + PLAIN)
    made = made_in(fresh)
    assert text(made)
    with pytest.raises(ChatProblem) as caught:
        made.examples({"messages": [user("trap"), assistant("A")]}, "chat")
    assert caught.value.problem == problems.TEMPLATE_ENDLESS
    assert text(made)


@pytest.mark.parametrize(
    "trap",
    [
        "{{ raise_exception('no trap') }}",
        "{{ messages.append(1) }}",
        "{{ messages.__class__.__mro__ }}{{ ''.__class__.__base__.__subclasses__() }}",
        "{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_that_raises_is_a_problem_of_the_row(fresh, trap):
    trap = "{% if messages[0].content == 'trap' %}" + trap + "{% endif %}"
    (fresh / "chat_template.jinja").write_text(trap + PLAIN)
    with pytest.raises(ChatProblem) as caught:
        made_in(fresh).examples({"messages": [user("trap"), assistant("A")]}, "chat")
    assert caught.value.problem == problems.TEMPLATE_REFUSED


def test_generation_marks_are_written_through(fresh):
    plain = fresh / "plain.jinja"
    plain.write_text(PLAIN)
    marked = fresh / "marked.jinja"
    marked.write_text(
        PLAIN.replace(
            "m.content + '<|im_end|>' }}", "'' }}{% generation %}{{ m.content }}"
        ).replace("{% endfor %}", "<|im_end|>{% endgeneration %}{% endfor %}")
    )
    assert made_in(fresh, str(marked)).examples(ROW, "chat") == made_in(fresh, str(plain)).examples(
        ROW, "chat"
    )


def test_a_rank_file_gives_the_same_characters(tmp_path):
    """Tokens of part of a character begin at it; special tokens of the text count as such."""
    merges = [b"\n\n", b":\n", b":\n\n", b"\xf0\x9f"]
    ranks = {bytes([n]): n for n in range(256)} | {m: 256 + n for n, m in enumerate(merges)}
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    (tmp_path / "a.tiktoken").write_text("".join(lines))
    names = {"<|im_end|>": 300, "<|im_start|>": 301, "<|end|>": 302}
    config = {"special_tokens": names, "eos_token": "<|end|>", "pattern": r"[\s\S]+"}
    (tmp_path / "tiktoken.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text(PLAIN)
    tokenizer = load_tokenizer(str(tmp_path))
    ids, starts = tokenizer.encode_with_starts("é🙂:\n\n<|im_end|>x")
    assert starts == [0, 0, 1, 1, 1, 2, 5, 15] and ids[-2] == 300
    ids, starts = tokenizer.encode_with_starts("a<|im_end|>", special=False)
    assert 300 not in ids and starts == list(range(11))
    (example,) = made_in(tmp_path).examples({"messages": [user("é"), assistant("🙂\n\n")]}, "chat")
    said = [t for t, trained in zip(example.tokens, example.trained, strict=True) if trained]
    assert tokenizer.decode(said) == "🙂\n\n<|im_end|>"


def test_v32_writes_tools_and_results_as_deepseek_does(folder):
    """Pieces of the golden text in the model's repository, with other names."""
    made = renderer(folder, FAMILIES["V3.2"])
    tools = [{"type": "function", "function": {"name": "f", "description": "é"}}]
    messages = [
        {"role": "system", "content": "S"},
        ASKED,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        result("T", "call_0"),
        assistant("A"),
    ]
    written = text(made, {"messages": messages, "tools": tools})
    assert written.startswith("<｜begin▁of▁sentence｜>S\n\n## Tools\n\nYou have access to a set")
    ending = """Here are the functions available in JSONSchema format:
<functions>
{"name": "f", "description": "é"}
</functions>
<｜User｜>probe question<｜Assistant｜></think>

<｜DSML｜function_calls>
<｜DSML｜invoke name="probe">
<｜DSML｜parameter name="x" string="true">1</｜DSML｜parameter>
</｜DSML｜invoke>
</｜DSML｜function_calls><｜end▁of▁sentence｜>

<function_results>
<result>T</result>
</function_results>

</think>A<｜end▁of▁sentence｜>"""
    assert written.endswith(ending)


def test_v32_refuses_results_that_fit_no_call(folder):
    made = renderer(folder, FAMILIES["V3.2"])
    for results, part in ((1, "fewer"), (3, "more")):
        messages = [user("Q"), assistant("", calls=2)]
        messages += [result("T", f"find_{n}") for n in range(results)]
        with pytest.raises(ChatProblem, match=part):
            made.examples({"messages": [*messages, assistant("A")]}, "chat")


def test_v4_sorts_results_by_their_calls(folder):
    made = renderer(folder, FAMILIES["V4"])
    messages = [user("Q"), assistant("", calls=2), result("T1", "find_1"), result("T0", "find_0")]
    written = text(made, {"messages": [*messages, user("More"), assistant("A")]})
    assert "<tool_result>T0</tool_result>\n\n<tool_result>T1</tool_result>\n\nMore" in written


def test_built_in_formats_name_a_wrong_variable(folder):
    made = ChatRenderer(load(folder), str(folder), Chat("deepseek_v4", {"reasoning_effort": "max"}))
    with pytest.raises(UserError, match="no variable reasoning_effort"):
        _ = made.stop_ids
