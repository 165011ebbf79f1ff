"""Packs for the kernels of attention, and what is asked of these: as accurate as torch, by float64."""

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from flashgrpo.kernels.attention import packed_attention

ALONE = [0, 129, 0, 0, 1, 70, 0], [-1] * 7
FAMILIES = [1, 40, 0, 65, 70, 33, 3, 0, 96], [-1, 0, 0, -1, 3, 3, -1, 6, -1]
SMALL = [37, 20, 5], [-1, 0, 0]


def make_qkv(total_tokens, device, num_heads=2, num_kv_heads=1, head_dim=64, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    heads = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    tensors = [torch.randn(total_tokens, h, head_dim, generator=generator).to(device, dtype) for h in heads]
    return [x.requires_grad_() for x in tensors[:3]], tensors[3]


def index(lengths, prefix, device):
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    return cu_seqlens, None if prefix is None else torch.tensor(prefix, dtype=torch.int32, device=device)


def run(qkv: list[Tensor], d_out: Tensor, lengths, prefix, **options) -> list[Tensor]:
    """Output and the three gradients, where memory that nobody has written holds NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        out = packed_attention(*qkv, *index(lengths, prefix, d_out.device), **options)
        return [out.detach(), *torch.autograd.grad(out, qkv, d_out)]
    finally:
        torch.use_deterministic_algorithms(False)


def dense(qkv: list[Tensor], d_out: Tensor, lengths, prefix) -> list[Tensor]:
    lengths, parents = torch.tensor(lengths, device=d_out.device), torch.tensor(prefix, device=d_out.device)
    segment = torch.arange(len(lengths), device=d_out.device).repeat_interleave(lengths)
    place = torch.arange(len(segment), device=d_out.device)
    own = (segment[:, None] == segment) & (place[:, None] >= place)
    mask = own | (parents[segment][:, None] == segment)
    q, k, v = (x.transpose(0, 1)[None] for x in qkv)
    out = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)[0].transpose(0, 1)
    return [out.detach(), *torch.autograd.grad(out, qkv, d_out)]


def assert_as_accurate_as_torch(ours: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> None:
    """RMS error at most 1.1x and largest error at most 1.5x that of `plain`, and 1e-6 of the values' scale."""
    for actual, torch_s, true in zip(ours, plain, exact, strict=True):
        floor = 1e-6 * max(1.0, true.abs().max().item())
        error, torch_error = actual.double() - true, torch_s.double() - true
        assert error.square().mean().sqrt() <= 1.1 * torch_error.square().mean().sqrt() + floor
        assert error.abs().max() <= 1.5 * torch_error.abs().max() + floor


def check(device, lengths, prefix, dtype, backend="triton", **shape) -> list[Tensor]:
    qkv, d_out = make_qkv(sum(lengths), device, dtype=dtype, **shape)
    exact = dense([x.detach().double().requires_grad_() for x in qkv], d_out.double(), lengths, prefix)
    ours = run(qkv, d_out, lengths, prefix, backend=backend)
    assert_as_accurate_as_torch(ours, dense(qkv, d_out, lengths, prefix), exact)
    return ours
