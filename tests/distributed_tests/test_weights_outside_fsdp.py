"""Experts, embedding and head outside of FSDP, with compute weights: of one rank, or of several."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.distributed_tests.test_layouts import (
    ALL_GATHER,
    ALL_TO_ALL,
    COMPILED,
    KEEP_WEIGHTS,
    layout,
)
from tests.distributed_tests.training_ranks import (
    assert_trained_alike,
    config_of,
    counts_of,
    evaluated_and_trained,
    global_batches,
    train_on_this_rank,
    train_with,
)
from tests.tiny_run import losses, tiny
from torchtitan.components.optimizer import build_compute_weights
from torchtitan.components.optimizer.compute_weights import ComputeWeights
from torchtitan.components.optimizer.fused_adam import FusedAdam
from torchtitan.distributed import fsdp
from torchtitan.distributed.exchange import Gather
from torchtitan.distributed.grad_norm import clip_factor, clip_grad_norm
from torchtitan.distributed.token_dispatch import ExactDispatcher
from torchtitan.models.moe.dispatcher import LocalDispatcher
from torchtitan.tools.utils import local_device
from torchtitan.train import main
from torchtitan.trainer import Trainer

BF16 = "--training.mixed_precision_param=bfloat16"


@contextmanager
def patched(*, by_fsdp: bool) -> Iterator[None]:
    """Run both with one product for gate and up; by_fsdp: with FSDP around experts, too."""
    patch = pytest.MonkeyPatch()
    # Two products would round the rows' gradient once more.
    for dispatcher in (ExactDispatcher, LocalDispatcher):
        patch.setattr(dispatcher, "prefers_whole_tokens", True)
    if by_fsdp:
        for module in (fsdp, build_compute_weights):
            patch.setattr(module, "modules_outside_fsdp", lambda *_: [])
    try:
        yield
    finally:
        patch.undo()


def train(options: list[str], folder: str, *, by_fsdp: bool) -> dict:
    with patched(by_fsdp=by_fsdp):
        return train_with(config_of(*options, BF16, f"--job.dump_folder={folder}"))


def oracle(options: list[str], folder: str) -> dict:
    return train(options, folder, by_fsdp=True)


def ours(options: list[str], folder: str) -> dict:
    return train(options, folder, by_fsdp=False)


@pytest.mark.parametrize(
    "world_size, options",
    [
        layout(2, ep=2),
        layout(2, ep=2, accumulation=2),
        layout(2, replicate=2, shard=1, ep=2, ac="full"),
        (2, [*layout(2, tp=2, etp=2)[1], "--optimizer.name=Muon"]),
        (2, [*layout(2, ep=2)[1], "--optimizer.implementation=foreach"]),
    ],
    ids=["FSDP", "accumulation", "DDP", "split experts, Muon", "foreach"],
)
def test_they_train_as_under_fsdp(ranks, tmp_path, world_size, options):
    """The oracle is the same layout with FSDP around all weights, which casts and reduces."""
    expected = ranks(world_size).run(oracle, options, str(tmp_path / "a"))
    for result in ranks(world_size).run(ours, options, str(tmp_path / "b")):
        assert_trained_alike(result, expected[0])


FOUR_LAYERS = "--model.args.n_layers=4"
BF16_SUMS = "--training.mixed_precision_reduce=bfloat16"


@pytest.mark.parametrize(
    "world_size, options",
    [
        layout(2, FOUR_LAYERS),
        layout(2, FOUR_LAYERS, accumulation=2),
        layout(2, FOUR_LAYERS, BF16_SUMS, ac="full"),
        layout(4, FOUR_LAYERS, *COMPILED, ep=2),
        layout(2, KEEP_WEIGHTS, FOUR_LAYERS),
        layout(2, KEEP_WEIGHTS, FOUR_LAYERS, BF16_SUMS),
        layout(2, KEEP_WEIGHTS, FOUR_LAYERS, accumulation=2, ac="full"),
        layout(4, KEEP_WEIGHTS, FOUR_LAYERS, ep=2),
        layout(4, KEEP_WEIGHTS, tp=2, etp=2),
        layout(4, KEEP_WEIGHTS, "--optimizer.name=Muon", cp=2, ep=2),
        layout(2, KEEP_WEIGHTS, "--optimizer.implementation=foreach"),
        layout(2, FOUR_LAYERS, replicate=2, shard=1),
        layout(2, replicate=2, shard=1, accumulation=2, ac="full"),
        layout(4, FOUR_LAYERS, replicate=2, shard=2, ep=2, accumulation=2),
        layout(4, FOUR_LAYERS, BF16_SUMS, replicate=2, shard=2),
        layout(4, FOUR_LAYERS, "--parallelism.expert_parallel_node_size=2"),
        layout(2, FOUR_LAYERS, "--model.args.n_mtp_layers=2", accumulation=2),
        layout(2, KEEP_WEIGHTS, "--model.args.n_mtp_layers=1"),
        layout(2, "--model.args.n_dense_layers=2"),
    ],
    ids=[
        "freed",
        "freed, accumulation",
        "freed, bf16 sums, recomputed",
        "freed, FSDP x EP, compiled",
        "FSDP",
        "bf16 sums",
        "accumulation",
        "FSDP x EP",
        "split",
        "CP, Muon",
        "foreach",
        "DDP",
        "DDP, accumulation",
        "HSDP x EP, accumulation",
        "HSDP, bf16 sums",
        "two nodes of two",
        "freed, multi-token prediction, accumulation",
        "multi-token prediction",
        "no experts",
    ],
)
def test_gathered_ones_train_as_under_fsdp(ranks, tmp_path, world_size, options):
    """The oracle is the same layout with FSDP around all weights, which copies, casts, gathers."""
    expected = ranks(world_size).run(oracle, options, str(tmp_path / "a"))
    for result in ranks(world_size).run(ours, options, str(tmp_path / "b")):
        assert_trained_alike(result, expected[0])


def dtypes_of_replicas_sums(options: list[str], folder: str) -> set[tuple[torch.dtype, bool]]:
    """Dtypes that sums over replicas travel in, and whether gradients are what arrived."""
    found, finish = set(), ComputeWeights._finish

    def noted(self: ComputeWeights) -> None:
        sums = list(self._replica_sums)
        finish(self)
        found.update((sent.dtype, torch.equal(grad, sent.to(grad.dtype))) for grad, sent in sums)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ComputeWeights, "_finish", noted)
        ours(options, folder)
    return found


@pytest.mark.parametrize("how", ["accumulation", "--optimizer.implementation=foreach"])
def test_replicas_sum_in_the_dtype_that_is_asked_for(ranks, tmp_path, how):
    """Also where gradients are fp32: those of several micro-batches, and torch's optimizers'."""
    passes = {"accumulation": 2} if how == "accumulation" else {}
    more = [] if passes else [how]
    for dtype, sums in ((torch.float32, []), (torch.bfloat16, [BF16_SUMS])):
        options = layout(2, *more, *sums, replicate=2, shard=1, **passes)[1]
        found = ranks(2).run(dtypes_of_replicas_sums, options, str(tmp_path / str(dtype)))
        assert found == [{(dtype, True)}] * 2


def train_with_late_ranks(options: list[str], folder: str) -> dict:
    """Every second rank starts each exchange of tokens later than the others."""
    start = Gather.start

    def late(self: Gather, x: Tensor) -> Tensor:
        time.sleep(0.03 * (dist.get_rank() % 2))
        return start(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gather, "start", late)
        return train_on_this_rank(options, folder)


def test_tokens_that_arrive_late_pass_fsdp(ranks, tmp_path):
    """FSDP makes views of a module's inputs, among them tokens that gloo has still to fill in."""
    options = layout(4, ALL_TO_ALL, FOUR_LAYERS, replicate=2, shard=2, ep=2)[1]
    expected = ranks(4).run(train_on_this_rank, options, str(tmp_path / "a"))[0]
    for result in ranks(4).run(train_with_late_ranks, [*options, ALL_GATHER], str(tmp_path / "b")):
        assert_trained_alike(result, expected)


