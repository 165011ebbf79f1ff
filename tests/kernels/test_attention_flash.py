"""The keys that flash-attn of each family is given, with its function computed densely on a CPU."""

import sys
from inspect import signature
from itertools import accumulate, pairwise
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import varlen as torch_varlen

from flashgrpo.kernels import attention_flash
from flashgrpo.kernels.attention import packed_attention
from flashgrpo.kernels.common import accumulation_dtype

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
        assert (first == last) <= (start == stop), "families differ in what queries without keys get"
        keys, values = (x[first:last].to(wide).repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = softmax_scale * torch.einsum("qhd,khd->hqk", q[start:stop].to(wide), keys)
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + last - first - (stop - start))
        out[start:stop] = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(2), values)
    return out.to(q.dtype) + (q[:0].sum() + k[:0].sum() + v[:0].sum())  # a function of all three also without keys


def flash_attn_2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
                 causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
                 return_attn_probs=False, block_table=None):  # fmt: skip
    return varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                  softmax_scale=softmax_scale, causal=causal, deterministic=deterministic)  # fmt: skip


def flash_attn_3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
                 softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
                 window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None,
                 deterministic=False, sm_margin=0, return_attn_probs=False):  # fmt: skip
    assert seqused_q is seqused_k is qv is None
    return varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                  softmax_scale=softmax_scale, causal=causal, deterministic=deterministic)  # fmt: skip


def flash_attn_4(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
                 min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
                 softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0,
                 num_splits=1, pack_gqa=None, deterministic=False, score_mod=None, return_lse=False):  # fmt: skip
    assert qv is min_seqlen_k is seqused_q is seqused_k is None
    out = varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                 softmax_scale=softmax_scale, causal=causal, deterministic=deterministic)  # fmt: skip
    return out, torch.empty(q.shape[1], q.shape[0], dtype=torch.float32)


def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):  # fmt: skip
    assert enable_gqa
    return varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k,
                  softmax_scale=scale, causal=window_size == (-1, 0), deterministic=True)  # fmt: skip


# By the projects' sources, as attention_flash.py names them; the last is torch's own.
FAKES = {
    "flash-attn 4": ("flash_attn.cute", "flash_attn_varlen_func", flash_attn_4),
    "flash-attn 3": ("flash_attn_interface", "flash_attn_varlen_func", flash_attn_3),
    "flash-attn 2": ("flash_attn", "flash_attn_varlen_func", flash_attn_2),
    "torch's varlen_attn": ("torch.nn.attention.varlen", "varlen_attn", varlen_attn),
}


@pytest.fixture
def install(monkeypatch):
    """Makes these families all that is installed, on a Hopper."""
    monkeypatch.setattr(attention_flash, "_capability", lambda _: (9, 0))
    attention_flash.flash_family.cache_clear()

    def these(*names):
        for name, (module, function, fake) in FAKES.items():
            found = SimpleNamespace(**{function: fake}) if name in names else None
            monkeypatch.setitem(sys.modules, module, found)

    yield these
    attention_flash.flash_family.cache_clear()


@pytest.fixture
def flash_attn(install):
    install("flash-attn 2")


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
    keys = attention_flash.gathered_keys(offsets, prefix, len(d_out), 8)
    out = attention_flash.flash_attention(*qkv, keys, 0.3)
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


def test_what_flash_attn_does_not_have_is_named():
    q, offsets = torch.zeros(4, 2, 8), torch.tensor([0, 4])
    short, wanted = q.half()[..., :4], "wanted a GPU, or another backend"
    for x, found in ((q, "q is torch.float32"), (short, "q has head_dim 4"), (q.half(), wanted)):
        with pytest.raises(ValueError, match=found):
            packed_attention(x, x, x, offsets, backend="flash_attn")


@pytest.mark.parametrize("family", FAKES)
def test_every_family_is_called_as_its_source_says(family, install):
    install(family)
    qkv, d_out, offsets, prefix = inputs(*FAMILIES, torch.bfloat16, 3)
    out = packed_attention(*qkv, offsets, prefix, backend="flash_attn")
    exact = [x.detach().double().requires_grad_() for x in qkv]
    expected = packed_attention(*exact, offsets, prefix)
    results = (out, *torch.autograd.grad(out, qkv, d_out))
    for x, y in zip(results, (expected, *torch.autograd.grad(expected, exact, d_out.double())), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=0.02, atol=0.02 * y.abs().max().item())


