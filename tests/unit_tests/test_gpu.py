"""What only a GPU can show: its kernels against fp64, and that the CPU never waits for it."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.tiny_run import losses, tiny
from torchtitan.components.loss import cross_entropy_sum
from torchtitan.components.optimizer.ema import WeightAverage
from torchtitan.config import EMA
from torchtitan.distributed.token_dispatch import AllToAllDispatcher
from torchtitan.models.deepseek_v3 import DeepSeekV3Model, deepseekv3_args
from torchtitan.models.moe import MoE, MoEArgs, TokenChoiceTopKRouter
from torchtitan.models.moe import router as router_module
from torchtitan.ops import cudnn_documents, packed_documents
from torchtitan.ops.attention import (
    Documents,
    attention,
    causal_mask,
    document_mask,
    number_documents,
)
from torchtitan.ops.expert_ffn import expert_ffn, expert_ffn_chain
from torchtitan.ops.grouped_mm import grouped_linear, grouped_mm_loop
from torchtitan.ops.linear_cross_entropy import linear_cross_entropy
from torchtitan.ops.mla_attention import can_fuse, mla_attention
from torchtitan.ops.permute import sort_slots
from torchtitan.ops.rope import apply_rope, rope_table
from torchtitan.tools.utils import to_device
from torchtitan.train import main

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.isfinite().all()
    return (
        (actual.double().cpu() - expected.double().cpu()).norm() / expected.double().norm()
    ).item()


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [
        torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for shape in shapes
    ]


def doubles(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


@pytest.mark.parametrize("frozen", [(1,), (2,), (1, 2)])
def test_expert_operator_leaves_frozen_weights_alone(frozen: tuple[int, ...]) -> None:
    T, D, hidden, E, K = 512, 256, 192, 16, 4
    inputs = leaves((T, D), (E, 2 * hidden, D), (E, D, hidden))
    inputs.append(torch.rand(T, K, device="cuda").requires_grad_())
    order = sort_slots(torch.stack([torch.randperm(E, device="cuda")[:K] for _ in range(T)]), E)
    grad = torch.randn(T, D, device="cuda", dtype=inputs[0].dtype)
    expected = torch.autograd.grad(expert_ffn(*inputs, order), inputs, grad)
    for i in frozen:
        inputs[i].requires_grad_(False)
    expert_ffn(*inputs, order).backward(grad)
    for i, each in enumerate(inputs):
        assert each.grad is None if i in frozen else torch.equal(each.grad, expected[i])


def packed_tokens(B: int, S: int, ends: list[int]) -> Tensor:
    """Tokens of which 3 ends a document: at random, or at `ends` of the flattened batch."""
    tokens = torch.randint(4, 20, (B, S)) if ends else torch.randint(0, 20, (B, S))
    tokens.view(-1)[[end - 1 for end in ends]] = 3
    return tokens


# Positions of the batch at which documents end; [] = many short ones. Long ones have calls of their
# own: one that isn't whole blocks, short ones between, one before the end.
PACKED = {"short documents": (256, []), "long documents": (4096, [3100, 3110, 4000, 4250])}


@pytest.fixture
def cudnn_alone(monkeypatch) -> None:
    """Let packed documents be computed by cuDNN's one call or not at all."""
    if cudnn_documents.package() is None:
        pytest.skip("needs nvidia-cudnn-frontend")
    for name in ("attend", "attend_backward"):
        monkeypatch.setattr(packed_documents, name, lambda *_: pytest.fail("cuDNN refused"))


@pytest.fixture(params=["with cudnn-frontend", "without it"])
def both_ways(request, monkeypatch) -> None:
    """Run a test with the package's one call for all documents, and without the package."""
    if request.param == "without it":
        monkeypatch.setattr(cudnn_documents, "package", lambda: None)
    else:
        request.getfixturevalue("cudnn_alone")


