"""Pipeline plans: which layers a stage holds, where stages lie, and what is refused."""

import pytest

from torchtitan.config.schema import build
from torchtitan.distributed.pipeline_plan import PipelinePlan, plan_pipeline
from torchtitan.tools.errors import UserError

KEY = "parallelism.pipeline_parallel_"


def plan(num_layers: int = 8, batch: int = 8, *, degree: int = 2, **values) -> PipelinePlan:
    keys = {f"{KEY}{name}": value for name, value in values.items() if name != "others"}
    config = build({f"{KEY}degree": degree} | keys | values.get("others", {}))
    return plan_pipeline(config.parallelism, num_layers=num_layers, local_batch_size=batch)


def refusal(*args, **values) -> str:
    with pytest.raises(UserError) as error:
        plan(*args, **values)
    return str(error.value)


def layers_of(stages: tuple[tuple[str, ...], ...]) -> list[int]:
    return [sum(name.startswith("layers.") for name in stage) for stage in stages]


@pytest.mark.parametrize(
    "values, expected",
    [
        (dict(), [4, 4]),
        (dict(first_stage_less_layers=0), [5, 3]),
        (dict(degree=4), [2, 3, 2, 1]),
        (dict(schedule="Interleaved1F1B"), [2, 3, 2, 1]),
        (dict(schedule="Interleaved1F1B", layers_per_stage=1, num_layers=6), [0] + [1] * 6 + [0]),
    ],
)
def test_layers_are_shared_evenly_and_ends_have_less(values, expected):
    stages = plan(**values).stages
    assert layers_of(stages) == expected
    assert stages[0][0] == "tok_embeddings" and stages[-1][-2:] == ("norm", "output")
    everything = [name for stage in stages for name in stage]
    layers = [f"layers.{i}" for i in range(sum(expected))]
    assert everything == ["tok_embeddings", *layers, "norm", "output"]


def test_stages_go_around_the_ranks_or_there_and_back():
    looped = plan(schedule="Interleaved1F1B", degree=2)
    assert [looped.stages_of(rank) for rank in range(2)] == [[0, 2], [1, 3]]
    there_and_back = plan(schedule="DualPipeV", degree=2)
    assert [there_and_back.stages_of(rank) for rank in range(2)] == [[0, 3], [1, 2]]
    assert there_and_back.rank_of(3) == 0


@pytest.mark.parametrize(
    "values, sentence",
    [
        (
            dict(schedule="1f1b"),
            f"{KEY}schedule = '1f1b' is not a schedule; did you mean '1F1B'?",
        ),
        (
            dict(microbatch_size=3),
            f"{KEY}microbatch_size = 3 must divide training.local_batch_size (8); set it to 2 or "
            "4.",
        ),
        (
            dict(batch=1),
            f"{KEY}schedule '1F1B' needs at least as many as stages (2) micro-batches, but "
            f"training.local_batch_size over {KEY}microbatch_size (1) makes 1; change "
            "training.local_batch_size.",
        ),
        (
            dict(schedule="DualPipeV", batch=2),
            f"{KEY}schedule 'DualPipeV' needs at least as many as stages (4) micro-batches, but "
            f"training.local_batch_size over {KEY}microbatch_size (1) makes 2; change "
            "training.local_batch_size.",
        ),
        (
            dict(schedule="Interleaved1F1B", batch=5),
            f"{KEY}schedule 'Interleaved1F1B' needs a multiple of {KEY}degree (2), or fewer than "
            f"twice as many micro-batches, but training.local_batch_size over "
            f"{KEY}microbatch_size (1) makes 5; change training.local_batch_size.",
        ),
        (
            dict(num_layers=2, degree=8),
            f"8 pipeline stages ({KEY}degree 8) are too many for model.args.n_layers (2) with 1 "
            f"less on the first and 1 less on the last: lower the degree, raise "
            f"{KEY}layers_per_stage, or set {KEY}first_stage_less_layers and "
            "last_stage_less_layers to 0.",
        ),
        (
            dict(layers_per_stage=3),
            f"{KEY}layers_per_stage makes 4 stages, but their number must be {KEY}degree (2): "
            "'1F1B' has one stage a rank; change either.",
        ),
        (
            dict(schedule="ZBVZeroBubble", layers_per_stage=2, num_layers=10),
            f"{KEY}layers_per_stage makes 6 stages, but their number must be twice {KEY}degree "
            "(2): 'ZBVZeroBubble' has two stages a rank; change either.",
        ),
        (
            dict(layers_per_stage=4, num_layers=9),
            f"{KEY}layers_per_stage makes 3 stages, but their number must be a multiple of "
            f"{KEY}degree (2); change either.",
        ),
        (dict(layers_per_stage=0), f"{KEY}layers_per_stage = 0 must be 1 or more."),
        (
            dict(first_stage_less_layers=-1),
            f"{KEY}first_stage_less_layers = -1 must be 0 or more.",
        ),
        (
            dict(
                schedule="DualPipeV",
                others={"parallelism.fsdp_reshard_after_forward": "always"},
            ),
            'parallelism.fsdp_reshard_after_forward = "always" frees weights between the two '
            f"pieces of the backward pass of {KEY}schedule 'DualPipeV': set it to "
            '"default" or "never".',
        ),
    ],
)
def test_what_cannot_run_is_refused(values, sentence):
    assert refusal(**values) == sentence


