"""Conversations: every layout trains like one process; packed is what each alone would be."""

import functools
import itertools
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from tests.tiny_run import as_option, losses, records, tiny
from torchtitan.config import ConfigManager
from torchtitan.data.training import build_training_dataloader
from torchtitan.models.deepseek_v3 import DeepSeekV3Model, deepseekv3_args
from torchtitan.ops.attention import document_mask
from torchtitan.ops.cross_entropy import cross_entropy_sum
from torchtitan.tools.utils import device_type
from torchtitan.train import main
from torchtitan.trainer import Trainer
from torchtitan.trainer.preflight import check_config

CHAT = {
    "training__dataset": "chat_sample",
    "training__format": "chat",
    "training__seq_len": 128,
    "training__local_batch_size": 2,
    "training__global_batch_size": 4,
    "model__args__attn_mask_type": "block_causal",
    "model__args__n_mtp_layers": 1,
    "model__args__moe_args__sequence_balance_coeff": 0.01,
}
VALIDATION = {
    "validation__enable": "true",
    "validation__dataset": "chat_sample",
    "validation__format": "chat",
    "validation__seq_len": 128,
    "validation__local_batch_size": 2,
    "validation__freq": 2,
}


def trained(arguments: list[str]) -> int:
    """One process of a run; the process group of the pool is used."""
    return main(arguments)


def options(folder: Path, **changes) -> list[str]:
    return tiny(folder, **(CHAT | VALIDATION | changes))