@pytest.mark.parametrize("documents", [None, *PACKED])
def test_attention_at_mla_sizes_equals_fp64(documents: str | None, both_ways) -> None:
    S, ends = PACKED[documents] if documents else (256, [])
    B, H, scale = 2, 4, 192**-0.5
    inputs = leaves((B, S, H, 192), (B, S, H, 192), (B, S, H, 128))
    exact = doubles(inputs)
    tokens = packed_tokens(B, S, ends).cuda()
    visible = torch.ones(S, S, dtype=torch.bool, device="cuda").tril().expand(B, 1, S, S)
    mask = None
    if documents:
        mask = document_mask(number_documents(tokens, 3))
        assert (mask.starts_on_host is not None) == bool(ends)
        visible = document_mask(
            number_documents(tokens.cpu(), 3)
        ).cuda()  # the CPU's form: a plain matrix
    out = attention(*inputs, scale=scale, mask=mask)
    q, k, v = (t.transpose(1, 2) for t in exact)
    scores = (q @ k.mT * scale).masked_fill(~visible, float("-inf"))
    expected = (scores.softmax(-1) @ v).transpose(1, 2)
    assert relative_error(out, expected) < 1e-2
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad.double())
    for ours, theirs in zip(inputs, exact, strict=True):
        assert relative_error(ours.grad, theirs.grad) < 1e-2


# Lengths of documents.
DOCUMENTS = {
    "of one token": [1, 1, 300, 1, 700, 20, 1],
    "many": [1] * 40 + [9] * 40 + [624],
    "one for all": [1024],
    "long, not whole blocks": [3100, 900, 96],
}


def attention_in_fp32(inputs: list[Tensor], lengths: list[int], grad: Tensor) -> list[Tensor]:
    """Output and gradients of q, k and v, (B, S, H, C), document by document."""
    group = inputs[0].size(2) // inputs[1].size(2)
    exact = [t.detach().float().requires_grad_() for t in inputs]
    q, k, v = (t.flatten(0, 1).split(lengths) for t in exact)
    outs = []
    for its_q, its_k, its_v in zip(q, k, v, strict=True):
        its_k, its_v = (t.repeat_interleave(group, 1) for t in (its_k, its_v))
        scores = torch.einsum("qhc,khc->hqk", its_q, its_k) * 0.1
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
        shares = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        outs.append(torch.einsum("hqk,khc->qhc", shares, its_v))
    out = torch.cat(outs).view(grad.shape)
    return [out, *torch.autograd.grad(out, exact, grad.float())]


def documents_of(lengths: list[int], S: int) -> Documents:
    numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).view(-1, S)
    mask = document_mask(numbers, device=torch.device("cuda"))
    if mask is None:  # one document; the kernels take it, too
        starts = torch.tensor([0, S] + [S] * 15, dtype=torch.int32)
        return Documents(starts.cuda(), S)
    return mask


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=["equal heads", "GQA"])
@pytest.mark.parametrize("channels", sorted(cudnn_documents.PROVEN))
def test_cudnn_computes_packed_documents_as_fp32_does(
    channels, heads, documents, cudnn_alone
) -> None:
    (qk, v), (H, kv_heads), lengths = channels, heads, DOCUMENTS[documents]
    S = sum(lengths)
    inputs = leaves((1, S, H, qk), (1, S, kv_heads, qk), (1, S, kv_heads, v))
    grad = torch.randn(1, S, H, v, device="cuda", dtype=torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float16):
        inputs = [t.detach().to(dtype).requires_grad_() for t in inputs]
        out = attention(*inputs, scale=0.1, mask=documents_of(lengths, S))
        assert out.dtype == dtype
        ours = [out, *torch.autograd.grad(out, inputs, grad.to(dtype))]
        for a, b in zip(ours, attention_in_fp32(inputs, lengths, grad), strict=True):
            assert relative_error(a, b) < 1e-2


