"""The torch twin of elementwise.py, for CPUs and float64."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class QKNorm(NamedTuple):
    """RMSNorm of every query head and every key head."""

    q_weight: Tensor  # [head_dim]
    k_weight: Tensor  # [head_dim]
    eps: float


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `elementwise.rms_norm`."""
    summed = x if residual is None else residual + x
    return F.rms_norm(summed, weight.shape, weight, eps), summed


def rope(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, norm: QKNorm | None) -> tuple[Tensor, Tensor, Tensor]:
    """As `elementwise.rope`, never in place."""
    num_kv_heads = (qkv.shape[1] - num_heads) // 2
    heads = num_heads, num_kv_heads
    q, k, v = qkv.split((*heads, num_kv_heads), dim=1)
    if norm is None:
        q, k = apply_rope(qkv[:, : sum(heads)], cos, sin).split(heads, dim=1)
        return q, k, v.contiguous()  # a view would keep q and k for the backward pass, too
    q = F.rms_norm(q, q.shape[2:], norm.q_weight, norm.eps)
    k = F.rms_norm(k, k.shape[2:], norm.k_weight, norm.eps)
    q, k = apply_rope(torch.cat((q, k), dim=1), cos, sin).split(heads, dim=1)
    return q, k, v


def apply_rope(
    x: Tensor,  # [n, num_heads, head_dim]
    cos: Tensor,  # [n, 1, head_dim]
    sin: Tensor,  # [n, 1, head_dim]
) -> Tensor:
    """x rotated, in x's dtype; computed in fp32 or better and rounded once."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """As `elementwise.swiglu`."""
    gate, up = gate_up.chunk(2, dim=1)
    return F.silu(gate).mul_(up)


def swiglu_backward(gate_up: Tensor, d_product: Tensor) -> tuple[Tensor, Tensor]:
    """As `elementwise.swiglu_backward`; d_product is used up."""
    gate, up = gate_up.chunk(2, dim=1)
    silu = F.silu(gate)
    if torch.compiler.is_compiling():  # which writes no result into a part of a tensor
        d_gate = torch.ops.aten.silu_backward(d_product * up, gate)
        return torch.cat((d_gate, silu * d_product), dim=1), silu * up
    d_gate_up = torch.empty_like(gate_up)
    d_gate, d_up = d_gate_up.chunk(2, dim=1)
    torch.mul(silu, d_product, out=d_up)
    torch.ops.aten.silu_backward(d_product.mul_(up), gate, grad_input=d_gate)
    return d_gate_up, silu.mul_(up)
