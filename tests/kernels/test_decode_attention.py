"""Attention of a decoding step: right, the new keys appended, a row the same whatever stands beside it."""

from itertools import accumulate
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from flashgrpo.kernels import decode_attention as module
from flashgrpo.kernels.decode_attention import DecodeRows, decode_attention

ROOM = 100
# By group: tokens of the prompt, and its rows' own keys so far.
GROUPS = [(70, [0, 5, 33, 64]), (1, [31]), (130, []), (33, [99, 7]), (96, [32, 32, 32])]


class Step(NamedTuple):
    """Arguments of `decode_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    prompts: tuple[Tensor, Tensor]
    own: tuple[Tensor, Tensor]
    rows: DecodeRows

    def to(self, dtype: torch.dtype) -> "Step":
        """A copy, so that what is appended stays apart."""
        tensors = [x.to(dtype, copy=True) for x in (*self[:3], *self.prompts, *self.own)]
        return Step(*tensors[:3], (tensors[3], tensors[4]), (tensors[5], tensors[6]), self.rows)

    def only(self, kept: list[int], room: int) -> "Step":
        """Some of the groups, in another order of caches, with other room and other bounds."""
        groups = [(int(self.rows.prompt_start[g]), int(self.rows.prompt_length[g])) for g in kept]
        rows = [row for g in kept for row in torch.nonzero(self.rows.group == g)[:, 0].tolist()]
        places = self.rows.place[rows].tolist()
        prompts = [torch.cat([x[start : start + length] for start, length in groups]) for x in self.prompts]
        own = [torch.full((len(rows), room, *x.shape[2:]), torch.nan).to(x) for x in self.own]
        for new, old in zip(own, self.own, strict=True):
            for row, (place, length) in enumerate(zip(places, self.rows.length[rows].tolist(), strict=True)):
                new[row, :length] = old[place, :length]
        lengths = self.rows.length[rows].tolist()
        sizes = [int((self.rows.group == g).sum()) for g in kept]
        spread = make_rows([n for _, n in groups], sizes, lengths, range(len(rows)), self.q.device)
        spread = spread._replace(widest=spread.widest + 20, longest_prompt=spread.longest_prompt + 150)
        return Step(*(x[rows] for x in self[:3]), tuple(prompts), tuple(own), spread)


def make_rows(prompt_lengths, sizes, lengths, places, device) -> DecodeRows:
    def index(values):
        return torch.tensor([*values], dtype=torch.int32, device=device)

    group = [g for g, size in enumerate(sizes) for _ in range(size)]
    starts = [0, *accumulate(prompt_lengths)][:-1]
    tensors = [0, *accumulate(sizes)], starts, prompt_lengths, group, places, lengths
    return DecodeRows(*map(index, tensors), max(sizes, default=0), max(prompt_lengths, default=0))


def make(device, groups=GROUPS, dtype=torch.float32, num_heads=4, num_kv_heads=2, head_dim=32, room=ROOM) -> Step:
    """Places of own keys in reverse order, one of them without a row. What is no key holds NaN."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    prompt_lengths, lengths = [n for n, _ in groups], [n for _, own in groups for n in own]
    places = [*range(len(lengths), 0, -1)]
    rows = make_rows(prompt_lengths, [len(own) for _, own in groups], lengths, places, device)
    total = len(lengths)
    q, k, v = (
        noise(total, num_heads, head_dim),
        noise(total, num_kv_heads, head_dim),
        noise(total, num_kv_heads, head_dim),
    )
    behind = 40  # tokens of no prompt
    prompts = [noise(sum(prompt_lengths) + behind, num_kv_heads, head_dim) for _ in range(2)]
    own = [
        torch.full((total + 1, room, num_kv_heads, head_dim), torch.nan, device=device, dtype=dtype) for _ in range(2)
    ]
    for cache in own:
        for place, length in zip(places, lengths, strict=True):
            cache[place, :length] = noise(length, num_kv_heads, head_dim)
    for cache in prompts:
        cache[sum(prompt_lengths) :] = torch.nan
    return Step(q, k, v, (prompts[0], prompts[1]), (own[0], own[1]), rows)