def test_the_signature_of_torchs_own():
    assert [*signature(varlen_attn).parameters] == [*signature(torch_varlen.varlen_attn).parameters]


@pytest.mark.parametrize(
    ("capability", "head_dim", "expected"),
    [((8, 0), 128, 2), ((8, 6), 256, 2), ((9, 0), 128, 0), ((9, 0), 256, 2), ((10, 3), 128, 0), ((10, 0), 256, 2),
     ((12, 0), 64, 2)],
)  # fmt: skip
def test_the_newest_family_of_a_chip_is_taken(capability, head_dim, expected, install, caplog):
    install(*FAKES)
    caplog.set_level("INFO")
    for _ in range(2):
        name, _ = attention_flash.flash_family(head_dim, capability)
        assert name == [*FAKES][expected]
    assert len(caplog.records) == 1, "said once"
    assert name in caplog.text


def test_an_older_family_stands_in(install):
    install("flash-attn 3", "torch's varlen_attn")
    assert attention_flash.flash_family(192, (9, 0))[0] == "flash-attn 3"
    assert attention_flash.flash_family(200, (9, 0))[0] == "torch's varlen_attn"


def test_what_was_found_and_what_to_install_is_named(install, monkeypatch):
    """Also a package that was built for another torch, and torch's function of an older one."""
    install()
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
    older = SimpleNamespace(varlen_attn=lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal: None)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", older)
    q = torch.zeros(4, 2, 8, dtype=torch.bfloat16)
    found = "(?s)head_dim 8 on sm_90.*flash-attn 4: .*no attribute.*lacks enable_gqa: too old.*pip install .flash-attn"
    with pytest.raises(ImportError, match=found):
        packed_attention(q, q, q, torch.tensor([0, 4]), backend="flash_attn")
    with pytest.raises(ImportError, match=r"sm_75 .*torch's varlen_attn does not have it"):
        attention_flash.flash_family(64, (7, 5))


# The two functions of flash-attn 2.8.3's extension that a call ends in, their arguments in order:
# https://github.com/Dao-AILab/flash-attention/blob/v2.8.3/csrc/flash_attn/flash_api.cpp
TENSOR, MAYBE, NONE = torch.Tensor, (torch.Tensor, type(None)), type(None)
VARLEN_FWD = {
    **dict(q=TENSOR, k=TENSOR, v=TENSOR, out_=MAYBE, cu_seqlens_q=TENSOR, cu_seqlens_k=TENSOR, seqused_k=MAYBE),
    **dict(leftpad_k_=MAYBE, block_table_=MAYBE, alibi_slopes_=MAYBE, max_seqlen_q=int, max_seqlen_k=int),
    **dict(p_dropout=float, softmax_scale=float, zero_tensors=bool, is_causal=bool, window_size_left=int),
    **dict(window_size_right=int, softcap=float, return_softmax=bool, gen_=NONE),
}
VARLEN_BWD = {
    **dict(dout=TENSOR, q=TENSOR, k=TENSOR, v=TENSOR, out=TENSOR, softmax_lse=TENSOR, dq_=MAYBE, dk_=MAYBE, dv_=MAYBE),
    **dict(cu_seqlens_q=TENSOR, cu_seqlens_k=TENSOR, alibi_slopes_=MAYBE, max_seqlen_q=int, max_seqlen_k=int),
    **dict(p_dropout=float, softmax_scale=float, zero_tensors=bool, is_causal=bool, window_size_left=int),
    **dict(window_size_right=int, softcap=float, deterministic=bool, gen_=NONE, rng_state=MAYBE),
}


