"""Validation: the same loss in any layout, of every token once, and a run that does not notice."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.tiny_run import as_option, losses, records, tiny
from torchtitan.config import ConfigManager
from torchtitan.config.rules.values import check_validation
from torchtitan.data.validation import open_validation_sets
from torchtitan.models.deepseek_v3 import DeepSeekV3Model
from torchtitan.ops.cross_entropy import IGNORE_INDEX
from torchtitan.tools.errors import UserError
from torchtitan.train import main
from torchtitan.trainer import Trainer
from torchtitan.trainer.preflight import check_config

# 32 documents of very different lengths: ranks run out of them at different times.
TEXTS = [
    f"Document {n}. " + "The quick brown fox jumps over the lazy dog. " * (n // 4)
    for n in range(32)
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("validation") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def options(dump_folder: Path, texts: Path, **changes) -> list[str]:
    validation = {
        "validation__enable": "true",
        "validation__dataset": "text",
        "validation__dataset_path": texts,
        "validation__seq_len": 24,
        "validation__local_batch_size": 4,
        "validation__freq": 2,
        "training__global_batch_size": 8,
        "training__local_batch_size": 2,
        "validation__sample_prompts": '["The quick", "A"]',
        "validation__sample_tokens": 5,
        "metrics__enable_tensorboard": "true",
    }
    return tiny(dump_folder, **(validation | changes))


def trained(arguments: list[str]) -> int:
    """One process of a run; the process group of the pool is used."""
    return main(arguments)


LAYOUTS = {
    "FSDP 2": (2, {}),
    "EP 2 x FSDP 2, batches of 1": (
        4,
        {"parallelism__expert_parallel_degree": 2, "validation__local_batch_size": 1},
    ),
}


@pytest.fixture(scope="module")
def one_process(ranks, texts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    assert ranks(1).run(trained, options(folder, texts)) == [0]
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_finds_the_same_loss(ranks, one_process, texts, layout, tmp_path):
    world_size, changes = LAYOUTS[layout]
    arguments = options(tmp_path, texts, **changes)
    assert ranks(world_size).run(trained, arguments) == [0] * world_size
    for record, expected in zip(records(tmp_path), records(one_process), strict=True):
        assert ("validation_loss" in record) == (record["step"] in (1, 2, 4))
        if "validation_loss" in record:
            assert record["validation_tokens"] == expected["validation_tokens"]
            assert record["validation_loss"] == pytest.approx(expected["validation_loss"], rel=1e-6)
    written = texts_in_tensorboard(tmp_path / "tb")
    assert written == texts_in_tensorboard(one_process / "tb") and len(written) == 2


@pytest.mark.parametrize("kinds", [("tensor", "context"), ("pipeline", "tensor")])
def test_split_sequences_tensors_and_layers_find_the_same_losses(ranks, kinds, tmp_path):
    """Also those of multi-token prediction, which is for training only. The last batch of the set
    is not full."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:10]))
    same = {
        "training__seq_len": 24,
        "training__steps": 2,
        "training__local_batch_size": 4,
        "validation__sample_prompts": "[]",
        "model__args__n_mtp_layers": 1,
    }
    split = {f"parallelism__{kind}_parallel_degree": 2 for kind in kinds}
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert ranks(1).run(trained, options(alone, few, **same)) == [0]
    assert ranks(4).run(trained, options(together, few, **same, **split)) == [0] * 4
    for record, expected in zip(records(together), records(alone), strict=True):
        assert record["validation_tokens"] == expected["validation_tokens"]
        assert -(-record["validation_tokens"] // 24) % 4, "a full last batch"
        for loss in ("validation_loss", "mtp_loss_1", "loss"):
            assert record[loss] == pytest.approx(expected[loss], rel=1e-6), loss


def test_the_loss_is_the_mean_over_all_tokens(texts, tmp_path):
    """By hand: every document's tokens, packed as the loader packs, each a label once."""
    arguments = options(tmp_path, texts, training__global_batch_size=2, training__steps=1)
    config = ConfigManager().parse_args(arguments)
    trainer = Trainer(config)
    numbers = trainer.validator.run(trainer.model, 1)
    _, args, tokenizer = check_config(config)
    model = DeepSeekV3Model(args)
    model.load_state_dict(trainer.model.state_dict())
    trainer.close()

    (whole,) = open_validation_sets(config, tokenizer, dp_rank=0, dp_degree=1)
    loss = tokens = 0
    for inputs, labels in whole.loader:
        logits = model(inputs["input"]).double()
        flat = labels.flatten()
        loss += F.cross_entropy(
            logits.flatten(0, 1), flat, reduction="sum", ignore_index=IGNORE_INDEX
        ).item()
        tokens += int((flat != IGNORE_INDEX).sum())
    marks = (tokenizer.bos_id is not None) + (tokenizer.eos_id is not None)
    in_texts = sum(len(tokenizer.encode(text)) + marks for text in TEXTS)
    lanes = in_texts - tokens  # the first token of a lane is no label
    assert 1 <= lanes <= len(TEXTS)
    assert numbers["validation_tokens"] == tokens
    assert numbers["validation_loss"] == pytest.approx(loss / tokens, rel=1e-6)
    assert numbers["validation_perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-5)


SETS = [
    {"name": "fox", "dataset_path": ""},
    {"name": "chat", "dataset": "chat_sample", "format": "chat"},
]


def with_sets(folder: Path, texts: Path, **changes) -> list[str]:
    alone = options(folder, texts, model__args__attn_mask_type="block_causal", **changes)
    of_one = ("--validation.dataset", "--validation.sample_prompts")
    rest = [option for option in alone if not option.startswith(of_one)]
    return [*rest, as_option([SETS[0] | {"dataset_path": str(texts)}, SETS[1]], "validation.sets")]


def test_each_set_has_the_loss_that_it_has_alone(ranks, texts, tmp_path, caplog):
    """In one process and in two; the whole is the mean over the tokens of both."""
    assert main(with_sets(tmp_path / "one", texts)) == 0
    assert ranks(2).run(trained, with_sets(tmp_path / "two", texts)) == [0, 0]
    block = {"model__args__attn_mask_type": "block_causal", "validation__sample_prompts": "[]"}
    assert main(options(tmp_path / "fox", texts, **block)) == 0
    chat = {"validation__dataset": "chat_sample", "validation__format": "chat"}
    of_chat = options(tmp_path / "chat", texts, **block, **chat)
    assert main([o for o in of_chat if "validation.dataset_path" not in o]) == 0
    alone = {name: records(tmp_path / name) for name in ("fox", "chat")}
    for n, (one, two) in enumerate(
        zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True)
    ):
        if "validation_loss" not in one:
            continue
        fox, talk = alone["fox"][n], alone["chat"][n]
        assert one["validation_set_loss"] == {
            "fox": fox["validation_loss"],
            "chat": talk["validation_loss"],
        }
        assert one["validation_set_accuracy"] == {"chat": talk["validation_accuracy"]}
        assert "validation_accuracy" not in one, "of texts it is not known"
        tokens = fox["validation_tokens"], talk["validation_tokens"]
        assert one["validation_tokens"] == sum(tokens)
        whole = fox["validation_loss"] * tokens[0] + talk["validation_loss"] * tokens[1]
        assert one["validation_loss"] == pytest.approx(whole / sum(tokens), rel=1e-12)
        assert two["validation_set_loss"] == pytest.approx(one["validation_set_loss"], rel=1e-6)


def test_a_run_does_not_notice_that_it_is_validated(texts, tmp_path):
    """Its losses stay bitwise the same, samples and all."""
    assert main(options(tmp_path / "a", texts, validation__enable="false")) == 0
    assert main(options(tmp_path / "b", texts)) == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def texts_in_tensorboard(folder: Path) -> dict[str, list[bytes]]:
    """By tag, what was written at steps 1, 2 and 4."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run,) = folder.iterdir()
    events = EventAccumulator(str(run)).Reload()
    tags = events.Tags()
    assert {"validation_metrics/loss", "validation_metrics/perplexity"} <= set(tags["scalars"])
    written = {}
    for tag in (tag for tag in tags["tensors"] if tag.startswith("samples/")):
        assert [event.step for event in events.Tensors(tag)] == [1, 2, 4]
        written[tag] = [event.tensor_proto.string_val[0] for event in events.Tensors(tag)]
        assert all(text.startswith(b"**") for text in written[tag])
    return written


def test_steps_limits_the_batches(texts, tmp_path):
    arguments = options(tmp_path, texts, validation__steps=2, training__steps=1)
    assert main(arguments) == 0
    assert records(tmp_path)[0]["validation_tokens"] == 2 * 4 * 24


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"validation__freq": 0}, "validation.freq = 0 must be 1 or more."),
        ({"validation__steps": 0}, "validation.steps = 0 must be 1 or more, or -1"),
        ({"validation__seq_len": 64}, "validation.seq_len = 64 must be at most the model's max"),
        ({"validation__dataset_path": "no/such"}, "validation.dataset_path"),
        (
            {"validation__sets": '[{name = "a"}]'},
            'validation.dataset = "text" and [[validation.sets]] both set the data to read; leave',
        ),
        (
            {"validation__sets": '[{name = "a"}, {name = "a"}]'},
            "validation.sets 2: the name 'a' is already taken; choose another one.",
        ),
        (
            {"validation__sample_tokens": 32},
            "validation.sample_prompts, sample_tokens: the longest prompt and max_new_tokens make",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_the_run(texts, tmp_path, capsys, changes, sentence):
    assert main(options(tmp_path, texts, **changes)) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("axis", ["tensor", "context", "pipeline"])
def test_split_sequences_and_matrices_write_no_samples(texts, tmp_path, axis):
    """The rules alone: whether the axis itself is supported is another's check."""
    split = {f"parallelism__{axis}_parallel_degree": 2}

    def refusal(**changes) -> str:
        arguments = options(tmp_path, texts, **split, **changes)
        with pytest.raises(UserError) as caught:
            check_validation(ConfigManager().parse_args(arguments))
        return str(caught.value)

    assert refusal().startswith("validation.sample_prompts is set, but text is generated token by ")
    same = options(tmp_path, texts, **split, validation__sample_prompts="[]")
    check_validation(ConfigManager().parse_args(same))


@pytest.mark.parametrize(
    "axis, changes, sentence",
    [
        ("context", {"validation__seq_len": 18}, "validation.seq_len = 18 must be a multiple of 4"),
        (
            "pipeline",
            {"validation__local_batch_size": 1},
            "validation.local_batch_size over .* makes 1; change validation.local_batch_size",
        ),
    ],
)
def test_what_is_validated_must_fit_the_layout(
    texts, tmp_path, monkeypatch, axis, changes, sentence
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    changes |= {f"parallelism__{axis}_parallel_degree": 2, "validation__sample_prompts": "[]"}
    with pytest.raises(UserError, match=sentence):
        check_config(ConfigManager().parse_args(options(tmp_path, texts, **changes)))


def test_without_validation_its_keys_may_hold_anything(texts, tmp_path):
    config = ConfigManager().parse_args(
        options(tmp_path, texts, validation__enable="false", validation__freq=0)
    )
    check_config(config)
    assert torch.is_grad_enabled()
