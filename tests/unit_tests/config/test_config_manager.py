"""Reading a TOML file and a command line: precedence, spellings, any keys and values."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import torchtitan
from torchtitan.config import (
    Chat,
    ConfigManager,
    JobConfig,
    LoRA,
    Metrics,
    Optimizer,
    Quantize,
    Schedule,
    to_dict,
)
from torchtitan.config.manager import deep_merge
from torchtitan.config.schema import KEYS, alternatives, row_type
from torchtitan.tools.errors import UserError


def parse(*argv: str) -> JobConfig:
    return ConfigManager().parse_args(list(argv))


def get(config: JobConfig, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


# ---------------------------------------------------------------------------------------------
# What comes out
# ---------------------------------------------------------------------------------------------


def test_command_line_beats_file_beats_defaults(toml):
    file = toml("[training]\nsteps = 7\nseq_len = 64\n")
    config = parse(file, "--training.steps", "9")
    assert (config.training.steps, config.training.seq_len) == (9, 64)
    assert config.training.local_batch_size == JobConfig().training.local_batch_size
    assert config.job.config_file == file.partition("=")[2]


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse().training.steps = 3


@pytest.mark.parametrize(
    "spelling", [["--job.config_file", "F"], ["--job.config-file=F"], ["--job.config-file", "F"]]
)
def test_config_file_option_has_all_spellings(toml, spelling):
    file = toml("[training]\nsteps = 7\n").partition("=")[2]
    options = [part.replace("F", file) for part in spelling]
    assert parse("--training.seq_len=8", *options).training.steps == 7


@pytest.mark.parametrize(
    "argv, key, value",
    [
        (["--training.local-batch-size", "4"], "training.local_batch_size", 4),
        (["--training.global_batch_size", "-1"], "training.global_batch_size", -1),
        (["--training.steps=1", "--training.steps=2"], "training.steps", 2),
        (["--optimizer.lr", "1"], "optimizer.lr", 1.0),
        (["--metrics.enable_tensorboard"], "metrics.enable_tensorboard", True),
        (["--metrics.enable_tensorboard", "True"], "metrics.enable_tensorboard", True),
        (["--metrics.enable_tensorboard=false"], "metrics.enable_tensorboard", False),
        (["--compile.components", "loss"], "compile.components", ["loss"]),
        (["--compile.components=model,loss"], "compile.components", ["model", "loss"]),
        (["--compile.components", "model", "loss"], "compile.components", ["model", "loss"]),
        (["--compile.components", '["loss"]'], "compile.components", ["loss"]),
        (["--compile.components="], "compile.components", []),
        (["--quantize.grouped_mm.float8.fqns", "experts"], None, ["experts"]),
        (["--job.description", "two words"], "job.description", "two words"),
        (["--job.description=--odd"], "job.description", "--odd"),
        (["--lr_scheduler.decay_ratio=0.5"], "lr_scheduler.decay_ratio", 0.5),
    ],
)
def test_option_spellings(argv, key, value):
    assert get(parse(*argv), key or argv[0][2:]) == value


def test_option_switches_off_what_the_file_switches_on(toml):
    file = toml("[metrics]\nenable_tensorboard = true\n[debug]\nseed = 3\n")
    for off in ("--metrics.no-enable_tensorboard", "--metrics.no_enable-tensorboard"):
        config = parse(file, off, "--debug.seed", "None")
        assert config.metrics.enable_tensorboard is False
        assert config.debug.seed is None


def test_nested_lists_come_from_file_and_command_line(toml):
    parts = [["tok_embeddings", "layers.0"], ["norm", "output"]]
    key = "parallelism.module_fqns_per_model_part"
    file = toml(f"[parallelism]\nmodule_fqns_per_model_part = {json.dumps(parts)}\n")
    assert get(parse(file), key) == parts
    assert get(parse(f"--{key}", json.dumps(parts)), key) == parts
    assert get(parse(file, f"--{key}=None"), key) is None


def test_model_args_merge_deeply_and_keep_toml_types(toml):
    file = toml("[model.args]\nn_layers = 4\n[model.args.moe_args]\nnum_experts = 8\ntop_k = 2\n")
    options = "--model.args.n-layers 6 --model.args.moe_args.top_k=3 --model.args.theta 1e4"
    options += " --model.args.use_flex=true --model.args.mode native --model.args.sizes=[1,2]"
    options += " --model.args.groups None --model.args.rope {factor=40.0}"
    assert parse(file, *options.split()).model.args == {
        "n_layers": 6,
        "moe_args": {"num_experts": 8, "top_k": 3},
        "theta": 10000.0,
        "use_flex": True,
        "mode": "native",
        "sizes": [1, 2],
        "groups": None,
        "rope": {"factor": 40.0},
    }


def test_deep_merge_leaves_its_inputs_alone():
    below, above = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 9}, "d": {"e": 4}}
    assert deep_merge(below, above) == {"a": {"b": 9, "c": 2}, "d": {"e": 4}}
    assert below == {"a": {"b": 1, "c": 2}, "d": 3} and above == {"a": {"b": 9}, "d": {"e": 4}}


def test_saved_config_is_a_config_file(tmp_path):
    options = ["--debug.seed=3", "--model.args.moe_args.top_k=2", "--model.converters=a,b"]
    config = parse(*options)
    saved = tmp_path / "config.json"
    saved.write_text(json.dumps(to_dict(config)))
    again = parse(f"--job.config_file={saved}")
    renamed = dataclasses.replace(config.job, config_file=str(saved))
    assert again == dataclasses.replace(config, job=renamed)


def test_byte_order_mark_and_windows_line_ends_are_fine(toml):
    assert parse(toml(b"\xef\xbb\xbf[training]\r\nsteps = 7\r\n")).training.steps == 7


def test_config_answers_quickly_because_it_leaves_torch_alone():
    code = (
        "import sys; from torchtitan.config import ConfigManager, validate; "
        "validate(ConfigManager().parse_args(['--training.steps=3']), 1); "
        "print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_help_lists_every_key_with_its_sentence(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert [key for key in KEYS if not re.search(rf"--{re.escape(key)}[ ,]", text)] == []
    words = " ".join(re.sub("[│\n]", " ", text).split())
    assert "Peak learning rate, before the factor of lr_scheduler. (default: 0.0008)" in words
    assert "--model.args.moe_args.num_experts 8" in words


def test_the_version_is_printed_and_ends_the_program(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--training.steps", "3", "--version")
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"torchtitan-moe {torchtitan.__version__}\n"


def test_every_key_has_a_sentence():
    modules = {
        kind.__module__ for kind in (Chat, JobConfig, LoRA, Metrics, Optimizer, Quantize, Schedule)
    }
    source = "".join(Path(sys.modules[name].__file__).read_text() for name in modules)
    names = [key.rpartition(".")[2] for key in KEYS]
    rows = [row for key in KEYS.values() if (row := row_type(key.type))]
    names += [field.name for row in rows for field in dataclasses.fields(row)]
    for name in set(names):
        documented = re.findall(rf'^    {name}: .*\n    """[A-Z\w].*\."""$', source, re.MULTILINE)
        assert len(documented) == names.count(name), name


# ---------------------------------------------------------------------------------------------
# Any keys, any values
# ---------------------------------------------------------------------------------------------

# No control characters, which JSON and TOML escape differently; no ~, the home folder in paths.
words = st.text(st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="~"), max_size=8)
plain = st.one_of(st.integers(-(2**63), 2**63 - 1), st.booleans(), words, st.lists(words))
numbers = st.floats(allow_nan=False)
names = st.from_regex(r"[a-z][a-z0-9_]{0,6}", fullmatch=True)


def values_for(kind: Any) -> st.SearchStrategy:
    first = alternatives(kind)[0]
    if row_type(first) is not None:
        return st.just([])  # tables in lists have tests of their own
    if get_origin(first) is Literal:
        return st.sampled_from(get_args(first))
    return {
        bool: st.booleans(),
        int: st.integers(-(2**63), 2**63 - 1),
        float: numbers,
        str: words,
        list[str]: st.lists(words),
        list[list[str]]: st.lists(st.lists(words)),
        dict[str, Any]: st.dictionaries(names, plain | st.dictionaries(names, plain)),
    }[first]


def some_settings() -> st.SearchStrategy[dict[str, Any]]:
    keys = [key for key in KEYS if key != "job.config_file"]
    return st.fixed_dictionaries({}, optional={key: values_for(KEYS[key].type) for key in keys})


def as_toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {as_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(as_toml(item) for item in value) + "]"
    return repr(value) if type(value) is float else json.dumps(value, ensure_ascii=False)


def as_options(flat: dict[str, Any]) -> list[str]:
    def text(value: Any) -> str:
        return value if isinstance(value, str) else as_toml(value)

    return [f"--{key}={text(value)}" for key, value in flat.items()]


def as_file(flat: dict[str, Any]) -> str:
    lines = (f"{key} = {as_toml(value)}" for key, value in flat.items())
    return "\n".join(lines) + "\n"


@settings(max_examples=30, deadline=None)
@given(in_file=some_settings(), on_line=some_settings())
def test_any_settings_come_through_with_command_line_over_file_over_defaults(
    tmp_path_factory, in_file, on_line
):
    path = tmp_path_factory.mktemp("config") / "any.toml"
    path.write_bytes(as_file(in_file).encode())
    # "None" is how the command line unsets a key, so it cannot also be a value there.
    on_line = {key: value for key, value in on_line.items() if value != "None"}
    config = parse(f"--job.config_file={path}", *as_options(on_line))
    expected = {key: entry.default for key, entry in KEYS.items()} | in_file | on_line
    expected["job.config_file"] = str(path)
    expected["model.args"] = deep_merge(
        in_file.get("model.args", {}), on_line.get("model.args", {})
    )
    assert {key: get(config, key) for key in KEYS} == expected


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.one_of(
            words,
            st.sampled_from(
                ["--", "--training", "--training.", "--model.args", "--training.steps"]
            ),
            st.sampled_from(sorted(KEYS)).map(lambda key: f"--{key}"),
            st.tuples(st.sampled_from(sorted(KEYS)), words).map(lambda pair: "--" + "=".join(pair)),
        ),
        max_size=3,
    )
)
def test_any_command_line_gives_a_config_or_one_sentence(argv):
    try:
        assert isinstance(parse(*argv), JobConfig)
    except UserError as error:
        assert str(error).startswith(("command line: ", "job.config_file"))
    except SystemExit as stop:
        assert stop.code == 0 and {"-h", "--help"} & set(argv)


def test_foreign_tables_at_their_defaults_ask_for_nothing(toml):
    option = toml(
        "[fault_tolerance]\nenable = false\n[memory_estimation]\n"
        "[experimental]\ncustom_import = ''\n"
        "[quantize.linear.mx]\nrecipe_name = 'mxfp8_cublas'\nfilter_fqns = ['output']\n"
    )
    config = ConfigManager().parse_args([option])
    assert dataclasses.replace(config, job=JobConfig().job) == JobConfig()


@pytest.mark.parametrize(
    "text", ["[fault_tolerance]\nenable = true", "[experimental]\ncustom_import = 'my.module'"]
)
def test_foreign_tables_that_ask_for_something_are_refused(toml, text):
    with pytest.raises(UserError, match="a table of torchtitan that is not supported here"):
        ConfigManager().parse_args([toml(text)])
