import os
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from flashgrpo.kernels.attention import packed_attention, plan_attention, planned_attention

# The kernels have none of these tests, so that a machine with a GPU need not have hypothesis.
hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")
pytestmark = pytest.mark.twin


def make_qkv(total_tokens: int, num_heads=4, num_kv_heads=2, head_dim=8, dtype=torch.float64, seed=0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    heads = (num_heads, num_kv_heads, num_kv_heads)
    return [torch.randn(total_tokens, h, head_dim, dtype=dtype, generator=generator).requires_grad_() for h in heads]


def naive_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], prefix: list[int], scale=None) -> Tensor:
    """Each query by itself, over the rows that the rule lets it see."""
    starts = [0, *accumulate(lengths)]
    group = q.shape[1] // k.shape[1]
    out = [torch.zeros_like(q[0]) for _ in range(q.shape[0])]
    for segment, parent in enumerate(prefix):
        shared = list(range(starts[parent], starts[parent + 1])) if parent >= 0 else []
        for i in range(starts[segment], starts[segment + 1]):
            seen = [*shared, *range(starts[segment], i + 1)]
            heads = []
            for h in range(q.shape[1]):
                scores = k[seen, h // group] @ q[i, h] * (q.shape[2] ** -0.5 if scale is None else scale)
                heads.append(scores.softmax(0) @ v[seen, h // group])
            out[i] = torch.stack(heads)
    return torch.stack(out) if out else q * 0


def run(qkv: list[Tensor], lengths: list[int], prefix: list[int] | None, **options) -> Tensor:
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return packed_attention(
        *qkv, cu_seqlens, None if prefix is None else torch.tensor(prefix, dtype=torch.int32), **options
    )


def assert_same_with_gradients(actual: Tensor, expected: Tensor, inputs: list[Tensor], tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
    upstream = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(7))
    pairs = zip(
        torch.autograd.grad(actual, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    )
    for actual_gradient, expected_gradient in pairs:
        torch.testing.assert_close(actual_gradient, expected_gradient, rtol=0, atol=tolerance)


@st.composite
def layouts(draw) -> tuple[list[int], list[int]]:
    """Prompts with their completions, any of them empty, in any order of lengths."""
    lengths, prefix = [], []
    for _ in range(draw(st.integers(0, 3))):
        prompt = len(lengths)
        lengths.append(draw(st.integers(0, 9)))
        prefix.append(-1)
        for length in draw(st.lists(st.integers(0, 7), max_size=3)):
            lengths.append(length)
            prefix.append(prompt)
    return lengths, prefix


@hypothesis.given(layout=layouts(), spare=st.integers(0, 2), num_kv_heads=st.sampled_from([1, 2, 4]))
@hypothesis.settings(max_examples=int(os.environ.get("EXAMPLES", 30)), deadline=None)
def test_every_layout_equals_the_definition(layout, spare, num_kv_heads):
    lengths, prefix = layout
    qkv = make_qkv(sum(lengths) + spare, num_kv_heads=num_kv_heads)
    actual, expected = run(qkv, lengths, prefix), naive_attention(*qkv, lengths, prefix)
    if sum(lengths):
        assert_same_with_gradients(actual, expected, qkv, 1e-10)
    else:
        assert torch.equal(actual, torch.zeros_like(actual))


def test_lengths_too_different_to_share_a_padded_batch():
    lengths, prefix = [150, 3, 140, 5, 300, 2], [-1, 0, 0, -1, 3, 3]
    qkv = make_qkv(sum(lengths), num_heads=2, num_kv_heads=1)
    assert_same_with_gradients(run(qkv, lengths, prefix), naive_attention(*qkv, lengths, prefix), qkv, 1e-10)


def test_a_prefix_may_follow_its_segment_and_scale_is_used():
    lengths, prefix = [4, 3, 5], [1, -1, 1]
    qkv = make_qkv(12)
    actual = run(qkv, lengths, prefix, scale=0.3, backend="torch")
    assert_same_with_gradients(actual, naive_attention(*qkv, lengths, prefix, scale=0.3), qkv, 1e-10)


def test_shared_prompt_equals_repeated_prompts():
    prompt, completions = 11, [4, 7, 1]
    q, k, v = qkv = make_qkv(prompt + sum(completions))
    shared = run(qkv, [prompt, *completions], [-1, 0, 0, 0])
    starts = [prompt, *(prompt + s for s in accumulate(completions))]
    rows = torch.cat(
        [torch.cat([torch.arange(prompt), torch.arange(starts[i], starts[i + 1])]) for i in range(len(completions))]
    )
    repeated = run([q[rows], k[rows], v[rows]], [prompt + length for length in completions], None)
    is_first_copy = torch.zeros(prompt + sum(completions), dtype=torch.int64)
    is_first_copy[rows.flip(0)] = torch.arange(len(rows)).flip(0)
    assert_same_with_gradients(shared, repeated[is_first_copy], qkv, 1e-10)


def test_gradcheck():
    qkv = make_qkv(9, num_heads=2, num_kv_heads=1, head_dim=4)
    assert torch.autograd.gradcheck(lambda *x: run(list(x), [3, 2, 0, 3], [-1, 0, 0, -1]), qkv)


def test_rows_beyond_the_last_offset_are_zero_even_if_they_hold_nan():
    q, k, v = make_qkv(9)
    with torch.no_grad():
        for x in (q, k, v):
            x[6:] = torch.nan
    out = run([q, k, v], [4, 2], [-1, 0])
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert torch.equal(out[6:], torch.zeros_like(out[6:]))
    for gradient in gradients:
        assert torch.equal(gradient[6:], torch.zeros_like(gradient[6:]))
        assert gradient.isfinite().all()


@pytest.mark.parametrize(("total_tokens", "lengths"), [(0, []), (0, [0, 0]), (3, []), (3, [0])])
def test_nothing_to_attend_gives_zeros_and_zero_gradients(total_tokens, lengths):
    qkv = make_qkv(total_tokens)
    out = run(qkv, lengths, None)
    assert torch.equal(out, torch.zeros(total_tokens, 4, 8, dtype=torch.float64))
    for gradient in torch.autograd.grad(out.sum(), qkv):
        assert not gradient.any()


def test_scoring_and_training_forward_are_bit_identical():
    lengths, prefix = [37, 9, 20, 50, 13], [-1, 0, 0, -1, 3]
    qkv = make_qkv(sum(lengths), head_dim=16, dtype=torch.float32)
    trained = run(qkv, lengths, prefix)
    with torch.no_grad():
        scored = run(qkv, lengths, prefix)
    assert torch.equal(trained, scored)


def test_what_is_compiled_serves_any_number_of_segments():
    compiled = torch.compile(planned_attention, backend="eager", dynamic=True)
    for lengths in ([5, 4, 3], [7, 2]):
        qkv = make_qkv(sum(lengths))
        plan = plan_attention(torch.tensor([0, *accumulate(lengths)]), None, sum(lengths), (4, 2, 8), torch.float64)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.equal(compiled(*qkv, plan), run(qkv, lengths, None))


def test_bfloat16_stays_close_to_float64():
    lengths, prefix = [30, 9, 20], [-1, 0, 0]
    qkv = make_qkv(sum(lengths), head_dim=16, dtype=torch.bfloat16)
    out = run(qkv, lengths, prefix)
    assert out.dtype == torch.bfloat16
    expected = naive_attention(*[x.double() for x in qkv], lengths, prefix)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=0.02)


Q, KV = torch.zeros(4, 4, 8), torch.zeros(4, 2, 8)
OFFSETS = torch.tensor([0, 2, 4])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((Q[0], KV, KV, OFFSETS), {}, ValueError, "q has shape"),
        ((Q, KV[:3], KV, OFFSETS), {}, ValueError, r"wanted \[4, num_kv_heads, 8\]"),
        ((Q, KV, KV[:, :1], OFFSETS), {}, ValueError, "and v"),
        ((Q, KV.new_zeros(4, 3, 8), KV.new_zeros(4, 3, 8), OFFSETS), {}, ValueError, "4 heads and k has 3"),
        ((Q, KV.double(), KV, OFFSETS), {}, TypeError, "k is torch.float64"),
        ((Q.long(), KV.long(), KV.long(), OFFSETS), {}, TypeError, "floating"),
        ((Q, KV, KV, OFFSETS.float()), {}, TypeError, "cu_seqlens is torch.float32"),
        ((Q, KV, KV, OFFSETS[None]), {}, ValueError, "one dimension"),
        ((Q, KV, KV, OFFSETS[:0]), {}, ValueError, r"cu_seqlens has shape \(0,\)"),
        ((Q, KV, KV, torch.tensor([1, 4])), {}, ValueError, "rise from 0"),
        ((Q, KV, KV, torch.tensor([0, 3, 2])), {}, ValueError, "rise from 0"),
        ((Q, KV, KV, torch.tensor([0, 5])), {}, ValueError, "at most 4"),
        ((Q, KV, KV, OFFSETS, torch.tensor([-1])), {}, ValueError, r"prefix has shape \(1,\); wanted \[2\]"),
        ((Q, KV, KV, OFFSETS, torch.tensor([-1, 2])), {}, ValueError, r"prefix\[1\] is 2"),
        ((Q, KV, KV, OFFSETS, torch.tensor([-2, 0])), {}, ValueError, r"prefix\[0\] is -2"),
        ((Q, KV, KV, OFFSETS, torch.tensor([-1, 1])), {}, ValueError, "another"),
        ((Q, KV, KV, OFFSETS, torch.tensor([1, 0])), {}, ValueError, "one level"),
        (
            (Q, KV, KV, OFFSETS, torch.tensor([1, -1])),
            {},
            ValueError,
            r"prefix\[0\] is 1; wanted segment 0 right behind",
        ),
        ((Q, KV, KV, torch.tensor([0, 1, 2, 3]), torch.tensor([-1, -1, 0])), {}, ValueError, "or backend='torch'"),
        ((Q, KV, KV, OFFSETS, torch.tensor([-1.0, 0.0])), {}, TypeError, "prefix is torch.float32"),
        ((Q, KV, KV, OFFSETS, [-1, 0]), {}, TypeError, "prefix is list; wanted a tensor"),
        ((Q, KV, KV, OFFSETS), {"scale": 0.0}, ValueError, "scale is 0.0; wanted a finite number above 0"),
        ((Q, KV, KV, OFFSETS), {"max_seqlen": 1}, ValueError, "max_seqlen is 1"),
        ((Q, KV, KV, OFFSETS), {"backend": "cudnn"}, ValueError, "known backends: triton, torch"),
    ],
)
def test_bad_arguments_are_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        packed_attention(*arguments, **options)