def checked(wanted: dict, given: list) -> SimpleNamespace:
    """The arguments by name, after what pybind11 and the function's own TORCH_CHECKs say of them."""
    assert len(given) == len(wanted)
    for (name, kind), value in zip(wanted.items(), given, strict=True):
        assert isinstance(value, kind), f"{name} is {value!r}"
        assert kind is bool or type(value) is not bool, f"{name} is {value!r}"
    found = SimpleNamespace(**dict(zip(wanted, given, strict=True)))
    (total_q, heads, head_dim), (total_k, kv_heads, _) = found.q.shape, found.k.shape
    assert found.q.dtype in (torch.bfloat16, torch.float16)
    assert head_dim % 8 == 0
    assert head_dim <= 256
    assert heads % kv_heads == 0
    for name in ("q", "k", "v", "out", "dout", "dq_", "dk_", "dv_"):
        if (x := getattr(found, name, None)) is not None:
            rows = (total_k, kv_heads) if name[:2] in ("k", "v", "dk", "dv") else (total_q, heads)
            assert (x.dtype, x.stride(-1), x.shape) == (found.q.dtype, 1, (*rows, head_dim)), name
    for offsets, longest, total in (
        (found.cu_seqlens_q, found.max_seqlen_q, total_q),
        (found.cu_seqlens_k, found.max_seqlen_k, total_k),
    ):
        assert offsets.dtype == torch.int32
        assert offsets.is_contiguous()
        assert offsets.shape == found.cu_seqlens_q.shape
        assert (offsets[0], offsets[-1]) == (0, total)
        assert longest >= offsets.diff().max()
    return found


class FlashAttnVarlenFunc(torch.autograd.Function):
    """flash-attn's, of flash_attn_interface.py: what it passes on, and where from."""

    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, max_q, max_k, dropout, scale, causal, window, softcap, deterministic):
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        options = [dropout, scale, False, causal, *window, softcap]
        checked(VARLEN_FWD, [q, k, v, None, cu_q, cu_k, *[None] * 4, max_q, max_k, *options, False, None])
        with torch.enable_grad():
            ctx.inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            offsets = cu_q, cu_k, max_q, max_k
            ctx.out = varlen(*ctx.inputs, *offsets, softmax_scale=scale, causal=causal, deterministic=deterministic)
        lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32)
        ctx.rest = lse, offsets, options, deterministic
        return ctx.out.detach()

    @staticmethod
    def backward(ctx, *gradients):
        (d_out,) = gradients
        d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
        lse, (cu_q, cu_k, max_q, max_k), options, deterministic = ctx.rest
        tensors = [*ctx.inputs, ctx.out, lse, *map(torch.empty_like, ctx.inputs), cu_q, cu_k, None]
        state = torch.empty(2, dtype=torch.int64)
        checked(VARLEN_BWD, [d_out, *tensors, max_q, max_k, *options, deterministic, None, state])
        return *torch.autograd.grad(ctx.out, ctx.inputs, d_out), *[None] * 10


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
    causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
    return_attn_probs=False, block_table=None,
):  # fmt: skip
    """flash-attn's, by its own signature."""
    assert (alibi_slopes, return_attn_probs, block_table) == (None, False, None)
    offsets = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    options = dropout_p, softmax_scale, causal, window_size, softcap, deterministic
    return FlashAttnVarlenFunc.apply(q, k, v, *offsets, *options)


@pytest.mark.parametrize("d_out_is", ["whole", "of every other head", "transposed"])
@pytest.mark.parametrize(("lengths", "prefix"), [FAMILIES, EMPTY_PROMPT, ([1, 1, 1], [-1, 0, 0])])
def test_what_flash_attns_extension_is_given(lengths, prefix, d_out_is, flash_attn, monkeypatch):
    """In number, order, type and layout as its C++ says, also where v is a part of a joint projection."""
    module = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    total = sum(lengths)
    joint = torch.randn(total, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    q, k, v = joint.split([4, 2, 2], dim=1)
    assert not v.is_contiguous()
    offsets = torch.tensor([0, *accumulate(lengths)])
    out = packed_attention(q, k, v, offsets, torch.tensor(prefix), max_seqlen=max(lengths), backend="flash_attn")
    d_out = {
        "whole": torch.randn(total, 4, 8),
        "of every other head": torch.randn(total, 8, 8)[:, ::2],
        "transposed": torch.randn(8, 4, total).permute(2, 1, 0),
    }[d_out_is]
    (d_joint,) = torch.autograd.grad(out, joint, d_out.bfloat16())
    assert d_joint.isfinite().all()
    assert d_joint.any()
    assert (len(VARLEN_FWD), len(VARLEN_BWD)) == (21, 24)
