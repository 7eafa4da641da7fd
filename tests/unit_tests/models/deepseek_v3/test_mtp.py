"""Multi-token prediction against the report's equations, written down one position at a time."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.tiny_run import as_option, records, tiny
from tests.unit_tests.models.moe.test_balancing import ARGS, RECOMPUTE, batch
from torchtitan.distributed.activation_checkpoint import apply_activation_checkpoint
from torchtitan.models.deepseek_v3 import DeepSeekV3Model, DeepSeekV3StateDictAdapter
from torchtitan.models.deepseek_v3.mtp import mtp_inputs
from torchtitan.ops.attention import number_documents
from torchtitan.train import main

LAMBDA, EOS = 0.7, 3


def documents_of(tokens: Tensor, labels: Tensor) -> Tensor:
    return number_documents(tokens, EOS).masked_fill(labels == -100, -1)


def make_model(depth: int, **changes: object) -> DeepSeekV3Model:
    args = dataclasses.replace(ARGS, n_mtp_layers=depth, mtp_loss_weight=LAMBDA, **changes)
    torch.manual_seed(0)
    model = DeepSeekV3Model(args)
    model.init_weights()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:  # ones would hide which norm goes where
                p.uniform_(0.5, 1.5)
    return model.double().train()


def tokens_and_labels() -> tuple[Tensor, Tensor]:
    text = batch(0, rows=3)
    text[text == EOS] = 4
    text[0, 4] = text[2, 7] = EOS
    tokens, labels = text[:, :-1].contiguous(), text[:, 1:].clone()
    labels[1, 6:] = -100
    return tokens, labels


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(dim=-1, keepdim=True) + ARGS.norm_eps).sqrt() * weight


def document_of(tokens: list[int], i: int) -> int:
    return sum(token == EOS for token in tokens[:i])


def plain_mtp_loss(model: DeepSeekV3Model, tokens: Tensor, labels: Tensor, apart: bool) -> Tensor:
    """Sum over layers and positions. Runs layer by layer with the model's own blocks, and looks up
    tokens and labels position by position."""
    mask = model.get_attention_masks(number_documents(tokens, EOS))
    h = model.tok_embeddings(tokens)
    for layer in model.layers.values():
        h, _ = layer(h, model.rope, mask)
    h, (rows, length) = rms(h, model.norm.weight), tokens.shape
    total = h.new_zeros(())
    for k in range(1, len(model.mtp) + 1):
        layer = model.mtp[str(k - 1)]
        inputs = torch.zeros_like(tokens)
        for b in range(rows):
            for i in range(length):
                j = i + k  # the token embedded at i; the one behind the window is the last label
                known = j < length or (j == length and labels[b, -1] != -100)
                inputs[b, i] = (tokens[b, j] if j < length else labels[b, -1]) if known else 0
        embedded = rms(model.tok_embeddings.weight[inputs], layer.enorm.weight)
        both = torch.cat((embedded, rms(h, layer.hnorm.weight)), dim=-1)
        x, _ = layer.block(both @ layer.eh_proj.weight.T, model.rope, mask)
        h = rms(x, layer.norm.weight)
        logits = h @ model.output.weight.T
        for b in range(rows):
            for i in range(length - k):
                same = document_of(tokens[b].tolist(), i) == document_of(tokens[b].tolist(), i + k)
                if labels[b, i + k] != -100 and (same or not apart):
                    total = total + F.cross_entropy(logits[b, i], labels[b, i + k])
    return total


def gradients(model: DeepSeekV3Model, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("mask_type", ["causal", "block_causal"])
def test_loss_and_every_gradient_are_those_of_the_equations(depth, mask_type):
    tokens, labels = tokens_and_labels()
    model = make_model(depth, attn_mask_type=mask_type)
    valid = (labels != -100).sum()

    def main_loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / valid

    mask = model.get_attention_masks(number_documents(tokens, EOS))
    further = plain_mtp_loss(model, tokens, labels, apart=mask_type == "block_causal")
    plain = gradients(model, main_loss(model(tokens, mask)) + LAMBDA / depth * further / valid)
    model.take_side_losses()

    model.set_tokens_in_step(valid, valid)
    logits = model(tokens, mask, **model.extra_inputs(tokens, labels, documents_of(tokens, labels)))
    ours = gradients(model, main_loss(logits))
    assert sum(model.take_side_losses().values()).item() == pytest.approx(further.item(), rel=1e-6)
    for name, expected in plain.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-8, atol=1e-11, msg=name)


def test_the_main_logits_stay_what_they_were():
    tokens, labels = tokens_and_labels()
    model = make_model(1)
    with_mtp = model(tokens, **model.extra_inputs(tokens, labels, documents_of(tokens, labels)))
    torch.testing.assert_close(with_mtp, model(tokens), rtol=1e-12, atol=1e-12)
    assert model.eval().extra_inputs(tokens, labels, documents_of(tokens, labels)) == {}


def test_which_tokens_and_labels_by_hand():
    # Two documents, the first one ends at the third token; the last label is padding.
    tokens, labels = torch.tensor([[5, 6, EOS, 8, 9]]), torch.tensor([[6, EOS, 8, 9, -100]])
    documents = documents_of(tokens, labels)
    apart = mtp_inputs(tokens, labels, documents, 2, apart=True)
    assert apart.tokens_BKS[0].tolist() == [[6, EOS, 8, 9, 0], [EOS, 8, 9, 0, 0]]
    # Position 2 (the end of a document) would predict 9 from 8, a token of the next document.
    assert apart.labels_BKS[0].tolist() == [
        [EOS, 8, -100, -100, -100],
        [8, -100, -100, -100, -100],
    ]
    together = mtp_inputs(tokens, labels, documents, 2, apart=False)
    assert together.labels_BKS[0].tolist() == [
        [EOS, 8, 9, -100, -100],
        [8, 9, -100, -100, -100],
    ]


def test_a_pipeline_stage_gets_tensors_alone() -> None:
    """torch 2.11 asks each argument of a stage for its gradient: a None ended the run."""
    tokens, labels = tokens_and_labels()
    documents = documents_of(tokens, labels)
    for weights in (None, torch.ones(labels.shape)):
        inputs = mtp_inputs(tokens, labels, documents, 2, apart=False, weights_BS=weights)
        leaves = tree_leaves(inputs.at(torch.arange(4)))
        assert len(leaves) == 3 + (weights is not None)
        assert all(isinstance(leaf, Tensor) for leaf in leaves)


@pytest.mark.parametrize("how", RECOMPUTE)
def test_recomputation_changes_nothing_and_counts_once(how):
    tokens, labels = tokens_and_labels()
    model, other = make_model(1), make_model(1)
    apply_activation_checkpoint(other.blocks(), RECOMPUTE[how])
    grads, counts, losses = [], [], []
    for each in (model, other):
        logits = each(tokens, **each.extra_inputs(tokens, labels, documents_of(tokens, labels)))
        grads.append(gradients(each, logits.square().mean()))
        counts.append(each.moe_layers()[4].tokens_per_expert.tolist())
        losses.append(each.take_side_losses()["mtp_loss_1"].item())
    assert losses[0] == losses[1] and counts[0] == counts[1]
    counted = sum(max(0, n - 1) for n in (labels != -100).sum(dim=1).tolist())
    assert sum(counts[0]) == counted * ARGS.moe_args.top_k
    for name, expected in grads[0].items():
        torch.testing.assert_close(grads[1][name], expected, rtol=1e-12, atol=0, msg=name)


# ---------------------------------------------------------------------------------------------
# In a run
# ---------------------------------------------------------------------------------------------

MTP = "--model.args.n_mtp_layers=1"


def test_a_run_learns_both_and_its_phases_set_the_weight(tmp_path):
    phases = [{"tokens": 1280}, {"tokens": 128, "mtp_loss_weight": 0.1}]
    assert main([*tiny(tmp_path, training__steps=11), MTP, as_option(phases)]) == 0
    seen = records(tmp_path)
    assert seen[0]["mtp_loss_1"] == pytest.approx(7.62 * 31 / 32, abs=0.1), "one label fewer a row"
    assert seen[-1]["mtp_loss_1"] < seen[0]["mtp_loss_1"] - 0.2
    assert seen[-1]["loss"] < seen[0]["loss"] - 0.2
    assert "2" in seen[0]["layer_max_violation"], "the layer behind the last"
    assert seen[-1]["mtp_loss_weight"] == 0.1 and "mtp_loss_weight" not in seen[0]


def test_a_weight_needs_a_layer(tmp_path, capsys):
    phases = as_option([{"tokens": 128, "mtp_loss_weight": 0.1}])
    assert main([*tiny(tmp_path), phases]) == 2
    assert "model.args.n_mtp_layers is 0: set it to 1" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# Hugging Face
# ---------------------------------------------------------------------------------------------


def test_the_published_layout_goes_in_and_out():
    """Names of DeepSeek-V3's files: layer 61 of 61, here 4 of 4, with copies of what is shared."""
    model = make_model(1)
    adapter = DeepSeekV3StateDictAdapter(model.model_args)
    state = model.state_dict()
    theirs = adapter.to_hf(state)
    extra = {name.removeprefix("model.layers.4.") for name in theirs if ".layers.4." in name}
    assert {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"} <= extra
    assert {"self_attn.o_proj.weight", "mlp.gate.e_score_correction_bias"} <= extra
    assert "mlp.experts.7.up_proj.weight" in extra
    copies = {
        "model.layers.4.embed_tokens.weight": state["tok_embeddings.weight"],
        "model.layers.4.shared_head.head.weight": state["output.weight"],
    }
    again = adapter.from_hf(theirs | copies)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)
    assert {piece.name for piece in adapter.pieces()} == theirs.keys()
    assert adapter.hf_config()["num_nextn_predict_layers"] == 1


