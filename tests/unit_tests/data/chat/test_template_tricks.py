"""Habits of published templates, one in each small template of our own: masked exactly, or refused.

docs/finetuning.md has the published ones that were compared, and how.
"""

import pytest

from tests.unit_tests.data.chat.families import (
    EOS,
    Family,
    assistant,
    renderer,
    result,
    runs,
    user,
)
from torchtitan.data.chat import ChatProblem, problems

ASKED = [user("Q1"), assistant("A1"), user("Q2"), assistant("A2")]
REASONED = [user("Q1"), assistant("A1", "R1"), user("Q2"), assistant("A2", "R2")]
CALLED = [user("Q"), assistant("", calls=1), result("T", "find_0"), assistant("A")]


@pytest.fixture
def trained(folder, tokenizer, tmp_path):
    """trained(template, messages): per example the runs of trained text."""

    def run(template: str, messages: list[dict], **settings) -> list[list[str]]:
        path = tmp_path / "template.jinja"
        path.write_text("\n".join(line.strip() for line in template.strip().splitlines()))
        made = renderer(folder, Family(str(path)), **settings)
        examples = made.examples({"messages": messages}, "chat")
        return [runs(tokenizer, example) for example in examples]

    return run


# DeepSeek-V3-0324 and R1-0528: the opener stands behind each user turn, asked for or not.
OPENER_WITH_THE_USER = """
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{- '<｜User｜>' + m.content + '<｜Assistant｜>' -}}
{%- else -%}{{- m.content + '<｜end▁of▁sentence｜>' -}}{%- endif -%}
{%- endfor -%}
{{- '<｜Assistant｜>' if add_generation_prompt and messages[-1].role != 'user' else '' -}}
"""


def test_an_opener_that_the_user_turn_brings_is_no_answer(trained):
    assert trained(OPENER_WITH_THE_USER, ASKED) == [["A1" + EOS, "A2" + EOS]]


# Qwen3.5: the prompt opens the tag, and without reasoning the turn closes it at once.
TAG_IN_THE_PROMPT = """
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if m.role == 'assistant' and loop.last -%}
{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- m.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n<think>\\n' -}}
{%- if QUIET -%}{{- '\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
"""
QUIET = "enable_thinking is defined and not enable_thinking"


def test_a_pair_of_which_the_prompt_holds_half_stays_out(trained):
    template = TAG_IN_THE_PROMPT.replace("QUIET", QUIET)
    assert trained(template, ASKED) == [["A1<|im_end|>"], ["A2<|im_end|>"]]
    said = [[f"R{n}\n</think>\n\nA{n}<|im_end|>"] for n in "12"]
    assert trained(template, REASONED) == said


def test_without_a_mode_for_it_the_white_space_behind_the_pair_is_trained(trained):
    """StepFun: no setting makes a prompt with the whole pair."""
    template = TAG_IN_THE_PROMPT.replace("QUIET", "false")
    assert trained(template, ASKED) == [["\n\nA1<|im_end|>"], ["\n\nA2<|im_end|>"]]


# DeepSeek-R1: the prompt opens the tag, and no turn has it.
TAG_IN_THE_PROMPT_ALONE = """
{%- for m in messages -%}
{{- ('<｜User｜>' if m.role == 'user' else '<｜Assistant｜>') + m.content -}}
{{- '' if m.role == 'user' else '<｜end▁of▁sentence｜>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<｜Assistant｜><think>\\n' -}}{%- endif -%}
"""


@pytest.mark.parametrize("messages", [ASKED, REASONED], ids=["plain", "reasoned"])
def test_a_turn_without_the_tag_that_its_prompt_opens_is_refused(trained, messages):
    with pytest.raises(ChatProblem, match=problems.PROMPT_DIFFERS):
        trained(TAG_IN_THE_PROMPT_ALONE, messages)


