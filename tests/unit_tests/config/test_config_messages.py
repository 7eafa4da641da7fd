"""Each mistake in a file or on the command line is answered with one sentence."""

import dataclasses

import pytest

from torchtitan.config import ConfigManager, JobConfig
from torchtitan.tools.errors import UserError, suggest


def names_in(table) -> str:
    return ", ".join(f"'{name}'" for name in sorted(f.name for f in dataclasses.fields(table)))


@pytest.mark.parametrize(
    "argv, message",
    [
        (
            "--training.stpes 3",
            "--training.stpes: unknown key 'stpes' in [training]; did you mean 'steps'?",
        ),
        (
            "--trainning.steps 3",
            "--trainning.steps: unknown table [trainning]; did you mean 'training'?",
        ),
        ("--wibble 3", f"--wibble: unknown table [wibble]; choose one of {names_in(JobConfig)}."),
        (
            "--training.lr 3",
            "--training.lr: 'lr' is not a key of [training]; it belongs to [optimizer].",
        ),
        (
            "--seq_len 3",
            "--seq_len: 'seq_len' is not a key of the top level; it belongs to [training] or "
            "[validation].",
        ),
        (
            "--training",
            "--training: [training] is a table, not a key; name one of its keys, such as "
            "training.dataset.",
        ),
        (
            "--training.steps.x 3",
            "--training.steps.x: training.steps is a key, not a table; it must be an integer, "
            "for example 10000.",
        ),
        (
            "--fault_tolerance.enable",
            "--fault_tolerance.enable: [fault_tolerance] is a table of torchtitan that is not "
            "supported here; remove it.",
        ),
        ("--training.steps ten", "--training.steps ten must be an integer, for example 10000."),
        ("--training.steps 1e4", "--training.steps 1e4 must be an integer, for example 10000."),
        ("--optimizer.lr fast", "--optimizer.lr fast must be a number, for example 0.0008."),
        (
            "--training.seq_len 8 --debug.seed x --training.steps 2",
            "--debug.seed x must be an integer, for example 1.",
        ),
        (
            "--lr_scheduler.decay_type cosin",
            '--lr_scheduler.decay_type cosin must be "cosine", "linear" or "sqrt".',
        ),
        (
            "--metrics.enable_wandb maybe",
            "--metrics.enable_wandb maybe must be true or false.",
        ),
        (
            "--metrics.no_enable_wandb true",
            "--metrics.enable_wandb true must be true or false.",
        ),
        ("--training.steps", "--training.steps needs a value, as in --training.steps=VALUE."),
        (
            "--job.description two words",
            "--job.description two words takes one value, not 2; put quotes around a value with "
            "spaces.",
        ),
        (
            "--job.description run training.steps=20",
            "training.steps=20 is a key without dashes; write --training.steps=20.",
        ),
        ("training", "'training' is not an option; options look like --training.steps 100."),
        (
            "train.toml",
            "'train.toml' is not an option; name a settings file so: CONFIG_FILE=train.toml "
            "./run_train.sh.",
        ),
        (
            "--model.args 3",
            "--model.args 3 must be a table of numbers, strings, booleans and lists, for example "
            "{ n_layers = 8 }.",
        ),
        (
            "--model.args.day 2024-01-01",
            "--model.args.day 2024-01-01 must be a table of numbers, strings, booleans and lists, "
            "for example { n_layers = 8 }.",
        ),
        (
            "--model.args.n_layers",
            "--model.args.n_layers needs a value, as in --model.args.n_layers=VALUE.",
        ),
        (
            "--parallelism.module_fqns_per_model_part a,b",
            "--parallelism.module_fqns_per_model_part a,b must be a list of lists of strings, for "
            'example [["tok_embeddings", "layers.0"], ["layers.1", "norm", "output"]].',
        ),
    ],
)
def test_wrong_option_says_so_in_one_sentence(argv, message, capfd):
    with pytest.raises(UserError) as error:
        ConfigManager().parse_args(argv.split())
    assert str(error.value) == f"command line: {message}"
    assert capfd.readouterr() == ("", ""), "tyro's own box must not appear beside the sentence"