def test_a_model_without_it_leaves_the_extra_layer_out():
    theirs = DeepSeekV3StateDictAdapter(make_model(1).model_args).to_hf(make_model(1).state_dict())
    plain = make_model(0)
    again = DeepSeekV3StateDictAdapter(plain.model_args).from_hf(theirs)
    assert again.keys() == plain.state_dict().keys()


@pytest.mark.parametrize("depth", [1, 2])
def test_each_label_has_the_weight_that_it_has_in_the_main_loss(depth):
    """The loss is linear in the weights: halves of them are the halves of the loss, and those of
    one document alone are that document's part."""
    tokens, labels = tokens_and_labels()
    model = make_model(depth, attn_mask_type="block_causal")
    documents = documents_of(tokens, labels)
    mask = model.get_attention_masks(number_documents(tokens, EOS))

    def losses(weights: Tensor | None) -> float:
        extra = model.extra_inputs(tokens, labels, documents, None, weights)
        model(tokens, mask, **extra)
        return sum(model.take_side_losses().values()).item()

    plain, ones = losses(None), torch.ones(labels.shape)
    assert losses(ones) == pytest.approx(plain, rel=1e-6)
    assert losses(ones / 2) == pytest.approx(plain / 2, rel=1e-6)
    # A label of layer k at position i is the main loss's at i + k.
    first = losses(torch.where(documents == 0, 1.0, 0.0))
    only = torch.where(documents == 0, labels, -100)
    extra = model.extra_inputs(tokens, only, documents)
    extra["mtp"] = extra["mtp"]._replace(
        tokens_BKS=model.extra_inputs(tokens, labels, documents)["mtp"].tokens_BKS
    )
    model(tokens, mask, **extra)
    assert first == pytest.approx(sum(model.take_side_losses().values()).item(), rel=1e-6)
    assert 0 < first < plain
