import pytest
import torch
from triton import knobs

from flashgrpo.kernels import attention, attention_plan
from flashgrpo.kernels.attention import HEAD_DIMS, packed_attention, plan_attention, planned_attention
from packs import ALONE, FAMILIES, SMALL, assert_as_accurate_as_torch, check, dense, index, make_qkv, run

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", [ALONE, FAMILIES], ids=["empty, single and long segments", "families"])
def test_as_accurate_as_torch(layout, dtype, device):
    check(device, *layout, dtype)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim(head_dim, device):
    check(device, *SMALL, torch.bfloat16, head_dim=head_dim)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (4, 2), (7, 1)])
def test_every_ratio_of_query_to_kv_heads(num_heads, num_kv_heads, device):
    check(device, *SMALL, torch.bfloat16, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=32)


def test_a_longer_pack(device):
    check(device, [200, 150, 1, 130, 129, 70], [-1, 0, 0, 0, -1, -1], torch.bfloat16)


@pytest.mark.parametrize("sign", [-1, 1])
def test_scores_far_below_and_far_above_zero(sign, device, as_accurate):
    """At -128 every power underflows that is not measured from a maximum below 0."""
    qkv, d_out = make_qkv(62, device)
    with torch.no_grad():
        qkv[0].add_(4 * sign)
        qkv[1].add_(4)
    exact = dense([x.detach().double().requires_grad_() for x in qkv], d_out.double(), *SMALL)
    results = zip(("out", "d_q", "d_k", "d_v"), run(qkv, d_out, *SMALL), dense(qkv, d_out, *SMALL), exact, strict=True)
    for name, ours, plain, true in results:
        as_accurate(ours, plain, true, name)


def test_without_prefix_and_with_a_scale_equals_the_twin(device):
    lengths = [70, 33]
    qkv, d_out = make_qkv(103, device)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    ours, twin = run(qkv, d_out, lengths, None, scale=0.3), run(exact, d_out.double(), lengths, None, scale=0.3)
    for actual, expected in zip(ours, twin, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-5)


def test_rows_beyond_the_last_offset_are_zero_and_touch_nothing(device):
    lengths, prefix = FAMILIES
    qkv, d_out = make_qkv(sum(lengths) + 70, device)
    inside = slice(sum(lengths))
    alone = run([x[inside].detach().requires_grad_() for x in qkv], d_out[inside], lengths, prefix)
    with torch.no_grad():
        for x in (*qkv, d_out):
            x[sum(lengths) :] = torch.nan
    for padded, expected in zip(run(qkv, d_out, lengths, prefix), alone, strict=True):
        assert torch.equal(padded[inside], expected)
        assert not padded[sum(lengths) :].any()


@pytest.mark.parametrize(("total_tokens", "lengths"), [(0, []), (0, [0, 0]), (3, []), (3, [0]), (1, [1])])
def test_next_to_nothing(total_tokens, lengths, device):
    qkv, d_out = make_qkv(total_tokens, device)
    out, *gradients = run(qkv, d_out, lengths, [-1] * len(lengths))
    alone = total_tokens == sum(lengths)  # a token that sees itself only returns its value
    assert torch.equal(out, qkv[2].detach().expand_as(out) if alone else torch.zeros_like(out))
    for gradient, expected in zip(gradients, (0, 0, d_out.sum(1, keepdim=True) if alone else 0), strict=True):
        torch.testing.assert_close(gradient, expected + torch.zeros_like(gradient), rtol=0, atol=1e-5)


