"""Attention of a decoding step: one new token a row, behind its own and behind a prompt that its group shares.

    out_r = sum_j p_rj v_j        p_rj = softmax_j(scale q_r . k_j)

over the keys of the row's prompt, the row's own, and the new one, which is appended to the row's own
in the same launch. Forward only. A group's prompt is read once for all its rows: their queries of
one kv head are the rows of one tile, BLOCK_M at a time. A row's own keys meet the queries of one kv
head. Both are cut into splits of SPLIT keys, a program each, so that few rows with many keys still
fill a GPU; a second kernel adds a row's splits, those of the prompt first. Where a cut falls follows
from the key's place in its prompt or completion alone. Without atomics, results are deterministic,
and a row's do not depend on other rows, on the caches' room or on how many rows there are.

What a step must read, predicted, in bytes a layer, with 2 bytes an element:

    4 head_dim num_kv_heads (sum of prompts + sum of own keys), each prompt once a group

At P 1,024, R 1,024, G 16 that is 17 x 1,024 keys a group in place of the 32 x 1,024 of repeated
prompts. Queries that need more than one tile read a prompt again, from L2: the tiles of a split are
neighbours. Splits are written and read again as fp32: 8 (head_dim + 2) a row, query head and split,
those of a shared prompt, too. Of a row's own keys that is 2 heads_per_kv_head / SPLIT of what was
read; of all keys of that group 4.5% at 3 heads and 10% at 7. Of a row's matrix products 16 rows are
computed where heads_per_kv_head are wanted: 16 FLOPs a byte, far below a GPU's balance (200 on an
H100), so bytes decide. No GPU has run it yet.

Sources: Dao et al., Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html, for the
splits; Juravsky et al., Hydragen, arXiv 2402.05099, and Ye et al., Cascade Inference,
https://flashinfer.ai/2024/02/02/cascade-inference.html, for prompts that are read once a group.
"""

# pyright: reportGeneralTypeIssues=false
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashgrpo.kernels.attention import HEAD_DIMS, load_rows
from flashgrpo.kernels.attention_plan import architecture, block_of
from flashgrpo.kernels.common import accumulation_dtype, by_triton, check_index, launch, tl, triton

# Keys of one program. A multiple of every BLOCK_N; another number gives other bits.
SPLIT = 256
SUM_WARPS = 4
_LOG2_E = tl.constexpr(math.log2(math.e))
# By architecture and head_dim rounded up: queries of a group in a tile, keys in a block, warps, stages.
TILES = {
    ("fp32", 64): (32, 32, 4, 1),
    ("fp32", 128): (32, 32, 4, 1),
    ("fp32", 256): (16, 32, 4, 1),
    ("sm_80", 64): (64, 64, 4, 3),
    ("sm_80", 128): (32, 32, 4, 4),
    ("sm_80", 256): (64, 32, 8, 3),
    ("sm_86", 64): (64, 64, 4, 3),
    ("sm_86", 128): (32, 32, 4, 4),
    ("sm_86", 256): (32, 32, 8, 3),
    ("sm_90", 64): (64, 64, 4, 3),
    ("sm_90", 128): (64, 32, 4, 4),
    ("sm_90", 256): (64, 32, 8, 3),
    ("sm_100", 64): (64, 64, 4, 3),
    ("sm_100", 128): (64, 32, 4, 4),
    ("sm_100", 256): (64, 32, 8, 3),
    ("gfx942", 64): (64, 64, 4, 1),
    ("gfx942", 128): (64, 64, 4, 1),
    ("gfx942", 256): (64, 32, 4, 1),
}


class DecodeRows(NamedTuple):
    """The rows of a step, the rows of a group side by side. int32 on the caches' device."""

    first_row: Tensor  # [num_groups + 1], of each group, and the number of rows
    prompt_start: Tensor  # [num_groups], of the group's tokens in the prompts' cache
    prompt_length: Tensor  # [num_groups]
    group: Tensor  # [rows]
    place: Tensor  # [rows], the row's in the cache of own keys; each is of one row
    length: Tensor  # [rows], own keys before this step; below the cache's room
    widest: int  # rows of the largest group, or more
    longest_prompt: int  # or more


_INDICES = DecodeRows._fields[:6]  # the tensors


