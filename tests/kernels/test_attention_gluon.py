"""Backend "gluon" as the Triton kernels are asked, in the emulator.

On a GPU `flashgrpo bench attention --qualify` asks, in a process of its own: a kernel that hangs, or leaves its memory,
takes no other test along.
"""

import dataclasses
import os
from typing import Any

import pytest
import torch

import gluon_emulator
from flashgrpo.kernels import attention_gluon, attention_plan
from flashgrpo.kernels.attention import packed_attention, plan_attention
from packs import ALONE, FAMILIES, SMALL, assert_as_accurate_as_torch, check, dense, index, make_qkv, run

pytestmark = pytest.mark.kernels
LAUNCHERS = attention_gluon.LAUNCHERS
FAMILY = [130, 70, 1, 66], [-1, 0, 0, 0]  # a prefix of a block and a tail


@dataclasses.dataclass
class Emulated:
    """A kernel whose launches run in the emulator, with a schedule of `seed`."""

    kernel: Any
    seed: int = 0

    @property
    def arg_names(self) -> list[str]:
        return self.kernel.arg_names

    def __getitem__(self, grid):
        def launch(num_warps, **arguments):
            given = [arguments[name] for name in self.arg_names]
            gluon_emulator.run(self.kernel, grid, *given, seed=self.seed)

        return launch


def emulate(monkeypatch, launchers, seed=0):
    launchers = [dataclasses.replace(launcher, kernel=Emulated(launcher.kernel, seed)) for launcher in launchers]
    monkeypatch.setattr(attention_gluon, "LAUNCHERS", launchers)


@pytest.fixture(autouse=True)
def hopper(monkeypatch, device):
    """What makes a CPU pass for a Hopper."""
    if device.type == "cuda":
        pytest.skip("the emulator needs a CPU")
    emulate(monkeypatch, LAUNCHERS)

    def options(q):
        names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
        shared = {"HEAD_DIM": q.shape[2], "BLOCK_D": q.shape[2]}
        return [dict(zip(names, tile, strict=True)) | shared for tile in attention_plan.TILES["sm_90", q.shape[2]]]

    monkeypatch.setattr(attention_plan, "tile_options", options)
    monkeypatch.setattr(attention_plan, "architecture", lambda q: "sm_90")


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [ALONE, FAMILIES, FAMILY], ids=["alone", "families", "family"])
def test_as_accurate_as_torch(layout, dtype, head_dim, device):
    check(device, *layout, dtype, backend="gluon", head_dim=head_dim)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (4, 2), (7, 1)])
def test_every_ratio_of_query_to_kv_heads(num_heads, num_kv_heads, device):
    check(device, *SMALL, torch.bfloat16, "gluon", num_heads=num_heads, num_kv_heads=num_kv_heads)


def test_a_longer_pack(device):
    check(device, [300, 150, 1, 130, 129, 70], [-1, 0, 0, 0, -1, -1], torch.bfloat16, "gluon", head_dim=128)


@pytest.mark.parametrize("sign", [-1, 1])
def test_scores_far_below_and_far_above_zero(sign, device):
    """At -128 every power underflows that is not measured from a maximum below 0."""
    qkv, d_out = make_qkv(62, device, dtype=torch.bfloat16)
    with torch.no_grad():
        qkv[0].add_(4 * sign)
        qkv[1].add_(4)
    exact = dense([x.detach().double().requires_grad_() for x in qkv], d_out.double(), *SMALL)
    assert_as_accurate_as_torch(run(qkv, d_out, *SMALL, backend="gluon"), dense(qkv, d_out, *SMALL), exact)


def test_without_prefix_and_with_a_scale_equals_the_twin(device):
    qkv, d_out = make_qkv(103, device, dtype=torch.float16)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    ours, twin = (
        run(x, d, [70, 33], None, scale=0.3, backend=backend)
        for x, d, backend in ((qkv, d_out, "gluon"), (exact, d_out.double(), "torch"))
    )
    for actual, expected in zip(ours, twin, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=4e-3 * expected.abs().max().item())


