"""The ban is a constant of the output head: in every forward, in no checkpoint, and in nobody's gradient."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText
from trl.trainer.utils import add_fused_lm_head

from vt_trl.token_ban import ban_tokens

BANNED = [7, 3]
IDS = torch.tensor([[10, 11, 12, 13, 14, 15], [20, 21, 22, 23, 24, 25]])


@pytest.fixture
def model(checkpoint):
    return AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()


def test_banned_tokens_have_no_probability_and_the_others_share_it(model):
    before = model(input_ids=IDS).logits
    ban_tokens(model, BANNED)
    after = model(input_ids=IDS).logits.softmax(-1)
    assert before.softmax(-1)[..., BANNED].min() > 0
    before[..., BANNED] = -torch.inf
    assert after[..., BANNED].abs().max() == 0.0
    torch.testing.assert_close(after, before.softmax(-1))


def test_nothing_of_it_is_a_parameter_or_saved(model, tmp_path):
    names, saved = [name for name, _ in model.named_parameters()], set(model.state_dict())
    ban_tokens(model, BANNED)
    assert [name for name, _ in model.named_parameters()] == names and set(model.state_dict()) == saved
    model.save_pretrained(tmp_path)
    assert not any("bias" in name and "head" in name for name in load_file(tmp_path / "model.safetensors"))
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert again.get_output_embeddings().bias is None
    assert again(input_ids=IDS).logits.softmax(-1)[..., BANNED].min() > 0


def test_tied_embeddings_stay_tied_and_inputs_are_not_banned(model):
    embeddings = model.get_input_embeddings()(IDS[:, :2]).clone()
    ban_tokens(model, IDS[0, :2].tolist())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings()(IDS[:, :2]), embeddings)
    assert model(input_ids=IDS).logits.isfinite().all()


def test_trls_fused_head_sees_the_ban_too(model):
    with torch.no_grad():  # let the head prefer the banned tokens, so that a ban left out shows
        model.get_output_embeddings().weight[BANNED] *= 20
    ban_tokens(model, BANNED)
    temperature = 0.7
    logits = model(input_ids=IDS).logits[:, :-1] / temperature
    logits[..., BANNED] = -torch.inf
    expected = logits.log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0]
    add_fused_lm_head(model, temperature=temperature)
    fused = model(input_ids=IDS, labels=IDS, fused_lm_head=True).log_probs
    torch.testing.assert_close(fused, expected, atol=1e-5, rtol=1e-5)


def test_gradient_reaches_the_weights_and_not_the_ban(model):
    ban_tokens(model, BANNED)
    head = model.get_output_embeddings()
    before = head.bias.clone()
    model(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert head.weight.grad.abs().sum() > 0
    assert head.bias.grad is None and not head.bias.requires_grad and torch.equal(head.bias, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_ban_follows_the_models_precision(model, dtype):
    ban_tokens(model, BANNED)
    head = model.to(dtype).get_output_embeddings()
    logits = head(torch.ones(1, head.in_features, dtype=dtype))
    assert logits.dtype == dtype and logits.isfinite().all()
    assert logits.softmax(-1)[0, BANNED].tolist() == [0.0, 0.0]


def test_a_second_ban_replaces_the_first(model):
    for banned in ([5], BANNED):
        ban_tokens(model, banned)
    assert model.get_output_embeddings().bias.nonzero().flatten().tolist() == sorted(BANNED)


@pytest.mark.parametrize("head", [nn.Linear(2, 9, bias=True), nn.Identity(), None])
def test_a_head_that_cannot_be_banned_is_refused(head):
    model = nn.Module()
    model.get_output_embeddings = lambda: head
    with pytest.raises(ValueError, match="Cannot ban tokens"):
        ban_tokens(model, BANNED)
