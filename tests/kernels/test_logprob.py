import pytest
import torch
from torch import Tensor

from flashgrpo.kernels import logprob_torch
from flashgrpo.kernels.logprob import gather_logprobs


def make_logits(num_rows=7, vocab=11, dtype=torch.float64, seed=0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(num_rows, vocab, dtype=torch.float64, generator=generator)).to(dtype).requires_grad_()
    return logits, torch.randint(0, vocab, (num_rows,), generator=generator)


def naive(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    z = logits / temperature
    p = z.exp() / z.exp().sum(1, keepdim=True)
    return p[torch.arange(len(targets)), targets].log(), -(p * p.log()).sum(1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("rows_a_chunk", [1, 3, 100])
def test_equals_the_definition_with_every_gradient(temperature, rows_a_chunk, monkeypatch):
    monkeypatch.setattr(logprob_torch, "_CHUNK_BYTES", rows_a_chunk * 4 * 11)
    logits, targets = make_logits()
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(2, 7, dtype=torch.float64, generator=generator)
    actual, expected = gather_logprobs(logits, targets, temperature=temperature), naive(logits, targets, temperature)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-12)
    for used in ([0], [1], [0, 1]):
        gradients = [
            torch.autograd.grad(sum((weights[i] * x[i]).sum() for i in used), logits, retain_graph=True)[0]
            for x in (actual, expected)
        ]
        torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_gradcheck():
    logits, targets = make_logits(4, 5)
    targets[2] = -100
    assert torch.autograd.gradcheck(lambda x: gather_logprobs(x, targets.int(), temperature=0.6), logits)


def test_in_place_gradient_is_the_same_and_lies_in_the_logits():
    leaf, targets = make_logits()
    logits = leaf * 2
    kept = (leaf * 2).detach()
    sum(x.sum() for x in gather_logprobs(logits, targets, inplace_backward=True)).backward()
    reference = kept.clone().requires_grad_()
    sum(x.sum() for x in gather_logprobs(reference, targets)).backward()
    torch.testing.assert_close(leaf.grad, 2 * reference.grad, rtol=0, atol=1e-14)
    assert torch.equal(logits.detach(), reference.grad)


def test_a_second_use_of_overwritten_logits_is_refused():
    leaf, targets = make_logits()
    logits = leaf * 2
    logprobs, _ = gather_logprobs(logits, targets, inplace_backward=True)
    logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprobs.sum().backward()


def test_double_backward_is_refused():
    logits, targets = make_logits()
    logprobs, _ = gather_logprobs(logits, targets)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(logprobs.sum(), logits, create_graph=True)


def test_ignored_rows_are_zero_whatever_they_hold():
    logits, targets = make_logits()
    targets[2] = -100
    with torch.no_grad():
        logits[2] = torch.nan
    logprobs, entropy = gather_logprobs(logits, targets)
    (gradient,) = torch.autograd.grad((logprobs + entropy).sum(), logits)
    assert logprobs[2] == 0
    assert entropy[2] == 0
    assert not gradient[2].any()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("target", [-1, 11, -101, 2**31 - 1])
def test_a_target_out_of_range_is_nan_and_spoils_no_other_row(target):
    logits, targets = make_logits()
    targets[3] = target
    logprobs, _ = gather_logprobs(logits, targets)
    (gradient,) = torch.autograd.grad(logprobs.sum(), logits)
    assert logprobs.isnan().nonzero().tolist() == [[3]]
    assert gradient.isnan().any(1).nonzero().tolist() == [[3]]


def test_masked_vocabulary():
    inf = torch.inf
    logits = torch.tensor([[-inf, 2.0, -inf], [1.0, 1.0, -inf], [-inf, 1.0, 1.0]], requires_grad=True)
    logprobs, entropy = gather_logprobs(logits, torch.tensor([1, 0, 0]))
    log2 = torch.tensor(2.0).log().item()
    assert logprobs.tolist() == pytest.approx([0, -log2, -inf])
    assert entropy.tolist() == pytest.approx([0, log2, log2])
    (by_logprob,) = torch.autograd.grad(logprobs.sum(), logits, retain_graph=True)
    expected = torch.tensor([[0, 0, 0], [0.5, -0.5, 0], [1, -0.5, -0.5]])
    torch.testing.assert_close(by_logprob, expected)
    (by_entropy,) = torch.autograd.grad((1e6 * entropy).sum(), logits)
    assert by_entropy.abs().max() < 0.1 + 1e6 * 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_logits_give_fp32_results(dtype):
    logits, targets = make_logits(20, 300, dtype)
    logprobs, entropy = gather_logprobs(logits, targets)
    (gradient,) = torch.autograd.grad((logprobs + entropy).sum(), logits)
    assert (logprobs.dtype, entropy.dtype, gradient.dtype) == (torch.float32, torch.float32, dtype)

    def plain(logits: Tensor) -> tuple[Tensor, ...]:
        log_p = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), 1)
        both = log_p[torch.arange(20), targets], -(log_p.exp() * log_p).sum(1)
        return *(x.detach() for x in both), *torch.autograd.grad(sum(x.sum() for x in both), logits)

    true = plain(logits.detach().double().requires_grad_())
    for ours, dense, exact in zip((logprobs, entropy, gradient), plain(logits), true, strict=True):
        floor = 1e-6 * max(1.0, exact.abs().max().item())
        error, dense_error = (x.detach().double() - exact for x in (ours, dense))
        assert error.square().mean().sqrt() <= 1.1 * dense_error.square().mean().sqrt() + floor
        assert error.abs().max() <= 1.5 * dense_error.abs().max() + floor


def test_autocast_changes_nothing():
    logits, targets = make_logits(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual = gather_logprobs(logits, targets)
    for a, e in zip(actual, gather_logprobs(logits, targets), strict=True):
        assert torch.equal(a, e)


def test_strided_rows_and_no_rows():
    wide, targets = make_logits(7, 22)
    half = wide[:, :11]
    targets = targets % 11
    actual = torch.autograd.grad(gather_logprobs(half, targets)[0].sum(), wide)[0]
    expected = torch.autograd.grad(gather_logprobs(half.contiguous(), targets)[0].sum(), wide)[0]
    assert torch.equal(actual, expected)
    empty = torch.zeros(0, 5, requires_grad=True)
    logprobs, entropy = gather_logprobs(empty, torch.zeros(0, dtype=torch.int64))
    assert (logprobs.shape, entropy.shape) == ((0,), (0,))
    assert torch.autograd.grad(logprobs.sum(), empty)[0].shape == (0, 5)


@pytest.mark.parametrize(
    ("logits", "targets", "temperature", "error", "message"),
    [
        (torch.zeros(3), torch.zeros(3).long(), 1.0, ValueError, "logits has shape"),
        (torch.zeros(3, 0), torch.zeros(3).long(), 1.0, ValueError, "logits has shape"),
        (torch.zeros(3, 2).long(), torch.zeros(3).long(), 1.0, TypeError, "floating"),
        (torch.zeros(3, 2), torch.zeros(2).long(), 1.0, ValueError, r"wanted \[3\]"),
        (torch.zeros(3, 2), torch.zeros(3), 1.0, TypeError, "targets is torch.float32"),
        (torch.zeros(3, 2), torch.zeros(3).long(), 0.0, ValueError, "temperature is 0.0"),
        (torch.zeros(3, 2), torch.zeros(3).long(), torch.nan, ValueError, "temperature is nan"),
    ],
)
def test_bad_arguments_are_named(logits, targets, temperature, error, message):
    with pytest.raises(error, match=message):
        gather_logprobs(logits, targets, temperature=temperature)
