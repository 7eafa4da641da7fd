"""Shipped configs with something wrong in them: each is refused in one sentence, or can be run.

    python -m tests.unit_tests.config.test_config_fuzz --count 10000 [--seed 1]

Each mutation goes through `main` with `--job.check_config`. What comes through is looked at with
rules of the test's own.
"""

import argparse
import contextlib
import io
import json
import math
import os
import random
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tomli

import torchtitan.train as front_door
from tests.tiny_run import as_toml
from torchtitan.config import ConfigManager
from torchtitan.config.schema import KEYS
from torchtitan.trainer.preflight import check_config

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "train_configs").glob("*.toml"))
COUNT = int(os.environ.get("TITAN_FUZZ_COUNT", 400))
ON_THE_LINE = 0.04  # share of mutations with an option, which takes ten times as long to read
SECONDS = 2.0  # of computing, for one mutation

NUMBERS = (
    "nan -nan inf -inf 0 -0 -0.0 1 -1 2 3 7 0.5 1e39 -1e39 1e-50 1e308 1e999 true false 2147483647 "
    "2147483648 9223372036854775807 9223372036854775808 1000000000000 16777217 65537 1_000 0x10 0b1"
).split() + ["1" + "0" * 400, "-1" + "0" * 400, "1" + "0" * 5000]
STRINGS = (
    "~ ~/x ~nosuchuser/x .. / none None auto * [ ** text sample nan /dev/null/x float32 ' \" %s {} "
    "-- op \u0663 \u00b2 \u202e"
).split() + [
    *("", " ", "x" * 300, "x/" * 3000, "a\nb", "x\n", "\0", "a\0b", "\u00e9" * 200),
    *("a" * 100_000, "9" * 5000),
]
OTHERS = (
    "[] {} [[]] [1] [nan] {a=1} {a={a={a=1}}} 2024-01-01 07:32:00 [{}] [{a=1}] [true,1] [[[]]] "
    '["a"] [{name="a",weight=inf}] [{tokens=1e300}] [{match=["*"],lr_factor=2}] '
    '[{watch="loss",above=nan}] [{watch="loss",above=1.0,times=99999999999}] '
    "[{tokens=1e6,lr=1e39}] [{tokens=1000000,seq_len=1000000000000}] [{tokens=9e15}] "
    '[{tokens=1e15,batch_size=16384,batch_size_shape="linear",batch_size_step=1}]'
).split() + ["[" * 40 + "]" * 40, "[" * 3000 + "]" * 3000, "{ x = " * 30 + "1" + " }" * 30]
# Model arguments of the families, and some that neither has.
ARGUMENTS = (
    "n_layers dim n_heads inter_dim moe_inter_dim vocab_size max_seq_len n_dense_layers norm_eps "
    "init_std q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim rope_theta "
    "yarn original_seq_len rope_factor beta_fast beta_slow mscale n_mtp_layers mtp_loss_weight "
    "attn_mask_type moe_args head_dim n_kv_heads hidden_dim moe_enabled n_layer x"
).split()
MOE_ARGUMENTS = (
    "num_experts num_shared_experts score_func route_norm route_scale score_before_experts top_k "
    "num_expert_groups num_limited_groups use_grouped_mm load_balance_coeff group_score_func "
    "sequence_balance_coeff global_balance_coeff z_loss_coeff x"
).split()


class Case(NamedTuple):
    file: bytes
    options: list[str]


# ---------------------------------------------------------------------------------------------
# Mutations
# ---------------------------------------------------------------------------------------------


def flat(table: dict[str, Any], at: str = "") -> dict[str, str]:
    """Keys, with their tables, and values as TOML."""
    lines = {}
    for name, value in table.items():
        if isinstance(value, dict):
            lines |= flat(value, f"{at}{name}.")
        else:
            lines[at + name] = as_toml(value)
    return lines


def some_key(rng: random.Random) -> str:
    place = rng.random()
    if place < 0.2:
        return f"model.args.{rng.choice(ARGUMENTS)}"
    if place < 0.35:
        return f"model.args.moe_args.{rng.choice(MOE_ARGUMENTS)}"
    return rng.choice([key for key in KEYS if not key.startswith(("job.print", "job.check"))])


