"""The flavor "from_hf", and the page's table of Hugging Face's names and ours."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from scripts.cards.official import PUBLISHED, QWEN3, QWEN3_MOE, V2, V3, YARN
from tests.pages import REPO
from tests.unit_tests.models.test_hf_configs import FLAVORS, adapter_of
from torchtitan.components.huggingface.sizes import flavor_of, without_folder
from torchtitan.config import ConfigManager, JobConfig
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.errors import UserError
from torchtitan.train import main
from torchtitan.trainer.preflight import model_args_of

SHIPPED = REPO / "tests/assets/tokenizer"


def folder_of(path: Path, hf_config: dict | None) -> Path:
    path.mkdir(exist_ok=True)
    for file in SHIPPED.iterdir():
        if file.name != "config.json":
            (path / file.name).write_bytes(file.read_bytes())
    if hf_config is not None:
        (path / "config.json").write_text(json.dumps(hf_config))
    return path


def config_of(folder: Path, *options: str, name: str = "deepseek_v3") -> JobConfig:
    return ConfigManager().parse_args(
        [f"--model.name={name}", "--model.flavor=from_hf", f"--model.hf_assets_path={folder}"]
        + list(options)
    )


@pytest.mark.parametrize("flavor", PUBLISHED)
def test_a_published_folder_gives_the_flavor_of_that_name(flavor, tmp_path):
    published = PUBLISHED[flavor]
    name = "qwen3" if published["model_type"].startswith("qwen3") else "deepseek_v3"
    config = config_of(folder_of(tmp_path, published), name=name)
    args = flavor_of(config, get_train_spec(name))
    ours = FLAVORS[flavor]
    free = {"max_seq_len": ours.max_seq_len, "init_std": ours.init_std}
    # What is without effect: YaRN's numbers without YaRN, a dense model's experts.
    if not published["rope_scaling"] and name == "deepseek_v3":
        free |= {key: getattr(ours, key) for key in ours.yarn_numbers}
    assert dataclasses.replace(args, **free) == ours


TOY = V3 | {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}


def test_a_run_takes_them_and_the_command_line_wins(tmp_path, capsys):
    folder = folder_of(tmp_path / "hf", TOY)
    options = ["--training.dataset=sample", "--model.args.n_layers=3", "--job.check_config"]
    options += ["--model.flavor=from_hf", f"--model.hf_assets_path={folder}"]
    assert main(options) == 0
    assert "deepseek_v3 from_hf with " in capsys.readouterr().out
    config = config_of(folder, "--model.args.n_layers=3")
    args = model_args_of(config, get_train_spec("deepseek_v3"), 128)
    assert (args.n_layers, args.dim, args.moe_args.num_experts) == (3, 64, 8)
    assert not args.use_yarn  # 128 tokens need none


@pytest.mark.parametrize("published", [TOY, QWEN3_MOE, V2], ids=["V3", "Qwen3", "V2"])
def test_the_same_model_can_be_spelled_out_without_the_folder(published, tmp_path):
    name = "qwen3" if published["model_type"].startswith("qwen3") else "deepseek_v3"
    spec = get_train_spec(name)
    config = config_of(folder_of(tmp_path, published), name=name)
    args = model_args_of(config, spec, 64)
    spelled = without_folder(config, spec, args)
    assert spelled.model.flavor != "from_hf"
    assert model_args_of(spelled, spec, 64) == args


@pytest.mark.parametrize(
    "hf_config, sentence",
    [
        (None, "but .* has none; name the folder of the model"),
        (QWEN3, "another family, 'qwen3': set model.name to 'qwen3'"),
        (V3 | {"model_type": "deepseek_v32"}, "model_type 'deepseek_v32', which no family here"),
        (V3 | {"index_topk": 2048}, "config.json has index_topk = 2048, which is not supported"),
    ],
)
def test_what_can_not_be_read_is_refused_in_a_sentence(hf_config, sentence, tmp_path):
    folder = folder_of(tmp_path, hf_config)
    with pytest.raises(UserError, match=sentence) as caught:
        flavor_of(config_of(folder), get_train_spec("deepseek_v3"))
    assert 'model.flavor = "from_hf"' in str(caught.value)


# ---------------------------------------------------------------------------------------------
# The page's table
# ---------------------------------------------------------------------------------------------


def rows_of_page() -> dict[str, set[str]]:
    """Our names by Hugging Face's."""
    text = (REPO / "docs/huggingface.md").read_text()
    table = text[text.index("## Names of sizes") :].split("\n\n")[2]
    found: dict[str, set[str]] = {}
    for line in table.splitlines()[2:]:
        theirs, ours = (re.findall(r"`([\w.]+)`", cell) for cell in line.split("|")[1:3])
        for name in theirs:
            found.setdefault(name, set()).update(ours)
    return found


def flat(args) -> dict:
    found = {}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        inner = dataclasses.is_dataclass(value)
        found |= (
            {f"{field.name}.{k}": v for k, v in flat(value).items()}
            if inner
            else {field.name: value}
        )
    return found


# Keys that must change together with MLA.
TOGETHER = {"num_attention_heads": "num_key_value_heads"}
# Other values of keys that are no numbers.
OTHERS = {"q_lora_rank": [32], "rope_scaling": [None], "model_type": ["deepseek_v2"]}


def changes(config: dict) -> list[tuple[str, dict]]:
    found = []
    for key, value in config.items():
        values = OTHERS.get(key, [])
        if type(value) in (int, float):
            values = [value * 2, value / 2 if value % 2 or value == 1 else value // 2]
        elif type(value) is bool:
            values = [not value]
        for other in values:
            is_mla = "kv_lora_rank" in config
            together = {TOGETHER[key]: other} if key in TOGETHER and is_mla else {}
            found.append((key, config | {key: other} | together))
    for key, value in (config.get("rope_scaling") or {}).items():
        if type(value) in (int, float):
            table = config["rope_scaling"] | {key: value * 2}
            found.append((f"rope_scaling.{key}", config | {"rope_scaling": table}))
    return found


def effects(config: dict) -> dict[str, set[str]]:
    """Arguments that change with each key of a config.json, one key at a time."""
    Adapter = adapter_of(config)
    before, found = flat(Adapter.args_of(config)), {}
    for key, changed in changes(config):
        try:
            after = flat(Adapter.args_of(changed))
        except UserError:
            continue
        differing = {name for name in after if after[name] != before[name]}
        if differing:
            found.setdefault(key, set()).update(differing)
    return found


def test_the_table_of_names_is_what_the_code_reads():
    yarn = YARN | {"attention_factor": 1.0, "truncate": True}
    read: dict[str, set[str]] = {}
    for config in (V3 | {"rope_scaling": yarn}, V2, QWEN3, QWEN3_MOE):
        for key, names in effects(config).items():
            read.setdefault(key, set()).update(names)
    assert rows_of_page() == read
