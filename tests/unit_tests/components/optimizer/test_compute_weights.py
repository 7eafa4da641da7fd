"""Working copies: the same numbers as casting in every forward pass, and nobody else notices."""

import copy
import gc
import math
import weakref

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_run import losses, tiny
from torchtitan.components.optimizer import build_optimizer, compute_weights, fused_adam
from torchtitan.components.optimizer.compute_weights import ComputeWeights
from torchtitan.components.optimizer.fused_adam import FusedAdam
from torchtitan.distributed.grad_norm import clip_factor
from torchtitan.models.deepseek_v3 import DeepSeekV3Model, deepseekv3_args
from torchtitan.ops import block_fp8
from torchtitan.ops.fp8 import emulation
from torchtitan.ops.fp8.linear import Fp8Recipe
from torchtitan.ops.fp8.weight import Fp8Weight
from torchtitan.ops.linear import Joint, Linear, fp8_weights
from torchtitan.ops.linear_cross_entropy import linear_cross_entropy
from torchtitan.protocols.layers import ExpertWeights
from torchtitan.train import main

SIZES = {"n_layers": 2, "dim": 32, "n_heads": 2, "inter_dim": 48, "moe_inter_dim": 16}
SIZES |= {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
ADAMW = dict(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
ADAMW |= dict(name="AdamW", weight_decay_on="matrices")


def make_model(**changes) -> nn.Module:
    args = deepseekv3_args["debugmodel"].for_run(
        overrides=SIZES | {"vocab_size": 64} | changes, seq_len=16
    )
    torch.manual_seed(0)
    model = DeepSeekV3Model(args)
    model.init_weights()
    return model


def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(tokens(), labels=tokens()) / tokens().numel()


def train(model: nn.Module, steps: int, *, passes: int = 1, implementation: str = "fused"):
    """Losses, and the model, after steps on compute weights."""
    in_fp32 = passes > 1 or implementation != "fused"
    grad_dtype = torch.float32 if in_fp32 else torch.bfloat16
    weights = ComputeWeights(model.modules(), torch.bfloat16, root=model, grad_dtype=grad_dtype)
    optimizer = build_optimizer(
        [model], compute_weights=weights, implementation=implementation, **ADAMW
    )
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(passes):
            loss = loss_of(model)
            (loss / passes).backward()
        losses.append(loss.item())
        optimizer.step()
    return losses, model


def test_one_step_is_that_of_weights_cast_by_hand():
    """The oracle: a bf16 model made from the fp32 weights, and torch's AdamW in fp32."""
    model, masters, bf16 = make_model(), make_model(), make_model().bfloat16()
    weights = ComputeWeights(model.modules(), torch.bfloat16, root=model, grad_dtype=torch.bfloat16)
    optimizer = build_optimizer([model], compute_weights=weights, implementation="fused", **ADAMW)
    loss, expected_loss = loss_of(model), loss_of(bf16)
    loss.backward(), expected_loss.backward()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-3)
    named = zip(model.named_parameters(), masters.parameters(), bf16.parameters(), strict=True)
    for (name, p), master, rounded in named:
        # One GEMM for several weights rounds in another order than one for each.
        assert (p.grad - rounded.grad).norm() < 0.03 * rounded.grad.norm(), name
        master.grad = p.grad.float()
    optimizer.step()
    build_optimizer([masters], implementation="for-loop", **ADAMW).step()
    for ours, theirs in zip(model.parameters(), masters.parameters(), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("implementation", ["foreach", "for-loop"])
def test_other_implementations_train_alike(implementation):
    fused, _ = train(make_model(), 4)
    others, _ = train(make_model(), 4, implementation=implementation)
    assert others == pytest.approx(fused, rel=2e-3) and fused[-1] < fused[0]


def test_micro_batches_are_added_up_in_fp32():
    model = make_model()
    ComputeWeights(model.modules(), torch.bfloat16, root=model, grad_dtype=torch.float32)
    for _ in range(3):
        loss_of(model).backward()
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32, name
        assert torch.equal(p.grad, (p.grad / 3).bfloat16().float() * 3), name


@pytest.mark.parametrize("keeps", ["float32", "bfloat16"])
@pytest.mark.parametrize("computes", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "optimizer",
    [{"implementation": "foreach"}, {"implementation": "for-loop"}, {"name": "Muon"}, {}],
    ids=["foreach", "for-loop", "Muon", "fused"],
)
def test_each_optimizer_takes_gradients_of_weights_in_any_dtype(
    tmp_path, keeps, computes, optimizer
):
    """torch's optimizers and Muon take gradients in the parameters' dtype alone."""
    settings = {f"optimizer__{key}": value for key, value in optimizer.items()}
    dtypes = {"training__dtype": keeps, "training__mixed_precision_param": computes}
    batch = {"training__local_batch_size": 1, "training__global_batch_size": 2}
    assert main(tiny(tmp_path, **settings, **dtypes, **batch)) == 0
    found = losses(tmp_path)
    assert all(map(math.isfinite, found)) and len(found) > 1


@pytest.mark.parametrize(
    "optimizer", [{"implementation": "foreach"}, {"implementation": "for-loop"}, {}]
)
def test_adapters_in_fp32_on_weights_in_bf16_get_gradients_of_their_own_dtype(tmp_path, optimizer):
    settings = {f"optimizer__{key}": value for key, value in optimizer.items()}
    dtypes = {"training__dtype": "bfloat16", "training__mixed_precision_param": "bfloat16"}
    adapters = {"model__converters": '["lora"]', "lora__rank": 4}
    assert main(tiny(tmp_path, **settings, **dtypes, **adapters)) == 0
    assert all(map(math.isfinite, losses(tmp_path)))


def test_state_dict_is_that_of_the_plain_model_and_loading_reaches_the_copies():
    plain, model = make_model(), make_model()
    ComputeWeights(model.modules(), torch.bfloat16, root=model, grad_dtype=torch.bfloat16)
    state, expected = model.state_dict(), plain.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    other = make_model(init_std=0.1)
    reference = make_model(init_std=0.1)
    ComputeWeights(reference.modules(), torch.bfloat16, root=reference, grad_dtype=torch.bfloat16)
    assert not torch.equal(model(tokens()), reference(tokens()))
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(tokens()), reference(tokens()))


def test_weights_of_the_compute_type_get_no_copies_and_fused_ones_take_their_place():
    model = make_model().bfloat16()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    weights = ComputeWeights(model.modules(), torch.bfloat16, root=model, grad_dtype=torch.bfloat16)
    experts = model.layers["1"].moe.experts
    assert experts.w1.data_ptr() == experts.w13.tensor.data_ptr()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and weights.copy_of(p) is None
    optimizer = build_optimizer([model], compute_weights=weights, implementation="fused", **ADAMW)
    loss_of(model).backward()
    optimizer.step()
    assert torch.equal(experts.w13.tensor[:, :16], experts.w1)
    assert not torch.equal(experts.w1, before["layers.1.moe.experts.w1"])


def test_the_clipping_factor_is_applied_on_the_way():
    clipped, scaled = make_model(), make_model()
    models = []
    for model in (clipped, scaled):
        weights = ComputeWeights(
            model.modules(), torch.bfloat16, root=model, grad_dtype=torch.float32
        )
        optimizer = build_optimizer(
            [model], compute_weights=weights, implementation="fused", **ADAMW
        )
        assert isinstance(optimizer, FusedAdam)
        loss_of(model).backward()
        models.append((model, optimizer))
    norm, models[0][1].grad_factor = clip_factor(clipped.parameters(), 0.1)
    assert norm > 0.1
    nn.utils.clip_grad_norm_(scaled.parameters(), 0.1)
    for _, optimizer in models:
        optimizer.step()
    for ours, theirs in zip(clipped.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_early_steps_are_the_late_ones_and_leave_no_gradient():
    late_losses, late = train(make_model(), 3)
    model = make_model()
    weights = ComputeWeights(model.modules(), torch.bfloat16, root=model, grad_dtype=torch.bfloat16)
    optimizer = build_optimizer(
        [model],
        compute_weights=weights,
        implementation="fused",
        early_step_in_backward=True,
        **ADAMW,
    )
    losses = []
    for _ in range(3):
        loss = loss_of(model)
        loss.backward()
        losses.append(loss.item())
        assert all(p.grad is None for p in model.parameters())
        assert optimizer.clip([], math.inf) > 0
        optimizer.step()
    assert losses == late_losses
    for ours, theirs in zip(model.parameters(), late.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_optimizer_state_goes_on_bit_for_bit_and_is_torchs():
    models = [make_model(), make_model()]
    made = []
    for model in models:
        weights = ComputeWeights(
            model.modules(), torch.bfloat16, root=model, grad_dtype=torch.bfloat16
        )
        made.append(
            build_optimizer([model], compute_weights=weights, implementation="fused", **ADAMW)
        )

    def step(model, optimizer) -> float:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        return loss.item()

    step(models[0], made[0])
    models[1].load_state_dict(models[0].state_dict())
    made[1].load_state_dict(copy.deepcopy(made[0].state_dict()))  # it would share tensors
    for group in made[1].param_groups:
        assert group["lr"] == 1e-2
    assert [step(models[0], made[0]) for _ in range(2)] == [
        step(models[1], made[1]) for _ in range(2)
    ]
    plain = build_optimizer([make_model()], implementation="foreach", **ADAMW)
    assert set(made[0].param_groups[0]) == set(plain.param_groups[0])


def test_a_prepared_step_is_the_one_it_would_be_also_after_one_that_was_not_taken(monkeypatch):
    models = [make_model(), make_model()]
    made = [FusedAdam([{"params": list(m.parameters())}], decoupled=True) for m in models]
    for taken in (True, False, True, "unprepared"):
        prepared, plain = made
        for model, optimizer in zip(models, made, strict=True):
            optimizer.zero_grad()
            loss_of(model).backward()
            for group in optimizer.param_groups:
                group["lr"] *= 0.5
        if taken != "unprepared":
            prepared.prepare()
        if taken:
            with monkeypatch.context() as patch:
                if taken != "unprepared":  # its numbers are there
                    patch.setattr(fused_adam, "step_numbers", lambda *_: pytest.fail("made again"))
                prepared.step()
            plain.step()
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(ours, theirs)
        assert prepared.state[ours]["step"] == plain.state[theirs]["step"] == 3


def test_a_learning_rate_set_after_loading_counts():
    model = make_model()
    weights = ComputeWeights(model.modules(), torch.bfloat16, root=model, grad_dtype=torch.bfloat16)
    optimizer = build_optimizer([model], compute_weights=weights, implementation="fused", **ADAMW)
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for p in model.parameters()]
    loss_of(model).backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


FP8 = {"moe_inter_dim": 128, "inter_dim": 128}


def fp8_model(**changes) -> nn.Module:
    """With master weights that bf16 copies hold exactly."""
    model = make_model(**FP8 | changes)
    for module in model.modules():
        converted = type(module) is Linear and not module.out_features % 16
        if converted or isinstance(module, ExpertWeights):
            module.fp8 = Fp8Recipe(emulate=True)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    return model


def copies_in_fp8(model: nn.Module) -> list[tuple[Fp8Weight, Tensor]]:
    """With their master weights."""
    found = []
    for module in model.modules():
        params = dict(module.named_parameters())
        for name, value in vars(module).items():
            if isinstance(value, Fp8Weight):
                found.append((value, params[name]))
            if isinstance(value, Joint) and isinstance(value.tensor, Fp8Weight):
                masters = [params[part] for part in value.names]
                found.append((value.tensor, torch.cat(masters, value.dim)))
    return found


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_copies_in_fp8_are_what_each_pass_would_make_of_bf16_ones(grad_dtype, monkeypatch):
    results = []
    for quantised_in_passes in (False, True):
        if quantised_in_passes:
            monkeypatch.setattr(compute_weights, "fp8_weights", lambda module: ())
        model = fp8_model()
        ComputeWeights(model.modules(), torch.bfloat16, root=model, grad_dtype=grad_dtype)
        assert bool(copies_in_fp8(model)) != quantised_in_passes
        loss = loss_of(model)
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    for ours, twin in zip(*results, strict=True):
        assert ours.dtype == twin.dtype and torch.equal(ours, twin)


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_a_step_quantises_each_master_weight_once_as_the_published_format(
    implementation, monkeypatch
):
    """However many passes it has."""
    calls, by_blocks = [], emulation.by_blocks

    def counted(*args, **how):
        calls.append(1)
        return by_blocks(*args, **how)

    monkeypatch.setattr(emulation, "by_blocks", counted)
    losses, model = train(fp8_model(), 3, passes=2, implementation=implementation)
    assert losses[2] < losses[0]
    matrices = sum(len(fp8_weights(module)) for module in model.modules())
    # Made with the copies; then by the optimizer, or before the next forward pass.
    assert len(calls) == matrices * (4 if implementation == "fused" else 3)
    loss_of(model)
    for copy_of_weight, master in copies_in_fp8(model):
        matrices = (
            each.view(-1, *each.shape[-2:])
            for each in (*copy_of_weight.by_blocks(), master.detach())
        )
        for values, scales, matrix in zip(*matrices, strict=True):
            published = block_fp8.quantize_blocks(matrix)
            for part, expected in zip((values, scales), published, strict=True):
                assert torch.equal(part.float(), expected.float())


def test_a_model_with_copies_is_freed():
    model = make_model()
    weights = ComputeWeights(model.modules(), torch.bfloat16, root=model, grad_dtype=torch.bfloat16)
    loss_of(model).backward()
    copies = weakref.ref(model.layers["1"].moe.experts.w13.tensor)
    del model, weights
    gc.collect()
    assert copies() is None


def test_the_models_own_loss_is_that_of_its_logits():
    model = make_model()
    logits = model(tokens())
    identity = torch.eye(64)
    expected = linear_cross_entropy(logits.flatten(0, 1), identity, tokens().flatten())
    torch.testing.assert_close(model(tokens(), labels=tokens()), expected)
