# pyright: reportGeneralTypeIssues=false
"""What a decoder block does between its matrix products: RMSNorm with the residual added, RoPE with QK norm, SwiGLU.

All of it is bound by memory, so what counts is passes: reads and writes of a tensor of n rows. With
h the hidden size, qk the width of queries and keys together, kv that of keys, and m the
intermediate size, a block's passes and kernels, against those of torch's operators one by one:

    forward                  torch                here
    two norms, two sums      10 h, 4 kernels      9 h, 3 kernels (the last sum is torch's)
    RoPE                     13 qk + 2 kv, 5      2 qk, 1
      with QK norm           17 qk, 7             2 qk, 1
    SwiGLU                   5 m, 2               3 m, 1

    backward
    two norms, two sums      16 h, 6              8 h, 4 (two add partial sums of d_weight)
    RoPE                     30 qk + 2 kv, 10     2 qk + 2 kv, 1
      with QK norm           37 qk + 2 kv, 15     3 qk + 2 kv, 2
    SwiGLU                   18 m, 6              6 m, 1

Predictions, at 4.1 TB/s (85% of an H200's) in bf16, for 16,384 rows of a block of Qwen2.5-7B:
SwiGLU 1.4 ms in place of 3.5, all of the above 2.0 ms in place of 5.7, which is 8% of the time of a
micro-batch. No GPU has run it yet.

Everything is computed in fp32 and rounded once; torch rounds between norm and RoPE, silu and
product. Kept for the backward pass: the norm's input, which its residual stream is, and neither
1/rms nor the normed rows; of SwiGLU gate_up alone; of RoPE nothing, or with QK norm the product
before it. Gradients of norm weights are partial sums of up to 512 runs of rows, added in order: no
atomics. The ideas are Liger Kernel's (Hsu et al., arXiv 2410.10989: norms and SwiGLU whose backward
passes overwrite or recompute) and vLLM's fused_add_rms_norm and fused_qk_norm_rope.
"""

from typing import Any

import torch
from torch import Tensor

from flashgrpo.kernels import elementwise_torch
from flashgrpo.kernels.common import backward_once, by_triton, launch, tl, triton
from flashgrpo.kernels.elementwise_torch import QKNorm

SWIGLU_BLOCK = 2048  # columns of a program
HEADS_BLOCK = 1024  # elements of half heads of a program
# Partial sums of a norm weight's gradient: as many as an H200 runs programs at once, or twice as many.
PARTIALS = 512
SUM_ROWS, SUM_COLUMNS = 64, 32  # of partial sums that a program adds at once


@triton.jit
def _rms_norm_fwd_kernel(normed, summed, x, residual, weight, width, eps, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    row = tl.program_id(0).to(tl.int64) * width + columns
    value = tl.load(x + row, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + row, mask=inside, other=0.0).to(tl.float32)
        # The norm is of the sum as it is stored, so that the backward pass sees the same.
        rounded = value.to(summed.dtype.element_ty)
        tl.store(summed + row, rounded, mask=inside)
        value = rounded.to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row, value * inverse_rms * scale, mask=inside)


@triton.jit(do_not_specialize=["n", "rows_each"])
def _rms_norm_bwd_kernel(
    d_x, partials, d_normed, d_summed, x, weight, n, rows_each, width, eps, BLOCK: tl.constexpr
):  # fmt: skip
    """A program takes `rows_each` rows one after the other and writes their sum of d_weight."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    d_weight = tl.zeros([BLOCK], tl.float32)
    first = program * rows_each
    row = first.to(tl.int64) * width + columns
    for _ in range(first, tl.minimum(first + rows_each, n)):
        value = tl.load(x + row, mask=inside, other=0.0).to(tl.float32)
        upstream = tl.load(d_normed + row, mask=inside, other=0.0).to(tl.float32)
        inverse_rms = tl.rsqrt(tl.sum(value * value, 0) / width + eps)
        unit = value * inverse_rms
        d_weight += upstream * unit
        scaled = upstream * scale
        gradient = (scaled - unit * (tl.sum(scaled * unit, 0) / width)) * inverse_rms
        if d_summed is not None:
            gradient += tl.load(d_summed + row, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_x + row, gradient, mask=inside)
        row += width
    tl.store(partials + program.to(tl.int64) * width + columns, d_weight, mask=inside)


@triton.jit(do_not_specialize=["num_partials"])
def _sum_partials_kernel(out, partials, num_partials, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, num_partials, ROWS):
        rows = start + tl.arange(0, ROWS)
        offsets = rows.to(tl.int64)[:, None] * width + columns[None, :]
        total += tl.load(partials + offsets, mask=(rows < num_partials)[:, None] & inside[None, :], other=0.0)
    tl.store(out + columns, tl.sum(total, 0), mask=inside)


@triton.jit
def _load_halves(x, offsets, inside, HALF: tl.constexpr):
    """Both halves of heads, fp32."""
    low = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    return low, tl.load(x + offsets + HALF, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _head_weights(q_weight, k_weight, is_q, columns, HALF: tl.constexpr):
    """Both halves of each head's norm weight, [heads, HALF]."""
    inside = columns < HALF
    q_low, q_high = _load_halves(q_weight, columns, inside, HALF)
    k_low, k_high = _load_halves(k_weight, columns, inside, HALF)
    low = tl.where(is_q[:, None], q_low[None, :], k_low[None, :])
    return low, tl.where(is_q[:, None], q_high[None, :], k_high[None, :])


