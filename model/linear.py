"""The products of the decoder's layers, x weight^T, and their gradients.

fp32 products on a CPU go through oneDNN rather than torch's choice, MKL, which does not use AVX-512 on processors that
are not Intel's: on two cores of a Zen 5, [1200, 256] x [256, 768] runs at 360 GFLOP/s instead of 170, a gradient of
the weight at 240. Everything else is `torch.nn.functional.linear`. The operator is the one that torch's own compiler
calls; a torch without it falls back.

oneDNN keeps about 0.4 MB for every shape it has met, so the number of rows must not take any value: `padded_rows`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashgrpo.kernels.common import backward_once

# Below, MKL's shorter way to a product (about 15 us) outweighs its slower arithmetic.
_MIN_MULTIPLY_ADDS = 2**21
ONEDNN_PRODUCT = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


class Linear(nn.Linear):
    """`nn.Linear` through `product`."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and by_onednn(input, self.weight):
            return _Linear.apply(input, self.weight, self.bias)
        return product(input, self.weight, self.bias)


def product(
    x: Tensor,  # [n, in_features]
    weight: Tensor,  # [out_features, in_features], any strides
    bias: Tensor | None = None,  # [out_features]
) -> Tensor:  # [n, out_features]
    """x weight^T + bias. Not differentiable where oneDNN computes it: `Linear` is."""
    if not by_onednn(x, weight):
        return F.linear(x, weight, bias)
    weight = getattr(weight, "packed", weight)
    return ONEDNN_PRODUCT(x, weight, bias, "none", [], "")  # pyright: ignore[reportOptionalCall]


class PackedWeights:
    """Copies of a module's matrices in oneDNN's own layout, for many products of few rows, as in decoding.

    `with packed:` lets `product` read them, about 10 us a product sooner; in between the module may change or train.
    """

    def __init__(self, module: nn.Module, num_rows: int):
        matrices = [p for p in module.parameters() if p.dim() == 2 and _suits_onednn(num_rows, p)]
        pack = torch.ops.mkldnn._reorder_linear_weight if matrices else None
        self.copies = [(p, pack(p.detach(), num_rows)) for p in matrices]  # pyright: ignore[reportOptionalCall]

    def __enter__(self) -> None:
        for parameter, copy in self.copies:
            parameter.packed = copy  # pyright: ignore[reportAttributeAccessIssue]

    def __exit__(self, *_: object) -> None:
        for parameter, _copy in self.copies:
            del parameter.packed  # pyright: ignore[reportAttributeAccessIssue]


def weight_gradient(
    d_out: Tensor,  # [n, out_features]
    x: Tensor,  # [n, in_features]
) -> Tensor:  # [out_features, in_features]
    """d_out^T x."""
    return product(d_out.T, x.T)


def padded_rows(n: int, weight: Tensor) -> int:
    """n, or where oneDNN takes n rows a little more: a multiple of 64, and one of 16 between two powers of two."""
    step = max(64, 1 << max(n.bit_length() - 5, 0)) if _suits_onednn(n, weight) else 1
    return -(-n // step) * step


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `product` takes oneDNN for these."""
    return x.dim() == 2 and x.dtype == weight.dtype and _suits_onednn(len(x), weight)


def _suits_onednn(n: int, weight: Tensor) -> bool:
    return (  # what most often fails first: decoding calls this often
        n * weight.numel() >= _MIN_MULTIPLY_ADDS
        and weight.is_cpu
        and weight.dtype == torch.float32
        and ONEDNN_PRODUCT is not None
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


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