@pytest.fixture(scope="module")
def one_process(ranks, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    assert ranks(1).run(trained, options(folder)) == [0]
    return folder


LAYOUTS = {
    "FSDP 2": (2, {}),
    "EP 2 x FSDP 2": (
        4,
        {"parallelism__expert_parallel_degree": 2, "training__local_batch_size": 1},
    ),
    "CP 2, TP 2": (
        4,
        {
            "parallelism__context_parallel_degree": 2,
            "parallelism__tensor_parallel_degree": 2,
        },
    ),
    "PP 2": (2, {"parallelism__pipeline_parallel_degree": 2}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_like_one_process(ranks, one_process, layout, tmp_path):
    world_size, changes = LAYOUTS[layout]
    assert ranks(world_size).run(trained, options(tmp_path, **changes)) == [0] * world_size
    ours, theirs = records(tmp_path), records(one_process)
    same = ("filled_percent", "trained_percent", "validation_tokens")
    for record, expected in zip(ours, theirs, strict=True):
        for name in ("loss", "grad_norm", "mtp_loss_1", "validation_loss"):
            assert (name in record) == (name in expected)
            if name in record:
                assert record[name] == pytest.approx(expected[name], rel=1e-5), name
        assert {n: record.get(n) for n in same} == {n: expected.get(n) for n in same}
    split = "TP" in layout or "PP" in layout
    assert ("validation_accuracy" in ours[-1]) == (not split)


@pytest.mark.parametrize("layout", ["alone", "CP 2, TP 2", "PP 2"])
def test_conversations_weigh_the_same_where_asked(ranks, layout, tmp_path):
    """The first step's loss is the mean of the conversations' means, in every layout."""
    world_size, changes = LAYOUTS.get(layout, (1, {}))
    changes = changes | {"chat__loss_weight": "conversation", "training__steps": 1}
    arguments = options(tmp_path, **changes, validation__enable="false")
    assert ranks(world_size).run(trained, arguments) == [0] * world_size
    loss, further = mean_of_means()
    assert records(tmp_path)[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert records(tmp_path)[0]["mtp_loss_1"] == pytest.approx(further, rel=1e-5)


@functools.cache
def mean_of_means() -> tuple[float, float]:
    """Compute the loss by hand, of the next token and of the one after it: each conversation's mean
    over its labels, then the mean of these."""
    folder = Path(tempfile.mkdtemp())
    trainer = Trainer(ConfigManager().parse_args(options(folder, validation__enable="false")))
    try:
        batches, means, further = iter(trainer.dataloader), [], []
        for _ in range(2):
            inputs, labels = next(batches)
            inputs = {name: tensor.to(device_type()) for name, tensor in inputs.items()}
            labels = labels.to(device_type())
            documents = inputs["documents"]
            mask = document_mask(documents)
            logits = trainer.model(inputs["input"], mask).detach()
            extra = trainer.model.extra_inputs(inputs["input"], labels, documents)
            shifted = extra["mtp"].labels_BKS[:, 0]
            for row in range(len(labels)):
                for number in range(int(documents[row].max()) + 1):
                    here = (documents[row] == number) & (labels[row] != -100)
                    sums = cross_entropy_sum(logits[row, here][None], labels[row, here][None])
                    means.append(float(sums / here.sum()))
                    other = (documents[row] != number) | (shifted[row] == -100)
                    further.append(
                        further_sum(trainer.model, inputs, mask, extra, row, other) / here.sum()
                    )
        return sum(means) / len(means), float(sum(further) / len(further))
    finally:
        trainer.close()


def further_sum(model, inputs, mask, extra, row: int, other) -> float:
    """Sum of the losses of multi-token prediction over one conversation's labels."""
    labels = torch.full_like(extra["mtp"].labels_BKS, -100)
    labels[row, 0] = extra["mtp"].labels_BKS[row, 0].masked_fill(other, -100)
    model.take_side_losses()
    model(inputs["input"], mask, mtp=extra["mtp"]._replace(labels_BKS=labels))
    return model.take_side_losses()["mtp_loss_1"].item()


def test_a_resumed_run_has_the_same_bits(ranks, one_process, tmp_path):
    checkpoints = {"checkpoint__enable": "true", "checkpoint__interval": 2}
    assert ranks(1).run(trained, options(tmp_path, **checkpoints)) == [0]
    shutil.rmtree(tmp_path / "checkpoint/step-4")
    assert ranks(1).run(trained, options(tmp_path, **checkpoints)) == [0]
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4]
    assert losses(tmp_path) == losses(one_process)


def test_conversations_and_texts_blend(ranks, tmp_path):
    blend = [
        {"name": "chat", "dataset": "chat_sample", "format": "chat", "weight": 1},
        {"name": "web", "dataset": "sample", "weight": 1},
    ]
    arguments = [
        each
        for each in options(tmp_path, **{"validation__enable": "false"})
        if not each.startswith(("--training.dataset=", "--training.format="))
    ]
    assert ranks(1).run(trained, [*arguments, as_option(blend, "training.blend")]) == [0]
    last = records(tmp_path)[-1]
    tokens = last["blend_tokens"]
    assert tokens["web"] == 8 * 128 and 0.5 * tokens["web"] < tokens["chat"] <= tokens["web"]
    assert 50 < last["trained_percent"] < 100, "every token of texts, a part of conversations"


def test_loader_processes_give_the_same_sequences(tmp_path):
    rows = Path("torchtitan/data/sample/chat.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(rows * 8)
    data = {"training__dataset": "text", "training__dataset_path": tmp_path / "rows.jsonl"}
    found = []
    for workers in (0, 2):
        config = ConfigManager().parse_args(
            options(tmp_path, training__dataset_num_workers=workers, **data)
        )
        _, _, tokenizer = check_config(config)
        loader = build_training_dataloader(config, tokenizer, dp_rank=1, dp_degree=2, seed=3)
        batches = itertools.islice(loader, 12)
        found.append([(i["input"], i["documents"], labels) for i, labels in batches])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def make_batch(seq_len: int) -> tuple[dict, torch.Tensor, object]:
    config = ConfigManager().parse_args(options(Path("unused"), training__seq_len=seq_len))
    _, _, tokenizer = check_config(config)
    loader = build_training_dataloader(config, tokenizer, dp_rank=0, dp_degree=1, seed=3)
    inputs, labels = next(iter(loader))
    return inputs, labels, config


def test_a_packed_batch_has_the_loss_and_gradients_of_its_conversations_alone():
    inputs, labels, _ = make_batch(192)
    args = deepseekv3_args["debugmodel"].for_run(
        overrides={"attn_mask_type": "block_causal", "n_layers": 2}, seq_len=192
    )
    torch.manual_seed(0)
    model = DeepSeekV3Model(args)
    model.init_weights()
    model.double()
    documents = inputs["documents"]
    packed = cross_entropy_sum(model(inputs["input"], document_mask(documents)), labels)
    packed.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone = torch.zeros((), dtype=torch.float64)
    for row in range(len(labels)):
        for number in range(int(documents[row].max()) + 1):
            here = documents[row] == number
            logits = model(inputs["input"][row, here].unsqueeze(0))
            loss = cross_entropy_sum(logits, labels[row, here].unsqueeze(0))
            loss.backward()
            alone += loss.detach()
    assert int(documents.max()) >= 2, "several conversations a sequence"
    torch.testing.assert_close(packed.detach(), alone, rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        if name in grads:
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-5, atol=1e-6)


def test_prompts_count_in_the_load_of_experts_and_padding_does_not(tmp_path):
    arguments = options(tmp_path, training__steps=1, **{"validation__enable": "false"})
    trainer = Trainer(ConfigManager().parse_args(arguments))
    try:
        batch = next(iter(trainer.dataloader))
        labels, tokens, _ = trainer.passes.count(batch).tolist()
        assert tokens == int((batch[0]["documents"] >= 0).sum()) > labels > 0
        inputs = trainer.passes.inputs(batch)
        assert int(inputs.token_mask.sum()) == tokens
    finally:
        trainer.close()


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (
            {"model__args__attn_mask_type": "causal"},
            'training.format = "chat" packs several conversations into a sequence, which must not '
            'see each other; set model.args.attn_mask_type = "block_causal".',
        ),
        (
            {"training__fim_rate": 0.1},
            'training.fim_rate = 0.1 rearranges texts, but training.format = "chat" has none; set '
            "it to 0.",
        ),
        (
            {"compile__cuda_graph": "true"},
            "compile.cuda_graph = true",
        ),
        (
            {
                "training__dataset": "sample",
                "training__format": "text",
                "validation__enable": "false",
                "chat__loss_weight": "conversation",
            },
            'chat.loss_weight = "conversation" weights conversations',
        ),
        ({"training__dataset": "sample"}, "or training.format, or mend"),
        ({"training__format": "text"}, "or training.dataset_text_key, or mend"),
        ({"chat__template": "nowhere.jinja"}, "nowhere.jinja"),
        ({"chat__look_ahead": 0}, "chat.look_ahead = 0 must be"),
    ],
)
def test_what_can_not_be_is_one_sentence(changes, sentence, tmp_path, capfd):
    assert main(options(tmp_path, **changes)) == 2
    assert sentence in capfd.readouterr().err


def test_a_broken_line_is_counted_and_nothing_is_lost(tmp_path):
    rows = Path("torchtitan/data/sample/chat.jsonl").read_text().splitlines()
    bad = [
        "{broken",
        json.dumps({"messages": [{"role": "robot", "content": "x"}]}),
        json.dumps({"messages": [{"role": "user", "content": ""}]}),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*rows, *bad]) + "\n")
    changes = {"training__dataset": "text", "training__dataset_path": path}
    assert main(options(tmp_path / "run", training__steps=2, **changes)) == 0
    assert records(tmp_path / "run")[-1]["skipped_documents"] >= 3
