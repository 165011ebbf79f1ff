"""The tables of attention's tiles, whose kernels are not run here: who computes what, how long, in how much room.

Costs are clocks on sm_90 as read from the compiled code: a prediction.
"""

import heapq
import random
from itertools import accumulate, pairwise

import pytest
import torch

from flashgrpo.kernels import attention_plan

pytestmark = pytest.mark.kernels

PROCESSORS = 132
TILE, PASS = 4000, 2900  # clocks of a program for d_k and d_v, and of a block of queries of one head in it
BYTES_A_CLOCK = 2400  # of memory, all processors together
BLOCKS = [tile[0] for tile in attention_plan.TILES["sm_90", 128]] + [attention_plan.TILES["sm_90", 128][2][1]]
BLOCK_M, BLOCK_N = BLOCKS[2:]
HEADS = [(32, 8), (28, 4), (14, 2), (12, 2), (16, 1)]


def lengths_like_a_run_s(seed, num=16, mean=2048, most=16_384):
    draw = random.Random(seed).lognormvariate
    return [max(1, min(most, int(mean * draw(-0.5, 1)))) for _ in range(num)]


BATCHES = {
    "8k causal": [[8192]],
    "P 128, G 64, R 1024": [[128, *[1024] * 64]],
    "P 4096, G 8, R 1024": [[4096, *[1024] * 8]],
    "5k causal x 8": [[5120]] * 8,
    "128k beside 2000 of 16": [[131_072], *[[16]] * 2000],
    **{f"512 + 16 x lognormal, {seed}": [[512, *lengths_like_a_run_s(seed)]] for seed in range(3)},
}


def index(families):
    """cu_seqlens and prefix of families, a prompt and its completions each."""
    prefix = []
    for _, *completions in families:
        prefix += [-1] + [len(prefix)] * len(completions)
    lengths = [n for family in families for n in family]
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), torch.tensor(prefix, dtype=torch.int32)


def schedule(costs, processors=PROCESSORS) -> float:
    """When the last program ends, each begun by whoever is free first."""
    free = [0.0] * processors
    for cost in costs:
        heapq.heapreplace(free, free[0] + cost)
    return max(free)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), HEADS)
def test_gradients_of_keys_keep_every_processor_busy(num_heads, num_kv_heads):
    """At least 90% of the time, 75% with one kv head; what pieces add is no work, and their sum is waited for."""
    shares = {}
    for name, families in BATCHES.items():
        total_tokens = sum(map(sum, families))
        *_, entries, _ = attention_plan.attention_tiles(
            *index(families), total_tokens, (num_heads, num_kv_heads), BLOCKS
        )
        used = entries[entries[:, 0] < entries[:, 1]]
        passes = (used[:, 3] - used[:, 2] + BLOCK_M - 1) // BLOCK_M * (num_heads // num_kv_heads)
        programs = (TILE + PASS * passes).repeat_interleave(num_kv_heads).tolist()
        tiles = num_kv_heads * len(used[:, 0].unique())
        ideal = (TILE * tiles + PASS * num_kv_heads * int(passes.sum())) / PROCESSORS
        piece_bytes = 2 * 2 * 4 * 128 * BLOCK_N * num_kv_heads * int((used[:, 4] >= 0).sum())
        shares[name] = round(ideal / (schedule(programs) + piece_bytes / BYTES_A_CLOCK), 3)
    assert min(shares.values()) >= (0.75 if num_kv_heads == 1 else 0.9), shares


