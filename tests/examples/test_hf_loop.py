"""The plain loop on a transformers model."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

import hf_loop


def padded_loss(model, prompts, groups, advantages, old_logprobs):
    """By plain torch: a padded row a completion, with its prompt, and all logits."""
    model.set_attn_implementation("sdpa")
    pairs = [(prompt, completion) for prompt, group in zip(prompts, groups, strict=True) for completion in group]
    padded = torch.nn.utils.rnn.pad_sequence([torch.cat(pair) for pair in pairs], batch_first=True)
    starts, stops = torch.tensor([[len(prompt), len(prompt) + len(completion)] for prompt, completion in pairs]).T
    places = torch.arange(padded.shape[1])
    is_token = places < stops[:, None]
    is_target = (is_token & (places >= starts[:, None]))[:, 1:]
    logits = model(padded, attention_mask=is_token.long()).logits[:, :-1]
    logprobs = logits.log_softmax(-1).gather(-1, padded[:, 1:, None]).squeeze(-1)
    ratio = (logprobs[is_target] - old_logprobs).exp()
    advantages = advantages[:, None].expand_as(is_target)[is_target]
    clipped = ratio.clamp(1 - hf_loop.LOSS.clip_low, 1 + hf_loop.LOSS.clip_high)
    assert 0 < float(((ratio * advantages) > (clipped * advantages)).float().mean()) < 0.5
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_packed_prompts_have_the_loss_and_gradients_of_padded_rows(kind, monkeypatch):
    monkeypatch.setattr(hf_loop, "DEVICE", "cpu")
    torch.manual_seed(0)
    config = kind(
        vocab_size=hf_loop.VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    prompts = [torch.randint(2, hf_loop.VOCAB, (length,)) for length in (9, 4, 1)]
    groups = [[torch.randint(2, hf_loop.VOCAB, (n,)) for n in lengths] for lengths in ((3, 1), (6, 5), (2, 8))]
    rewards = torch.tensor([[0.0, 1.0], [0.7, 0.2], [0.1, 0.4]])
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    batch = hf_loop.pack(prompts, groups)
    old_logprobs = hf_loop.logprobs_of(model, batch)
    old_logprobs += 0.3 * torch.randn(old_logprobs.shape)
    results = []
    for loss in (
        hf_loop.loss_of(model, batch, rewards, old_logprobs),
        padded_loss(model, prompts, groups, advantages.flatten(), old_logprobs),
    ):
        gradients = torch.autograd.grad(loss, [*model.parameters()])
        results.append((loss.item(), torch.cat([gradient.flatten() for gradient in gradients])))
    (packed, found), (padded, wanted) = results
    assert packed == pytest.approx(padded, abs=1e-6)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_the_loop_runs_and_shares_prompts(capsys):
    hf_loop.main(steps=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line[:12] for line in lines] == ["step  1 of 2", "step  2 of 2"]
    share, tokens, repeated = map(float, re.findall(r"[\d.]+", lines[1])[2:])
    assert 0 < share < 1
    assert 2 * tokens < repeated
