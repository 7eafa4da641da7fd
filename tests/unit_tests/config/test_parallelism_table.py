"""docs/parallelism.md says what the validator says."""

from pathlib import Path

import pytest

from torchtitan.config import ConfigManager
from torchtitan.tools.errors import UserError
from torchtitan.trainer.preflight import check_config

PAGE = Path(__file__).parents[3] / "docs/parallelism.md"
MODELS = {
    "V3": ["--model.flavor=671B"],
    "V3, MTP": ["--model.flavor=671B", "--model.args.n_mtp_layers=1"],
    "Qwen3": ["--model.name=qwen3", "--model.flavor=235B-A22B"],
}
KEYS = {
    "pp": "pipeline_parallel_degree",
    "replicate": "data_parallel_replicate_degree",
    "shard": "data_parallel_shard_degree",
    "cp": "context_parallel_degree",
    "tp": "tensor_parallel_degree",
    "ep": "expert_parallel_degree",
    "etp": "expert_tensor_parallel_degree",
}
# What the table calls a refusal, and words of the sentence that the user gets.
SENTENCES = {
    "the product must be the number of processes": "but the number of processes is",
    "tp does not divide the number of processes": "does not divide the number of processes",
    "tp must divide n_heads": "must divide model.args.n_heads (128)",
    "tp must divide n_kv_heads": "must divide model.args.n_kv_heads (4)",
    "`1F1B` needs a micro-batch for each stage": "needs at least as many as stages (16)",
    "etp must be 1 or tp": "must be 1 or parallelism.tensor_parallel_degree",
    "ep must divide dp_shard · cp": "must divide the data-parallel shard degree (8)",
    "ep must divide a replica, or be made of whole ones": "or be a multiple of it that divides",
    "ep must divide num_experts": "must divide the number of experts",
    "seq_len must be a multiple of tp": "training.seq_len = 4096 must be a multiple of 3",
    "seq_len must be a multiple of 2 · cp": "training.seq_len = 4096 must be a multiple of 6",
}


def rows() -> list[dict[str, str]]:
    lines = PAGE.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| model |"))
    cells = [
        [c.strip() for c in line.strip("|").split("|")] for line in lines[start:] if "|" in line
    ]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


@pytest.mark.parametrize("row", rows(), ids=lambda row: " ".join(row.values()))
def test_the_table_of_combinations_is_the_validators(row, monkeypatch, tmp_path):
    processes, model, verdict = row.pop("processes"), MODELS[row.pop("model")], row.pop("")
    monkeypatch.setenv("WORLD_SIZE", processes)
    degrees = [f"--parallelism.{KEYS[name]}={value}" for name, value in row.items()]
    options = [*model, "--training.seq_len=4096", f"--job.dump_folder={tmp_path}"]
    config = ConfigManager().parse_args([*options, *degrees])
    if verdict == "accepted":
        check_config(config)
        return
    with pytest.raises(UserError) as error:
        check_config(config)
    assert SENTENCES[verdict] in str(error.value)