def packs(total_tokens):
    """Random ones, and of equal families of every shape: those that want most pieces a token are among them."""
    rng = random.Random(0)
    for _ in range(40):
        families, left = [], total_tokens
        while left > 0:
            most = rng.choice([50, 500, 5000, 50_000])
            families.append([min(left, 1 + int(most * rng.random() ** 3)) for _ in range(rng.choice([1, 1, 2, 9]))])
            left -= sum(families[-1])
        yield families
    for prompt in (1, 130, 1000, 4000, 15_000, 30_000):
        for number, length in ((0, 0), (1, 1), (1, 2000), (1, 9000), (3, 1500), (3, 7000), (40, 300), (500, 120)):
            yield [[prompt, *[length] * number]] * max(1, total_tokens // (prompt + number * length))


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), HEADS)
def test_no_pack_wants_more_pieces_than_there_is_room_for(num_heads, num_kv_heads, monkeypatch):
    monkeypatch.setattr(attention_plan, "PIECE_ROWS", 64)  # which keep it from making all that it may
    most = 0.0
    for families in packs(65_536):
        cu_seqlens, prefix = index(families)
        total_tokens = int(cu_seqlens[-1])
        segments = attention_plan.Segments.of(cu_seqlens, prefix, total_tokens)
        segment, first, stop = segments.tiles(BLOCK_N, total_tokens)
        sizes = segments.stop - segments.start, segments.query_stop() - segments.start
        piece = attention_plan.piece_lengths(*sizes, num_heads, num_kv_heads, BLOCK_M, BLOCK_N)[segment]
        pieces = (segments.query_stop()[segment] - first + piece - 1) // piece
        wanted = int(pieces[(first < stop) & (pieces > 1)].sum())
        most = max(most, wanted / attention_plan.count_slots(total_tokens, num_kv_heads, BLOCK_N))
    assert 0.2 < most <= 1
    room = attention_plan.count_slots(65_536, num_kv_heads, BLOCK_N) * num_kv_heads * BLOCK_N
    assert 2 * 4 * 128 * room <= 512e6


def test_pieces_cover_every_query_once():
    families = [[130, *[700] * 40], [2000, *[500] * 40], [300]]
    cu_seqlens, prefix = index(families)
    *_, entries, cut = attention_plan.attention_tiles(cu_seqlens, prefix, int(cu_seqlens[-1]), (12, 2), BLOCKS)
    used = entries[entries[:, 0] < entries[:, 1]]
    ends = {0: 28_130, 28_130: 50_130}
    numbers = []
    for start, stop in pairwise(cu_seqlens.tolist()):
        for key in range(start, stop, BLOCK_N):
            rows = sorted(used[used[:, 0] == key].tolist(), key=lambda row: row[2])
            assert {row[1] for row in rows} == {stop}
            assert [rows[0][2], rows[-1][3]] == [key, ends.get(start, stop)]
            assert all(before[3] == after[2] for before, after in pairwise(rows))
            if len(rows) > 1:
                numbers.append((key, stop, rows[0][4], len(rows)))
                assert [row[4] for row in rows] == [*range(rows[0][4], rows[0][4] + len(rows))]
    assert len(numbers) == 2 + 16, "the tiles of both prompts"
    assert sorted(cut[cut[:, 0] < cut[:, 1]][:, :4].tolist()) == sorted(map(list, numbers))
    work = (used[:, 3] - used[:, 2]).tolist()
    assert work == sorted(work, reverse=True)


def is_stopped(check, offsets, prefix) -> bool:
    try:
        check(torch.tensor(offsets), prefix and torch.tensor(prefix))
    except RuntimeError as error:
        return "a segment does not follow its prefix" in str(error)
    return False


@pytest.mark.parametrize("compiled", [False, True])
def test_offsets_on_a_device_are_asserted_without_a_wait(compiled):
    """The operator that stops a GPU raises on a CPU, also in a graph."""

    def check(cu_seqlens, prefix):
        attention_plan.Segments.of(cu_seqlens, prefix, 30)
        return cu_seqlens + 1

    check = torch.compile(check, fullgraph=True, backend="aot_eager") if compiled else check
    offsets = [0, 9, 9, 20, 28]
    for prefix in (None, [-1, 0, 0, -1], [-1, -1, 1, 1], [-1, 0, -1, 2]):
        assert not is_stopped(check, offsets, prefix)
    for prefix in ([1, -1, 1, -1], [-1, -1, 0, 0], [-1, 0, 1, 0], [-1, 0, -2, -1], [-1, 0, 4, -1], [0, 0, 0, -1]):
        assert is_stopped(check, offsets, prefix)
    for wrong in ([1, 9, 9, 20, 28], [0, 9, 8, 20, 28], [0, 9, 9, 20, 31]):
        assert is_stopped(check, wrong, None)