def plain(step: Step, dtype: torch.dtype, scale: float | None = None) -> Tensor:
    """Every row by torch's operators in `dtype`."""
    rows, out = step.rows, []
    for row, (group, place, length) in enumerate(
        zip(rows.group.tolist(), rows.place.tolist(), rows.length.tolist(), strict=True)
    ):
        start, stop = int(rows.prompt_start[group]), int(rows.prompt_start[group] + rows.prompt_length[group])
        k, v = (
            torch.cat((prompt[start:stop], own[place, :length], new[row : row + 1])).to(dtype).transpose(0, 1)
            for prompt, own, new in zip(step.prompts, step.own, (step.k, step.v), strict=True)
        )
        q = step.q[row].to(dtype)[:, None]
        out.append(
            torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], scale=scale, enable_gqa=True)[0]
        )
    return torch.stack(out)[:, :, 0] if out else step.q.to(dtype)


def run(step: Step, **options) -> Tensor:
    """On a copy of the caches."""
    return decode_attention(*step.to(step.q.dtype), **options)


@pytest.fixture
def short_splits(monkeypatch):
    monkeypatch.setattr(module, "SPLIT", 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("split", [32, 256])
def test_as_accurate_as_torch(split, dtype, device, as_accurate, monkeypatch, poisoned):
    monkeypatch.setattr(module, "SPLIT", split)
    step = make(device, dtype=dtype)
    as_accurate(run(step), plain(step, dtype), plain(step, torch.float64))


@pytest.mark.twin
def test_the_twin_is_exact_in_float64(device):
    step = make(device, dtype=torch.float64, head_dim=7)
    torch.testing.assert_close(run(step), plain(step, torch.float64), rtol=0, atol=1e-12)


@pytest.mark.kernels
@pytest.mark.parametrize("head_dim", module.HEAD_DIMS)
def test_every_head_dim(head_dim, device, as_accurate, short_splits):
    step = make(device, GROUPS[2:], torch.bfloat16, head_dim=head_dim)
    as_accurate(run(step), plain(step, torch.bfloat16), plain(step, torch.float64))


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (4, 4), (14, 2), (7, 1), (32, 1)])
def test_every_ratio_of_query_to_kv_heads(num_heads, num_kv_heads, device, as_accurate, short_splits):
    step = make(device, GROUPS[:2], torch.bfloat16, num_heads=num_heads, num_kv_heads=num_kv_heads)
    as_accurate(run(step), plain(step, torch.bfloat16), plain(step, torch.float64))


def test_a_group_of_more_queries_than_a_tile_has(device, as_accurate, short_splits):
    step = make(device, [(50, [*range(37)]), (3, [4])])
    as_accurate(run(step), plain(step, torch.float32), plain(step, torch.float64))


@pytest.mark.parametrize("sign", [-1, 1])
def test_scores_far_below_and_far_above_zero(sign, device, as_accurate, short_splits):
    """At -128 every power underflows that is not measured from a maximum below 0."""
    step = make(device, [(70, [*range(0, 96, 3)])], head_dim=64)
    step.q.add_(4 * sign)
    for keys in (step.k, step.prompts[0], step.own[0]):
        keys.add_(4)
    as_accurate(run(step), plain(step, torch.float32), plain(step, torch.float64))


def test_no_number_of_rows_moves_a_pointer_off_its_alignment(monkeypatch):
    """Triton compiles a kernel anew for pointers that 16 does not divide: in the middle of a run, as rows leave."""
    pointers = []

    def launch(kernel, grid, *arguments, **options):
        pointers.extend(x.data_ptr() for x in arguments if isinstance(x, Tensor))

    monkeypatch.setattr(module, "launch", launch)
    step = make(torch.device("cpu"), [(300, [3])], num_heads=7, num_kv_heads=1)
    module._by_kernels(*step, 0.1)
    assert len(pointers) == 22
    assert not [pointer for pointer in pointers if pointer % 16]


def test_indices_that_are_columns_of_a_table(device):
    step = make(device)
    columns = [torch.stack((x, x + 5), dim=1)[:, 0] for x in step.rows[:6]]
    assert torch.equal(run(step._replace(rows=DecodeRows(*columns, *step.rows[6:]))), run(step))


def test_a_scale_of_its_own(device, as_accurate):
    step = make(device, GROUPS[:2])
    as_accurate(run(step, scale=0.3), plain(step, torch.float32, 0.3), plain(step, torch.float64, 0.3))