def test_more_documents_than_before_have_a_call_of_their_own(cudnn_alone) -> None:
    inputs = leaves((1, 1024, 2, 192), (1, 1024, 2, 192), (1, 1024, 2, 128))
    grad = torch.randn(1, 1024, 2, 128, device="cuda", dtype=torch.bfloat16)
    for count in (3, 16, 17, 300, 1000, 5):
        lengths = [1] * (count - 1) + [1025 - count]
        out = attention(*inputs, scale=0.1, mask=documents_of(lengths, 1024))
        ours = [out, *torch.autograd.grad(out, inputs, grad)]
        for a, b in zip(ours, attention_in_fp32(inputs, lengths, grad), strict=True):
            assert relative_error(a, b) < 1e-2


def test_cudnn_and_flash_attention_agree_on_documents(monkeypatch) -> None:
    """Values are a slice; the host never waits for cuDNN."""
    if cudnn_documents.package() is None:
        pytest.skip("needs nvidia-cudnn-frontend")
    B, S, H = 2, 4096, 4
    q, k, wide = leaves((B, S, H, 192), (B, S, H, 192), (B, S, H, 256))
    grad = torch.randn(B, S, H, 128, device="cuda", dtype=torch.bfloat16)
    mask = documents_of([3100, 996, 1, 2000, 95, 2000], S)

    def run(mask: Documents) -> list[Tensor]:
        out = attention(q, k, wide[..., 128:], scale=0.1, mask=mask)
        return [out, *torch.autograd.grad(out, (q, k, wide), grad)]

    run(mask)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = run(mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    monkeypatch.setattr(cudnn_documents, "package", lambda: None)
    for used in (mask, mask._replace(starts_on_host=None)):
        for a, b in zip(ours, run(used), strict=True):
            assert relative_error(a, b) < 1e-2


def test_a_recorded_call_computes_the_documents_of_the_moment(cudnn_alone) -> None:
    S, H = 1024, 4
    inputs = leaves((1, S, H, 192), (1, S, H, 192), (1, S, H, 128))
    grad = torch.randn(1, S, H, 128, device="cuda", dtype=torch.bfloat16)
    first, later = documents_of([600, 424], S), documents_of([100, 1, 900, 23], S)
    mask = Documents(first.starts.clone(), S)

    def run() -> list[Tensor]:
        out = attention(*inputs, scale=0.1, mask=mask)
        return [out, *torch.autograd.grad(out, inputs, grad)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    mask.starts.copy_(later.starts)
    graph.replay()
    for a, b in zip(found, run(), strict=True):
        assert relative_error(a, b) < 1e-3  # the order of sums differs


def test_packed_documents_repeat_bit_for_bit_in_a_deterministic_run() -> None:
    lengths = [1, 600, 23, 400]
    inputs = leaves((1, 1024, 4, 192), (1, 1024, 4, 192), (1, 1024, 4, 128))
    grad = torch.randn(1, 1024, 4, 128, device="cuda", dtype=torch.bfloat16)

    def run() -> list[Tensor]:
        out = attention(*inputs, scale=0.1, mask=documents_of(lengths, 1024))
        return [out, *torch.autograd.grad(out, inputs, grad)]

    torch.use_deterministic_algorithms(True)
    try:
        first, again = run(), run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for a, b in zip(first, attention_in_fp32(inputs, lengths, grad), strict=True):
        assert relative_error(a, b) < 1e-2


@pytest.mark.parametrize("ranks_chunk", [0, 1])
def test_attention_of_a_rank_of_context_parallelism_equals_fp64(ranks_chunk: int) -> None:
    """Two chunks of 128 of a sequence of 512, by cuDNN, and by flex attention."""
    B, H, C, scale = 2, 4, 128, 192**-0.5
    late = 3 - ranks_chunk
    chunks = (ranks_chunk, late)
    queries = torch.cat([torch.arange(C * i, C * (i + 1), device="cuda") for i in chunks])
    inputs = leaves((B, 2 * C, H, 192), (B, C * (late + 1), H, 192), (B, C * (late + 1), H, 128))
    exact = doubles(inputs)
    mask = causal_mask(queries)
    assert mask.borders == ((0, 128, 384, 512) if ranks_chunk == 0 else (128, 384))
    q, k, v = (t.transpose(1, 2) for t in exact)
    hidden = queries[:, None] < torch.arange(k.size(2), device="cuda")
    expected = (q @ k.mT * scale).masked_fill(hidden, float("-inf")).softmax(-1) @ v
    expected = expected.transpose(1, 2)
    grad = torch.randn(expected.shape, device="cuda", dtype=torch.bfloat16)
    theirs = torch.autograd.grad(expected, exact, grad.double())
    for used in (mask, mask.blocks):
        out = attention(*inputs, scale=scale, mask=used)
        ours = torch.autograd.grad(out, inputs, grad)
        for a, b in zip((out, *ours), (expected, *theirs), strict=True):
            assert relative_error(a, b) < 1e-2


@pytest.mark.parametrize("counts", [[5, 0, 100, 23], [0, 0, 128, 0], [1, 1, 1, 125]], ids=str)
def test_grouped_mm_equals_the_loop_in_fp64(counts: list[int]) -> None:
    rows, weights = leaves((128, 64), (4, 96, 64))
    exact = doubles([rows, weights])
    counts_E = torch.tensor(counts, device="cuda")
    out = grouped_linear(rows, weights, counts_E)
    expected = grouped_mm_loop(exact[0], exact[1].transpose(1, 2), counts_E)
    assert relative_error(out, expected) < 1e-2
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad.double())
    assert relative_error(rows.grad, exact[0].grad) < 1e-2
    assert relative_error(weights.grad, exact[1].grad) < 1e-2


# None: every slot has a row. Else the length of the list of rows, of about 1,500 that are taken.
@pytest.mark.parametrize("num_rows", [None, 2048, 1000])
def test_expert_operator_equals_the_chain_in_fp64(num_rows: int | None) -> None:
    T, D, hidden, E, K = 512, 256, 192, 16, 4
    inputs = leaves((T, D), (E, 2 * hidden, D), (E, D, hidden))
    inputs.append(torch.rand(T, K, device="cuda").requires_grad_())
    exact = [t.cpu() for t in doubles(inputs)]
    exact = [t.detach().requires_grad_() for t in exact]
    ids = torch.stack([torch.randperm(E, device="cuda")[:K] for _ in range(T)])
    if num_rows is not None:
        ids[torch.rand(T, K, device="cuda") > 0.75] = -1
    out = expert_ffn(*inputs, sort_slots(ids, E, num_rows))
    expected = expert_ffn_chain(*exact, sort_slots(ids.cpu(), E, num_rows))
    assert relative_error(out, expected) < 1e-2
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad.cpu().double())
    for ours, theirs in zip(inputs, exact, strict=True):
        assert relative_error(ours.grad, theirs.grad) < 1e-2