def evaluate(options: list[str], folder: str, by_fsdp: bool) -> list[float]:
    with patched(by_fsdp=by_fsdp):
        return evaluated_and_trained([*options, BF16], folder)


def test_gathered_ones_are_whole_in_an_evaluation(ranks, tmp_path):
    """After a step the copies are outdated, whichever forward pass comes next."""
    options = layout(2, KEEP_WEIGHTS, FOUR_LAYERS)[1]
    expected = ranks(2).run(evaluate, options, str(tmp_path / "a"), True)
    assert ranks(2).run(evaluate, options, str(tmp_path / "b"), False) == [
        pytest.approx(losses, rel=1e-6) for losses in expected
    ]


def what_a_pass_leaves(options: list[str], folder: str, event: str) -> tuple[int, int, bool]:
    """Evaluate, or fail in a backward pass, and go on. Returns bytes of gathered weights after the
    event, and after the next pass sums not handed out and whether all experts have gradients."""
    trainer = Trainer(config_of(*options, BF16, f"--job.dump_folder={folder}"))
    weights, (tokens, labels) = trainer.compute_weights, next(iter(global_batches()))
    assert weights is not None
    batch = {"input": tokens}, labels
    if event == "evaluation":
        trainer.model.eval()
        with torch.no_grad():
            trainer.loss_sum(batch)
        trainer.model.train()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ComputeWeights, "_finish", raised)
        if event == "error":
            with pytest.raises(ZeroDivisionError):
                trainer.forward_backward(batch, counts_of(labels.numel()))
    held = sum(w.whole.untyped_storage().nbytes() for w in weights._gathered())
    trainer.optimizer.zero_grad()
    trainer.forward_backward(batch, counts_of(labels.numel()))
    experts = [moe.experts for moe in trainer.model.moe_layers().values()]
    complete = all(p.grad is not None for each in experts for p in each.parameters())
    trainer.close()
    return held, len(weights._sums) + len(weights._replica_sums), complete