def some_value(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.55:
        return rng.choice(NUMBERS)
    return json.dumps(rng.choice(STRINGS)) if kind < 0.8 else rng.choice(OTHERS)


def swap_value(rng: random.Random, lines: dict[str, str]) -> None:
    lines[rng.choice(sorted(lines))] = some_value(rng)


def add_key(rng: random.Random, lines: dict[str, str]) -> None:
    lines[some_key(rng)] = some_value(rng)


def misspell(rng: random.Random, lines: dict[str, str]) -> None:
    key = rng.choice(sorted(lines))
    at = rng.randrange(len(key))
    noise = rng.choice(["", ".", "x", "_", "a." * 20, "a." * 2000, "x" * 5000])
    lines[key[:at] + noise + key[at + 1 :]] = lines.pop(key)


def other_model(rng: random.Random, lines: dict[str, str]) -> None:
    name, flavor = rng.choice([("qwen3", "debugmodel"), ("qwen3", "debugmodel_moe"), ("x", "y")])
    lines |= {"model.name": f'"{name}"', "model.flavor": f'"{flavor}"'}


def damage(rng: random.Random, text: bytes) -> bytes:
    """Truncation, bytes and lines out of place, other encodings."""
    at = rng.randrange(len(text) + 1)
    lines = text.splitlines(keepends=True)
    return rng.choice(
        [
            lambda: text[:at],
            lambda: text[:at] + rng.randbytes(3) + text[at:],
            lambda: text[:at] + bytes([rng.randrange(32, 127)]) + text[at + 1 :],
            lambda: text + rng.choice(lines),
            lambda: b"".join(rng.sample(lines, len(lines))),
            lambda: text.decode().encode("utf-16"),
            lambda: b"\xef\xbb\xbf" + text,
            lambda: text.replace(b"[", b"[["),
            lambda: text.replace(b"\n", b"\r"),
            lambda: text + b"\n" + rng.choice([b"[model]\n", b"model = 3\n", b"[[optimizer]]\n"]),
            lambda: b"",
        ]
    )()


def mutate(rng: random.Random) -> Case:
    source = rng.choice(FILES).read_bytes()
    if rng.random() < 0.2:
        return Case(damage(rng, source), [])
    lines = flat(tomli.loads(source.decode()))
    # Most of the shipped files name tokenizers and layouts that a test machine has not.
    lines["model.hf_assets_path"] = '"./tests/assets/tokenizer"'
    lines = {k: v for k, v in lines.items() if not k.startswith(("parallelism.", "checkpoint."))}
    if not any(key.startswith("schedule") for key in lines):
        lines["training.global_batch_size"] = "-1"
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        rng.choice([swap_value, swap_value, add_key, add_key, add_key, misspell, other_model])(
            rng, lines
        )
    options = []
    if rng.random() < ON_THE_LINE:
        value = rng.choice([rng.choice(NUMBERS), rng.choice(STRINGS), rng.choice(OTHERS), "\udcff"])
        options = [f"--{some_key(rng)}={value}"[:100_000]]
    text = "\n".join(f"{key} = {value}" for key, value in lines.items())
    return Case(text.encode("utf-8", "surrogatepass"), options)


# ---------------------------------------------------------------------------------------------
# Verdicts
# ---------------------------------------------------------------------------------------------


def play(case: Case, folder: Path) -> str | None:
    """Run the case, and describe what is wrong with the program's answer; None where nothing is."""
    file = folder / "any.toml"
    file.write_bytes(case.file)
    argv = [f"--job.config_file={file}", *case.options]
    out, err = io.StringIO(), io.StringIO()
    began = time.process_time()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = front_door.main([*argv, "--job.check_config"])
    except BaseException:
        return traceback.format_exc()
    seconds = time.process_time() - began
    if seconds > SECONDS:
        return f"it took {seconds:.1f} s"
    refusals = [line for line in err.getvalue().splitlines() if re.match(r"\S+ \S+ E ", line)]
    if code == 2:
        return not_a_sentence(refusals, err.getvalue())
    if code != 0 or refusals or not out.getvalue().startswith("The config fits: "):
        return f"exit code {code}, {out.getvalue()!r}, {err.getvalue()!r}"
    config = ConfigManager().parse_args(argv)
    _, model_args, _ = check_config(config)
    settings = asdict(config)
    settings["model"].pop("args")  # model_args has what they became
    numbers = [*numbers_of(settings), *numbers_of(asdict(model_args), "model_args")]
    return next((f"{name} = {n}" for name, n in numbers if is_absurd(name, n)), None)


def not_a_sentence(refusals: list[str], text: str) -> str | None:
    bad = len(refusals) != 1 or "Traceback" in text or len(text) > 8_000
    return f"not one sentence: {text[:8_000]!r}" if bad else None


def numbers_of(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """All numbers in tables and lists, with where they are."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from numbers_of(item, f"{name}.{key}")
    elif isinstance(value, list):
        for item in value:
            yield from numbers_of(item, name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


COUNTS_OF_STEPS = r"\.(seed|steps|freq|.*_freq|.*_steps?|interval)$"


def is_absurd(name: str, number: float) -> bool:
    if name == ".training.max_norm" and number == math.inf:
        return False
    if isinstance(number, float):
        return not math.isfinite(number) or abs(number) > 3.41e38 or 0 < abs(number) < 1.1e-38
    if name.startswith("model_args"):
        layers = name.endswith("layers")
        return not 0 <= number <= (1024 if layers else 2**24)
    return abs(number) > (2**63 - 1 if re.search(COUNTS_OF_STEPS, name) else 2**31 - 1)


# ---------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_any_damaged_config_is_refused_in_a_sentence_or_can_run(home):
    rng = random.Random(17)
    cases = [mutate(rng) for _ in range(COUNT)]
    found = [(case, wrong) for case in cases if (wrong := play(case, home))]
    assert found == []


@pytest.mark.parametrize("options", [[], ["--training.max_norm=inf", "--training.steps=3"]])
def test_what_is_right_comes_through(home, options):
    file = ROOT / "train_configs/debug_model.toml"
    assert play(Case(file.read_bytes(), options), home) is None
    assert front_door.main([f"--job.config_file={file}", "--job.check_config", *options]) == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    settings = parser.parse_args()
    os.chdir(ROOT)
    rng, wrong = random.Random(settings.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        for n in range(settings.count):
            case = mutate(rng)
            if (fault := play(case, Path(folder))) is not None:
                wrong += 1
                print(f"--- {n}: {case.options} {case.file[:3000]!r}\n{fault}", flush=True)
    print(f"{settings.count} mutations, {wrong} of them not as they should")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