@pytest.mark.parametrize("documents", [None, *PACKED])
def test_mla_operator_equals_the_plain_lines_in_fp64(documents: str | None, both_ways) -> None:
    S, ends = PACKED[documents] if documents else (256, [])
    B, H, scale = 2, 4, 0.07
    assert can_fuse("cuda", torch.bfloat16, 128, 64, 128)
    projected, kv = leaves((B, S, H * 192 + 64), (B, S, H, 256))
    table = rope_table(64, S, 10000.0).cuda()
    tokens = packed_tokens(B, S, ends) if documents else torch.ones(B, S, dtype=torch.int64)
    mask = document_mask(number_documents(tokens, 3), device=torch.device("cuda"))
    assert (mask is not None) == bool(documents)
    assert mask is None or (mask.starts_on_host is not None) == bool(ends)
    q = projected[..., : H * 192].unflatten(-1, (H, 192))
    k_rope = projected[..., -64:]
    out = mla_attention(q, kv, k_rope, table, v_channels=128, scale=scale, mask=mask)

    exact_projected, exact_kv = doubles([projected, kv])
    q = exact_projected[..., : H * 192].unflatten(-1, (H, 192))
    k_rope = apply_rope(exact_projected[..., None, -64:], table.double()).expand(-1, -1, H, -1)
    q = torch.cat((q[..., :128], apply_rope(q[..., 128:], table.double())), -1)
    k = torch.cat((exact_kv[..., :128], k_rope), -1)
    q, k, v = (t.transpose(1, 2) for t in (q, k, exact_kv[..., 128:]))
    hidden = ~document_mask(number_documents(tokens, 3)).cuda()
    scores = (q @ k.mT * scale).masked_fill(hidden, float("-inf"))
    expected = (scores.softmax(-1) @ v).transpose(1, 2)
    assert relative_error(out, expected) < 1e-2
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad.double())
    assert relative_error(projected.grad, exact_projected.grad) < 1e-2
    assert relative_error(kv.grad, exact_kv.grad) < 1e-2


