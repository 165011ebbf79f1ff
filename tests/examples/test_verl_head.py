"""verl's head against its own formula, as in verl/utils/experimental/torch_functional.py."""

import inspect

import pytest
import torch

from verl_head import FusedLinearForPPO, linear_cross_entropy


def formula(hidden, weight, labels, temperature):
    logits = hidden @ weight.T / torch.as_tensor(temperature, dtype=torch.float64)[..., None]
    logprobs = logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
    return logprobs, logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


@pytest.mark.parametrize(
    ("head", "is_flat"),
    [
        (linear_cross_entropy, True),
        (FusedLinearForPPO(impl_backend="torch"), False),
        (FusedLinearForPPO(chunk_size=4), False),
    ],
    ids=["triton backend", "torch backend", "torch backend, chunks"],
)
@pytest.mark.parametrize("shape", [(7,), (2, 5)], ids=str)
@pytest.mark.parametrize("by_token", [False, True], ids=["one temperature", "one a token"])
def test_values_and_gradients_are_those_of_the_formula(head, is_flat, shape, by_token):
    torch.manual_seed(0)
    temperature = torch.rand(shape, dtype=torch.float64) + 0.5 if by_token else 0.7
    hidden = torch.randn(*shape, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(30, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 30, shape)
    to_logprobs, to_entropy = torch.randn(2, *shape, dtype=torch.float64)
    results = []
    for function in (head, formula):
        logprobs, entropy = function(hidden, weight, labels, temperature)
        assert logprobs.shape == entropy.shape == (labels.flatten().shape if is_flat and function is head else shape)
        objective = (logprobs.view(shape) * to_logprobs + entropy.view(shape) * to_entropy).sum()
        gradients = torch.autograd.grad(objective, (hidden, weight))
        results.append([logprobs.flatten(), entropy.flatten(), *gradients])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_signatures_are_those_of_verl():
    """As verl calls them: by position and by name."""
    names = ["hidden", "weight", "labels", "temperature", "reduction", "dist_process_group"]
    assert [*inspect.signature(linear_cross_entropy).parameters] == names
    names = ["hidden_states", "vocab_weights", "input_ids", "temperature"]
    assert [*inspect.signature(FusedLinearForPPO().forward).parameters] == names


def test_what_is_missing_is_refused(monkeypatch):
    hidden, weight, labels = torch.randn(3, 8), torch.randn(30, 8), torch.tensor([1, 2, 3])
    with pytest.raises(ValueError, match="reduction is 'mean'"):
        linear_cross_entropy(hidden, weight, labels, 1.0, "mean")
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    with pytest.raises(ValueError, match="2 ranks"):
        linear_cross_entropy(hidden, weight, labels, 1.0, "none", object())