@triton.jit
def _load_queries(
    ptr, stride, first_row, last_row, first_query, kv_head,
    HEADS: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Queries of one kv head, row after row, from `first_query` on, [ROWS, BLOCK_D]; their rows, heads, and which are.

    What is no query is 0.
    """
    query = first_query + tl.arange(0, ROWS)
    row = first_row + query // HEADS
    head = kv_head * HEADS + query % HEADS
    inside = row < last_row
    columns = tl.arange(0, BLOCK_D)[None, :]
    pointers = ptr + (row.to(tl.int64) * stride + head * HEAD_DIM)[:, None] + columns
    return tl.load(pointers, mask=inside[:, None] & (columns < HEAD_DIM), other=0.0), row, head, inside


@triton.jit
def _attend(
    q, k_ptr, v_ptr, stride, num_keys, log2_scale,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """sum_j p_j v_j, sum_j p_j and the largest score, with p relative to it, of keys from the pointers on."""
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    row_max = tl.full((ROWS,), float("-inf"), tl.float32)
    for key in range(0, num_keys, BLOCK_N):
        offset = key * stride  # key < SPLIT
        k = load_rows(k_ptr + offset, stride, num_keys - key, BLOCK_N, HEAD_DIM, BLOCK_D, True)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = tl.where(key + tl.arange(0, BLOCK_N)[None, :] < num_keys, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2((scores - base[:, None]) * log2_scale)
        rescale = tl.exp2((row_max - base) * log2_scale)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        row_max = new_max
        v = load_rows(v_ptr + offset, stride, num_keys - key, BLOCK_N, HEAD_DIM, BLOCK_D, True)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    return acc, row_sum, row_max


@triton.jit
def _store_split(
    acc_ptr, sums_ptr, peaks_ptr, acc, row_sum, row_max, row, head, inside, split, num_splits, num_heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What `_attend` returns, by row, split and head."""
    place = (row.to(tl.int64) * num_splits + split) * num_heads + head
    columns = tl.arange(0, BLOCK_D)[None, :]
    tl.store(acc_ptr + place[:, None] * HEAD_DIM + columns, acc, mask=inside[:, None] & (columns < HEAD_DIM))
    tl.store(sums_ptr + place, row_sum, mask=inside)
    tl.store(peaks_ptr + place, row_max, mask=inside)


@triton.jit(
    do_not_specialize=[
        "room", "num_kv_heads", "num_groups", "tiles", "prompt_splits", "own_splits",
    ]
)  # fmt: skip
def _decode_split_kernel(
    q_ptr, k_ptr, v_ptr, prompt_k_ptr, prompt_v_ptr, own_k_ptr, own_v_ptr, acc_ptr, sums_ptr, peaks_ptr,
    first_rows, prompt_start, prompt_length, place, length,
    scale, q_stride, k_stride, v_stride, room, num_kv_heads, num_groups, tiles, prompt_splits, own_splits,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, OWN_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The first programs have a split of a prompt and a tile of its group's queries, the others a split of a row's own
    keys; of these the last appends the new key and value. Only it reads or writes that place.
    """
    log2_scale = scale * _LOG2_E
    stride = num_kv_heads * HEAD_DIM  # of a token in both caches
    num_heads = num_kv_heads * HEADS
    num_splits = prompt_splits + own_splits
    program = tl.program_id(0)
    prompt_programs = num_groups * prompt_splits * num_kv_heads * tiles
    if program < prompt_programs:
        query = program % tiles * BLOCK_M
        kv_head = program // tiles % num_kv_heads
        split = program // (tiles * num_kv_heads)
        group = split // prompt_splits
        split = split % prompt_splits
        first, last = tl.load(first_rows + group), tl.load(first_rows + group + 1)
        num_keys = tl.minimum(tl.load(prompt_length + group) - split * SPLIT, SPLIT)
        if (num_keys > 0) & (query < (last - first) * HEADS):
            q, row, head, inside = _load_queries(
                q_ptr, q_stride, first, last, query, kv_head, HEADS, BLOCK_M, HEAD_DIM, BLOCK_D
            )
            key = (tl.load(prompt_start + group) + split * SPLIT).to(tl.int64) * stride + kv_head * HEAD_DIM
            acc, row_sum, row_max = _attend(
                q, prompt_k_ptr + key, prompt_v_ptr + key, stride, num_keys, log2_scale,
                BLOCK_M, HEAD_DIM, BLOCK_D, BLOCK_N,
            )  # fmt: skip
            _store_split(
                acc_ptr, sums_ptr, peaks_ptr, acc, row_sum, row_max, row, head, inside, split, num_splits, num_heads,
                HEAD_DIM, BLOCK_D,
            )  # fmt: skip
    else:
        program -= prompt_programs
        kv_head = program % num_kv_heads
        split = program // num_kv_heads
        own_row = split // own_splits
        split = split % own_splits
        own_length = tl.minimum(tl.load(length + own_row), room - 1)
        num_keys = own_length - split * SPLIT  # and the new one
        if num_keys >= 0:
            q, row, head, inside = _load_queries(
                q_ptr, q_stride, own_row, own_row + 1, 0, kv_head, HEADS, OWN_M, HEAD_DIM, BLOCK_D
            )
            key = (tl.load(place + own_row).to(tl.int64) * room + split * SPLIT) * stride + kv_head * HEAD_DIM
            acc, row_sum, row_max = _attend(
                q, own_k_ptr + key, own_v_ptr + key, stride, tl.minimum(num_keys, SPLIT), log2_scale,
                OWN_M, HEAD_DIM, BLOCK_D, BLOCK_N,
            )  # fmt: skip
            if num_keys < SPLIT:
                columns = tl.arange(0, BLOCK_D)
                wanted = columns < HEAD_DIM
                new = own_row.to(tl.int64)
                k = tl.load(k_ptr + new * k_stride + kv_head * HEAD_DIM + columns, mask=wanted, other=0.0)
                v = tl.load(v_ptr + new * v_stride + kv_head * HEAD_DIM + columns, mask=wanted, other=0.0)
                end = key + num_keys * stride
                tl.store(own_k_ptr + end + columns, k, mask=wanted)
                tl.store(own_v_ptr + end + columns, v, mask=wanted)
                score = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1)
                new_max = tl.maximum(row_max, score)
                base = tl.where(new_max == float("-inf"), 0.0, new_max)
                p = tl.exp2((score - base) * log2_scale)
                rescale = tl.exp2((row_max - base) * log2_scale)
                row_sum = row_sum * rescale + p
                row_max = new_max
                acc = acc * rescale[:, None] + p[:, None] * v.to(tl.float32)[None, :]
            _store_split(
                acc_ptr, sums_ptr, peaks_ptr, acc, row_sum, row_max, row, head, inside, prompt_splits + split,
                num_splits, num_heads, HEAD_DIM, BLOCK_D,
            )  # fmt: skip


@triton.jit(do_not_specialize=["room", "num_kv_heads", "prompt_splits", "own_splits"])
def _decode_sum_kernel(
    acc_ptr, sums_ptr, peaks_ptr, out_ptr, prompt_length, group, length,
    scale, room, num_kv_heads, prompt_splits, own_splits,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Adds the splits of a row's queries of one kv head, the prompt's first, in the order of their keys."""
    kv_head = tl.program_id(0) % num_kv_heads
    row = tl.program_id(0) // num_kv_heads
    of_prompt = tl.cdiv(tl.load(prompt_length + tl.load(group + row)), SPLIT)
    of_own = tl.minimum(tl.load(length + row), room - 1) // SPLIT + 1
    heads = tl.arange(0, BLOCK_H)
    inside = heads < HEADS
    columns = tl.arange(0, BLOCK_D)[None, :]
    mask = inside[:, None] & (columns < HEAD_DIM)
    num_heads = num_kv_heads * HEADS
    log2_scale = scale * _LOG2_E
    first = row.to(tl.int64) * (prompt_splits + own_splits)
    acc = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    peak = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    for i in range(of_prompt + of_own):
        split = tl.where(i < of_prompt, i, prompt_splits + i - of_prompt)
        places = (first + split) * num_heads + kv_head * HEADS + heads
        split_peak = tl.load(peaks_ptr + places, mask=inside, other=float("-inf"))
        new_peak = tl.maximum(peak, split_peak)
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp2((split_peak - base) * log2_scale)
        rescale = tl.exp2((peak - base) * log2_scale)
        split_acc = tl.load(acc_ptr + places[:, None] * HEAD_DIM + columns, mask=mask, other=0.0)
        acc = acc * rescale[:, None] + weight[:, None] * split_acc
        total = total * rescale + weight * tl.load(sums_ptr + places, mask=inside, other=0.0)
        peak = new_peak
    out = acc / tl.where(inside, total, 1.0)[:, None]
    pointers = out_ptr + (row.to(tl.int64) * num_heads + kv_head * HEADS + heads)[:, None] * HEAD_DIM + columns
    tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=mask)


def tile_options(q: Tensor, num_kv_heads: int) -> dict[str, Any]:
    """What the first kernel is compiled with, for q's device, dtype and heads."""
    heads, block_d, arch = q.shape[1] // num_kv_heads, block_of(q.shape[2]), architecture(q)
    block_m, block_n, num_warps, num_stages = TILES[arch, max(64, block_d)]
    return {
        "HEADS": heads, "HEAD_DIM": q.shape[2], "BLOCK_D": block_d,
        "BLOCK_M": block_m, "OWN_M": max(16, block_of(heads)), "BLOCK_N": block_n, "SPLIT": SPLIT,
        "num_warps": num_warps, "num_stages": num_stages,
    } | ({"matrix_instr_nonkdim": 16} if torch.version.hip else {})  # fmt: skip


def decode_attention(
    q: Tensor,  # [rows, num_heads, head_dim]
    k: Tensor,  # [rows, num_kv_heads, head_dim], of the new tokens
    v: Tensor,  # [rows, num_kv_heads, head_dim]
    prompts: tuple[Tensor, Tensor],  # keys and values, [prompt_tokens, num_kv_heads, head_dim], prompt behind prompt
    own: tuple[Tensor, Tensor],  # keys and values, [places, room, num_kv_heads, head_dim]; written in place
    rows: DecodeRows,
    *,
    scale: float | None = None,
) -> Tensor:  # [rows, num_heads, head_dim]
    """Attention of each row's new token to its group's prompt, its own keys and itself; appends k and v.

    Keys past a prompt's or a row's length are not read, whatever they hold. `scale` defaults to
    1/sqrt(head_dim). Not differentiable. On a CPU and in float64 a torch twin of any floating dtype and
    head_dim, made for correctness.

    Raises ValueError for shapes that do not fit together and a head_dim or scale that the kernels do
    not have, TypeError for dtypes. Starts and lengths are not checked: they are on the device.
    """
    _check(q, k, v, prompts, own, rows)
    scale = float(q.shape[2] ** -0.5) if scale is None else scale
    if not by_triton(q):
        return _torch_decode_attention(q, k, v, prompts, own, rows, scale)
    if q.shape[2] not in HEAD_DIMS:
        raise ValueError(f"q has head_dim {q.shape[2]}; wanted one of {HEAD_DIMS}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}; wanted a finite number above 0")
    return _by_kernels(q, k, v, prompts, own, rows, scale)


def _by_kernels(
    q: Tensor, k: Tensor, v: Tensor, prompts: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], rows: DecodeRows,
    scale: float,
) -> Tensor:  # fmt: skip
    """`decode_attention`, its arguments checked."""
    num_rows, num_heads, head_dim = q.shape
    (_, room, num_kv_heads, _), num_groups = own[0].shape, rows.prompt_start.shape[0]
    options = tile_options(q, num_kv_heads)
    rows = rows._replace(**{name: getattr(rows, name).contiguous() for name in _INDICES})
    prompt_splits, own_splits = -(-rows.longest_prompt // SPLIT), -(-room // SPLIT)
    tiles = -(-rows.widest * options["HEADS"] // options["BLOCK_M"])
    num_splits = prompt_splits + own_splits
    acc = q.new_empty(num_rows, num_splits, num_heads, head_dim, dtype=torch.float32)
    # Apart: half of one tensor would begin where 16 bytes do for some numbers of rows and not for others.
    sums, peaks = (q.new_empty(num_rows, num_splits, num_heads, dtype=torch.float32) for _ in range(2))
    q, k, v = (x if x.stride()[1:] == (head_dim, 1) else x.contiguous() for x in (q, k, v))
    programs = (num_groups * prompt_splits * tiles + num_rows * own_splits) * num_kv_heads
    launch(
        _decode_split_kernel, (programs,), q, k, v, *prompts, *own, acc, sums, peaks,
        rows.first_row, rows.prompt_start, rows.prompt_length, rows.place, rows.length,
        scale, q.stride(0), k.stride(0), v.stride(0), room, num_kv_heads, num_groups, tiles, prompt_splits, own_splits,
        **options,
    )  # fmt: skip
    out = q.new_empty(num_rows, num_heads, head_dim)
    shared = {name: options[name] for name in ("HEADS", "HEAD_DIM", "BLOCK_D", "SPLIT")}
    launch(
        _decode_sum_kernel, (num_rows * num_kv_heads,), acc, sums, peaks, out,
        rows.prompt_length, rows.group, rows.length, scale, room, num_kv_heads, prompt_splits, own_splits,
        BLOCK_H=block_of(options["HEADS"]), num_warps=SUM_WARPS, **shared,
    )  # fmt: skip
    return out


def _check(
    q: Tensor, k: Tensor, v: Tensor, prompts: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], rows: DecodeRows
) -> None:
    named = {"k": k, "v": v, "prompt keys": prompts[0], "prompt values": prompts[1], "own keys": own[0]}
    named["own values"] = own[1]
    for name, tensor in named.items():
        if tensor.dtype != q.dtype or not q.is_floating_point():
            raise TypeError(f"{name} are {tensor.dtype} and q is {q.dtype}; wanted one floating dtype")
        if tensor.device != q.device:
            raise ValueError(f"{name} are on {tensor.device} and q on {q.device}; wanted one device")
    for name, tensor, dims in (("q", q, 3), ("own keys", own[0], 4)):
        if tensor.dim() != dims:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; wanted {dims} dimensions")
    num_kv_heads, head_dim = own[0].shape[2:]
    wanted = {"k": (q.shape[0], num_kv_heads, head_dim), "prompt keys": (prompts[0].shape[0], num_kv_heads, head_dim)}
    wanted |= {"v": wanted["k"], "prompt values": wanted["prompt keys"], "own values": tuple(own[0].shape)}
    for name, shape in wanted.items():
        if named[name].shape != shape:
            raise ValueError(f"{name} have shape {tuple(named[name].shape)}; wanted {list(shape)}")
    if q.shape[2] != head_dim or not num_kv_heads or q.shape[1] % num_kv_heads:
        raise ValueError(f"q has shape {tuple(q.shape)}; wanted a multiple of {num_kv_heads} heads of {head_dim}")
    for name in ("prompt keys", "prompt values", "own keys", "own values"):
        if not named[name].is_contiguous():
            raise ValueError(f"{name} are not contiguous; wanted caches that are")
    num_groups = rows.prompt_start.shape[0]
    lengths = dict.fromkeys(_INDICES, q.shape[0])
    lengths |= {"first_row": num_groups + 1, "prompt_start": num_groups, "prompt_length": num_groups}
    for name, length in lengths.items():
        check_index(name, getattr(rows, name), q.device, length)


def _torch_decode_attention(
    q: Tensor, k: Tensor, v: Tensor, prompts: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], rows: DecodeRows,
    scale: float,
) -> Tensor:  # fmt: skip
    """Row by row, as the formula stands; waits for the lengths to reach the host."""
    out = torch.empty_like(q)
    wide = accumulation_dtype(q.dtype)
    lines = zip(rows.group.tolist(), rows.place.tolist(), rows.length.tolist(), strict=True)
    for row, (group, place, length) in enumerate(lines):
        start = int(rows.prompt_start[group])
        prompt = slice(start, start + int(rows.prompt_length[group]))
        own[0][place, length], own[1][place, length] = k[row], v[row]
        keys = torch.cat((prompts[0][prompt], own[0][place, : length + 1])).to(wide)
        values = torch.cat((prompts[1][prompt], own[1][place, : length + 1])).to(wide)
        grouped = q[row].to(wide).view(k.shape[1], -1, q.shape[2])  # [num_kv_heads, heads of each, head_dim]
        weights = torch.einsum("ghd,ngd->ghn", grouped, keys).mul(scale).softmax(2)
        out[row] = torch.einsum("ghn,ngd->ghd", weights, values).flatten(0, 1)
    return out