@pytest.mark.parametrize(
    "text, message",
    [
        ("[training]\nstpes = 3", "unknown key 'stpes' in [training]; did you mean 'steps'?"),
        ("[trainning]\nsteps = 3", "unknown table [trainning]; did you mean 'training'?"),
        ("[training]\nlr = 3", "'lr' is not a key of [training]; it belongs to [optimizer]."),
        ("lr = 3", "'lr' is not a key of the top level; it belongs to [optimizer]."),
        (
            "[quantize.linear.flaot8]\nemulate = true",
            "unknown table [flaot8] in [quantize.linear]; did you mean 'float8'?",
        ),
        (
            "[training.optimizer]\nlr = 3",
            "unknown table [optimizer] in [training]; choose one of "
            + names_in(JobConfig().training)
            + ".",
        ),
        ("training = 3", "training = 3 must be a table, written [training]."),
        ("[training]\nsteps = '3'", 'training.steps = "3" must be an integer, for example 10000.'),
        (
            "[training]\nsteps = 1e4",
            "training.steps = 10000.0 must be an integer, for example 10000.",
        ),
        (
            "[training]\nsteps = true",
            "training.steps = true must be an integer, for example 10000.",
        ),
        ("[optimizer]\nlr = true", "optimizer.lr = true must be a number, for example 0.0008."),
        (
            "[metrics]\nenable_tensorboard = 1",
            "metrics.enable_tensorboard = 1 must be true or false.",
        ),
        (
            "[activation_checkpoint]\nselective_ac_option = 2",
            'activation_checkpoint.selective_ac_option = 2 must be a string, for example "2".',
        ),
        (
            "[compile]\ncomponents = 'loss'",
            'compile.components = "loss" must be a list of strings, for example ["model", "loss"].',
        ),
        (
            "[training]\ndtype = 'bf16'",
            'training.dtype = "bf16" must be "bfloat16" or "float32".',
        ),
        (
            "[model.args]\nday = 2024-01-01",
            'model.args = {"day": "2024-01-01"} must be a table of numbers, strings, booleans and '
            "lists, for example { n_layers = 8 }.",
        ),
        *(
            (
                f"[{table}]\nenable = true",
                f"[{table}] is a table of torchtitan that is not supported here; remove it.",
            )
            for table in ("experimental", "fault_tolerance", "memory_estimation")
        ),
        *(
            (
                f"[{table}]\nfoo = []",
                f"[{table}] is a table of torchtitan that is not supported here; remove it.",
            )
            for table in ("quantize.linear.mx", "quantize.grouped_mm.mx")
        ),
    ],
)
def test_wrong_entry_of_a_file_says_so_in_one_sentence(toml, text, message):
    option = toml(text)
    with pytest.raises(UserError) as error:
        ConfigManager().parse_args([option])
    assert str(error.value) == f"{option.partition('=')[2]}: {message}"


def test_unreadable_files_are_named_with_the_line(toml, tmp_path):
    with pytest.raises(UserError, match=r"run\.toml is not valid TOML: .*line 2.*\."):
        ConfigManager().parse_args([toml("[training]\nsteps = \n")])
    with pytest.raises(UserError, match=r"run\.json is not valid JSON: .*line 1.*\."):
        ConfigManager().parse_args([toml("{", "run.json")])
    with pytest.raises(UserError, match="run.json must hold a JSON object with one entry per tab"):
        ConfigManager().parse_args([toml("[]", "run.json")])
    with pytest.raises(UserError) as error:
        ConfigManager().parse_args([toml(b"[job]\n\ndescription = '\xff'\n")])
    assert str(error.value) == (
        f"{tmp_path}/run.toml is not UTF-8 text (at line 3), which TOML requires; save it as UTF-8."
    )


def test_missing_file_names_its_neighbour(toml, tmp_path):
    toml("", "debug_model.toml")
    with pytest.raises(UserError) as error:
        ConfigManager().parse_args([f"--job.config_file={tmp_path}/debug_modle.toml"])
    assert str(error.value) == (
        f"job.config_file {tmp_path}/debug_modle.toml does not exist; "
        f"did you mean {tmp_path}/debug_model.toml?"
    )
    with pytest.raises(UserError, match="cannot be read .*; name a readable TOML file"):
        ConfigManager().parse_args([f"--job.config_file={tmp_path}"])


def test_suggest_gives_the_nearest_name_or_all():
    assert suggest("adamw", ["Adam", "AdamW"]) == "; did you mean 'AdamW'?"
    assert suggest("zebra", ["b", "a"]) == "; choose one of 'a', 'b'."
    assert suggest("zebra", []) == "."
