"""Files of torchtitan v0.1 to v0.3 become ours: keys move, comments stay, nothing is lost."""

from pathlib import Path

import pytest
import tomli

from scripts.torchtitan_files.names import LEFT_OUT, REFUSED
from scripts.torchtitan_files.read import flat
from tests.pages import REPO, blocks
from tests.scripts import script
from torchtitan.config import validate
from torchtitan.config.moved_keys import MOVED, MOVED_TABLES
from torchtitan.config.schema import FOREIGN_TABLES, KEYS, TABLES, build
from torchtitan.tools.errors import UserError
from torchtitan.train import main as train

MODEL = '[model]\nname = "deepseek_v3"\n'
FILES = Path(__file__).parent / "torchtitan_files"
tool = script("from_torchtitan.py")


def translated(tmp_path: Path, old: Path) -> dict:
    new = tmp_path / "new.toml"
    assert tool.main([str(old), "-o", str(new)]) == 0
    return flat(tomli.loads(new.read_text()))


def refusal(tmp_path: Path, capsys, text: str) -> str:
    old = tmp_path / "old.toml"
    old.write_text(text)
    assert tool.main([str(old)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


@pytest.mark.parametrize("name, processes", [("v01.toml", 2), ("v02.toml", 8), ("v03.json", 1)])
def test_the_translation_is_a_config_that_can_run(name, processes, tmp_path, monkeypatch, capsys):
    translated(tmp_path, FILES / name)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    config = tmp_path / "new.toml"
    assert train([f"--job.config_file={config}", "--job.check_config"]) == 0
    assert "The config fits" in capsys.readouterr().out


def test_v01(tmp_path, capsys):
    new = translated(tmp_path, FILES / "v01.toml")
    wanted = {
        "job.print_config": True,
        "model.hf_assets_path": "./tests/assets/tokenizer",
        "model.converters": [],
        "optimizer.lr": 6e-4,
        "lr_scheduler.min_lr_factor": 0.1,
        "compile.enable": False,
        "debug.seed": 7,
        "debug.deterministic": True,
        "checkpoint.enable": True,
        "checkpoint.last_save_model_only": True,
        "checkpoint.exclude_from_loading": ["dataloader", "lr_scheduler"],
        "quantize.linear.float8.filter_fqns": ["output"],
    }
    assert {key: new[key] for key in wanted} == wanted
    said = capsys.readouterr().err
    assert "moved     training.seed -> debug.seed\n" in said
    assert "model.converters: mx has no counterpart" in said
    assert "left out  fault_tolerance.enable: " in said
    assert "weight_decay_on" in said and "norm_eps is 1e-6" in said


def test_comments_and_spelling_stay(tmp_path):
    translated(tmp_path, FILES / "v01.toml")
    text = (tmp_path / "new.toml").read_text()
    old = (FILES / "v01.toml").read_text()
    comments = [line.partition("#")[2] for line in old.splitlines() if "#" in line]
    assert [comment for comment in comments if comment not in text] == []
    assert "# one pass is enough here\nsteps = 1_000\n" in text
    assert "# Curves only.\n[metrics]\n" in text
    assert "lr = 6e-4 # half of what exploded\n" in text


# Each line stays as it is; the marked one holds what the translation leaves out.
ODD = """\
# the first line

   # indented, and alone

[ model ]# which one
name="deepseek_v3"   # no spaces around =
converters    =    [   # of GPUs
    # in a list
    "float8",      # eight bits
    "mx", # REMOVED
]   # behind a list
    # below a list

[model.args]
n_layers   = 3	# behind a tab
  dim      = 256

[model . args . moe_args]

  top_k = 2

# empty tables have comments, too
[profiling] # nothing set


# two lines above

# rows
[[ optimizer.group ]] # the first
  # inside
  match   = ["*norm*"]   # a glob
  weight_decay = 0.0

# between two
[[optimizer.group]]

match = [
    "*.wq.*",   # one
    "*.wkv*"    # none behind this
]
lr_factor=0.5 # half

# above a table that goes on

[training]
# two
# lines
steps = 1_000 #three



dataset = "c4_test"

# at the end
"""


def test_every_line_that_is_kept_stays_as_it_was(tmp_path, capsys):
    old = tmp_path / "old.toml"
    old.write_text(ODD)
    assert tool.main([str(old)]) == 0
    kept = [line for line in ODD.splitlines() if "REMOVED" not in line]
    assert capsys.readouterr().out.splitlines() == kept


@pytest.mark.parametrize("name", sorted(p.name for p in REPO.glob("train_configs/*.toml")))
def test_our_own_files_stay_as_they_are(name, tmp_path, capsys):
    text, old = (REPO / "train_configs" / name).read_text(), tmp_path / "old.toml"
    if "name" not in tomli.loads(text)["model"]:
        text = text.replace("[model]\n", MODEL)
    old.write_text(text)
    assert tool.main([str(old)]) == 0
    new = capsys.readouterr().out
    if "attn_mask_type" not in text:  # added, as torchtitan's flavors have it
        table = "" if "[model.args]" in text else "\n[model.args]\n"
        new = new.replace(f'{table}attn_mask_type = "block_causal"\n', "")
    assert new == text


def test_what_moves_leaves_comments_on_other_lines_where_they_were(tmp_path, capsys):
    old = tmp_path / "old.toml"
    old.write_text(
        f"""{MODEL}
# of all runs

[training]   # how long

# chapter one

# the seed
seed  =  7  # prime
steps = 3

# chapter two

# gone with its key
dataloader.pin_memory = true
[mx]
# gone
recipe_name = "x"

# eight bits
[float8]  # moved
# rows
recipe_name = "rowwise"
[debug]
deterministic = true
"""
    )
    assert tool.main([str(old)]) == 0
    assert (
        capsys.readouterr().out
        == f"""{MODEL}
# of all runs

[training]   # how long

# chapter one
steps = 3

# chapter two

# eight bits
[quantize.linear.float8]  # moved
# rows
recipe_name = "rowwise"
[debug]
# the seed
seed  =  7  # prime
deterministic = true
"""
    )


def test_v01_saved_the_optimizer_at_the_end_by_default(tmp_path):
    old = tmp_path / "old.toml"
    lines = (FILES / "v01.toml").read_text().splitlines()
    kept = [line for line in lines if not line.startswith("last_save_model_weights_only")]
    old.write_text("\n".join(kept))
    assert translated(tmp_path, old)["checkpoint.last_save_model_only"] is False


def test_v02(tmp_path, capsys):
    old = flat(tomli.loads((FILES / "v02.toml").read_text()))
    new = translated(tmp_path, FILES / "v02.toml")
    same = {key: value for key, value in old.items() if key in KEYS}
    added = {"training.dataset_num_workers": 2, "model.args.attn_mask_type": "block_causal"}
    assert new == same | added
    said = capsys.readouterr().err
    gone = old.keys() - same.keys()
    assert all(key in said for key in gone)


def test_v03(tmp_path, capsys):
    new = translated(tmp_path, FILES / "v03.json")
    wanted = {
        "model.name": "deepseek_v3",
        "model.flavor": "debugmodel",
        "model.args.attn_mask_type": "block_causal",
        "job.dump_folder": "./outputs/third",
        "job.print_config": True,
        "training.dataset": "c4_test",
        "training.dataset_num_workers": 1,
        "optimizer.name": "AdamW",
        "optimizer.lr": 8e-4,
        "optimizer.beta1": 0.9,
        "optimizer.beta2": 0.95,
        "optimizer.eps": 1e-8,
        "optimizer.weight_decay": 0.1,
        "optimizer.implementation": "fused",
        "optimizer.state_dtype": "bfloat16",
        "activation_checkpoint.mode": "selective",
        "activation_checkpoint.selective_ac_option": "op",
        "validation.dataset": "c4_validation",
        "profiling.profile_freq": 10,
    }
    assert {key: new[key] for key in wanted} == wanted
    assert "left out  override.imports: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("[training]\nsteps = 3\n", "has no model.name"),
        ('[model]\nname = "llama3"\n', "'llama3' is not a model family"),
        ('[model]\nname = "qwen3"\nflavor = "0.6B"\n', "model.flavor '0.6B' is not a flavor"),
        (f"{MODEL}[training]\nseqlen = 3\n", "unknown key 'seqlen' in [training]; did you mean"),
        (f"{MODEL}[checkpoint]\nenable_checkpoints = true\n", "did you mean 'enable_checkpoint'?"),
        (f"{MODEL}[trainin]\nsteps = 3\n", "unknown table [trainin]; did you mean 'training'?"),
        (f'{MODEL}[training]\nsteps = "3"\n', 'training.steps = "3" must be an integer'),
        (f'{MODEL}[experimental]\ncustom_import = "mine"\n', "runs code of yours"),
        (f"{MODEL}[lr_scheduler]\ntotal_steps = 9\n", "set that to it, and stop the run"),
        (
            f'{MODEL}[parallelism]\npipeline_parallel_split_points = ["layers.3"]\n',
            "parallelism.module_fqns_per_model_part",
        ),
        (
            f'{MODEL}[[optimizer.param_groups]]\npattern = ".*norm.*"\n',
            "[[optimizer.group]]",
        ),
        ("x = = 3", "can't be read"),
        ("[model]\nname = 5\n", "5"),
    ],
)
def test_what_can_not_be_translated_is_refused_in_a_sentence(text, sentence, tmp_path, capsys):
    assert sentence in refusal(tmp_path, capsys, text)