def test_a_completion_touches_no_sibling_and_a_pack_no_family(device):
    lengths, prefix = [70, 40, 65, 20], [-1, 0, 0, 0]
    qkv, d_out = make_qkv(195, device, dtype=torch.bfloat16)
    before = run(qkv, d_out, lengths, prefix)
    packed = [torch.cat((torch.randn_like(x[:45]), x.detach(), torch.randn_like(x[:3]))) for x in (*qkv, d_out)]
    among = run([x.requires_grad_() for x in packed[:3]], packed[3], [45, *lengths, 3], [-1, -1, 1, 1, 1, -1])
    for actual, expected in zip(among, before, strict=True):
        assert torch.equal(actual[45:-3], expected)
    with torch.no_grad():
        for x in (*qkv, d_out):
            x[110:175] += 1
    after = run(qkv, d_out, lengths, prefix)
    for name, x, y in zip(("out", "d_q", "d_k", "d_v"), before, after, strict=True):
        siblings = [*range(70, 110), *range(175, 195)]
        assert torch.equal(x[siblings], y[siblings]), name
        assert not torch.equal(x[110:175], y[110:175])


def test_gradients_of_a_prompt_are_those_of_its_copies_summed(device):
    qkv, d_out = make_qkv(37 + 25, device)
    prompt, first, second = range(37), range(37, 57), range(57, 62)
    _, _, *shared = run(qkv, d_out, *SMALL)
    rows = torch.tensor([*prompt, *first, *prompt, *second], device=device)
    copies, d_copies = [x.detach()[rows].requires_grad_() for x in qkv], d_out[rows]
    d_copies[57 : 57 + 37] = 0  # the prompt's own outputs count once
    _, _, *repeated = run(copies, d_copies, [57, 42], None)
    for actual, copied in zip(shared, repeated, strict=True):
        expected = torch.zeros_like(actual).index_add_(0, rows, copied)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_split_families_equal_whole_ones(device, monkeypatch):
    lengths, prefix = [3, 70, 50, 45, 60, 60, 30], [-1, -1, 1, 1, 1, 1, -1]
    qkv, d_out = make_qkv(sum(lengths), device, num_heads=2, num_kv_heads=2, head_dim=32)
    exact = dense([x.detach().double().requires_grad_() for x in qkv], d_out.double(), lengths, prefix)
    whole = run(qkv, d_out, lengths, prefix)
    monkeypatch.setattr(attention_plan, "PIECE_ROWS", 64)
    split = run(qkv, d_out, lengths, prefix)
    packed = [torch.cat((torch.randn_like(x[:45]), x.detach())) for x in (*qkv, d_out)]
    among = run([x.requires_grad_() for x in packed[:3]], packed[3], [45, *lengths], [-1, -1, -1, 2, 2, 2, 2, -1])
    for x, y in zip(split, among, strict=True):
        assert torch.equal(x, y[45:])
    assert not torch.equal(split[3][3:73], whole[3][3:73]), "not split"
    assert torch.equal(split[3][73:], whole[3][73:])
    assert_as_accurate_as_torch(split, dense(qkv, d_out, lengths, prefix), exact)


@pytest.mark.parametrize("wanted", [True, False])
def test_a_plan_serves_layers_whatever_becomes_of_the_offsets(wanted, device):
    """Also one that is made in inference mode, for forward passes alone."""
    cu_seqlens, prefix = index(*SMALL, device)
    qkv, d_out = make_qkv(62, device)
    expected = run(qkv, d_out, *SMALL)
    with torch.inference_mode(not wanted):
        plan = plan_attention(cu_seqlens, prefix, 62, (2, 1, 64), torch.float32)
        out = planned_attention(*qkv, plan)
    cu_seqlens.zero_()
    assert torch.equal(out, expected[0])
    if wanted:
        for _ in range(2):
            out = planned_attention(*qkv, plan)
            for x, y in zip((out, *torch.autograd.grad(out, qkv, d_out)), expected, strict=True):
                assert torch.equal(x, y)
    else:
        with pytest.raises(ValueError, match="made without gradients"):
            planned_attention(*qkv, plan)
    for other in ([x[..., 32:] for x in qkv], [x.half() for x in qkv], [x.to("meta") for x in qkv]):
        with pytest.raises(
            ValueError, match=r"are \(62, 2, 1, .*; the plan is of \(62, 2, 1, 64, torch.float32, device"
        ):
            planned_attention(*other, plan)