def what_a_dense_model_holds(options: list[str], folder: str) -> tuple[list[int], list[int]]:
    """Bytes of gathered weights as each layer's forward pass begins, and numbers of sums on their
    way as each module's backward pass begins."""
    held, sums, begin = [], [], ComputeWeights.begin_backward

    def noted(self: ComputeWeights) -> None:
        begin(self)
        sums.append(len(self._sums))

    def note(*_: object) -> None:
        held.append(sum(w.whole.untyped_storage().nbytes() for w in gathered))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ComputeWeights, "begin_backward", noted)
        trainer = Trainer(config_of(*options, BF16, f"--job.dump_folder={folder}"))
        gathered = trainer.compute_weights._gathered()
        for layer in trainer.model.blocks().values():
            layer.register_forward_pre_hook(note)
        tokens, labels = next(iter(global_batches()))
        trainer.forward_backward(({"input": tokens}, labels), counts_of(labels.numel()))
    trainer.close()
    return held, sums


def test_a_dense_model_holds_its_head_no_longer_than_needed(ranks, tmp_path):
    """It is gathered beside the last layer, and its gradient travels beside one layer only."""
    options = layout(2, FOUR_LAYERS, "--model.args.n_dense_layers=4")[1]
    for held, sums in ranks(2).run(what_a_dense_model_holds, options, str(tmp_path)):
        assert held[:3] == [0, 0, 0] and held[3] > 0
        head, *layers = sums
        assert len(layers) == 4 and layers[2:] == [0, 0]


def losses_after_an_error(options: list[str], folder: str, fails: bool) -> float:
    """Loss of a pass with other weights, right after a forward pass, which may raise."""
    trainer = Trainer(config_of(*options, BF16, f"--job.dump_folder={folder}"))
    tokens, labels = next(iter(global_batches()))
    batch, counts = ({"input": tokens}, labels), counts_of(labels.numel())
    second = list(trainer.model.blocks().values())[1]
    hook = second.register_forward_pre_hook(lambda *_: raised(None))
    if fails:
        with pytest.raises(ZeroDivisionError):
            trainer.forward_backward(batch, counts)
    hook.remove()
    with torch.no_grad():
        for param in trainer.compute_weights._copy_of:  # FSDP keeps its own as they are gathered
            param.mul_(1.5)
    loss = trainer.forward_backward(batch, counts).item()
    trainer.close()
    return loss


def test_an_error_in_a_forward_pass_leaves_no_gather_on_its_way(ranks, tmp_path):
    """It would write older values over new ones."""
    options = layout(2, KEEP_WEIGHTS, FOUR_LAYERS, "--model.args.dim=256")[1]
    expected = ranks(2).run(losses_after_an_error, options, str(tmp_path / "a"), False)
    for attempt in range(3):
        folder = str(tmp_path / str(attempt))
        assert ranks(2).run(losses_after_an_error, options, folder, True) == expected


def raised(self: ComputeWeights | None) -> None:
    raise ZeroDivisionError


def test_an_evaluation_leaves_no_weights_of_multi_token_prediction(ranks, tmp_path):
    """Its block is never run there, and has begun to be gathered."""
    options = layout(2, FOUR_LAYERS, "--model.args.n_mtp_layers=1")[1]
    found = ranks(2).run(what_a_pass_leaves, options, str(tmp_path), "evaluation")
    assert found == [(0, 0, True)] * 2


@pytest.mark.parametrize("degrees", [{}, {"replicate": 2, "shard": 1}], ids=["FSDP", "DDP"])
def test_an_error_in_a_backward_pass_leaves_no_sums(ranks, tmp_path, degrees):
    options = layout(2, FOUR_LAYERS, **degrees)[1]
    found = ranks(2).run(what_a_pass_leaves, options, str(tmp_path), "error")
    assert [each[1:] for each in found] == [(0, True)] * 2