# Kimi-K2 of llama.cpp's first copy, R1's distillates: calls are left out without a word.
WITHOUT_CALLS = """
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def test_calls_that_the_template_leaves_out_are_refused(trained):
    with pytest.raises(ChatProblem, match=problems.CALLS_DROPPED):
        trained(WITHOUT_CALLS, CALLED)
    assert trained(WITHOUT_CALLS, CALLED, turns="last") == [["A<|im_end|>"]]
    assert trained(WITHOUT_CALLS, ASKED) == [["A1<|im_end|>", "A2<|im_end|>"]]


# DeepSeek-V3 of 2024: a flag that is never taken back, so that later calls have no opener.
OPENER_ONCE = """
{%- set ns = namespace(called=false) -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' and m.tool_calls -%}
{{- '\\n' if ns.called else '<｜Assistant｜>' -}}{%- set ns.called = true -%}
{{- m.tool_calls[0].function.name + '<｜end▁of▁sentence｜>' -}}
{%- elif m.role == 'assistant' -%}{{- '<｜Assistant｜>' + m.content + '<｜end▁of▁sentence｜>' -}}
{%- else -%}{{- '<｜User｜>' + m.content -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<｜Assistant｜>' -}}{%- endif -%}
"""


def test_a_second_call_without_its_opener_is_refused(trained):
    assert trained(OPENER_ONCE, CALLED) == [["find_0" + EOS, "A" + EOS]]
    with pytest.raises(ChatProblem, match=problems.PROMPT_DIFFERS):
        trained(OPENER_ONCE, CALLED + CALLED)


# Phi-3.5: behind the end of the last turn stands the end of the text.
TEXT_ENDS = """
{%- for m in messages -%}{{- '<|' + m.role + '|>' + m.content + '<|im_end|>\\n' -}}{%- endfor -%}
{{- '<|assistant|>' if add_generation_prompt else eos_token -}}
"""


def test_an_end_of_the_text_behind_the_turns_end_is_not_trained(trained):
    assert trained(TEXT_ENDS, ASKED) == [["A1<|im_end|>"], ["A2<|im_end|>"]]


# Kimi-K2-Thinking, GLM-5.3: macros, loops backwards that break, results sorted by their calls.
LOOPS = """
{%- macro said(m) -%}{{- m.get('content') or '' -}}{%- endmacro -%}
{%- set ns = namespace(last=-1) -%}
{%- for n in range(messages | length - 1, -1, -1) -%}
{%- if messages[n].role == 'user' -%}{%- set ns.last = n -%}{%- break -%}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == (loop.previtem or {}).role -%}{%- continue -%}{%- endif -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if m.role == 'tool' -%}
{%- for call in messages[loop.index0 - 1].tool_calls -%}
{%- for r in messages if r.tool_call_id == call.id -%}{{- said(r) -}}{%- endfor -%}
{%- endfor -%}
{%- elif m.role == 'assistant' -%}
{%- if loop.index0 > ns.last and m.reasoning_content -%}
{{- '<think>' + m.reasoning_content + '</think>' -}}
{%- endif -%}
{{- said(m) -}}{%- for call in m.tool_calls or [] -%}{{- call.id -}}{%- endfor -%}
{%- else -%}{{- said(m) -}}{%- endif -%}
{{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def test_loops_that_break_and_results_in_another_order_are_followed(trained):
    results = [result("T1", "find_1"), result("T0", "find_0")]
    messages = [user("Q"), assistant("", "R1", calls=2), *results, assistant("A", "R2")]
    calls, answer = "<think>R1</think>find_0find_1<|im_end|>", "<think>R2</think>A<|im_end|>"
    assert trained(LOOPS, messages) == [[calls, answer]]
    more = [*messages, user("Q2"), assistant("A2")]
    assert trained(LOOPS, more) == [[calls, answer], ["A2<|im_end|>"]]


# Kimi-K2 of llama.cpp: a list that grows, which transformers' sandbox forbids as ours does.
QUEUE = """
{%- set ns = namespace(ids=[]) -%}
{%- for m in messages -%}
{%- for call in m.tool_calls or [] -%}{%- set _ = ns.ids.append(call.id) -%}{%- endfor -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def test_a_template_that_changes_a_list_is_refused_where_it_does(trained):
    assert trained(QUEUE, ASKED) == [["A1<|im_end|>", "A2<|im_end|>"]]
    with pytest.raises(ChatProblem, match=problems.TEMPLATE_REFUSED):
        trained(QUEUE, CALLED)
