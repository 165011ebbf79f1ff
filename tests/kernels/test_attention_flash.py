"""The keys that flash-attn is given, with its function computed densely on a CPU."""

import sys
from itertools import accumulate, pairwise
from types import SimpleNamespace

import pytest
import torch

from flashgrpo.kernels import attention_flash
from flashgrpo.kernels.attention import packed_attention
from flashgrpo.kernels.common import accumulation_dtype

pytestmark = pytest.mark.twin

FAMILIES = [1, 9, 0, 4, 6, 3, 5, 0, 7, 0, 2], [-1, 0, 0, -1, -1, 4, 4, 4, -1, 8, -1]
EMPTY_PROMPT = [0, 3, 5, 4, 2], [-1, 0, -1, 2, 2]


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, softmax_scale, causal, deterministic):
    """flash_attn_varlen_func, densely: rows of no sequence hold anything, and so do their gradients."""
    assert causal
    assert deterministic
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert len(cu_seqlens_q) == len(cu_seqlens_k) > 1, "batch size must be positive"
    assert min(max_seqlen_q, max_seqlen_k) > 1, "a maximum of 1 is another layout, one of 0 an empty grid"
    wide = accumulation_dtype(q.dtype)
    out = torch.full_like(q, torch.nan, dtype=wide)
    bounds = zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True)
    for (start, stop), (first, last) in bounds:
        assert stop - start <= max_seqlen_q
        assert last - first <= max_seqlen_k
        if first == last:
            out[start:stop] = 0
            continue
        keys, values = (x[first:last].to(wide).repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = softmax_scale * torch.einsum("qhd,khd->hqk", q[start:stop].to(wide), keys)
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + last - first - (stop - start))
        out[start:stop] = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(2), values)
    return out.to(q.dtype) + (q[:0].sum() + k[:0].sum() + v[:0].sum())  # a function of all three also without keys


@pytest.fixture
def flash_attn(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=varlen))


def inputs(lengths, prefix, dtype, spare=0):
    """q, k and v with NaN in the `spare` rows behind the last segment, d_out, and what packed_attention takes then."""
    total_tokens = sum(lengths) + spare
    tensors = [torch.randn(total_tokens, heads, 8, dtype=dtype) for heads in (4, 2, 2, 4)]
    for x in tensors:
        x[sum(lengths) :] = torch.nan
    offsets = torch.tensor([0, *accumulate(lengths)])
    return [x.requires_grad_() for x in tensors[:3]], tensors[3], offsets, prefix and torch.tensor(prefix)


@pytest.mark.parametrize(
    ("lengths", "prefix", "spare"),
    [(*FAMILIES, 3), (*EMPTY_PROMPT, 0), ([4, 0, 6], None, 2), ([1, 1, 1], [-1, 0, 0], 1), ([3, 0], [-1, 0], 0),
     ([0, 0], [-1, 0], 2), ([], None, 2), ([], None, 0)],
    ids=["families", "empty prompt", "no prefix", "single tokens", "no completion", "all empty", "none", "no row"],
)  # fmt: skip
def test_equals_the_twin(lengths, prefix, spare, flash_attn):
    qkv, d_out, offsets, prefix = inputs(lengths, prefix, torch.float64, spare)
    out = attention_flash.flash_attention(*qkv, offsets, prefix, 0.3)
    expected = packed_attention(*qkv, offsets, prefix, scale=0.3)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    gradients = torch.autograd.grad(out, qkv, d_out)
    for x, y in zip(gradients, torch.autograd.grad(expected, qkv, d_out), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
    for x in (out, *gradients):
        assert not x[sum(lengths) :].any()


def test_the_public_function_adds_gradients_in_fp32(flash_attn):
    """A prompt's keys are read by all its completions: the error is some roundings' and not that of a sum in bf16."""
    qkv, d_out, offsets, prefix = inputs(*FAMILIES, torch.bfloat16)
    out = packed_attention(*qkv, offsets, prefix, max_seqlen=9, backend="flash_attn")
    exact = [x.detach().double().requires_grad_() for x in qkv]
    expected = packed_attention(*exact, offsets, prefix)
    assert out.dtype == torch.bfloat16
    results = (out, *torch.autograd.grad(out, qkv, d_out))
    for x, y in zip(results, (expected, *torch.autograd.grad(expected, exact, d_out.double())), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=0.02, atol=0.02 * y.abs().max().item())


def test_the_host_learns_of_a_batch_once(flash_attn, monkeypatch):
    """Its layers share the answer."""
    calls = []
    plan = attention_flash._gathered
    monkeypatch.setattr(attention_flash, "_gathered", lambda *x: calls.append(x) or plan(*x))
    qkv, _, offsets, prefix = inputs(*FAMILIES, torch.bfloat16)
    for _ in range(3):
        packed_attention(*qkv, offsets, prefix, backend="flash_attn")
    assert len(calls) == 1


def test_what_flash_attn_does_not_have_is_named():
    q, offsets = torch.zeros(4, 2, 8), torch.tensor([0, 4])
    for x, found in ((q, "q is torch.float32"), (q.half()[..., :4], "q has head_dim 4")):
        with pytest.raises(ValueError, match=found):
            packed_attention(x, x, x, offsets, backend="flash_attn")


def test_flash_attn_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    q = torch.zeros(4, 2, 8, dtype=torch.bfloat16)
    with pytest.raises(ImportError, match=r"pip install .flash-attn"):
        packed_attention(q, q, q, torch.tensor([0, 4]), backend="flash_attn")