@pytest.mark.parametrize(
    "parts, words",
    [
        ([["tok_embeddings", "layer.0"], ["layers.1", "norm", "output"]], "did you mean 'layers.0"),
        ([["tok_embeddings", "layers.0"], ["norm", "output"]], "leaves out 'layers.1'"),
        ([["layers.0", "tok_embeddings"], ["layers.1", "norm", "output"]], "out of order"),
        ([["tok_embeddings", "layers.0", "layers.1", "norm", "output"], []], "empty part"),
        ([["tok_embeddings", "layers.0", "layers.1", "norm", "output"]], "makes 1 stages"),
    ],
)
def test_listed_modules_must_be_all_of_the_model_in_order(parts, words):
    sentence = refusal(2, others={"parallelism.module_fqns_per_model_part": parts})
    assert sentence.startswith("parallelism.module_fqns_per_model_part") and words in sentence


def test_a_schedule_file_says_how_many_stages_there_are_and_where(tmp_path):
    file = tmp_path / "schedule.csv"
    # Two neighbouring stages a rank; empty cells and lines mean nothing.
    file.write_text("0F0,1F0,,,,,1I0, 0B0,1W0\n\n,,2F0,3F0,3B0,2B0\n")
    made = plan(batch=1, schedule_csv=str(file))
    assert made.schedule == str(file)
    assert layers_of(made.stages) == [2, 3, 2, 1]
    assert [made.stages_of(rank) for rank in range(2)] == [[0, 1], [2, 3]]
    assert made.file.cells[0] == ("0F0", "1F0", "1I0", "0B0", "1W0")


GOOD = ["0F0,0F1,0B0,0B1", "1F0,1B0,1F1,1B1"]
ORDER = (
    ": F needs F of the stage before it, B and I need F, and B or I of the stage after it, W "
    "needs I."
)


@pytest.mark.parametrize(
    "lines, sentence",
    [
        (None, "can't be read (No such file or directory); name a readable file."),
        (b"\xff\xfe", "is not a file of comma-separated values; name one, or leave it out."),
        (GOOD[:1], f"has 1 lines, but it needs one for each rank of {KEY}degree (2)."),
        (
            [GOOD[0], "1F0,1X0,1F1,1B1"],
            ": rank 1 has '1X0', which is not a pass; write the stage, F, B, I or W, and the "
            "micro-batch, such as '0F0'.",
        ),
        (
            ["0F0,0SEND_F0,0B0", GOOD[1]],
            ": rank 0 has '0SEND_F0', which is not a pass; write the stage, F, B, I or W, and the "
            "micro-batch, such as '0F0'.",
        ),
        (
            ["0F0,0B0", "1F0,1B0"],
            "is for 1 micro-batches, but training.local_batch_size over "
            f"{KEY}microbatch_size makes 2; change either.",
        ),
        (
            [GOOD[0], "1F0,1B0,0F1,1B1"],
            "has passes of stage 0 on rank 0 and on rank 1; a stage must be on one rank.",
        ),
        (
            [GOOD[0], "1F0,1B0,1F1"],
            "must have '1F1' once, and either '1B1' once or '1I1' and '1W1' once each; it has 1, "
            "and 0 or 0 and 0.",
        ),
        (
            ["0F0,0F0,0F1,0B0,0B1", GOOD[1]],
            "must have '0F0' once, and either '0B0' once or '0I0' and '0W0' once each; it has 2, "
            "and 1 or 0 and 0.",
        ),
        (
            [GOOD[0], "1F0,1I0,1F1,1B1"],
            "must have '1F0' once, and either '1B0' once or '1I0' and '1W0' once each; it has 1, "
            "and 0 or 1 and 0.",
        ),
        # Rank 0 wants a gradient of micro-batch 1 before it has sent it.
        (
            ["0F0,0B1,0F1,0B0", GOOD[1]],
            "would deadlock, with rank 0 at '0B1' and rank 1 at '1F1'" + ORDER,
        ),
        # Both passes of a pair are there or neither is.
        (
            [GOOD[0], "(1F0;1B0)OVERLAP_F_B,1F1,1B1"],
            "would deadlock, with rank 0 at '0B0' and rank 1 at '(1F0;1B0)OVERLAP_F_B'" + ORDER,
        ),
    ],
)
def test_a_schedule_file_that_cannot_run_is_refused(lines, sentence, tmp_path):
    file = tmp_path / "schedule.csv"
    if lines is not None:
        file.write_bytes(lines if isinstance(lines, bytes) else "\n".join(lines).encode())
    start = f"{KEY}schedule_csv {file}"
    space = "" if sentence.startswith(":") else " "
    assert refusal(batch=2, schedule_csv=str(file)) == f"{start}{space}{sentence}"


def test_a_schedule_file_and_the_other_keys_must_agree(tmp_path):
    file = tmp_path / "schedule.csv"
    file.write_text("0F0,0I0,0W0\n1F0,1B0")
    assert refusal(batch=1, schedule_csv=str(file), layers_per_stage=3) == (
        f"{KEY}layers_per_stage makes 4 stages, but their number must be that of "
        f"{KEY}schedule_csv {file} (2); change either."
    )
    always = {"parallelism.fsdp_reshard_after_forward": "always"}
    assert refusal(batch=1, schedule_csv=str(file), others=always) == (
        'parallelism.fsdp_reshard_after_forward = "always" frees weights between the two pieces of '
        f'the backward pass of {KEY}schedule_csv \'{file}\': set it to "default" or "never".'
    )
    file.write_text("0F0,2F0,2B0,0B0\n1F0,1B0")
    assert refusal(batch=1, schedule_csv=str(file)) == (
        f"{KEY}schedule_csv {file} makes 3 stages, but their number must be a multiple of "
        f"{KEY}degree (2); change either."
    )
