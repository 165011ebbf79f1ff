"""What a decoder does otherwise on a CPU: products by oneDNN, norms in fewer passes, threads.py before each pass.

`adapt` swaps these in when a model is opened for a CPU.

fp32 products go through oneDNN rather than torch's choice, MKL, which does not use AVX-512 on
processors that are not Intel's: on two cores of a Zen 5, [1200, 256] x [256, 768] runs at 360
GFLOP/s instead of 170, a gradient of the weight at 240. The operator is the one that torch's own
compiler calls; a torch without it falls back. oneDNN keeps about 0.4 MB for every shape it has met,
so the number of rows must not take any value: `padded_rows`.
"""

import functools
import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashgrpo.kernels.common import backward_once
from flashgrpo.kernels.elementwise_torch import apply_rope
from flashgrpo.model.decoder import KEPT_OPERATORS, MLP, Decoder, RMSNorm, SelfAttention
from flashgrpo.model.threads import Threads

# Read at MKL's first product. Without it the bits of a product of few rows depend on the number of threads, and a run
# on what else the machine does; without STRICT they still do where a processor has AMX.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

# Below, MKL's shorter way to a product (about 15 us) outweighs its slower arithmetic.
_MIN_MULTIPLY_ADDS = 2**21
_ONEDNN_PRODUCT = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
if _ONEDNN_PRODUCT:  # an activation checkpoint knows torch's own products only
    KEPT_OPERATORS.append(_ONEDNN_PRODUCT.default)


def adapt(decoder: Decoder) -> None:
    """Give a decoder, sharded or not, the modules below. Their parameters and names stay."""
    for module in decoder.modules():
        module.__class__ = _ON_CPU.get(type(module), type(module))


class _Decoder(Decoder):
    def padded_tokens(self, num_tokens: int) -> int:
        return padded_rows(num_tokens, self.model.layers[0].mlp.down_proj.weight)  # pyright: ignore


class _Embedding(nn.Embedding):
    """The first module of every pass, so the place to look at the threads."""

    threads = Threads()  # torch's, so one for all decoders

    def forward(self, input: Tensor) -> Tensor:
        self.threads.fit()
        return super().forward(input)


class Linear(nn.Linear):
    """`nn.Linear` through `product`."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and _by_onednn(input, self.weight):
            return _Linear.apply(input, self.weight, self.bias)
        return product(input, self.weight, self.bias)


class CPURMSNorm(RMSNorm):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        summed = x if residual is None else residual + x
        return rms_norm(summed, self.weight, self.eps), summed


class _SelfAttention(SelfAttention):
    def rotate(self, qkv: Tensor, cos: Tensor, sin: Tensor, overwrite: bool) -> tuple[Tensor, Tensor, Tensor]:
        """One norm of all heads: operators cost more here than copies."""
        heads = self.num_heads, self.num_kv_heads
        qk, v = qkv.split((sum(heads), self.num_kv_heads), dim=1)
        if norm := self.qk_norm:
            weights = norm.q_weight.expand(self.num_heads, -1), norm.k_weight.expand(self.num_kv_heads, -1)
            qk = rms_norm(qk, torch.cat(weights), norm.eps)
        else:
            v = v.contiguous()  # a view would keep q and k for the backward pass, too
        q, k = apply_rope(qk, cos, sin).split(heads, dim=1)
        return q, k, v


def product(
    x: Tensor,  # [n, in_features]
    weight: Tensor,  # [out_features, in_features], any strides
    bias: Tensor | None = None,  # [out_features]
) -> Tensor:  # [n, out_features]
    """x weight^T + bias. Not differentiable where oneDNN computes it: `Linear` is."""
    if not _by_onednn(x, weight):
        return F.linear(x, weight, bias)
    weight = _packed.get(id(weight), weight)
    return _ONEDNN_PRODUCT(x, weight, bias, "none", [], "")  # pyright: ignore[reportOptionalCall]


_packed: dict[int, Tensor] = {}  # by a parameter's id, while `PackedWeights` is open


class PackedWeights:
    """A snapshot of a module's large matrices in oneDNN's own layout, for many products of few rows, as in decoding.

    `with packed:` lets `product` read it, about 10 us a product sooner. Later changes of the weights are not seen.
    """

    def __init__(self, module: nn.Module, num_rows: int):
        matrices = [p for p in module.parameters() if p.dim() == 2 and _suits_onednn(num_rows, p)]
        self.matrices = matrices  # kept, so that nothing else gets their ids
        pack = torch.ops.mkldnn._reorder_linear_weight if matrices else None
        self.copies = {id(p): pack(p.detach(), num_rows) for p in matrices}  # pyright: ignore[reportOptionalCall]

    def __enter__(self) -> None:
        _packed.update(self.copies)

    def __exit__(self, *_: object) -> None:
        _packed.clear()


def padded_rows(n: int, weight: Tensor) -> int:
    """n, or where oneDNN takes n rows a little more: a multiple of 64, and one of 16 between two powers of two."""
    step = max(64, 1 << max(n.bit_length() - 5, 0)) if _suits_onednn(n, weight) else 1
    return -(-n // step) * step


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `product` takes oneDNN for these."""
    return x.dim() == 2 and x.dtype == weight.dtype and _suits_onednn(len(x), weight)


