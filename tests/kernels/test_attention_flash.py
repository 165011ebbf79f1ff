"""The merge of flash-attn's two calls, with its functions computed densely on a CPU."""

import sys
from itertools import accumulate, pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from flashgrpo.kernels import attention, attention_flash
from flashgrpo.kernels.attention import packed_attention
from flashgrpo.kernels.common import accumulation_dtype

FAMILIES = [1, 9, 0, 4, 6, 3, 5, 0, 7, 0, 2], [-1, 0, 0, -1, -1, 4, 4, 4, -1, 8, -1]
EMPTY_PROMPT = [0, 3, 5, 4, 2], [-1, 0, -1, 2, 2]


def pairs(q: Tensor, k: Tensor, offsets_q, offsets_k, max_q: int, max_k: int, scale: float, causal: bool):
    """Rows and scores [heads, queries, keys] of each sequence, -inf where a query does not see a key."""
    assert offsets_q.dtype == offsets_k.dtype == torch.int32
    assert len(offsets_q) == len(offsets_k) > 1, "batch size must be positive"
    assert min(max_q, max_k) > 1, "a maximum of 1 is another layout, one of 0 an empty grid"
    for (start, stop), (first, last) in zip(pairwise(offsets_q.tolist()), pairwise(offsets_k.tolist()), strict=True):
        assert stop - start <= max_q
        assert last - first <= max_k
        keys = k[first:last].repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = scale * torch.einsum("qhd,khd->hqk", q[start:stop], keys)
        if causal:
            hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + last - first - (stop - start))
            scores.masked_fill_(hidden, -torch.inf)
        yield slice(start, stop), slice(first, last), scores


def forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
    window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, zero_tensors=False,
):  # fmt: skip
    assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0, -1, -1, 0, None)
    dtype, sequences = q.dtype, (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    q, k, v = (x.to(accumulation_dtype(dtype)) for x in (q, k, v))
    out = torch.full_like(q, 0 if zero_tensors else torch.nan)
    lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf if zero_tensors else torch.nan)
    for queries, keys, scores in pairs(q, k, *sequences, softmax_scale, causal):
        values = v[keys].repeat_interleave(q.shape[1] // k.shape[1], 1)
        out[queries] = torch.einsum("hqk,khd->qhd", scores.softmax(2), values)
        lse[:, queries] = scores.logsumexp(2) if scores.shape[2] else torch.inf
    return out.to(dtype), lse, None, None


def backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
    rng_state=None, zero_tensors=False,
):  # fmt: skip
    assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0, -1, -1, 0, None)
    assert deterministic
    group, sequences = q.shape[1] // k.shape[1], (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    dout, q, k, v, out = (x.to(accumulation_dtype(x.dtype)) for x in (dout, q, k, v, out))
    for gradient in (dq, dk, dv):
        gradient.fill_(0 if zero_tensors else torch.nan)
    delta = (dout * out).sum(2)
    for queries, keys, scores in pairs(q, k, *sequences, softmax_scale, causal):
        p = (scores - softmax_lse[:, queries, None]).exp()
        dp = torch.einsum("qhd,khd->hqk", dout[queries], v[keys].repeat_interleave(group, 1))
        ds = softmax_scale * p * (dp - delta[queries].T[:, :, None])
        dq[queries] = torch.einsum("hqk,khd->qhd", ds, k[keys].repeat_interleave(group, 1)).to(dq.dtype)
        for gradient, x, rows in ((dk, ds, q), (dv, p, dout)):
            by_head = torch.einsum("hqk,qhd->khd", x, rows[queries])
            gradient[keys] = by_head.unflatten(1, (k.shape[1], group)).sum(2).to(gradient.dtype)


@pytest.fixture
def flash_attn(monkeypatch):
    functions = SimpleNamespace(_flash_attn_varlen_forward=forward, _flash_attn_varlen_backward=backward)
    monkeypatch.setattr(attention_flash, "_flash_attn", lambda: functions)


def inputs(lengths, prefix, dtype, spare=0):
    """q, k and v with NaN in the `spare` rows behind the last segment, d_out, and what packed_attention takes then."""
    total_tokens = sum(lengths) + spare
    tensors = [torch.randn(total_tokens, heads, 8, dtype=dtype) for heads in (4, 2, 2, 4)]
    for x in tensors:
        x[sum(lengths) :] = torch.nan
    offsets = torch.tensor([0, *accumulate(lengths)])
    return [x.requires_grad_() for x in tensors[:3]], tensors[3], offsets, prefix and torch.tensor(prefix)


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize(
    ("lengths", "prefix", "spare"),
    [(*FAMILIES, 3), (*EMPTY_PROMPT, 0), ([4, 0, 6], None, 2), ([1, 1, 1], [-1, 0, 0], 1), ([3, 0], [-1, 0], 0),
     ([0, 0], [-1, 0], 2), ([], None, 2), ([], None, 0)],
    ids=["families", "empty prompt", "no prefix", "single tokens", "no completion", "all empty", "none", "no row"],
)  # fmt: skip
def test_equals_the_twin(lengths, prefix, spare, bounded, flash_attn):
    qkv, d_out, offsets, prefix = inputs(lengths, prefix, torch.float64, spare)
    max_seqlen = max(lengths, default=0) if bounded else None
    out, _ = attention._attention_fwd(*qkv, offsets, prefix, max_seqlen, 0.3, True)
    expected = packed_attention(*qkv, offsets, prefix, scale=0.3)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    gradients = torch.autograd.grad(out, qkv, d_out)
    for x, y in zip(gradients, torch.autograd.grad(expected, qkv, d_out), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
    for x in (out, *gradients):
        assert not x[sum(lengths) :].any()


def test_the_public_function_merges_in_fp32(flash_attn):
    """Both calls round to bf16, so that the error is some roundings' and not that of a sum in bf16."""
    qkv, d_out, offsets, prefix = inputs(*FAMILIES, torch.bfloat16)
    out = packed_attention(*qkv, offsets, prefix, max_seqlen=9, backend="flash_attn")
    exact = [x.detach().double().requires_grad_() for x in qkv]
    expected = packed_attention(*exact, offsets, prefix)
    assert out.dtype == torch.bfloat16
    results = (out, *torch.autograd.grad(out, qkv, d_out))
    for x, y in zip(results, (expected, *torch.autograd.grad(expected, exact, d_out.double())), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=0.02, atol=0.02 * y.abs().max().item())


def test_a_prompt_is_read_once_for_all_its_completions():
    """As many sequences as families, however many completions these have; rows in none cost nothing."""
    offsets = torch.tensor([0, *accumulate([5, 10, *[7] * 60, 3, 8, 4, 4])])
    _, (offsets_q, offsets_k, *longest) = attention_flash._calls(
        offsets, torch.tensor([-1, -1, *[1] * 60, -1, -1, 63, 63]), 500, 10
    )
    assert offsets_q.tolist() == [0, 0, 15, 435, 435, 446, 454]
    assert offsets_k.tolist() == [0, 5, 5, 15, 438, 438, 446]
    assert longest == [420, 423]


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
