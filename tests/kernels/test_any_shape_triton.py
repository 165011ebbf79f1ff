"""Shapes that nobody thought of, EXAMPLES a test. Left out where hypothesis is not installed."""

import os

import pytest
import torch

from flashgrpo.kernels.attention import packed_attention
from flashgrpo.kernels.grpo_loss import LossConfig, logits_grpo_loss
from flashgrpo.kernels.linear_grpo import linear_grpo_loss
from flashgrpo.kernels.logprob import gather_logprobs

pytestmark = pytest.mark.kernels

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")
few = hypothesis.settings(max_examples=int(os.environ.get("EXAMPLES", 6)), deadline=None)
SEEDS = st.integers(0, 10**6)


def both(function, *tensors):
    """Outputs and gradients of the kernels in fp32, and of the twin in float64."""
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in tensors]
        out = function(*leaves)
        upstream = torch.linspace(-1, 1, out.numel(), device=out.device).to(dtype).view(out.shape)
        results.append([out.detach().double(), *(x.double() for x in torch.autograd.grad(out, leaves, upstream))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=3e-5, rtol=2e-5)


@few
@hypothesis.given(n=st.integers(0, 4), vocab=st.integers(1, 3000), scale=st.sampled_from([0.0, 1.0, 30.0]), seed=SEEDS)
def test_logprobs(n, vocab, scale, seed, device):
    torch.manual_seed(seed)
    targets = torch.randint(0, vocab, (n,), device=device)
    both(lambda x: torch.stack(gather_logprobs(x, targets)), scale * torch.randn(n, vocab, device=device))


@few
@hypothesis.given(
    spans=st.lists(st.integers(0, 12), min_size=1, max_size=4), preset=st.sampled_from(LossConfig.presets()), seed=SEEDS
)
def test_loss(spans, preset, seed, device):
    torch.manual_seed(seed)
    n = sum(spans)
    offsets = torch.tensor([0, *spans], device=device).cumsum(0)
    targets, advantages = torch.randint(0, 9, (n,), device=device), torch.randn(len(spans), device=device)
    old, ref = -2 + 0.3 * torch.randn(2, n, device=device)

    def loss(logits):
        return logits_grpo_loss(
            logits * 1, targets, offsets, LossConfig.preset(preset, kl_coef=0.1), denominator=float(n + 1),
            advantages=advantages, old_logprobs=old.to(logits.dtype), ref_logprobs=ref.to(logits.dtype),
        )[0]  # fmt: skip

    both(loss, torch.randn(n, 9, device=device))


@few
@hypothesis.given(
    n=st.integers(0, 12), vocab=st.integers(1, 300), hidden_size=st.integers(1, 70), chunk=st.integers(3, 15),
    preset=st.sampled_from(LossConfig.presets()), seed=SEEDS,
)  # fmt: skip
def test_linear_loss(n, vocab, hidden_size, chunk, preset, seed, device):
    torch.manual_seed(seed)
    targets, advantages = torch.randint(0, vocab, (n,), device=device), torch.randn(2, device=device)
    offsets, old = torch.tensor([0, n // 3, n], device=device), -2 + torch.randn(n, device=device)

    def loss(hidden, weight):
        return linear_grpo_loss(
            hidden, weight, targets, offsets, LossConfig.preset(preset, kl_coef=0.1), denominator=float(n + 1),
            advantages=advantages, old_logprobs=old, ref_logprobs=old + 0.3, chunk_tokens=chunk,
        )[0]  # fmt: skip

    weight = torch.randn(vocab, hidden_size, device=device) / hidden_size**0.5
    both(loss, torch.randn(n, hidden_size, device=device), weight)


@few
@hypothesis.given(
    families=st.lists(st.tuples(st.integers(1, 40), st.lists(st.integers(0, 40), max_size=3)), min_size=1, max_size=2),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    spare=st.integers(0, 5),
    seed=SEEDS,
)
def test_attention(families, heads, spare, seed, device):
    torch.manual_seed(seed)
    lengths, prefix = [], []
    for prompt, completions in families:
        prefix += [-1] + [len(prefix)] * len(completions)
        lengths += [prompt, *completions]
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    total = int(offsets[-1]) + spare
    q, k, v = (torch.randn(total, h, 16, device=device) for h in (heads[0], heads[1], heads[1]))
    both(lambda *x: packed_attention(*x, offsets, torch.tensor(prefix, device=device)), q, k, v)