def _suits_onednn(n: int, weight: Tensor) -> bool:
    return (  # what most often fails first: decoding calls this often
        n * weight.numel() >= _MIN_MULTIPLY_ADDS
        and weight.is_cpu
        and weight.dtype == torch.float32
        and _ONEDNN_PRODUCT is not None
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
        d_weight = product(d_out.T, x.T) if ctx.needs_input_grad[1] else None
        return d_x, d_weight, d_out.sum(0) if ctx.needs_input_grad[2] else None


class CPUMLP(MLP):
    product = staticmethod(product)


def rms_norm(
    x: Tensor,  # [n, d] or [n, num_heads, d]
    weight: Tensor,  # [d] or [num_heads, d]
    eps: float,
) -> Tensor:
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019)."""
    if x.dtype.itemsize < 4:
        if weight.dim() == 1:
            return F.rms_norm(x, weight.shape, weight, eps)
        return F.rms_norm(x, x.shape[-1:], eps=eps) * weight
    if torch.is_grad_enabled():  # torch has no fused kernel here, only its composition
        return _RMSNorm.apply(x, weight, eps)
    return (x * _inverse_rms(x, eps)).mul_(weight)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(_scalar(eps, x.dtype), norm, norm, value=1 / x.shape[-1]).rsqrt_()


@functools.cache
def _scalar(value: float, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu")


class _RMSNorm(torch.autograd.Function):
    """Keeps x and 1 / rms for the backward pass, where plain autograd also keeps the normalised x."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        inverse_rms = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, inverse_rms)
        normed = x * inverse_rms
        if torch.compiler.is_compiling():  # where torch 2.11 would lose the gradient of a result written in place
            return normed * weight
        return normed.mul_(weight)

    @staticmethod
    @backward_once
    def backward(ctx, *grad_outputs):
        (d_out,) = grad_outputs
        x, weight, inverse_rms = ctx.saved_tensors
        normed = x * inverse_rms
        d_scaled = d_out * normed  # summed over rows it is d_weight, weighted over columns the part of d_out along x
        along = d_scaled @ weight if weight.dim() == 1 else torch.linalg.vecdot(d_scaled, weight)
        along = along.div_(-x.shape[-1]).unsqueeze(-1)
        d_x = torch.addcmul(d_out * weight, normed, along).mul_(inverse_rms)
        return d_x, d_scaled.sum_to_size(weight.shape), None


_ON_CPU: dict[type, type] = {
    Decoder: _Decoder,
    nn.Embedding: _Embedding,
    nn.Linear: Linear,
    RMSNorm: CPURMSNorm,
    SelfAttention: _SelfAttention,
    MLP: CPUMLP,
}