@pytest.mark.parametrize("head_dim", [16, 80])
def test_views_are_read_in_place(head_dim, device):
    """q and k of one tensor and v of another with their row strides, as a decoder's projection and rotation leave them;
    and heads first, as transformers has them. Only d_out is copied.
    """
    (q, k, v), d_out = make_qkv(62, device, num_heads=4, num_kv_heads=2, head_dim=head_dim)
    expected = run([q, k, v], d_out, *SMALL)
    joint = torch.cat((q, k), 1).detach(), torch.cat((q, k, v), 1).detach()
    *heads_first, upstream = [x.detach().transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v, d_out)]
    for qkv in ([*joint[0].split((4, 2), 1), joint[1][:, 6:]], heads_first):
        views = [x.requires_grad_() for x in qkv]
        assert all(x is y for x, y in zip(attention._with_rows(*views), views, strict=True))
        for x, y in zip(run(views, upstream, *SMALL), expected, strict=True):
            assert torch.equal(x, y)


def test_tensors_without_contiguous_rows_are_copied(device):
    qkv, d_out = make_qkv(62, device, num_kv_heads=2)
    expected = run(qkv, d_out, *SMALL)
    across = [x.detach().transpose(0, 2).contiguous().transpose(0, 2) for x in (*qkv, d_out)]
    for x, y in zip(run([x.requires_grad_() for x in across[:3]], across[3], *SMALL), expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.skipif(knobs.runtime.interpret or not torch.cuda.is_available(), reason="needs a GPU")
def test_flash_attn_equals_the_kernels(device):
    lengths, prefix = FAMILIES
    qkv, d_out = make_qkv(sum(lengths) + 3, device, num_heads=4, num_kv_heads=2, dtype=torch.bfloat16)
    flash, ours = (run(qkv, d_out, lengths, prefix, backend=name) for name in ("flash_attn", "triton"))
    for x, y in zip(flash, ours, strict=True):
        torch.testing.assert_close(x, y, rtol=0.02, atol=0.02 * y.abs().max().item())
        assert not x[sum(lengths) :].any()


@pytest.mark.parametrize("planned", [False, True])
def test_one_compiled_graph_serves_every_pack(planned, device):
    function = planned_attention if planned else packed_attention
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths, prefix in (([40, 60, 30, 25], [-1, 0, 0, -1]), SMALL):  # of the first no two sizes are one
        qkv, d_out = make_qkv(sum(lengths), device)
        arguments, options = index(lengths, prefix, device), {"max_seqlen": max(lengths)}
        if planned:
            arguments = [plan_attention(*arguments, sum(lengths), (2, 1, 64), torch.float32, **options)]
        with torch._dynamo.config.patch(error_on_recompile=True):
            out = compiled(*qkv, *arguments, **({} if planned else options))
        actual = out, *torch.autograd.grad(out, qkv, d_out)
        for x, y in zip(actual, run(qkv, d_out, lengths, prefix), strict=True):
            assert torch.equal(x, y)


def test_operators_keep_their_contract_with_torch(device):
    (q, k, v), _ = make_qkv(62, device)
    plan = plan_attention(*index(*SMALL, device), 62, (2, 1, 64), torch.float32)
    torch.library.opcheck(attention._attention_fwd, (q, k, v, plan.keys, 0.1, False))


def test_double_backward_is_refused(device):
    qkv, _ = make_qkv(62, device)
    out = packed_attention(*qkv, *index(*SMALL, device))
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(out.sum(), qkv, create_graph=True)


def test_what_the_kernels_do_not_have_is_named(device):
    qkv, _ = make_qkv(62, device)
    places = index(*SMALL, device)
    with pytest.raises(ValueError, match="head_dim 48; wanted one of"):
        packed_attention(*(x[..., :48] for x in qkv), *places)
    with pytest.raises(ValueError, match="scale is -1"):
        packed_attention(*qkv, *places, scale=-1.0)