@pytest.mark.parametrize(("total_tokens", "lengths"), [(0, []), (0, [0, 0]), (3, []), (3, [0]), (1, [1])])
def test_next_to_nothing(total_tokens, lengths, device):
    qkv, d_out = make_qkv(total_tokens, device, dtype=torch.bfloat16)
    out, d_q, d_k, d_v = run(qkv, d_out, lengths, [-1] * len(lengths), backend="gluon")
    alone = total_tokens == sum(lengths)  # a token that sees itself only returns its value
    assert torch.equal(out, qkv[2].detach().expand_as(out) if alone else torch.zeros_like(out))
    assert torch.equal(d_v, d_out.float().sum(1, keepdim=True).to(d_v.dtype) if alone else torch.zeros_like(d_v))
    for gradient in (d_q, d_k):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-5)


def test_rows_beyond_the_last_offset_are_zero_and_touch_nothing(device):
    lengths, prefix = FAMILY
    qkv, d_out = make_qkv(sum(lengths) + 70, device, dtype=torch.bfloat16)
    inside = slice(sum(lengths))
    alone = run([x[inside].detach().requires_grad_() for x in qkv], d_out[inside], lengths, prefix, backend="gluon")
    with torch.no_grad():
        for x in (*qkv, d_out):
            x[sum(lengths) :] = torch.nan
    for padded, expected in zip(run(qkv, d_out, lengths, prefix, backend="gluon"), alone, strict=True):
        assert torch.equal(padded[inside], expected)
        assert not padded[sum(lengths) :].any()


def test_a_neighbour_s_nan_stays_there(device):
    """Segments that end within a block, between others of NaN."""
    lengths, prefix = [33, *FAMILY[0], 60], [-1, -1, 1, 1, 1, -1]
    qkv, d_out = make_qkv(sum(lengths), device, dtype=torch.bfloat16)
    inside = slice(33, sum(lengths) - 60)
    alone = run([x[inside].detach().requires_grad_() for x in qkv], d_out[inside], *FAMILY, backend="gluon")
    with torch.no_grad():
        for x in (*qkv, d_out):
            x[:33], x[-60:] = torch.nan, torch.nan
    for packed, expected in zip(run(qkv, d_out, lengths, prefix, backend="gluon"), alone, strict=True):
        assert torch.equal(packed[inside], expected)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_cut_families(head_dim, device, monkeypatch):
    """Pieces of a prompt's queries, the same in a pack with a stranger in it."""
    monkeypatch.setattr(attention_plan, "PIECE_ROWS", 128)
    lengths, prefix = [129, 140, 70], [-1, 0, 0]
    tables = plan_attention(
        *index(lengths, prefix, device), 339, (2, 1, head_dim), torch.bfloat16, backend="gluon"
    ).keys
    assert tables[3][:, 3].max() == 3
    cut = check(device, lengths, prefix, torch.bfloat16, "gluon", head_dim=head_dim)
    qkv, d_out = make_qkv(339, device, head_dim=head_dim, dtype=torch.bfloat16)
    packed = [torch.cat((torch.randn_like(x[:45]), x.detach())) for x in (*qkv, d_out)]
    among = run([x.requires_grad_() for x in packed[:3]], packed[3], [45, *lengths], [-1, -1, 1, 1], backend="gluon")
    for x, y in zip(cut, among, strict=True):
        assert torch.equal(x, y[45:])


def test_what_the_copies_cannot_address_is_copied_first(device):
    """Rows at no multiple of 16 bytes, and heads first."""
    qkv, d_out = make_qkv(sum(SMALL[0]), device, num_kv_heads=2, dtype=torch.bfloat16)
    expected = run(qkv, d_out, *SMALL, backend="gluon")
    odd = [torch.empty(x.numel() + 3, dtype=x.dtype, device=device)[3:].view(x.shape).copy_(x.detach()) for x in qkv]
    heads_first = [x.detach().transpose(0, 1).contiguous().transpose(0, 1) for x in qkv]
    joint = torch.cat(qkv, 1).detach().split([x.shape[1] for x in qkv], 1)
    for views in (odd, heads_first, joint):
        for x, y in zip(
            run([x.requires_grad_() for x in views], d_out, *SMALL, backend="gluon"), expected, strict=True
        ):
            assert torch.equal(x, y)


def test_any_schedule_gives_the_same_bits(device, monkeypatch):
    qkv, d_out = make_qkv(sum(FAMILY[0]), device, dtype=torch.bfloat16)
    expected = run(qkv, d_out, *FAMILY, backend="gluon")
    for seed in range(1, 1 + int(os.environ.get("EXAMPLES", 10))):
        emulate(monkeypatch, LAUNCHERS, seed)
        for x, y in zip(run(qkv, d_out, *FAMILY, backend="gluon"), expected, strict=True):
            assert torch.equal(x, y)


