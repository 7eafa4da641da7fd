"""How far routing has moved: the same in any layout and after a restart, and no step notices it."""

from types import SimpleNamespace

import numpy as np
import pytest

from tests.tiny_run import losses, records, tiny
from torchtitan.components.finetuning.routing_watch import FILE, _lengths, _share_moved
from torchtitan.config import ConfigManager
from torchtitan.models.moe import MoE
from torchtitan.train import main
from torchtitan.trainer import Trainer

ONE = 100 / (32 * 2)  # a choice that rounding has turned, of 32 tokens in a layer
SAVES = {
    "checkpoint__enable": "true",
    "checkpoint__interval": 2,
    "checkpoint__last_save_model_only": "false",
}


def options(folder, **changes) -> list[str]:
    batch = {"training__global_batch_size": 4, "training__local_batch_size": 2}
    return tiny(folder, **batch | {"metrics__routing_moved_freq": 2} | changes)


def moved(folder) -> dict[int, float]:
    return {
        record["step"]: record["routing_moved_percent"]
        for record in records(folder)
        if "routing_moved_percent" in record
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert main(options(folder, training__steps=5, **SAVES)) == 0
    return folder


def test_a_share_is_of_sets_of_experts():
    start = np.array([[0, 1], [2, 3]], dtype=np.int16)
    now = np.array([[1, 0], [3, 4]], dtype=np.int16)
    assert _share_moved(start, now) == 0.25


def test_it_is_measured_when_due_and_at_the_last_step(whole):
    assert list(moved(whole)) == [2, 4, 5]
    assert all(0 < percent < 100 for percent in moved(whole).values())


def test_losses_are_those_of_a_run_without(whole, tmp_path):
    assert main(options(tmp_path, training__steps=5, metrics__routing_moved_freq=0)) == 0
    assert losses(tmp_path) == losses(whole)
    assert moved(tmp_path) == {} and not (tmp_path / FILE).exists()


def test_it_is_the_share_of_the_routers_own_choices(tmp_path, monkeypatch):
    """By hand, of the last forward pass of each layer in eval mode."""
    seen: list[np.ndarray] = []
    route = MoE.forward

    def note(self, x_BSD, *args, **kwargs):
        if not self.training:
            ids = self.router(x_BSD.flatten(0, 1), self.expert_bias, None)[1]
            seen.append(ids.cpu().numpy())
        return route(self, x_BSD, *args, **kwargs)

    monkeypatch.setattr(MoE, "forward", note)
    trainer = Trainer(ConfigManager().parse_args(options(tmp_path, training__steps=2)))
    layers = len(trainer.moes)
    trainer.train()
    trainer.close()
    assert len(seen) == 2 * layers
    shares = [
        np.mean([expert not in start_TK[t] for t, own in enumerate(now_TK) for expert in own])
        for start_TK, now_TK in zip(seen[:layers], seen[layers:], strict=True)
    ]
    assert moved(tmp_path)[2] == pytest.approx(100 * np.mean(shares))


@pytest.mark.parametrize("ep", [1, 2])
def test_two_ranks_find_the_same(ranks, whole, tmp_path, ep):
    arguments = options(tmp_path, training__steps=5, parallelism__expert_parallel_degree=ep)
    assert ranks(2).run(main, arguments) == [0, 0]
    assert moved(tmp_path) == pytest.approx(moved(whole), abs=ONE)


@pytest.mark.parametrize("axis", ["tensor", "context", "pipeline"])
def test_ranks_that_split_the_text_or_the_layers_find_the_same(ranks, whole, tmp_path, axis):
    split = {f"parallelism__{axis}_parallel_degree": 2, "training__local_batch_size": 4}
    assert ranks(2).run(main, options(tmp_path, training__steps=5, **split)) == [0, 0]
    assert moved(tmp_path) == pytest.approx(moved(whole), abs=ONE)
    with np.load(tmp_path / FILE) as here, np.load(whole / FILE) as there:
        assert here.files == there.files
        equal = [np.mean(here[layer] == there[layer]) for layer in here.files]
    assert min(equal) > 0.99


def test_a_text_is_padded_to_what_ranks_split():
    dims = SimpleNamespace(cp=3, tp=2)
    assert _lengths(4096, dims) == (512, 516)
    assert _lengths(512, dims) == (504, 504)
    assert _lengths(100, SimpleNamespace(cp=1, tp=1)) == (100, 100)


def test_a_resumed_run_compares_with_the_first_start(whole, tmp_path):
    assert main(options(tmp_path, training__steps=4, lr_scheduler__decay_ratio=0.0, **SAVES)) == 0
    first = moved(tmp_path)
    assert main(options(tmp_path, training__steps=6, lr_scheduler__decay_ratio=0.0, **SAVES)) == 0
    assert list(moved(tmp_path)) == [2, 4, 6]
    assert {step: moved(tmp_path)[step] for step in first} == first


def test_a_lost_start_is_told(tmp_path, capfd):
    assert main(options(tmp_path, training__steps=2, **SAVES)) == 0
    (tmp_path / FILE).write_bytes(b"damaged")
    assert main(options(tmp_path, training__steps=4, **SAVES)) == 0
    said = capfd.readouterr().err
    assert "what has moved is counted from step 2 on" in said
    assert "are not those of step 2 (mean over" in said
