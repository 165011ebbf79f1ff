"""Attention on packed tokens, with completions that share one copy of their prompt.

Token i sees token j if both are in one segment and j <= i, or if j is in the segment prefix[segment(i)]:

    out_i  = sum_j p_ij v_j        p_ij = softmax_j(scale q_i . k_j)        lse_i = log2 sum_j exp(scale q_i . k_j)
    ds_ij  = p_ij (d_out_i . v_j - d_out_i . out_i)
    d_q_i  = scale sum_j ds_ij k_j        d_k_j = scale sum_i ds_ij q_i        d_v_j = sum_i p_ij d_out_i

with q, out [total_tokens, num_heads, head_dim] and k, v [total_tokens, num_kv_heads, head_dim]. A
prompt of P tokens with G completions of R costs P^2/2 + G R (P + R/2) scores a head instead of the
G (P + R)^2/2 of repeated prompts: at P=4096, R=1024, G=8 that is 2.3x less. A score costs 4
head_dim FLOPs forward and 14 backward: d_q has a kernel of its own, which computes two of the five
products again. Forward reads q, k, v and writes out and lse; backward reads these and d_out and
writes d_q, d_k, d_v and d_out . out; lse and d_out . out are fp32 [num_heads, total_tokens].

A program has one tile of one segment: queries of one head, or keys of one kv head with all their
query heads. Torch lists the tiles, longest first, on the device and once a pass, so nothing waits.
Since completions follow their prompt, a prompt's keys meet their queries in one causal range; where
few tiles or few kv heads make too few programs that range is cut into pieces, added in fixed order.
Without atomics, and with all ranges relative to a segment or its prompt, results are deterministic
and do not depend on what else is in the pack.

Not done here: dropout, sliding windows, bias, attention between completions, head_dim other than
those in `HEAD_DIMS` (80 and 96 are computed as 128). Sources: Dao, FlashAttention-2, arXiv
2307.08691; Juravsky et al., Hydragen, arXiv 2402.05099, here with one softmax over both parts.
"""

# pyright: reportGeneralTypeIssues=false
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashgrpo.kernels import attention_plan
from flashgrpo.kernels.attention_flash import check_flash, flash_attention, gathered_keys
from flashgrpo.kernels.attention_torch import check_tensors, segments_on_host, torch_attention
from flashgrpo.kernels.common import backward_once, by_triton, check_index, tl, triton
from flashgrpo.kernels.qualified import gluon_wins, input_key

HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)
BACKENDS = ("triton", "torch", "flash_attn", "gluon", "auto")
GLUON_HEAD_DIMS = (64, 128)
_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def load_rows(
    ptr, stride, num_rows, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr
):
    """[ROWS, BLOCK_D] with 0 in the columns from HEAD_DIM on and, if MASKED, in the rows from num_rows on."""
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    pointers = ptr + rows * stride + columns
    if MASKED or BLOCK_D != HEAD_DIM:
        return tl.load(pointers, mask=(rows < num_rows) & (columns < HEAD_DIM), other=0.0)
    return tl.load(pointers)


