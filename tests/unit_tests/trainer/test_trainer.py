"""What single settings of a run change: batch, learning rate, clipping, precision, tools."""

import gc
import json
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tiny_run import losses, records, tiny
from torchtitan.config import ConfigManager
from torchtitan.train import main
from torchtitan.trainer import Trainer
from torchtitan.trainer.forward_backward import StepCounts
from torchtitan.trainer.step_log import Interval


def start(folder: Path, **changes) -> Trainer:
    return Trainer(ConfigManager().parse_args(tiny(folder, **changes)))


def step(trainer: Trainer):
    trainer.step += 1
    return trainer.train_step(iter(trainer.dataloader), Interval())


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> list[float]:
    """The losses of the tiny run with nothing switched on."""
    folder = tmp_path_factory.mktemp("plain")
    assert main(tiny(folder)) == 0
    return losses(folder)


# ---------------------------------------------------------------------------------------------
# A step
# ---------------------------------------------------------------------------------------------


def test_a_global_batch_is_worked_off_in_local_ones(tmp_path, capfd, monkeypatch):
    sizes = []
    forward_backward = Trainer.forward_backward

    def watched(self, batch, counts: StepCounts) -> Tensor:
        sizes.append((tuple(batch[1].shape), int(counts.labels)))
        return forward_backward(self, batch, counts)

    monkeypatch.setattr(Trainer, "forward_backward", watched)
    options = {"training__local_batch_size": 2, "training__global_batch_size": 6}
    assert main(tiny(tmp_path, training__steps=2, **options)) == 0
    assert sizes == [((2, 32), 6 * 32)] * 6, "3 micro-batches a step, divided by the step's tokens"
    assert [record["tokens_seen"] for record in records(tmp_path)] == [6 * 32, 12 * 32]
    assert "2 steps of 6 sequences of 32 tokens" in capfd.readouterr().err


@pytest.mark.parametrize("warmup_steps, first_lr", [(0, 1e-2), (4, 2.5e-3)])
def test_the_first_step_moves_weights_by_the_learning_rate_it_logs(
    tmp_path, warmup_steps, first_lr
):
    """Adam's first update is lr · sign(gradient), wherever the gradient is much larger than eps."""
    options = {"lr_scheduler__warmup_steps": warmup_steps, "optimizer__weight_decay": 0}
    with closing(start(tmp_path, **options)) as trainer:
        before = trainer.model.output.weight.detach().clone()
        result = step(trainer)
        moved = (trainer.model.output.weight.detach() - before).abs().max().item()
    assert result.lr == pytest.approx(first_lr)
    assert moved == pytest.approx(first_lr, rel=1e-3)


@pytest.mark.parametrize("max_norm", [0.25, float("inf")])
def test_the_optimizer_sees_gradients_of_at_most_max_norm(tmp_path, max_norm):
    with closing(start(tmp_path, training__max_norm=max_norm)) as trainer:
        seen = []

        def measure(*_):
            squares = [p.grad.double().square().sum() for p in trainer.model.parameters()]
            seen.append(sum(squares).sqrt().item())

        trainer.optimizer.register_step_pre_hook(measure)
        reported = step(trainer).grad_norm
    assert reported > 0.5, "the norm before clipping"
    assert seen == [pytest.approx(min(reported, max_norm), rel=1e-5)]


# ---------------------------------------------------------------------------------------------
# Precision
# ---------------------------------------------------------------------------------------------


def test_bf16_weights_learn_and_the_expert_bias_stays_fp32(tmp_path):
    options = {
        "training__dtype": "bfloat16",
        "training__mixed_precision_param": "bfloat16",
        "training__steps": 12,
    }
    with closing(start(tmp_path, **options)) as trainer:
        trainer.train()
        assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
        (moe,) = trainer.moes.values()
        assert moe.expert_bias.dtype == torch.float32
        # Steps of ±1e-3 less their mean over 8 experts: multiples of 1e-3 / 8, which bf16's 8 bits
        # would round.
        in_units = moe.expert_bias / (1e-3 / 8)
        torch.testing.assert_close(in_units, in_units.round(), rtol=0, atol=1e-3)
        assert moe.expert_bias.abs().max() > 1e-3
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 0.3


def test_bf16_computation_follows_fp32(plain, tmp_path):
    assert main(tiny(tmp_path, training__mixed_precision_param="bfloat16")) == 0
    assert losses(tmp_path) == pytest.approx(plain, rel=2e-3)
    assert losses(tmp_path) != plain, "bf16 does round"


# ---------------------------------------------------------------------------------------------
# Tools
# ---------------------------------------------------------------------------------------------


def test_traces_are_written_where_they_are_asked_for(tmp_path):
    options = {
        "profiling__enable_profiling": "true",
        "profiling__profile_freq": 2,
        "profiling__profiler_warmup": 1,
        "profiling__save_traces_folder": "traces",
    }
    assert main(tiny(tmp_path, **options)) == 0
    traces = sorted(tmp_path.glob("traces/*/*"))
    expected = [f"traces/iteration_{n}/rank0_trace.json" for n in (2, 4)]
    assert [str(path.relative_to(tmp_path)) for path in traces] == expected
    names = {event.get("name") for event in json.loads(traces[0].read_text())["traceEvents"]}
    assert "aten::mm" in names


def test_a_step_leaves_no_cycle_that_holds_tensors(tmp_path, capfd):
    """gc_debug warns about each one: that memory would wait for a collection."""
    assert main(tiny(tmp_path, training__gc_debug="true")) == 0
    assert "reference cycles" not in capfd.readouterr().err


def test_python_collects_its_garbage_again_after_a_run(tmp_path):
    trainer = start(tmp_path)
    assert not gc.isenabled()
    trainer.close()
    trainer.close()
    assert gc.isenabled()


@pytest.fixture
def determinism_restored():
    yield
    torch.use_deterministic_algorithms(False)


def test_deterministic_mode_repeats_the_numbers_of_a_plain_cpu_run(
    plain, tmp_path, determinism_restored
):
    """In this mode torch fills fresh memory with NaN, so nothing that is read was unwritten."""
    assert main(tiny(tmp_path, debug__deterministic="true")) == 0
    assert torch.are_deterministic_algorithms_enabled()
    assert losses(tmp_path) == plain


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_run_has_the_same_losses(plain, tmp_path, backend):
    options = {"compile__enable": "true", "compile__backend": backend}
    assert main(tiny(tmp_path, **options)) == 0
    assert losses(tmp_path) == pytest.approx(plain, rel=1e-6)


def test_forced_balance_is_perfect_balance(plain, tmp_path):
    assert main(tiny(tmp_path, debug__moe_force_load_balance="true")) == 0
    assert [record["max_violation"] for record in records(tmp_path)] == [0, 0, 0, 0]
    assert losses(tmp_path) != plain
