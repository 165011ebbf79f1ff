"""The products of the decoder's layers, x weight^T, and their gradients.

fp32 products on a CPU go through oneDNN rather than torch's choice, MKL, which does not use AVX-512 on processors that
are not Intel's: on two cores of a Zen 5, [1200, 256] x [256, 768] runs at 360 GFLOP/s instead of 170, a gradient of
the weight at 240. Everything else is `torch.nn.functional.linear`.

The operator is the one that torch's own compiler calls; a torch without it falls back.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashgrpo.kernels.logprob import backward_once

# Below, MKL's shorter way to a product (about 15 us) outweighs its slower arithmetic.
_MIN_MULTIPLY_ADDS = 2**21
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear(nn.Linear):
    """`nn.Linear` through `product`."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and _by_onednn(input, self.weight):
            return _Linear.apply(input, self.weight, self.bias)
        return product(input, self.weight, self.bias)


def product(
    x: Tensor,  # [n, in_features]
    weight: Tensor,  # [out_features, in_features], any strides
    bias: Tensor | None = None,  # [out_features]
) -> Tensor:  # [n, out_features]
    """x weight^T + bias. Not differentiable where oneDNN computes it: `Linear` is."""
    if not _by_onednn(x, weight):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def weight_gradient(
    d_out: Tensor,  # [n, out_features]
    x: Tensor,  # [n, in_features]
) -> Tensor:  # [out_features, in_features]
    """d_out^T x. oneDNN is quicker where the result has more columns than rows."""
    if d_out.shape[1] > x.shape[1]:
        return product(x.T, d_out.T).T
    return product(d_out.T, x.T)


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    is_fp32 = x.dtype == weight.dtype == torch.float32
    return _HAS_ONEDNN and x.is_cpu and is_fp32 and len(x) * weight.numel() >= _MIN_MULTIPLY_ADDS


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @backward_once
    def backward(ctx, *grad_outputs):
        (d_out,) = grad_outputs
        x, weight = ctx.saved_tensors
        d_x = product(d_out, weight.T) if ctx.needs_input_grad[0] else None
        d_weight = weight_gradient(d_out, x) if ctx.needs_input_grad[1] else None
        return d_x, d_weight, d_out.sum(0) if ctx.needs_input_grad[2] else None