@triton.jit
def _store_rows(ptr, tile, stride, num_rows, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    mask = (rows < num_rows) & (columns < HEAD_DIM)
    tl.store(ptr + rows * stride + columns, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_tile(tiles_ptr, index):
    pointer = tiles_ptr + index * 5
    return tl.load(pointer), tl.load(pointer + 1), tl.load(pointer + 2), tl.load(pointer + 3), tl.load(pointer + 4)


@triton.jit
def _query_tile(tiles_ptr, q_row, q_head, num_heads, group_size, HEAD_DIM: tl.constexpr):
    """A program's tile of queries, their head and kv head, and where they lie in q and in out.

    The programs of a tile's heads are neighbours, here and below.
    """
    head = tl.program_id(0) % num_heads
    tile = _load_tile(tiles_ptr, tl.program_id(0) // num_heads)
    start = tile[0].to(tl.int64)
    out_offset = (start * num_heads + head) * HEAD_DIM
    return tile, head, head // group_size, start * q_row + head.to(tl.int64) * q_head, out_offset


@triton.jit
def _key_blocks(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr):
    """How many blocks of keys queries see in their prefix and in their segment, and where both begin.

    Whole blocks, or, MASKED, what is left: the prefix's tail and the diagonal. own_start = -1: rows that see none.
    """
    start, stop, own_start, prefix_start, prefix_stop = tile
    shared = (prefix_stop - prefix_start) // BLOCK_N
    shared_key = prefix_start
    own = (start - own_start) // BLOCK_N
    own_key = own_start
    if MASKED:
        shared_key += shared * BLOCK_N
        shared = tl.where(shared_key < prefix_stop, 1, 0)
        own = tl.cdiv(tl.minimum(stop - start, BLOCK_M), BLOCK_N)
        own_key = start
    return shared, tl.where(own_start < 0, 0, own), shared_key, own_key


@triton.jit(do_not_specialize=["total_tokens", "num_heads", "group_size"])
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tiles_ptr,
    scale, q_row, q_head, k_row, k_head, v_row, v_head, total_tokens, num_heads, group_size,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    num_stages: tl.constexpr,
):  # fmt: skip
    tile, head, kv_head, q_offset, out_offset = _query_tile(tiles_ptr, q_row, q_head, num_heads, group_size, HEAD_DIM)
    start, stop, own_start, _, prefix_stop = tile
    if start >= stop:
        return
    rows = start + tl.arange(0, BLOCK_M)
    out_stride = num_heads * HEAD_DIM
    k_ptr += kv_head.to(tl.int64) * k_head
    v_ptr += kv_head.to(tl.int64) * v_head
    q = load_rows(q_ptr + q_offset, q_row, stop - start, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    log2_scale = scale * _LOG2_E
    for MASKED in tl.static_range(2):  # a third stage makes the masked loop, which is short, spill
        shared, own, shared_key, own_key = _key_blocks(tile, BLOCK_M, BLOCK_N, MASKED)
        for i in tl.range(shared + own, num_stages=min(num_stages, 2) if MASKED else num_stages):
            in_prefix = i < shared
            key = tl.where(in_prefix, shared_key, own_key - shared * BLOCK_N) + i * BLOCK_N
            left = tl.where(in_prefix, prefix_stop, stop) - key
            k = load_rows(k_ptr + key.to(tl.int64) * k_row, k_row, left, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            if MASKED:
                visible = key + tl.arange(0, BLOCK_N)[None, :] <= tl.where(in_prefix, prefix_stop - 1, rows)[:, None]
                scores = tl.where(visible, scores, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            base = tl.where(new_max == float("-inf"), 0.0, new_max * log2_scale)
            p = tl.exp2(scores * log2_scale - base[:, None])
            rescale = tl.exp2(row_max * log2_scale - base)
            row_sum = row_sum * rescale + tl.sum(p, 1)
            row_max = new_max
            v = load_rows(v_ptr + key.to(tl.int64) * v_row, v_row, left, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
            acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    row_sum = tl.where(own_start < 0, 1.0, row_sum)  # of rows in no segment acc is 0
    _store_rows(out_ptr + out_offset, acc / row_sum[:, None], out_stride, stop - start, BLOCK_M, HEAD_DIM, BLOCK_D)
    lse = row_max * log2_scale + tl.log2(row_sum)
    tl.store(lse_ptr + head.to(tl.int64) * total_tokens + rows, lse, mask=rows < stop)


@triton.jit(do_not_specialize=["total_tokens", "num_heads", "group_size"])
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, d_out_ptr, lse_ptr, delta_ptr, dq_ptr, tiles_ptr,
    scale, q_row, q_head, k_row, k_head, v_row, v_head, total_tokens, num_heads, group_size,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    num_stages: tl.constexpr,
):  # fmt: skip
    """Writes delta = rowsum(out * d_out) too, which the other kernel needs."""
    tile, head, kv_head, q_offset, out_offset = _query_tile(tiles_ptr, q_row, q_head, num_heads, group_size, HEAD_DIM)
    start, stop, _, _, prefix_stop = tile
    if start >= stop:
        return
    rows = start + tl.arange(0, BLOCK_M)
    out_stride = num_heads * HEAD_DIM
    k_ptr += kv_head.to(tl.int64) * k_head
    v_ptr += kv_head.to(tl.int64) * v_head
    d_out = load_rows(d_out_ptr + out_offset, out_stride, stop - start, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    out = load_rows(out_ptr + out_offset, out_stride, stop - start, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    tl.store(delta_ptr + head.to(tl.int64) * total_tokens + rows, delta, mask=rows < stop)
    lse = tl.load(lse_ptr + head.to(tl.int64) * total_tokens + rows, mask=rows < stop, other=float("inf"))
    q = load_rows(q_ptr + q_offset, q_row, stop - start, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    log2_scale = scale * _LOG2_E
    for MASKED in tl.static_range(2):
        shared, own, shared_key, own_key = _key_blocks(tile, BLOCK_M, BLOCK_N, MASKED)
        for i in tl.range(shared + own, num_stages=min(num_stages, 2) if MASKED else num_stages):
            in_prefix = i < shared
            key = tl.where(in_prefix, shared_key, own_key - shared * BLOCK_N) + i * BLOCK_N
            left = tl.where(in_prefix, prefix_stop, stop) - key
            k = load_rows(k_ptr + key.to(tl.int64) * k_row, k_row, left, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
            v = load_rows(v_ptr + key.to(tl.int64) * v_row, v_row, left, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            p = tl.exp2(scores * log2_scale - lse[:, None])
            if MASKED:
                visible = key + tl.arange(0, BLOCK_N)[None, :] <= tl.where(in_prefix, prefix_stop - 1, rows)[:, None]
                p = tl.where(visible, p, 0.0)
            dp = tl.dot(d_out, tl.trans(v), input_precision="ieee")
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    _store_rows(dq_ptr + out_offset, dq * scale, out_stride, stop - start, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["total_tokens", "num_heads", "group_size"])
def _attention_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, dk_pieces_ptr, dv_pieces_ptr, tiles_ptr,
    scale, q_row, q_head, k_row, k_head, v_row, v_head, total_tokens, num_heads, group_size,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One flat loop over the kv head's query heads and blocks of queries; lse = inf past the end makes p = 0 there."""
    num_kv_heads = num_heads // group_size
    kv_head = tl.program_id(0) % num_kv_heads
    start, stop, query_start, query_stop, slot = _load_tile(tiles_ptr, tl.program_id(0) // num_kv_heads)
    if start >= stop:
        return
    k_ptr += start.to(tl.int64) * k_row + kv_head.to(tl.int64) * k_head
    v_ptr += start.to(tl.int64) * v_row + kv_head.to(tl.int64) * v_head
    k = load_rows(k_ptr, k_row, stop - start, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    v = load_rows(v_ptr, v_row, stop - start, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    log2_scale = scale * _LOG2_E
    columns, keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    num_blocks = tl.cdiv(query_stop - query_start, BLOCK_M)
    head, query = kv_head * group_size, query_start
    for _ in range(num_blocks * group_size):
        left = query_stop - query
        q_offset = query.to(tl.int64) * q_row + head.to(tl.int64) * q_head
        q = load_rows(q_ptr + q_offset, q_row, left, BLOCK_M, HEAD_DIM, BLOCK_D, True)
        out_offset = (query.to(tl.int64) * num_heads + head) * HEAD_DIM
        d_out = load_rows(d_out_ptr + out_offset, num_heads * HEAD_DIM, left, BLOCK_M, HEAD_DIM, BLOCK_D, True)
        row = head.to(tl.int64) * total_tokens + query
        lse = tl.load(lse_ptr + row + columns, mask=columns < left, other=float("inf"))
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")  # [keys, queries]
        dp = tl.dot(v, tl.trans(d_out), input_precision="ieee")  # beneath it run the exponentials
        p = tl.exp2(scores * log2_scale - lse[None, :])
        if query < start + BLOCK_N:  # the diagonal
            p = tl.where(columns[None, :] >= (keys - (query - start))[:, None], p, 0.0)
        # Loaded earlier it holds registers that the exponentials need, and spills some.
        delta = tl.load(delta_ptr + row + columns, mask=columns < left, other=0.0)
        ds = p * (dp - delta[None, :])
        dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision="ieee")
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
        query += BLOCK_M
        head = tl.where(query < query_stop, head, head + 1)
        query = tl.where(query < query_stop, query, query_start)
    dk *= scale
    if slot < 0:
        offset = (start.to(tl.int64) * num_kv_heads + kv_head) * HEAD_DIM
        stride = num_kv_heads * HEAD_DIM
        _store_rows(dk_ptr + offset, dk, stride, stop - start, BLOCK_N, HEAD_DIM, BLOCK_D)
        _store_rows(dv_ptr + offset, dv, stride, stop - start, BLOCK_N, HEAD_DIM, BLOCK_D)
    else:
        offset = (slot.to(tl.int64) * num_kv_heads + kv_head) * BLOCK_N * HEAD_DIM
        _store_rows(dk_pieces_ptr + offset, dk, HEAD_DIM, BLOCK_N, BLOCK_N, HEAD_DIM, BLOCK_D)
        _store_rows(dv_pieces_ptr + offset, dv, HEAD_DIM, BLOCK_N, BLOCK_N, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["num_kv_heads"])
def _attention_bwd_sum_kernel(
    pieces_ptr, out_ptr, tiles_ptr, num_kv_heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds the pieces of a tile of keys, [num_slots, num_kv_heads, BLOCK_N, HEAD_DIM] fp32, for dk or dv."""
    kv_head = tl.program_id(0) % num_kv_heads
    start, stop, slot, num_pieces, _ = _load_tile(tiles_ptr, tl.program_id(0) // num_kv_heads)
    if start >= stop:
        return
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for piece in range(num_pieces):
        offset = ((slot + piece).to(tl.int64) * num_kv_heads + kv_head) * BLOCK_N * HEAD_DIM
        total += load_rows(pieces_ptr + offset, HEAD_DIM, BLOCK_N, BLOCK_N, HEAD_DIM, BLOCK_D, False)
    out_ptr += (start.to(tl.int64) * num_kv_heads + kv_head) * HEAD_DIM
    _store_rows(out_ptr, total, num_kv_heads * HEAD_DIM, stop - start, BLOCK_N, HEAD_DIM, BLOCK_D)


def _with_rows(*tensors: Tensor) -> list[Tensor]:
    """The tensors, copied where the row of a head is not contiguous."""
    return [x if x.stride(2) == 1 else x.contiguous() for x in tensors]


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> list[Any]:
    """Strides from row to row and from head to head of each; tokens, heads of q, and those to a kv head.

    A single head may have any stride, for which a kernel would be compiled again.
    """
    strides = [n for x in (q, k, v) for n in (x.stride(0), x.stride(1) if x.shape[1] > 1 else x.shape[2])]
    return [*strides, q.shape[0], q.shape[1], q.shape[1] // k.shape[1]]


def _kernels(by_gluon: bool) -> tuple[Any, Any, Any]:
    """Forward, d_q, and d_k with d_v."""
    if by_gluon:
        from flashgrpo.kernels import attention_gluon  # wants a Triton that has Gluon

        return attention_gluon.LAUNCHERS
    return _attention_fwd_kernel, _attention_bwd_dq_kernel, _attention_bwd_dkv_kernel


@torch.library.custom_op("flashgrpo::packed_attention", mutates_args=())
def _attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tensor], scale: float, by_gluon: bool
) -> tuple[Tensor, Tensor]:
    """out as q; lse [num_heads, total_tokens] fp32, of base 2. `tiles` are those of `attention_tiles`."""
    q, k, v = _with_rows(q, k, v)
    total_tokens, num_heads, _ = q.shape
    out, lse = q.new_empty(q.shape), q.new_empty(num_heads, total_tokens, dtype=torch.float32)
    if not q.numel():
        return out, lse
    sizes = _sizes(q, k, v)
    options, _, _ = attention_plan.tile_options(q)
    with torch.cuda.device_of(q):
        fwd, _, _ = _kernels(by_gluon)
        fwd[(tiles[0].shape[0] * num_heads,)](q, k, v, out, lse, tiles[0], scale, *sizes, **options)
    return out, lse


@torch.library.custom_op("flashgrpo::packed_attention_backward", mutates_args=())
def _attention_bwd(
    d_out: Tensor, saved: Sequence[Tensor], scale: float, by_gluon: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`saved` is q, k, v, what the forward operator has returned, and its tiles."""
    q, k, v, out, lse, _, query_tiles, key_tiles, cut_tiles = saved
    d_out, (q, k, v) = d_out.contiguous(), _with_rows(q, k, v)  # its strides would cost a loop its registers
    (total_tokens, num_heads, head_dim), num_kv_heads = q.shape, k.shape[1]
    dq, dk, dv, delta = (x.new_empty(x.shape) for x in (q, k, v, lse))
    if not q.numel():
        return dq, dk.zero_(), dv.zero_()
    sizes = _sizes(q, k, v)
    _, options, key_options = attention_plan.tile_options(q)
    block_n = key_options["BLOCK_N"]
    num_slots = attention_plan.count_slots(total_tokens, num_kv_heads, block_n)
    pieces = q.new_empty(2, num_slots, num_kv_heads, block_n, head_dim, dtype=torch.float32)
    with torch.cuda.device_of(q):
        _, bwd_dq, bwd_dkv = _kernels(by_gluon)
        bwd_dq[(len(query_tiles) * num_heads,)](
            q, k, v, out, d_out, lse, delta, dq, query_tiles, scale, *sizes, **options
        )
        bwd_dkv[(len(key_tiles) * num_kv_heads,)](
            q, k, v, d_out, lse, delta, dk, dv, pieces[0], pieces[1], key_tiles, scale, *sizes, **key_options
        )
        del key_options["BLOCK_M"]
        for parts, total in zip(pieces, (dk, dv), strict=True):
            _attention_bwd_sum_kernel[(len(cut_tiles) * num_kv_heads,)](
                parts, total, cut_tiles, num_kv_heads, **key_options
            )
    return dq, dk, dv


@_attention_fwd.register_fake
def _(q, *_):
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@_attention_bwd.register_fake
def _(d_out, saved, *_):
    return tuple(x.new_empty(x.shape) for x in saved[:3])


def _save(ctx, inputs, output) -> None:
    q, k, v, tiles, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, *tiles)


@backward_once
def _backward(ctx, d_out, _):
    saved = ctx.saved_tensors  # once: a checkpoint recomputes them
    return *_attention_bwd(d_out, saved, *ctx.options), [None] * (len(saved) - 5), None, None


_attention_fwd.register_autograd(_backward, setup_context=_save)


class AttentionPlan(NamedTuple):
    """Where the queries of a batch find their keys: what `plan_attention` returns and `planned_attention` takes."""

    backend: str  # "torch" also where "triton" means the twin
    inputs: tuple[int, int, int, int, torch.dtype, torch.device]  # total_tokens, num_heads, num_kv_heads, head_dim, ..
    keys: Any  # the kernels' tables of tiles, flash-attn's gathered keys or the twin's segments


def _resolved(backend: str, like: Tensor) -> str:
    """`backend`, but "auto" as the one of "gluon" and "triton" that won on this machine.

    Raises ValueError for "gluon" where its kernels lack chip, head_dim or dtype.
    """
    arch, head_dim = attention_plan.architecture(like), like.shape[2]
    has = arch == "sm_90" and head_dim in GLUON_HEAD_DIMS and like.dtype in (torch.bfloat16, torch.float16)
    if backend == "gluon" and not has:
        raise ValueError(
            f"backend 'gluon' has head_dim {GLUON_HEAD_DIMS} in bfloat16 and float16 on sm_90; found {head_dim}, "
            f"{like.dtype} and {like.device} ({arch}): choose 'triton'"
        )
    if backend == "auto":
        return "gluon" if has and input_key(head_dim, like.dtype) in gluon_wins(like.device) else "triton"
    return backend


def plan_attention(
    cu_seqlens: Tensor,  # [num_segments + 1] int32 or int64
    prefix: Tensor | None,  # [num_segments] int32 or int64
    total_tokens: int,
    heads: tuple[int, int, int],  # num_heads, num_kv_heads, head_dim
    dtype: torch.dtype,
    *,
    max_seqlen: int | None = None,
    backend: str = "triton",
) -> AttentionPlan:
    """What `packed_attention` makes of the offsets, for all layers of a pass; none of them reads the offsets again.

    A model makes it before its blocks, outside of what it compiles, checkpoints or captures; inside works too. Without
    gradients, as in torch.no_grad(), it serves forward passes alone and takes a third of the launches. On a GPU,
    offsets and prefixes out of order stop the device by an assertion, and nothing waits but flash-attn's plan and the
    twin's.

    Raises what `packed_attention` says of offsets, prefix, backend, head_dim and dtype.
    """
    num_heads, num_kv_heads, head_dim = heads
    like = cu_seqlens.new_empty(0, num_heads, head_dim, dtype=dtype)
    check_index("cu_seqlens", cu_seqlens, like.device)
    if prefix is not None:
        check_index("prefix", prefix, like.device, cu_seqlens.shape[0] - 1)
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; known backends: {', '.join(BACKENDS)}")
    backend = _resolved(backend, like)
    if backend == "torch" or (backend == "triton" and not by_triton(like)):
        # What would stop a GPU is told where a program is tried, on a CPU.
        keys = segments_on_host(cu_seqlens, prefix, total_tokens, max_seqlen, in_order=backend == "triton")
        backend = "torch"
    elif backend == "flash_attn":
        check_flash(like)
        keys = gathered_keys(cu_seqlens, prefix, total_tokens, head_dim)
    elif head_dim not in HEAD_DIMS:
        raise ValueError(f"q has head_dim {head_dim}; wanted one of {HEAD_DIMS}, or backend='torch'")
    elif dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f"q is {dtype}; wanted bfloat16, float16 or float32, or backend='torch'")
    else:
        forward, backward, key_options = attention_plan.tile_options(like)
        blocks = [forward["BLOCK_M"]]
        if torch.is_grad_enabled():
            blocks += [backward["BLOCK_M"], key_options["BLOCK_M"], key_options["BLOCK_N"]]
        keys = attention_plan.attention_tiles(cu_seqlens, prefix, total_tokens, [num_heads, num_kv_heads], blocks)
    return AttentionPlan(backend, (total_tokens, *heads, dtype, like.device), keys)


def planned_attention(
    q: Tensor,  # [total_tokens, num_heads, head_dim]
    k: Tensor,  # [total_tokens, num_kv_heads, head_dim]
    v: Tensor,  # [total_tokens, num_kv_heads, head_dim]
    plan: AttentionPlan,
    *,
    scale: float | None = None,
) -> Tensor:  # [total_tokens, num_heads, head_dim]
    """`packed_attention` by a plan. Raises ValueError for q, k and v, or a scale, that it does not fit."""
    check_tensors(q, k, v)
    found = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], q.dtype, q.device)
    if found != plan.inputs:
        raise ValueError(f"tokens, heads, kv heads, head_dim, .. are {found}; the plan is of {plan.inputs}")
    if scale is not None and not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale is {scale}; wanted a finite number above 0")
    if plan.backend == "torch":
        return torch_attention(q, k, v, plan.keys, scale)
    scale = float(q.shape[2] ** -0.5) if scale is None else scale
    if plan.backend == "flash_attn":
        return flash_attention(q, k, v, plan.keys, scale)
    if len(plan.keys) == 1 and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("the plan was made without gradients, and q, k or v wants one: make it where they are on")
    return _attention_fwd(q, k, v, plan.keys, scale, plan.backend == "gluon")[0]


def packed_attention(
    q: Tensor,  # [total_tokens, num_heads, head_dim]
    k: Tensor,  # [total_tokens, num_kv_heads, head_dim]
    v: Tensor,  # [total_tokens, num_kv_heads, head_dim]
    cu_seqlens: Tensor,  # [num_segments + 1] int32 or int64
    prefix: Tensor | None = None,  # [num_segments] int32 or int64
    *,
    max_seqlen: int | None = None,
    scale: float | None = None,
    backend: str = "triton",
) -> Tensor:  # [total_tokens, num_heads, head_dim]
    """Causal attention within segments, and from every segment to the whole of the segment it has as prefix.

    prefix[s] is the segment whose tokens all of segment s sees, or -1. A segment that is a prefix
    has none itself, and those that have it follow it one after another. Without `prefix` every
    segment stands alone. Query head h uses kv head h // (num_heads // num_kv_heads). The kernels
    have a head_dim of 16, 32, 64, 80, 96, 128 or 256, the twin any. Rows from cu_seqlens[-1] on
    belong to no segment: their output and gradients are 0, whatever they hold.
    `max_seqlen` is the length of the longest segment or above, `scale` defaults to
    1/sqrt(head_dim). Differentiable once. "triton" means the torch twin on a CPU and for float64;
    under "torch" a prefix may stand anywhere; "flash_attn" is described in attention_flash.py, and
    "gluon", the kernels for Hopper, in attention_gluon.py; "auto" is "gluon" where `flashgrpo bench
    attention --qualify` has found it right and faster, else "triton".
    Views are read in place, as of [1, heads, tokens, head_dim] transposed, if head_dim is contiguous.
    The layers of a model share the work on the offsets by `plan_attention`.

    Raises ValueError for shapes that do not fit together, an unknown backend, a scale that is not
    above 0, a head_dim or, by flash-attn, dtype that the kernels do not have, and, by the twin, for
    offsets that decrease or leave the tensor and a prefix that is no segment, has one itself or is
    not followed by those that have it; the others then stop the device. TypeError for wrong dtypes;
    ImportError where no flash-attn or torch's varlen_attn has this chip and head_dim.
    """
    check_tensors(q, k, v)
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}; wanted {q.device}")
    heads = q.shape[1], k.shape[1], q.shape[2]
    plan = plan_attention(cu_seqlens, prefix, q.shape[0], heads, q.dtype, max_seqlen=max_seqlen, backend=backend)
    return planned_attention(q, k, v, plan, scale=scale)