@pytest.mark.parametrize("is_view", [False, True], ids=["tensors", "views of one product"])
def test_new_keys_are_appended_and_nothing_else_is_written(is_view, device, short_splits):
    step = make(device)
    if is_view:
        qkv = torch.cat(step[:3], dim=1)
        step = Step(*qkv.split([x.shape[1] for x in step[:3]], dim=1), *step[3:])
    before = step.to(torch.float32)
    out = decode_attention(*step)
    assert torch.equal(out, run(before))
    for name in ("prompts", "own"):
        for i, new in enumerate((step.k, step.v)):
            wanted = getattr(before, name)[i]
            if name == "own":
                wanted[step.rows.place.long(), step.rows.length.long()] = new
            torch.testing.assert_close(getattr(step, name)[i], wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kept", [[0], [1], [3, 0], [4, 3, 1]])
def test_a_row_is_the_same_bits_beside_any_others(kept, device, short_splits):
    """In caches of another room and places, among fewer rows and groups, under looser bounds; and in every run."""
    step = make(device, dtype=torch.bfloat16)
    whole, alone = run(step), run(step.only(kept, room=ROOM + 100))
    rows = [row for g in kept for row in torch.nonzero(step.rows.group == g)[:, 0].tolist()]
    assert torch.equal(alone, whole[rows])
    assert torch.equal(run(step), whole)


def test_a_row_is_the_same_bits_when_siblings_have_left(device, short_splits):
    step = make(device, [(70, [40, 5, 64])])
    last = Step(*(x[2:] for x in step[:3]), *step[3:5], make_rows([70], [1], [64], step.rows.place[2:], device))
    assert torch.equal(run(last)[0], run(step)[2])


def test_nan_stays_in_its_row_and_that_of_a_prompt_in_its_group(device, short_splits):
    step = make(device)
    clean = run(step)
    step.q[1] = torch.nan
    step.own[0][step.rows.place[7], 3] = torch.nan
    step.prompts[1][step.rows.prompt_start[3]] = torch.nan
    out = run(step)
    touched = {1, 7, *torch.nonzero(step.rows.group == 3)[:, 0].tolist()}
    for row in range(len(clean)):
        assert out[row].isnan().any() if row in touched else torch.equal(out[row], clean[row])


def test_keys_that_are_minus_infinite_have_no_weight(device, short_splits):
    step = make(device, [(70, [40])], num_heads=1, num_kv_heads=1)
    step.q.abs_()
    for keys in (step.prompts[0][:32], step.own[0][1, 32:40], step.k):
        keys.fill_(float("-inf"))
    out, exact = run(step), plain(step, torch.float64)
    assert exact.isfinite().all()
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-5)


def test_next_to_nothing(device):
    assert run(make(device, [(5, [])])).shape == (0, 4, 32)
    step = make(device, [(1, [0])], num_heads=2, num_kv_heads=1, room=1)
    torch.testing.assert_close(run(step), plain(step, torch.float32))


def test_arguments_that_do_not_fit_are_named(device):
    step = make(device)
    with pytest.raises(TypeError, match=r"k are torch\.bfloat16 and q is"):
        decode_attention(*step._replace(k=step.k.bfloat16()))
    with pytest.raises(ValueError, match=r"v have shape \(10, 2, 31\); wanted \[10, 2, 32\]"):
        decode_attention(*step._replace(v=step.v[..., 1:]))
    with pytest.raises(ValueError, match=r"q has shape \(10, 3, 32\); wanted a multiple of 2 heads of 32"):
        decode_attention(*step._replace(q=step.q[:, :3]))
    with pytest.raises(ValueError, match="own keys are not contiguous"):
        decode_attention(*step._replace(own=tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in step.own)))
    with pytest.raises(ValueError, match=r"q has shape \(10, 128\); wanted 3 dimensions"):
        decode_attention(*step._replace(q=step.q.flatten(1)))
    with pytest.raises(ValueError, match=r"own keys has shape \(11, 100, 64\); wanted 4 dimensions"):
        decode_attention(*step._replace(own=tuple(x.flatten(2) for x in step.own)))
    with pytest.raises(ValueError, match=r"place has shape \(9,\); wanted \[10\]"):
        decode_attention(*step._replace(rows=step.rows._replace(place=step.rows.place[1:])))
    with pytest.raises(TypeError, match=r"prompt_start is torch\.float32; wanted int32 or int64"):
        decode_attention(*step._replace(rows=step.rows._replace(prompt_start=step.rows.prompt_start.float())))


@pytest.mark.kernels
def test_what_no_kernel_has_is_named(device):
    with pytest.raises(ValueError, match="head_dim 48; wanted one of"):
        run(make(device, GROUPS[:1], head_dim=48))
    with pytest.raises(ValueError, match=r"scale is -0\.1; wanted a finite number above 0"):
        run(make(device, GROUPS[:1]), scale=-0.1)