@triton.jit
def _rope_fwd_kernel(
    out, qkv, cos, sin, q_weight, k_weight, num_heads, num_kv_heads, out_stride, qkv_stride, eps,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Some heads of a token, queries then keys. `out` may be qkv: what is read is written by the same program."""
    token = tl.program_id(0).to(tl.int64)
    heads, columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    inside = (heads < num_heads + num_kv_heads)[:, None] & (columns < HALF)[None, :]
    offsets = (heads * (2 * HALF))[:, None] + columns[None, :]
    low, high = _load_halves(qkv + token * qkv_stride, offsets, inside, HALF)
    if q_weight is not None:
        inverse_rms = tl.rsqrt(tl.sum(low * low + high * high, 1) / (2 * HALF) + eps)[:, None]
        low_weight, high_weight = _head_weights(q_weight, k_weight, heads < num_heads, columns, HALF)
        low, high = low * inverse_rms * low_weight, high * inverse_rms * high_weight
    # The first half of sin is negated (`rotary_cos_sin`), the second is what turns.
    c = tl.load(cos + token * (2 * HALF) + columns, mask=columns < HALF, other=0.0)[None, :]
    s = tl.load(sin + token * (2 * HALF) + HALF + columns, mask=columns < HALF, other=0.0)[None, :]
    out += token * out_stride
    tl.store(out + offsets, low * c - high * s, mask=inside)
    tl.store(out + offsets + HALF, high * c + low * s, mask=inside)


@triton.jit(do_not_specialize=["n", "rows_each"])
def _rope_bwd_kernel(
    d_qkv, partials, d_q, d_k, d_v, qkv, cos, sin, q_weight, k_weight, n, rows_each, num_heads, num_kv_heads,
    q_stride, k_stride, v_stride, qkv_stride, eps, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Some heads of `rows_each` tokens, one after the other: queries, keys, and values, which are copied. With norms
    a program writes its sums of both d_weights.
    """
    program = tl.program_id(0)
    heads, columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    in_half = (columns < HALF)[None, :]
    is_q, is_v = heads < num_heads, heads >= num_heads + num_kv_heads
    is_k = (heads >= num_heads) & (heads < num_heads + num_kv_heads)
    inside = (heads < num_heads + 2 * num_kv_heads)[:, None] & in_half
    offsets = (heads * (2 * HALF))[:, None] + columns[None, :]
    k_start, v_start = num_heads * (2 * HALF), (num_heads + num_kv_heads) * (2 * HALF)
    d_low_weight = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    d_high_weight = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    low_weight, high_weight = d_low_weight, d_high_weight
    if q_weight is not None:
        low_weight, high_weight = _head_weights(q_weight, k_weight, is_q, columns, HALF)
    first = program * rows_each
    token = first.to(tl.int64)
    for _ in range(first, tl.minimum(first + rows_each, n)):
        q_low, q_high = _load_halves(d_q + token * q_stride, offsets, is_q[:, None] & in_half, HALF)
        k_low, k_high = _load_halves(d_k + token * k_stride, offsets - k_start, is_k[:, None] & in_half, HALF)
        v_low, v_high = _load_halves(d_v + token * v_stride, offsets - v_start, is_v[:, None] & inside, HALF)
        c = tl.load(cos + token * (2 * HALF) + columns, mask=columns < HALF, other=0.0)[None, :]
        s = tl.load(sin + token * (2 * HALF) + HALF + columns, mask=columns < HALF, other=0.0)[None, :]
        turned_low, turned_high = q_low + k_low, q_high + k_high
        low, high = turned_low * c + turned_high * s, turned_high * c - turned_low * s
        if q_weight is not None:
            x_low, x_high = _load_halves(qkv + token * qkv_stride, offsets, (is_q | is_k)[:, None] & in_half, HALF)
            inverse_rms = tl.rsqrt(tl.sum(x_low * x_low + x_high * x_high, 1) / (2 * HALF) + eps)[:, None]
            x_low, x_high = x_low * inverse_rms, x_high * inverse_rms
            d_low_weight += low * x_low
            d_high_weight += high * x_high
            low, high = low * low_weight, high * high_weight
            along = (tl.sum(low * x_low + high * x_high, 1) / (2 * HALF))[:, None]
            low, high = (low - x_low * along) * inverse_rms, (high - x_high * along) * inverse_rms
        row = d_qkv + token * ((num_heads + 2 * num_kv_heads) * (2 * HALF))
        tl.store(row + offsets, tl.where(is_v[:, None], v_low, low), mask=inside)
        tl.store(row + offsets + HALF, tl.where(is_v[:, None], v_high, high), mask=inside)
        token += 1
    if q_weight is not None:
        sums = partials + (program.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * (4 * HALF)
        for KIND in tl.static_range(2):
            mine = (is_q if KIND == 0 else is_k)[:, None]
            start = sums + KIND * 2 * HALF + columns
            tl.store(start, tl.sum(tl.where(mine, d_low_weight, 0.0), 0), mask=columns < HALF)
            tl.store(start + HALF, tl.sum(tl.where(mine, d_high_weight, 0.0), 0), mask=columns < HALF)


@triton.jit
def _swiglu_fwd_kernel(product, gate_up, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + 2 * row + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + 2 * row + width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(product + row + columns, gate / (1 + tl.exp(-gate)) * up, mask=inside)


@triton.jit
def _swiglu_bwd_kernel(gate_up, d_product, width, BLOCK: tl.constexpr):
    """d_gate and d_up over gate and up, and the product over its gradient."""
    row = tl.program_id(0).to(tl.int64) * width
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate_place, up_place, place = gate_up + 2 * row + columns, gate_up + 2 * row + width + columns, row + columns
    gate = tl.load(gate_place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_place, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(d_product + place, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-gate))
    silu = gate * sigmoid
    tl.store(gate_place, upstream * up * (sigmoid * (1 + gate * (1 - sigmoid))), mask=inside)
    tl.store(up_place, upstream * silu, mask=inside)
    tl.store(d_product + place, silu * up, mask=inside)


def rms_norm(
    x: Tensor,  # [n, width]
    weight: Tensor,  # [width]
    eps: float,
    residual: Tensor | None = None,  # [n, width]
) -> tuple[Tensor, Tensor]:  # [n, width], [n, width]
    """RMSNorm of x + residual (Zhang and Sennrich 2019), and x + residual, or x where there is none.

    What uses the second result sends its gradient through the norm's backward pass, which adds both at once. In x's
    dtype; differentiable once by the kernels. Raises ValueError for shapes that do not fit together.
    """
    if x.dim() != 2 or weight.shape != x.shape[1:]:
        raise ValueError(f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; wanted [n, width], [width]")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        found, wanted = ((tuple(t.shape), t.dtype) for t in (residual, x))
        raise ValueError(f"residual has shape and dtype {found}; wanted x's, {wanted}")
    if not by_triton(x):
        return elementwise_torch.rms_norm(x, weight, eps, residual)
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, residual, weight, eps)
    normed, summed = _rms_norm_fwd(x, residual, weight, eps)
    return normed, x if residual is None else summed


def rope(
    qkv: Tensor,  # [n, num_heads + 2 * num_kv_heads, head_dim]
    cos: Tensor,  # [n, 1, head_dim] fp32
    sin: Tensor,  # [n, 1, head_dim] fp32, its first half negated
    num_heads: int,
    norm: QKNorm | None = None,
    *,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a joint product: the first two after `norm`, then rotated (Su et al., 2104.09864).

    v is a view of qkv. So are q and k, which are made in its place, with `overwrite` and where neither the backward
    pass of `norm` nor a compiler needs the product; q and k are [n, num_heads or num_kv_heads, head_dim]. In qkv's
    dtype; differentiable once by the kernels. Raises ValueError for shapes that do not fit together.
    """
    num_kv_heads, odd = divmod(qkv.shape[1] - num_heads, 2) if qkv.dim() == 3 else (0, 1)
    if odd or num_kv_heads < 1 or qkv.shape[2] % 2:
        wanted = f"[n, {num_heads} + 2 * num_kv_heads, an even head_dim]"
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}; wanted {wanted}")
    if {cos.shape, sin.shape} != {(len(qkv), 1, qkv.shape[2])}:
        found = tuple(cos.shape), tuple(sin.shape)
        raise ValueError(f"cos and sin have shapes {found}; wanted {(len(qkv), 1, qkv.shape[2])}")
    if norm and {norm.q_weight.shape, norm.k_weight.shape} != {qkv.shape[2:]}:
        found = tuple(norm.q_weight.shape), tuple(norm.k_weight.shape)
        raise ValueError(f"weights of norm have shapes {found}; wanted {tuple(qkv.shape[2:])}")
    if not by_triton(qkv):
        return elementwise_torch.rope(qkv, cos, sin, num_heads, norm)
    qkv, cos, sin = _dense_rows(qkv), cos.contiguous(), sin.contiguous()
    norm = norm and QKNorm(norm.q_weight.contiguous(), norm.k_weight.contiguous(), norm.eps)
    needed = torch.is_grad_enabled() and norm is not None
    overwrite = overwrite and not needed and not torch.compiler.is_compiling()
    rotate = _Rope.apply if torch.is_grad_enabled() else _rope
    return rotate(qkv, cos, sin, *(norm or (None, None, 0.0)), num_heads, overwrite)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020) of the joint product [n, 2 * width], [n, width]: `swiglu_backward` is its
    gradient.
    """
    _check_gate_up(gate_up)
    return _swiglu_fwd(gate_up) if by_triton(gate_up) else elementwise_torch.swiglu(gate_up)


def swiglu_backward(
    gate_up: Tensor,  # [n, 2 * width]
    d_product: Tensor,  # [n, width]
) -> tuple[Tensor, Tensor]:  # [n, 2 * width], [n, width]
    """d_gate_up, and once more silu(gate) * up, which a product behind it needs for its weight's gradient.

    Both arguments' memory may be used up: by the kernel, which puts the results there.
    """
    _check_gate_up(gate_up)
    if (2 * d_product.shape[1], len(d_product)) != (gate_up.shape[1], len(gate_up)):
        raise ValueError(f"d_product has shape {tuple(d_product.shape)} for a gate_up of {tuple(gate_up.shape)}")
    if not by_triton(gate_up):
        return elementwise_torch.swiglu_backward(gate_up, d_product)
    gate_up, d_product = gate_up.contiguous(), d_product.contiguous()
    _swiglu_bwd(gate_up, d_product)
    return gate_up, d_product


def _check_gate_up(gate_up: Tensor) -> None:
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up has shape {tuple(gate_up.shape)}; wanted [n, 2 * width]")


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        normed, summed = _rms_norm_fwd(x, residual, weight, eps)
        summed = x if residual is None else summed
        ctx.save_for_backward(summed, weight)
        ctx.eps, ctx.has_residual = eps, residual is not None
        ctx.set_materialize_grads(False)
        return normed, summed

    @staticmethod
    @backward_once
    def backward(ctx, *grad_outputs):
        d_normed, d_summed = grad_outputs
        summed, weight = ctx.saved_tensors
        if d_normed is None:
            return d_summed, d_summed if ctx.has_residual else None, None, None
        d_x, d_weight = _rms_norm_bwd(d_normed, d_summed, summed, weight, ctx.eps)
        return d_x, d_x if ctx.has_residual else None, d_weight, None


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, q_weight, k_weight, eps, num_heads, overwrite):
        kept = () if q_weight is None else (qkv, q_weight, k_weight)
        ctx.save_for_backward(cos, sin, *kept)
        ctx.eps = eps
        return _rope(qkv.detach(), cos, sin, q_weight, k_weight, eps, num_heads, overwrite)

    @staticmethod
    @backward_once
    def backward(ctx, *grad_outputs):
        cos, sin, *kept = ctx.saved_tensors
        d_qkv, d_weights = _rope_bwd(*grad_outputs, cos, sin, kept, ctx.eps)
        return d_qkv, None, None, *(d_weights if kept else (None, None)), None, None, None


def _rope(qkv, cos, sin, q_weight, k_weight, eps, num_heads, overwrite) -> tuple[Tensor, Tensor, Tensor]:
    num_kv_heads = (qkv.shape[1] - num_heads) // 2
    if overwrite:  # never while compiling, and an operator that writes costs the host more than the rest of this
        _launch_rope(qkv, qkv, cos, sin, q_weight, k_weight, eps, num_heads)
        torch.autograd.graph.increment_version(qkv)
        qk = qkv[:, : num_heads + num_kv_heads]
    else:
        qk = _rope_fwd(qkv, cos, sin, q_weight, k_weight, eps, num_heads)
    return *qk.split((num_heads, num_kv_heads), dim=1), qkv[:, num_heads + num_kv_heads :]


def _dense_rows(x: Tensor) -> Tensor:
    """x [n, heads, head_dim], copied unless each row is contiguous; rows may lie apart."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def _split_rows(n: int) -> tuple[int, int]:
    """Programs for n rows, and rows of each."""
    rows_each = -(-n // PARTIALS)
    return -(-n // max(1, rows_each)), rows_each


def _sum_partials(partials: Tensor, like: Tensor) -> Tensor:
    """The sum over the first dimension of [num_partials, *shape] fp32, in the dtype of `like`."""
    out = like.new_empty(partials.shape[1:])
    width = out.numel()
    launch(
        _sum_partials_kernel, (-(-width // SUM_COLUMNS),), out, partials, len(partials), width,
        ROWS=SUM_ROWS, COLUMNS=SUM_COLUMNS,
    )  # fmt: skip
    return out


def row_options(width: int) -> dict[str, Any]:
    """A whole row in a program's registers, 16 elements a thread."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(4, block // 512))}


@torch.library.custom_op("flashgrpo::rms_norm", mutates_args=())
def _rms_norm_fwd(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """normed, and x + residual, or an empty tensor without one."""
    x, weight = x.contiguous(), weight.contiguous()
    n, width = x.shape
    normed, summed = torch.empty_like(x), x.new_empty(0 if residual is None else x.shape)
    residual = None if residual is None else residual.contiguous()
    launch(_rms_norm_fwd_kernel, (n,), normed, summed, x, residual, weight, width, eps, **row_options(width))
    return normed, summed


@_rms_norm_fwd.register_fake
def _(x, residual, weight, eps):
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)


@torch.library.custom_op("flashgrpo::rms_norm_bwd", mutates_args=())
def _rms_norm_bwd(
    d_normed: Tensor, d_summed: Tensor | None, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """d_x and d_weight."""
    x, d_normed, scale = x.contiguous(), d_normed.contiguous(), weight.contiguous()
    d_summed = None if d_summed is None else d_summed.contiguous()
    n, width = x.shape
    num_programs, rows_each = _split_rows(n)
    d_x, partials = torch.empty_like(x), x.new_empty(num_programs, width, dtype=torch.float32)
    launch(
        _rms_norm_bwd_kernel, (num_programs,), d_x, partials, d_normed, d_summed, x, scale, n, rows_each, width, eps,
        **row_options(width),
    )  # fmt: skip
    return d_x, _sum_partials(partials, weight)


@_rms_norm_bwd.register_fake
def _(d_normed, d_summed, x, weight, eps):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def rope_options(num_heads: int, head_dim: int) -> dict[str, Any]:
    """Heads of a program, and the padded half of one."""
    block_d = triton.next_power_of_2(head_dim // 2)
    block_h = min(triton.next_power_of_2(num_heads), max(1, HEADS_BLOCK // block_d))
    return {"HALF": head_dim // 2, "BLOCK_H": block_h, "BLOCK_D": block_d, "num_warps": 4}


def _launch_rope(out: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, q_weight, k_weight, eps, num_heads: int) -> None:
    num_kv_heads = (qkv.shape[1] - num_heads) // 2
    options = rope_options(num_heads + num_kv_heads, qkv.shape[2])
    grid = len(qkv), -(-(num_heads + num_kv_heads) // options["BLOCK_H"])
    launch(
        _rope_fwd_kernel, grid, out, qkv, cos, sin, q_weight, k_weight, num_heads, num_kv_heads, out.stride(0),
        qkv.stride(0), eps, **options,
    )  # fmt: skip


@torch.library.custom_op("flashgrpo::rope", mutates_args=())
def _rope_fwd(
    qkv: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float, num_heads: int
) -> Tensor:
    """Queries and keys, [n, num_heads + num_kv_heads, head_dim]."""
    qk = qkv.new_empty(len(qkv), (qkv.shape[1] + num_heads) // 2, qkv.shape[2])
    _launch_rope(qk, qkv, cos, sin, q_weight, k_weight, eps, num_heads)
    return qk


@_rope_fwd.register_fake
def _(qkv, cos, sin, q_weight, k_weight, eps, num_heads):
    return qkv.new_empty(qkv.shape[0], (qkv.shape[1] + num_heads) // 2, qkv.shape[2])


@torch.library.custom_op("flashgrpo::rope_bwd", mutates_args=())
def _rope_bwd(
    d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor, kept: list[Tensor], eps: float
) -> tuple[Tensor, Tensor]:
    """d_qkv, and with norms d_q_weight and d_k_weight [2, head_dim]; `kept` is qkv before them and their weights."""
    d_q, d_k, d_v = map(_dense_rows, (d_q, d_k, d_v))
    (n, num_heads, head_dim), num_kv_heads = d_q.shape, d_k.shape[1]
    qkv, q_weight, k_weight = kept or (None, None, None)
    num_programs, rows_each = _split_rows(n) if kept else (n, 1)
    options = rope_options(num_heads + 2 * num_kv_heads, head_dim)
    num_blocks = -(-(num_heads + 2 * num_kv_heads) // options["BLOCK_H"])
    d_qkv = d_q.new_empty(n, num_heads + 2 * num_kv_heads, head_dim)
    partials = d_q.new_empty(num_programs * num_blocks, 2, head_dim, dtype=torch.float32) if kept else None
    launch(
        _rope_bwd_kernel, (num_programs, num_blocks), d_qkv, partials, d_q, d_k, d_v, qkv, cos, sin, q_weight,
        k_weight, n, rows_each, num_heads, num_kv_heads, d_q.stride(0), d_k.stride(0), d_v.stride(0),
        0 if qkv is None else qkv.stride(0), eps, **options,
    )  # fmt: skip
    return d_qkv, d_q.new_empty(0) if partials is None else _sum_partials(partials, kept[1])


@_rope_bwd.register_fake
def _(d_q, d_k, d_v, cos, sin, kept, eps):
    heads = d_q.shape[1] + 2 * d_k.shape[1]
    d_weights = kept[1].new_empty(2, d_q.shape[2]) if kept else d_q.new_empty(0)
    return d_q.new_empty(d_q.shape[0], heads, d_q.shape[2]), d_weights


@torch.library.custom_op("flashgrpo::swiglu", mutates_args=())
def _swiglu_fwd(gate_up: Tensor) -> Tensor:
    gate_up = gate_up.contiguous()
    n, width = len(gate_up), gate_up.shape[1] // 2
    product = gate_up.new_empty(n, width)
    launch(_swiglu_fwd_kernel, (n, -(-width // SWIGLU_BLOCK)), product, gate_up, width, BLOCK=SWIGLU_BLOCK)
    return product


@_swiglu_fwd.register_fake
def _(gate_up):
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@torch.library.custom_op("flashgrpo::swiglu_bwd", mutates_args=("gate_up", "d_product"))
def _swiglu_bwd(gate_up: Tensor, d_product: Tensor) -> None:
    """Overwrites gate_up with its gradient, and d_product with the product; both are contiguous."""
    n, width = d_product.shape
    launch(_swiglu_bwd_kernel, (n, -(-width // SWIGLU_BLOCK)), gate_up, d_product, width, BLOCK=SWIGLU_BLOCK)