def outside(options: list[str], folder: str) -> set[str]:
    """Names of what computes with copies, not under FSDP."""
    trainer = Trainer(config_of(*options, BF16, f"--job.dump_folder={folder}"))
    model, moe = trainer.model, next(iter(trainer.model.moe_layers().values()), None)
    modules = {"embedding": model.tok_embeddings, "head": model.output}
    if moe is not None:  # not on another stage
        modules["experts"] = moe.experts
    names = {"embedding": "weight", "head": "weight", "experts": "w2"}
    found = {
        name
        for name, module in modules.items()
        if module is not None and names[name] in module.__dict__
    }
    assert not any(isinstance(modules[name], FSDPModule) for name in found)
    trainer.close()
    return found


ALL = {"embedding", "head", "experts"}


@pytest.mark.parametrize(
    "world_size, options, expected",
    [
        (*layout(2, ep=2), ALL),
        (*layout(2), ALL),
        (*layout(2, KEEP_WEIGHTS), ALL),
        (*layout(2, replicate=2, shard=1), ALL),
        (*layout(2, "--model.args.vocab_size=2049"), {"experts"}),
        (*layout(2, "--training.frozen_fqns=['tok_embeddings.*']"), ALL - {"embedding"}),
        (*layout(2, "--training.frozen_fqns=['*.w1']"), ALL - {"experts"}),
        (*layout(2, tp=2, etp=2), {"experts"}),
        (*layout(4, KEEP_WEIGHTS, pp=2, ep=2), set()),
    ],
    ids=[
        "alone",
        "shared",
        "kept",
        "replicas",
        "uneven rows",
        "frozen embedding",
        "frozen experts",
        "TP",
        "pipeline",
    ],
)
def test_fsdp_keeps_what_cannot_be_gathered(ranks, tmp_path, world_size, options, expected):
    found = ranks(world_size).run(outside, options, str(tmp_path))
    assert found == [expected] * world_size


@pytest.mark.parametrize(
    "how", [{"expert_parallel_degree": 2}, {"fsdp_reshard_after_forward": "never"}]
)
def test_a_checkpoint_reaches_their_compute_weights(ranks, tmp_path, how):
    settings = {
        "training__mixed_precision_param": "bfloat16",
        **{f"parallelism__{key}": value for key, value in how.items()},
        "lr_scheduler__min_lr_factor": 1,
        "checkpoint__enable": True,
        "checkpoint__last_save_model_only": False,
    }
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert ranks(2).run(main, tiny(whole, **settings)) == [0, 0]
    assert ranks(2).run(main, tiny(parts, **settings, training__steps=2)) == [0, 0]
    assert ranks(2).run(main, tiny(parts, **settings)) == [0, 0]
    assert losses(parts) == losses(whole)


def update(fused: bool) -> list[torch.Tensor]:
    """Three clipped steps on shards, one of which is empty, and on a whole tensor."""
    device = local_device()
    mesh = init_device_mesh(device.type, (2,))
    generator = torch.Generator().manual_seed(3)
    shapes = [(4, 6), (1, 5), (3,)]

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    params = [nn.Parameter(random(shape)) for shape in shapes]
    for i in range(2):
        params[i] = nn.Parameter(distribute_tensor(params[i].data, mesh, [Shard(0)]))
    groups = [{"params": params, "lr": 1e-2, "weight_decay": 0.1}]
    how = {"betas": (0.9, 0.95), "eps": 1e-8}
    optimizer = (
        FusedAdam(groups, decoupled=True, **how)
        if fused
        # On GPUs torch's multi-tensor form refuses plain tensors beside sharded ones.
        else torch.optim.AdamW(groups, foreach=False, **how)
    )
    for _ in range(3):
        for p, shape in zip(params, shapes, strict=True):
            grad = random(shape)
            is_split = isinstance(p, DTensor)
            p.grad = distribute_tensor(grad, mesh, [Shard(0)]) if is_split else grad
        if fused:
            _, optimizer.grad_factor = clip_factor(params, 0.5)
        else:
            clip_grad_norm(params, 0.5)
        optimizer.step()
    return [
        p.full_tensor() if isinstance(p, DTensor) else p for p in map(torch.Tensor.detach, params)
    ]


def test_one_pass_over_shards_is_adamw(ranks):
    for result, expected in zip(
        ranks(2).run(update, True), ranks(2).run(update, False), strict=True
    ):
        for got, wanted in zip(result, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)
