"""Modules are changed from outside at the declared plug points only (protocols/plug_points.py)."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

from torchtitan.protocols.plug_points import PLUG_POINTS

ROOT = Path(__file__).parents[1] / "torchtitan"
POINTS = {point.target: set(point.files) for point in PLUG_POINTS}
# Names that variables for modules have in this code.
MODULES = set("attention block experts joint layer model module moe mtp part router".split())
# Statistics of the current step, which balancing owns.
OWNERS = {"models/moe/balancing.py"}
SELF = {"self", "cls", "ctx"}


def changes(source: str) -> set[tuple[str, str]]:
    """(object, what is changed) of every assignment to an attribute, and every method called, of
    other objects than self."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add((ast.unparse(node.value), node.attr))
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Attribute) and node.value.attr == "__dict__":
                found.add((ast.unparse(node.value.value), "__dict__"))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            thing, _, method = name.rpartition(".")
            if method in POINTS and (thing in MODULES | {"root"} or method == "fully_shard"):
                found.add((thing, method))
    return {(thing, name) for thing, name in found if thing not in SELF}


def violations(source: str, file: str) -> list[str]:
    wrong = []
    for thing, name in sorted(changes(source)):
        is_module = thing in MODULES and file not in OWNERS
        if name in POINTS and file not in POINTS[name] and (is_module or name == "__dict__"):
            wrong.append(f"{file} changes {thing}.{name}")
        elif is_module and name not in POINTS:
            wrong.append(f"{file} changes {thing}.{name}, which is no plug point")
        elif name.startswith("_") and name not in POINTS and not thing.startswith("torch."):
            wrong.append(f"{file} replaces the private {thing}.{name}")
    return wrong


@pytest.mark.parametrize("path", ROOT.rglob("*.py"), ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_are_changed_at_plug_points_only(path: Path) -> None:
    assert violations(path.read_text(), str(path.relative_to(ROOT))) == []


def test_every_plug_point_is_used_where_the_list_says() -> None:
    used = defaultdict(set)
    for path in ROOT.rglob("*.py"):
        for _, name in changes(path.read_text()):
            used[name].add(str(path.relative_to(ROOT)))
    unused = {target: files - used[target] for target, files in POINTS.items()}
    assert {target: files for target, files in unused.items() if files} == {}


@pytest.mark.parametrize(
    ("line", "file"),
    [
        ("moe.dispatcher = None", "trainer/trainer.py"),
        ("layer.moe = None", "distributed/compile.py"),
        ("moe.router._choose = other", "models/decoder/parallelize.py"),
        ("module.__dict__['weight'] = copy", "distributed/fsdp.py"),
        ("attention.attend_with: object = cache", "components/generation.py"),
        ("part.__class__ = Other", "trainer/trainer.py"),
        ("module.register_forward_pre_hook(print)", "trainer/trainer.py"),
    ],
)
def test_another_change_is_found(line: str, file: str) -> None:
    assert len(violations(line, file)) == 1
