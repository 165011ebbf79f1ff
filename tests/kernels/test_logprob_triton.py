"""The row kernels against float64, where a vocabulary, a value or a layout could trip them."""

import pytest
import torch

from flashgrpo.kernels.logprob import gather_logprobs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VOCABS = [1, 17, 127, 1023, 1024, 1025, 1500, 8191, 8192, 8193, 32000, 50257, 151936]


def dense(logits, targets, temperature=1.0):
    """The definition; in float64 the oracle, in fp32 plain torch."""
    log_p = torch.log_softmax(logits / temperature, -1)
    valid = (targets >= 0) & (targets < logits.shape[1])
    chosen = log_p.gather(1, torch.where(valid, targets, 0).long()[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p.clamp(min=-1e4)).sum(1)
    ignored = targets == -100
    logprobs = torch.where(valid, chosen, torch.nan)
    return torch.where(ignored, 0, logprobs), torch.where(ignored, 0, entropy)


def gradient(function, logits, targets, upstream, dtype, **options):
    leaf = logits.to(dtype).requires_grad_()
    outputs = function(leaf, targets, **options)
    total = sum((x * u.to(x.dtype)).sum() for x, u in zip(outputs, upstream, strict=True) if u is not None)
    (d_logits,) = torch.autograd.grad(total, leaf)
    return [x.detach() for x in outputs], d_logits


def check(as_accurate, logits, targets, upstream=None, **options):
    n = len(targets)
    if upstream is None:
        upstream = [torch.randn(n, device=logits.device), torch.randn(n, device=logits.device)]
    ours = gradient(gather_logprobs, logits, targets, upstream, logits.dtype, **options)
    torchs = gradient(dense, logits, targets, upstream, torch.float32, **options)
    exact = gradient(dense, logits, targets, upstream, torch.float64, **options)
    for name, *values in zip(("logprobs", "entropy"), ours[0], torchs[0], exact[0], strict=True):
        as_accurate(*values, name)
    as_accurate(ours[1], torchs[1].to(logits.dtype), exact[1], "d_logits")
    return ours


@pytest.mark.parametrize("vocab", VOCABS)
def test_every_vocabulary(vocab, device, poisoned, as_accurate):
    """Targets first, last, in the tail and ignored; more rows would only repeat a program."""
    targets = torch.tensor([0, vocab - 1, vocab * 2 // 3, -100], device=device)
    logits = 4 * torch.randn(4, vocab, device=device)
    check(as_accurate, logits.bfloat16(), targets)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)])
def test_every_dtype_and_gradient(dtype, used, device, poisoned, as_accurate):
    upstream = [torch.randn(5, device=device) if use else None for use in used]
    targets = torch.randint(0, 1500, (5,), device=device, dtype=torch.int32)
    check(as_accurate, (5 * torch.randn(5, 1500, device=device)).to(dtype), targets, upstream, temperature=0.7)


@pytest.mark.parametrize("temperature", [0.01, 10.0])
def test_temperatures(temperature, device, as_accurate):
    targets = torch.randint(0, 1025, (6,), device=device)
    check(as_accurate, 5 * torch.randn(6, 1025, device=device), targets, temperature=temperature)


def rows_of_trouble():
    n, vocab, inf = 8, 20000, float("inf")  # three blocks
    logits = torch.randn(n, vocab)
    targets = torch.randint(0, vocab, (n,))
    logits[0] = 1.0
    logits[1] = -200.0
    logits[2, 77] = 1e4
    logits[3] = (torch.randint(0, 2, (vocab,)) * 2.0 - 1) * 60000
    for row, block in ((4, slice(0, 8192)), (5, slice(8192, 16384)), (6, slice(16384, vocab))):
        logits[row, block] = -inf
        targets[row] = (12000, 100, 300)[row - 4]
    logits[7] = -inf
    logits[7, targets[7]] = 3.0
    return logits, targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_rows(dtype, device, poisoned, as_accurate):
    logits, targets = (x.to(device) for x in rows_of_trouble())
    check(as_accurate, logits.to(dtype), targets)