def test_the_router_kernel_chooses_what_torch_chooses(monkeypatch) -> None:
    torch.manual_seed(0)
    rules = {"num_expert_groups": 8, "num_limited_groups": 4, "route_norm": True}
    router = TokenChoiceTopKRouter(dim=512, num_experts=256, top_k=8, **rules)
    torch.nn.init.normal_(router.gate.weight, std=0.05)
    router = router.to("cuda", torch.bfloat16)
    x, bias = leaves((2048, 512))[0], torch.randn(256, device="cuda") * 0.01
    mask = torch.rand(2048, device="cuda") > 0.1
    weights, ids, counts = router(x, bias, mask)
    monkeypatch.setattr(router_module, "can_route", lambda *_: False)
    expected_weights, expected_ids, expected_counts = router(x, bias, mask)
    order, expected_order = ids.argsort(1), expected_ids.argsort(1)
    assert torch.equal(ids.gather(1, order), expected_ids.gather(1, expected_order))
    assert torch.equal(counts, expected_counts)
    expected_weights = expected_weights.gather(1, expected_order)
    assert relative_error(weights.gather(1, order), expected_weights) < 1e-5


def test_linear_cross_entropy_equals_fp64() -> None:
    inputs = leaves((300, 64), (1000, 64))
    exact = doubles(inputs)
    labels = torch.randint(0, 1000, (300,), device="cuda")
    labels[5] = -100
    loss = linear_cross_entropy(*inputs, labels)
    expected = linear_cross_entropy(*exact, labels)
    assert relative_error(loss, expected) < 1e-3
    (loss * 0.01).backward()
    (expected * 0.01).backward()
    for ours, theirs in zip(inputs, exact, strict=True):
        assert relative_error(ours.grad, theirs.grad) < 2e-2


