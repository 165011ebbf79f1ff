"""RMSNorm with the residual, RoPE with QK norm and SwiGLU against their definitions in float64."""

import functools

import pytest
import torch
import torch.nn.functional as F

from flashgrpo.kernels import elementwise
from flashgrpo.kernels.elementwise import QKNorm, rms_norm, rope, swiglu, swiglu_backward

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [1, 48, 1000, 1536, 3584]  # below and above a power of two, and those of real models
HEAD_DIMS = [64, 80, 96, 128]
EPS = 1e-5


def normed_sum(x, residual, weight):
    summed = x if residual is None else x + residual
    return F.rms_norm(summed, weight.shape, weight, EPS), summed


def rotate(x, cos, sin):
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


def dense_rope(qkv, cos, sin, num_heads, q_weight=None, k_weight=None):
    """Step by step, rounded after each as torch's operators do."""
    num_kv_heads = (qkv.shape[1] - num_heads) // 2
    q, k, v = qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    if q_weight is not None:
        q, k = F.rms_norm(q, q.shape[2:], q_weight, EPS), F.rms_norm(k, k.shape[2:], k_weight, EPS)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def dense_swiglu(gate_up):
    gate, up = gate_up.chunk(2, dim=1)
    return F.silu(gate) * up


def results(function, leaves, upstream, dtype):
    """Outputs and gradients, of a function that may overwrite the products that it is given."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in leaves]
    outputs = function(*(x * 1 for x in leaves))
    gradients = torch.autograd.grad(outputs, leaves, [u.to(dtype) for u in upstream])
    return [x.detach() for x in (*outputs, *gradients)]


def check(as_accurate, ours, dense, leaves, upstream, exact_dtype=torch.float64):
    dtype = leaves[0].dtype
    found = results(ours, leaves, upstream, dtype)
    torchs = results(dense, leaves, upstream, dtype)
    exact = results(dense, leaves, upstream, exact_dtype)
    for i, values in enumerate(zip(found, torchs, exact, strict=True)):
        assert values[0].dtype == dtype
        as_accurate(*values, f"result {i}")


def norm_case(n, width, dtype, device, with_residual=True):
    weight = 1 + torch.randn(width, device=device)
    tensors = [3 * torch.randn(n, width, device=device) for _ in range(1 + with_residual)]
    upstream = [torch.randn(n, width, device=device).to(dtype) for _ in range(2)]
    return [x.to(dtype) for x in (weight, *tensors)], upstream


def angles(n, head_dim, device):
    half = torch.rand(n, 1, head_dim // 2, device=device) * 100
    angle = torch.cat((-half, half), dim=2)
    return angle.cos(), angle.sin()


def rope_case(n, heads, head_dim, dtype, device, with_norm):
    num_heads, num_kv_heads = heads
    qkv = 2 * torch.randn(n, num_heads + 2 * num_kv_heads, head_dim, device=device)
    weights = [1 + torch.randn(head_dim, device=device) for _ in range(2 * with_norm)]
    upstream = [torch.randn(n, h, head_dim, device=device).to(dtype) for h in (num_heads, num_kv_heads, num_kv_heads)]
    return [x.to(dtype) for x in (qkv, *weights)], upstream, angles(n, head_dim, device)


def our_rope(cos, sin, num_heads, overwrite=True):
    def call(qkv, *weights):
        return rope(qkv, cos, sin, num_heads, QKNorm(*weights, EPS) if weights else None, overwrite=overwrite)

    return call


def swiglu_of(gate_up, d_product):
    """Forward and backward; the backward pass may use up what it is given."""
    product = swiglu(gate_up)
    return product, *swiglu_backward(gate_up.clone(), d_product.clone())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [True, False])
def test_norm_in_every_dtype(dtype, with_residual, device, poisoned, as_accurate):
    leaves, upstream = norm_case(37, 200, dtype, device, with_residual)
    check(
        as_accurate,
        lambda weight, x, residual=None: rms_norm(x, weight, EPS, residual),
        lambda weight, x, residual=None: normed_sum(x, residual, weight),
        leaves,
        upstream,
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_norm_of_every_width(width, device, poisoned, as_accurate):
    leaves, upstream = norm_case(3, width, torch.bfloat16, device)
    check(
        as_accurate,
        lambda weight, x, residual: rms_norm(x, weight, EPS, residual),
        lambda weight, x, residual: normed_sum(x, residual, weight),
        leaves,
        upstream,
    )


def test_weight_gradients_of_many_rows(device, poisoned, as_accurate, monkeypatch):
    """More rows than there are partial sums, more partial sums than are added at once, and no multiples of either."""
    monkeypatch.setattr(elementwise, "PARTIALS", 70)
    leaves, upstream = norm_case(173, 40, torch.float32, device)
    check(
        as_accurate,
        lambda weight, x, residual: rms_norm(x, weight, EPS, residual),
        lambda weight, x, residual: normed_sum(x, residual, weight),
        leaves,
        upstream,
    )
    leaves, upstream, (cos, sin) = rope_case(173, (2, 1), 16, torch.float32, device, with_norm=True)
    check(as_accurate, our_rope(cos, sin, 2), lambda x, *w: dense_rope(x, cos, sin, 2, *w), leaves, upstream)


@pytest.mark.parametrize("used", ["normed", "summed"])
def test_a_result_of_the_norm_that_nobody_uses(used, device, poisoned, close, dtype):
    leaves, (upstream, _) = norm_case(5, 24, dtype, device)
    which = int(used == "summed")
    leaves = [x.requires_grad_() for x in leaves]
    weight, x, residual = leaves
    found, wanted = (
        torch.autograd.grad(function()[which], leaves, upstream, allow_unused=True, materialize_grads=True)
        for function in (lambda: rms_norm(x, weight, EPS, residual), lambda: normed_sum(x, residual, weight))
    )
    close(found, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize("overwrite", [True, False])
def test_rope_in_every_dtype(dtype, with_norm, overwrite, device, poisoned, as_accurate):
    leaves, upstream, (cos, sin) = rope_case(5, (4, 2), 16, dtype, device, with_norm)
    ours = our_rope(cos, sin, 4, overwrite)
    check(as_accurate, ours, lambda x, *w: dense_rope(x, cos, sin, 4, *w), leaves, upstream)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("heads", [(14, 2), (28, 4), (3, 3), (1, 1)])
@pytest.mark.parametrize("with_norm", [True, False])
def test_rope_of_every_head(head_dim, heads, with_norm, device, poisoned, as_accurate):
    leaves, upstream, (cos, sin) = rope_case(2, heads, head_dim, torch.bfloat16, device, with_norm)
    ours = our_rope(cos, sin, heads[0])
    check(as_accurate, ours, lambda x, *w: dense_rope(x, cos, sin, heads[0], *w), leaves, upstream)


@pytest.mark.kernels
@pytest.mark.parametrize("with_norm", [True, False])
def test_rope_lies_in_the_product_where_nobody_needs_that(with_norm, device):
    (qkv, *weights), _, (cos, sin) = rope_case(3, (4, 2), 16, torch.float32, device, with_norm)
    turn, base = our_rope(cos, sin, 4), qkv.requires_grad_()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            product = base * 1
            q, k, v = turn(product, *weights)
        in_place = q.data_ptr() == product.data_ptr()
        assert in_place == (not (grad and with_norm))  # the norm's backward pass reads the product
        assert product._version == in_place  # who keeps the product hears of it
        assert v.data_ptr() == product[:, 6:].data_ptr()
        wanted = dense_rope(base, cos, sin, 4, *(weights and [w * 1 for w in weights]))
        if not with_norm:
            torch.testing.assert_close([q, k, v], [*wanted])


@pytest.mark.kernels
def test_a_second_backward_pass_through_overwritten_memory_is_refused(device):
    from flashgrpo.model.decoder import SwiGLU

    x, gate_up_weight, down_weight = (
        torch.randn(s, device=device, requires_grad=True) for s in ((3, 8), (12, 8), (8, 6))
    )
    out = SwiGLU.apply(x, gate_up_weight, down_weight, F.linear)
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 48, 1000, 4864])
@pytest.mark.parametrize("n", [1, 3])
def test_swiglu(dtype, width, n, device, poisoned, as_accurate):
    gate_up, upstream = (4 * torch.randn(n, 2 * width, device=device)).to(dtype), torch.randn(n, width, device=device)
    upstream = upstream.to(dtype)
    found = swiglu_of(gate_up, upstream)
    torchs, exact = (results(lambda x: [dense_swiglu(x)], [gate_up], [upstream], t) for t in (dtype, torch.float64))
    for i, values in enumerate(zip(found, (*torchs, torchs[0]), (*exact, exact[0]), strict=True)):
        assert values[0].dtype == dtype
        as_accurate(*values, f"result {i}")


def test_extreme_gates(device, dtype, close):
    gates = torch.tensor([-1e4, -200.0, -90.0, -1e-30, 0.0, 1e-30, 90.0, 200.0, 1e4], dtype=dtype, device=device)
    gate_up, upstream = torch.cat((gates, torch.ones_like(gates)))[None], torch.ones_like(gates)[None]
    wanted = results(lambda x: [dense_swiglu(x)], [gate_up], [upstream], dtype)
    found = swiglu_of(gate_up, upstream)
    assert all(x.isfinite().all() for x in found)
    close([*found], [*wanted, wanted[0]])


def test_norm_of_zeros_and_of_large_values(device, dtype, close):
    x = torch.stack((torch.zeros(64), 1e15 * torch.randn(64), 1e-15 * torch.randn(64))).to(device, dtype)
    weight, upstream = torch.ones(64, device=device, dtype=dtype), torch.randn(3, 64, device=device, dtype=dtype)
    found, wanted = (
        results(function, [x], [upstream], dtype)
        for function in (lambda x: rms_norm(x, weight, EPS)[:1], lambda x: normed_sum(x, None, weight)[:1])
    )
    close(found, wanted)


def test_norm_of_heads_that_are_next_to_nothing(device, dtype, close):
    """Zeros, and values whose squares are less than eps."""
    (qkv, *weights), upstream, (cos, sin) = rope_case(3, (4, 2), 16, dtype, device, with_norm=True)
    qkv = qkv * torch.tensor([0.0, 1e-3, 1.0], device=device, dtype=dtype)[:, None, None]
    found = results(our_rope(cos, sin, 4), [qkv, *weights], upstream, dtype)
    wanted = results(lambda x, *w: dense_rope(x, cos, sin, 4, *w), [qkv, *weights], upstream, dtype)
    for token in range(3):  # of sizes of their own
        close(*([x[token] for x in (*several[:3], several[3])] for several in (found, wanted)))
    close(found[4:], wanted[4:])


def every_function(n, device, dtype=torch.float32):
    """By name: a function of leaves, row tensors first, its leaves, how many of them have rows, and upstreams."""
    (weight, *norm_rows), norm_up = norm_case(n, 40, dtype, device)
    (qkv, *weights), rope_up, (cos, sin) = rope_case(n, (4, 2), 16, dtype, device, with_norm=True)
    gate_up, d_product = torch.randn(n, 30, device=device, dtype=dtype), torch.randn(n, 15, device=device, dtype=dtype)

    def rotated(qkv, cos, sin, *weights):
        return our_rope(cos, sin, 4)(qkv, *weights)

    return {
        "rms_norm": (lambda x, r, w: rms_norm(x, w, EPS, r), [*norm_rows, weight], 2, norm_up),
        "rope": (lambda *x: rotated(*x), [qkv, cos, sin], 3, rope_up),
        "rope with norms": (rotated, [qkv, cos, sin, *weights], 3, rope_up),
        "swiglu": (lambda x, d: swiglu_of(x, d), [gate_up, d_product], 2, None),
    }


def run(function, leaves, num_row_tensors, upstream):
    """Outputs and the gradients of tensors with rows."""
    if upstream is None:
        return [*function(*leaves)]
    leaves = [x.detach().clone() for x in leaves]
    first = [leaves[0].requires_grad_(), *leaves[1:]]
    outputs = function(first[0] * 1, *first[1:])
    return [x.detach() for x in (*outputs, *torch.autograd.grad(outputs, first[:1], upstream))]


@pytest.mark.parametrize("name", ["rms_norm", "rope", "rope with norms", "swiglu"])
def test_a_row_does_not_depend_on_what_is_packed_beside_it(name, device):
    function, leaves, count, upstream = every_function(7, device)[name]
    whole = run(function, leaves, count, upstream)
    for i in (0, 3, 6):
        alone = [x[i : i + 1] if j < count else x for j, x in enumerate(leaves)]
        up = None if upstream is None else [x[i : i + 1] for x in upstream]
        for x, y in zip(whole, run(function, alone, count, up), strict=True):
            assert torch.equal(x[i : i + 1], y)


@pytest.mark.parametrize("name", ["rms_norm", "rope", "rope with norms", "swiglu"])
def test_nan_stays_in_its_row(name, device):
    function, leaves, count, upstream = every_function(7, device)[name]
    for x in (leaves[0], *(upstream or leaves[1:])):
        x[2] = torch.nan
    for x in run(function, leaves, count, upstream):
        assert x.flatten(1).isnan().any(1).tolist() == [i == 2 for i in range(7)]


@pytest.mark.parametrize("name", ["rms_norm", "rope", "rope with norms", "swiglu"])
def test_the_same_bits_twice_and_no_rows(name, device):
    function, leaves, count, upstream = every_function(9, device)[name]
    for x, y in zip(*(run(function, leaves, count, upstream) for _ in range(2)), strict=True):
        assert torch.equal(x, y)
    none = [x[:0] if j < count else x for j, x in enumerate(leaves)]
    for x in run(function, none, count, None if upstream is None else [x[:0] for x in upstream]):
        assert len(x) == 0


def test_no_rows_have_no_weight_gradient(device, dtype):
    weight = torch.ones(8, device=device, dtype=dtype, requires_grad=True)
    normed, _ = rms_norm(torch.zeros(0, 8, device=device, dtype=dtype), weight, EPS)
    assert torch.equal(torch.autograd.grad(normed.sum(), weight)[0], torch.zeros_like(weight))
    weights = [torch.ones(4, device=device, dtype=dtype, requires_grad=True) for _ in range(2)]
    empty = torch.zeros(0, 1, 4, device=device)
    q, k, _ = our_rope(empty, empty, 2)(torch.zeros(0, 6, 4, device=device, dtype=dtype), *weights)
    for gradient in torch.autograd.grad(q.sum() + k.sum(), weights):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_tensors_of_any_stride(device, dtype, close):
    def apart(*shape):
        return torch.randn(*shape, 2, device=device, dtype=dtype)[..., 0]

    x, residual, weight, qkv, gate_up = apart(4, 24), apart(4, 24), apart(24), apart(4, 8, 16), apart(4, 24)
    cos, sin = (t.to(dtype) for t in angles(4, 16, device))
    found = *rms_norm(x, weight, EPS, residual), *rope(qkv, cos, sin, 4, overwrite=True), swiglu(gate_up)
    wanted = *normed_sum(x, residual, weight), *dense_rope(qkv, cos, sin, 4), dense_swiglu(gate_up)
    close(found, wanted)
    d_gate_up, product = swiglu_backward(gate_up.clone(), apart(4, 12))
    assert d_gate_up.shape == (4, 24)
    close(product, dense_swiglu(gate_up))


@pytest.mark.parametrize("with_norm", [True, False])
def test_gradients_through_tensors_of_any_stride(with_norm, device, dtype, close):
    """Of a product and norm weights that are every second element of others."""
    (qkv, *weights), upstream, (cos, sin) = rope_case(4, (4, 2), 16, dtype, device, with_norm)

    def of_pairs(function):
        return lambda *leaves: function(*(torch.stack((x, x), -1)[..., 1] for x in leaves))

    found = results(of_pairs(our_rope(cos, sin, 4)), [qkv, *weights], upstream, dtype)
    close(found, results(lambda x, *w: dense_rope(x, cos, sin, 4, *w), [qkv, *weights], upstream, dtype))


@pytest.mark.parametrize("name", ["rms_norm", "rope", "rope with norms"])
def test_graph_captured_whole_and_double_backward_refused(name, device, close):
    function, leaves, _, upstream = every_function(5, device)[name]
    leaf = leaves[0].clone().requires_grad_()

    def call(x):
        return sum((out * up).sum() for out, up in zip(function(x * 1, *leaves[1:]), upstream, strict=True))

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    close(compiled(leaf), call(leaf))
    close(*(torch.autograd.grad(f(leaf), leaf)[0] for f in (compiled, call)))


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["rms_norm", "rope", "rope with norms"])
def test_double_backward_is_refused(name, device):
    function, leaves, _, _ = every_function(5, device)[name]
    leaf = leaves[0].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(function(leaf * 1, *leaves[1:])[0].sum(), leaf, create_graph=True)


@pytest.mark.twin
def test_gradcheck():
    for function, (x, *fixed), _, _ in list(every_function(3, "cpu", torch.float64).values())[:3]:
        call = functools.partial(lambda function, fixed, x: function(x * 1, *fixed), function, fixed)
        assert torch.autograd.gradcheck(call, x.requires_grad_())


X, QKV, ONE = torch.zeros(3, 8), torch.zeros(3, 4, 8), torch.zeros(3, 1, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rms_norm(X, torch.zeros(7), EPS), "wanted .n, width., .width."),
        (lambda: rms_norm(X, torch.zeros(8), EPS, X[:2]), "residual has shape"),
        (lambda: rms_norm(X, torch.zeros(8), EPS, X.half()), "residual has shape and dtype"),
        (lambda: rope(QKV, ONE, ONE, 3), "qkv has shape"),
        (lambda: rope(QKV, ONE, ONE, 4), "qkv has shape"),
        (lambda: rope(QKV[:, :, :7], ONE, ONE, 2), "an even head_dim"),
        (lambda: rope(X, ONE, ONE, 2), "qkv has shape"),
        (lambda: rope(QKV, ONE[:2], ONE[:2], 2), "cos and sin have shapes"),
        (lambda: rope(QKV, ONE, ONE, 2, QKNorm(X[0], X[0, :7], EPS)), "weights of norm have shapes"),
        (lambda: swiglu(torch.zeros(3, 5)), "gate_up has shape"),
        (lambda: swiglu_backward(X, X), "d_product has shape"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