def test_target_at_minus_infinity(device):
    logits = torch.randn(2, 300, device=device)
    logits[0, 5] = -float("inf")
    logprobs, entropy = gather_logprobs(logits, torch.tensor([5, 5], device=device))
    assert logprobs[0] == -float("inf")
    assert entropy.isfinite().all()
    assert logprobs[1].isfinite()


def test_a_nan_row_and_a_target_out_of_range_stay_alone(device):
    logits = torch.randn(4, 9000, device=device)
    logits[1, 8500] = float("nan")
    targets = torch.tensor([3, 4, 9000, 5], device=device)
    outputs, d_logits = gradient(gather_logprobs, logits, targets, [torch.ones(4, device=device), None], logits.dtype)
    assert outputs[0].isnan().tolist() == [False, True, True, False]
    assert d_logits.isnan().all(1).tolist() == [False, True, True, False]
    assert d_logits[[0, 3]].isfinite().all()


@pytest.mark.parametrize("layout", ["rows apart", "unaligned", "columns apart"])
@pytest.mark.parametrize("inplace", [False, True])
def test_layouts(layout, inplace, device, as_accurate):
    storage = torch.randn(6, 2100, device=device).bfloat16()
    view = {"rows apart": storage[::2, :1500], "unaligned": storage[:3, 1:1501], "columns apart": storage[:3, ::2]}[
        layout
    ]
    targets = torch.randint(0, view.shape[1], (3,), device=device)
    upstream = [torch.randn(3, device=device), None]
    wanted = gradient(gather_logprobs, view.contiguous(), targets, upstream, view.dtype)
    logits = view.clone().requires_grad_()
    spaced = torch.empty_strided(view.shape, view.stride(), dtype=view.dtype, device=device)
    moved = spaced.copy_(logits)
    logprobs, _ = gather_logprobs(moved, targets, inplace_backward=inplace)
    assert torch.equal(logprobs, wanted[0][0])
    (logprobs * upstream[0]).sum().backward()
    assert torch.equal(logits.grad, wanted[1])


def test_a_row_does_not_depend_on_its_neighbours(device):
    logits, targets = torch.randn(6, 3000, device=device).bfloat16(), torch.randint(0, 3000, (6,), device=device)
    together = gather_logprobs(logits, targets)
    alone = [gather_logprobs(logits[i : i + 1], targets[i : i + 1]) for i in range(6)]
    for a, b in zip(together, map(torch.cat, zip(*alone, strict=True)), strict=True):
        assert torch.equal(a, b)


def test_targets_of_any_stride(device):
    logits, pairs = torch.randn(6, 40, device=device), torch.randint(0, 40, (6, 2), device=device)
    assert torch.equal(gather_logprobs(logits, pairs[:, 0])[0], gather_logprobs(logits, pairs[:, 0].clone())[0])
    one = pairs[:1, 0].expand(6)
    assert torch.equal(gather_logprobs(logits, one)[0], gather_logprobs(logits, one.clone())[0])


def test_rows_that_share_memory_keep_it(device):
    """An in-place gradient would be the last row's for all."""
    x = torch.randn(1, 10, device=device, requires_grad=True)
    targets = torch.arange(4, device=device)
    gradients = []
    for inplace in (True, False):
        logprobs, _ = gather_logprobs((x * 1).expand(4, 10), targets, inplace_backward=inplace)
        gradients.append(torch.autograd.grad(logprobs.sum(), x)[0])
    assert torch.equal(*gradients)


def test_graph_captured_whole_and_double_backward_refused(device):
    logits = torch.randn(3, 500, device=device, requires_grad=True)
    targets = torch.randint(0, 500, (3,), device=device)

    def loss(logits):
        logprobs, entropy = gather_logprobs(logits * 2, targets, inplace_backward=True)
        return logprobs.sum() + 0.1 * entropy.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(logits)
    torch.testing.assert_close(compiled, loss(logits))
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (compiled, loss(logits))))
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss(logits), logits, create_graph=True)
