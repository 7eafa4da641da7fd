"""The house: imports point down, and the model families stay apart from what spreads them."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "torchtitan"
# A folder may import what stands before it; what has the same number stands side by side.
HEIGHT = {
    "tools": 0,
    "ops": 1,
    "config": 1,
    "protocols": 2,
    "distributed": 3,
    "models": 4,
    "data": 4,
    "components": 5,
    "report": 6,
    "trainer": 7,
    "planning": 8,
    "proof": 8,
    "train": 9,
}
# The same inside a folder.
ROOMS = {
    "config": {
        "data_tables": 0,
        "lora_tables": 0,
        "moved_keys": 0,
        "optimizer_tables": 0,
        "quantize_tables": 0,
        "router_stats": 0,
        "schedule_tables": 0,
        "metrics_tables": 1,
        "job_config": 2,
        "degrees": 3,
        "dry_run": 3,
        "schema": 3,
        "phases": 4,
        "blend": 5,
        "rules": 6,
        "manager": 7,
        "__init__": 8,
    },
    "components": {
        "cuda_graph": 0,
        "generation": 0,
        "huggingface": 0,
        "loss": 0,
        "metrics": 0,
        "optimizer": 0,
        "quantize": 0,
        "finetuning": 1,
        "checkpoint": 2,
        "validate": 2,
        "dump_folder": 3,
    },
}
# Folders that don't know each other, whatever their height.
STRANGERS = {("components", "models")}
# What families share, each on those before it.
SHARED = ("moe", "decoder")
MAY_DISTRIBUTE = {"parallelize.py", "__init__.py"}


def imports(path: Path) -> set[str]:
    """Modules of ours that a file imports, type checking included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("torchtitan.")}


def violations(path: Path, root: Path = ROOT) -> list[str]:
    where = path.relative_to(root)
    own = where.parts[0].removesuffix(".py")
    wrong = []
    for module in sorted(imports(path)):
        _, other, *rest = module.split(".")
        above = HEIGHT[other] >= HEIGHT[own] and other != own
        above |= (own, other) in STRANGERS
        if own == other and own in ROOMS and len(where.parts) > 1:
            rooms, room = ROOMS[own], where.parts[1].removesuffix(".py")
            above = rest[0] in rooms and rest[0] != room and rooms[rest[0]] >= rooms[room]
        if own == "models" and other == "models":
            family, other_family = where.parts[1], rest[0] if rest else ""
            below = SHARED[: SHARED.index(family)] if family in SHARED else SHARED
            above = other_family not in (family, *below)
        if own == "models" and other == "distributed":
            above = where.name not in MAY_DISTRIBUTE
        if above:
            wrong.append(f"{where} imports {module}")
    return wrong


SOURCES = [path for path in ROOT.rglob("*.py") if len(path.relative_to(ROOT).parts) > 1] + [
    path for path in ROOT.glob("*.py") if path.name != "__init__.py"
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    assert violations(path) == []


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("ops/x.py", "import torchtitan.models.moe"),
        ("config/x.py", "from torchtitan.distributed import ParallelDims"),
        ("components/x.py", "from torchtitan.models.moe import MoE"),
        ("components/metrics/x.py", "from torchtitan.components.checkpoint import folder"),
        ("config/schema.py", "from torchtitan.config.rules import validate"),
        ("components/loss.py", "from torchtitan.components.validate import Validator"),
        ("models/qwen3/model.py", "from torchtitan.distributed.fsdp import apply_data_parallel"),
        ("models/qwen3/model.py", "from torchtitan.models.deepseek_v3 import DeepSeekV3Model"),
        ("models/moe/x.py", "from torchtitan.models.decoder import Decoder"),
        ("ops/x.py", "from torchtitan import trainer"),
        ("components/x.py", "from torchtitan import models"),
        ("tools/x.py", "import torchtitan.ops.rope"),
        ("data/x.py", "def f():\n    from torchtitan.trainer import Trainer"),
    ],
)
def test_an_import_that_points_up_is_found(tmp_path: Path, where: str, line: str) -> None:
    path = tmp_path / where
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert len(violations(path, tmp_path)) == 1


def test_every_file_says_its_idea_first() -> None:
    silent = [p for p in SOURCES if not ast.get_docstring(ast.parse(p.read_text()))]
    assert [str(p.relative_to(ROOT)) for p in silent] == []