WRONG = """\
[model]
name = "deepseek_v3"
flavor = "17B"
[training]
seqlen = 3
steps = "4"
batch_size = 4
local_batch_size = 8
[experimental]
custom_import = "mine"
[lr_scheduler]
total_steps = 9
[[optimizer.group]]
match = "norm"
lr_factr = 2.0
[[optimizer.group]]
weight_decay = 0.0
"""


def test_all_mistakes_of_a_file_are_told_at_once(tmp_path, capsys):
    sentences = [
        "unknown key 'seqlen' in [training]; did you mean",
        'training.steps = "4" must be an integer',
        "training.batch_size and training.local_batch_size are both training.local_batch_size",
        "experimental.custom_import",
        "lr_scheduler.total_steps = 9",
        'optimizer.group 1: match = "norm" must be',
        "optimizer.group 1: unknown key 'lr_factr'; did you mean 'lr_factor'?",
        "optimizer.group 2: match is missing",
        "model.flavor '17B' is not a flavor",
    ]
    lines = refusal(tmp_path, capsys, WRONG).splitlines()
    assert len(lines) == len(sentences)
    for line, sentence in zip(lines, sentences, strict=True):
        assert f"{tmp_path / 'old.toml'}: {sentence}" in line


def test_a_refused_family_is_not_called_missing(tmp_path, capsys):
    said = refusal(tmp_path, capsys, '[model]\nname = "llama3"\n[training]\nstep = 3\n')
    assert len(said.splitlines()) == 2