def moe_layer(**changes) -> MoE:
    torch.manual_seed(0)
    args = {"num_experts": 8, "top_k": 3, "num_expert_groups": 4, "num_limited_groups": 2}
    layer = MoE(MoEArgs(**args | {"score_before_experts": False} | changes), dim=64, hidden_dim=32)
    layer.init_weights(0.1)
    return layer


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    """Process group of this process alone."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dispatched", [False, True], ids=["at home", "dispatched"])
def test_moe_layer_equals_the_loop_in_fp64(group, compiled: bool, dispatched: bool) -> None:
    """Dispatched: through the all-to-all, its shared experts on a stream of their own."""
    layer = moe_layer().bfloat16()
    if dispatched:
        layer.dispatcher = AllToAllDispatcher(group, 8, ranks_per_node=1)
    exact = moe_layer(use_grouped_mm=False).double()
    exact.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    layer = layer.cuda()
    forward = torch.compile(layer.forward) if compiled else layer.forward
    x = torch.randn(2, 32, 64, dtype=torch.bfloat16)
    out, load = forward(x.cuda(), return_load=True)
    expected, expected_load = exact(x.double(), return_load=True)
    assert load.tokens_E.tolist() == expected_load.tokens_E.tolist(), "another choice of experts"
    assert relative_error(out, expected) < 2e-2
    out.float().square().sum().backward()
    expected.square().sum().backward()
    pairs = zip(layer.named_parameters(), exact.parameters(), strict=True)
    for (name, ours), theirs in pairs:
        assert relative_error(ours.grad, theirs.grad) < 3e-2, name


def test_the_cpu_never_waits_for_the_gpu_in_forward_and_backward() -> None:
    overrides = {"n_layers": 2, "dim": 64, "n_heads": 2, "inter_dim": 64, "moe_inter_dim": 32}
    args = deepseekv3_args["debugmodel_node_limited"].for_run(overrides=overrides, seq_len=64)
    model = DeepSeekV3Model(args)
    model.init_weights()
    model = model.to("cuda", torch.bfloat16)
    tokens = torch.randint(0, 2048, (2, 64), device="cuda")

    def step() -> None:
        cross_entropy_sum(model(tokens, token_mask=tokens != 1), tokens).backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert model.layers["1"].moe.tokens_per_expert.sum() > 0


def test_the_tiny_model_trains_in_bf16_and_compiled(tmp_path) -> None:
    changes = {"training__mixed_precision_param": "bfloat16", "training__steps": 6}
    assert main(tiny(tmp_path / "eager", **changes)) == 0
    assert main(tiny(tmp_path / "compiled", **changes, compile__enable=True)) == 0
    eager, compiled = losses(tmp_path / "eager"), losses(tmp_path / "compiled")
    assert eager[-1] < eager[0] - 0.3
    assert compiled == pytest.approx(eager, rel=5e-3)


def test_a_deterministic_run_repeats_bit_for_bit(tmp_path) -> None:
    changes = {"training__mixed_precision_param": "bfloat16", "debug__deterministic": True}
    assert main(tiny(tmp_path / "first", **changes)) == 0
    assert main(tiny(tmp_path / "again", **changes)) == 0
    assert losses(tmp_path / "first") == losses(tmp_path / "again")


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_replayed_graph_has_the_losses_of_the_run(tmp_path, compiled: bool) -> None:
    changes = {"training__mixed_precision_param": "bfloat16", "training__steps": 8}
    changes["compile__enable"] = compiled
    assert main(tiny(tmp_path / "run", **changes)) == 0
    assert main(tiny(tmp_path / "graph", **changes, compile__cuda_graph=True)) == 0
    assert losses(tmp_path / "graph") == pytest.approx(losses(tmp_path / "run"), rel=1e-4)


def test_the_average_of_the_weights_is_that_of_the_step_it_belongs_to() -> None:
    """Weights change while their copies are on the way, and the average is read at once."""
    model = torch.nn.Linear(4096, 4096, device="cuda")
    average = WeightAverage(model, EMA(enable=True, decay=0.75))
    average.enter(0)
    expected = model.weight.detach().cpu()
    for step in range(1, 5):
        average.before_update()
        with torch.no_grad():
            model.weight.add_(step)
        expected = 0.75 * expected + 0.25 * model.weight.detach().cpu()
        average.after_step(step)
        if step % 2:  # not waited for: before_update must
            continue
        torch.testing.assert_close(average.tensors()["weight"], expected, rtol=1e-6, atol=1e-6)
    average.close()


def test_a_batch_reaches_the_device_without_waiting_for_its_earlier_work():
    tokens = torch.arange(100_000)
    to_device(tokens, torch.device("cuda"))  # memory that both sides take for the first time
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    busy = torch.cuda.Event()
    busy.record()
    there = to_device(tokens, torch.device("cuda"))
    assert not busy.query(), "the host waited"
    assert torch.equal(there.cpu(), tokens)