def test_what_it_does_not_have_is_refused(device, monkeypatch):
    qkv, _ = make_qkv(62, device, dtype=torch.bfloat16)
    places = index(*SMALL, device)
    with pytest.raises(ValueError, match=r"head_dim \(64, 128\) in bfloat16 .* on sm_90; found 32, torch.bfloat16"):
        packed_attention(*(x[..., :32] for x in qkv), *places, backend="gluon")
    with pytest.raises(ValueError, match=r"found 64, torch.float32 .* choose 'triton'"):
        packed_attention(*(x.float() for x in qkv), *places, backend="gluon")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"found 64, torch.bfloat16 and cpu \(fp32\)"):
        packed_attention(*qkv, *places, backend="gluon")


FAULTS = [  # what, text of the kernels, text in its place, what is said of it; None: of wrong values
    ("producer's phase flipped", "& 1) ^ 1)", "& 1))", "deadlock"),
    ("consumer's phase flipped", "& 1)\n    return", "& 1 ^ 1)\n    return", "nobody"),
    ("consumer's wait dropped", "    mbarrier.wait(full.index(slot), i // slots.shape[0] & 1)\n", "", "nobody"),
    ("producer's wait dropped", "    mbarrier.wait(empty.index(slot), (i // slots.shape[0] & 1) ^ 1)\n", "",
     "race|too often"),
    ("one slot of the ring", "full.index(slot), slots.index(slot))", "full.index(slot), slots.index(0))", "race"),
    ("too few bytes expected", "desc.block_type.nbytes)", "desc.block_type.nbytes // 2)", "expect"),
    ("one of two consumers frees a slot", "count=READERS)", "count=1)", "race|deadlock"),
    ("three consumers free a slot", "count=READERS)", "count=READERS + 1)", "deadlock"),
    ("values freed before they are read", "            acc = warpgroup_mma_wait(0, [summed])\n",
     "            _free(values, i - 1)\n            acc = warpgroup_mma_wait(0, [summed])\n", "race|deadlock"),
    ("queries freed before they are read", "        dk = warpgroup_mma_wait(0, [summed_dk])\n",
     "        _free(queries, i)\n        dk = warpgroup_mma_wait(0, [summed_dk])\n", "race|too often"),
    ("scores read under way", "scores = warpgroup_mma_wait(1,", "scores = warpgroup_mma_wait(2,", "under way"),
    ("d_v read under way", "dv = warpgroup_mma_wait(1,", "dv = warpgroup_mma_wait(2,", "under way"),
    ("sums not waited for", "_ring(q_desc, _STAGES, 2, 2)", "_ring(q_desc, _STAGES, 2)", "race|too often"),
    ("sums not told", "        mbarrier.arrive(queries[1].index(slot), count=1)\n", "", "deadlock"),
    ("sums of one slot", "sums.index(2 * slot).store", "sums.index(0).store", "race|nobody"),
    ("a row of a neighbour", "[_RAGGED, stop, _RAGGED - stop +", "[_RAGGED, stop + 1, _RAGGED - stop - 1 +", None),
    ("the first key behind a prefix", "tile[4] - 1, rows", "tile[4], rows", None),
    ("a token does not see itself", "(start + columns)[None, :] <= rows", "(start + columns)[None, :] < rows", None),
    ("the diagonal of d_q", "(key + columns)[None, :] <= last", "(key + columns)[None, :] < last", None),
    ("the diagonal of d_k", "(query + columns)[None, :] >= keys", "(query + columns)[None, :] > keys", None),
    ("rescaled by the maximum", "acc = acc * gl.convert_layout(rescale", "acc = acc * gl.convert_layout(row_max", None),
    ("d_q not scaled", "dq * scale)", "dq)", None),
    ("rows of the next segment stored", "mask=(rows < num_rows)", "mask=(rows < num_rows + 1)", "race|are touched"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "said"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
def test_planted_fault_is_found(old, new, said, device, monkeypatch):
    faulty = gluon_emulator.with_fault(attention_gluon, old, new)
    with pytest.raises(gluon_emulator.Fault if said else AssertionError, match=said):
        for seed in range(3):
            emulate(monkeypatch, faulty.LAUNCHERS, seed)
            lengths, prefix = [33, 270, 70, 1, 66, 5, 9], [-1, -1, 1, 1, 1, -1, 5]
            check(device, lengths, prefix, torch.bfloat16, "gluon", num_heads=4, num_kv_heads=2)