def test_two_names_of_a_key_with_one_value_become_one_line(tmp_path):
    old = tmp_path / "old.toml"
    old.write_text(f"{MODEL}[training]\nseed = 3\n[debug]\nseed = 3\n")
    assert translated(tmp_path, old)["debug.seed"] == 3


def test_flex_flavors_and_old_tokenizer_files(tmp_path, capsys):
    old = tmp_path / "old.toml"
    old.write_text(
        f'{MODEL}flavor = "debugmodel_flex_attn"\ntokenizer_path = "a/b/tokenizer.model"'
    )
    new = translated(tmp_path, old)
    assert new["model.flavor"] == "debugmodel"
    assert new["model.args.attn_mask_type"] == "block_causal"
    assert new["model.hf_assets_path"] == "a/b"
    assert "download_hf_assets.py" in capsys.readouterr().err


def test_the_tables_of_names_fit_our_keys():
    assert set(MOVED.values()) <= KEYS.keys()
    assert set(MOVED_TABLES.values()) <= TABLES
    ours = (MOVED.keys() | LEFT_OUT.keys()) & KEYS.keys()
    assert ours == {"model.tokenizer_path"}  # which is refused there
    unknown = set(FOREIGN_TABLES) - LEFT_OUT.keys() - {"quantize"} - REFUSED.keys()
    assert unknown == set()


@pytest.mark.parametrize("name", ["float8", "quantize.linear.float8"])
def test_a_converter_stays_where_a_run_on_a_gpu_may_name_it(name, tmp_path):
    old = tmp_path / "old.toml"
    old.write_text(f'{MODEL}converters = ["{name}"]\n')
    new = translated(tmp_path, old)
    config = build({"model.converters": [name]})
    try:
        validate(config, 1, "cuda")
    except UserError:
        config = build({})
    assert new["model.converters"] == config.model.converters


def test_the_page_lists_the_keys_that_moved():
    (block,) = blocks(REPO / "docs/from_torchtitan.md", "")
    listed = dict(line.split() for line in block.splitlines())
    assert listed == MOVED | {f"{old}.*": f"{new}.*" for old, new in MOVED_TABLES.items()}


def test_shipped_files_of_v02_mean_the_same(tmp_path):
    for name in ("debug_model", "671b", "16b"):
        old = REPO / f"tests/unit_tests/config/v02/{name}.toml"
        new = translated(tmp_path, old)
        values = flat(tomli.loads(old.read_text()))
        assert {key: new[key] for key in values} == values


def test_a_moved_key_is_named_where_an_old_file_is_run_as_it_is(tmp_path, capsys):
    assert train([f"--job.config_file={FILES / 'v01.toml'}"]) == 2
    assert "from_torchtitan.py" in capsys.readouterr().err
