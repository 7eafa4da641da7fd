"""Pipeline plans: which layers a stage holds, where stages lie, and what is refused."""

import pytest

from torchtitan.config.pipeline import PipelinePlan, plan_pipeline
from torchtitan.config.schema import build
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
            dict(schedule_csv="missing.csv"),
            f"{KEY}schedule_csv missing.csv can't be read (No such file or directory).",
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


def test_a_schedule_file_has_a_line_for_each_rank(tmp_path):
    file = tmp_path / "schedule.csv"
    file.write_text("0F0,0B0\n")
    assert refusal(schedule_csv=str(file)) == (
        f"{KEY}schedule_csv {file} has 1 lines, but it needs one for each rank of {KEY}degree (2)."
    )
