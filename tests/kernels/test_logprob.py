"""Rows of logits against the definition in float64, where a vocabulary, a value or a layout could trip them."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flashgrpo.kernels import logprob, logprob_torch
from flashgrpo.kernels.logprob import gather_logprobs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Around a slice, a block of the torch twin's and of the kernels', and those of real models.
VOCABS = [1, 17, 127, 1024, 1025, 8191, 8193, 16385, 50257, 151936]


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
        assert values[0].dtype == torch.float32
        as_accurate(*values, name)
    assert ours[1].dtype == logits.dtype
    as_accurate(ours[1], torchs[1].to(logits.dtype), exact[1], "d_logits")


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


@pytest.mark.parametrize("temperature", [0.01, 100.0])
def test_temperatures(temperature, device, as_accurate):
    targets = torch.randint(0, 1025, (6,), device=device)
    check(as_accurate, 5 * torch.randn(6, 1025, device=device), targets, temperature=temperature)


def rows_of_trouble():
    n, vocab, inf = 10, 20000, float("inf")  # three blocks
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
    logits[8] = -1e7
    logits[9, :10_000], logits[9, 11_000:] = -3e38, -1e30  # masked by numbers, in most threads all that they have
    targets[9] = 10_500
    return logits, targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.01])
@pytest.mark.filterwarnings("ignore:overflow")
def test_extreme_rows(dtype, temperature, device, poisoned, as_accurate):
    logits, targets = (x.to(device) for x in rows_of_trouble())
    check(as_accurate, logits.to(dtype), targets, temperature=temperature)


@pytest.mark.twin
@pytest.mark.parametrize("rows_a_chunk", [1, 3, 100])
def test_chunks_of_rows_change_nothing(rows_a_chunk, monkeypatch):
    monkeypatch.setattr(logprob_torch, "_CHUNK_BYTES", rows_a_chunk * 4 * 11)
    logits, targets = 3 * torch.randn(7, 11, dtype=torch.float64), torch.randint(0, 11, (7,))
    upstream = [torch.randn(7), torch.randn(7)]
    results = [gradient(f, logits, targets, upstream, torch.float64, temperature=0.7) for f in (gather_logprobs, dense)]
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


@pytest.mark.twin
def test_gradcheck():
    logits, targets = torch.randn(4, 5, dtype=torch.float64, requires_grad=True), torch.tensor([1, 4, -100, 0])
    assert torch.autograd.gradcheck(lambda x: gather_logprobs(x, targets.int(), temperature=0.6), logits)


def test_masked_vocabulary(device):
    inf = torch.inf
    logits = torch.tensor([[-inf, 2.0, -inf], [1.0, 1.0, -inf], [-inf, 1.0, 1.0]], device=device, requires_grad=True)
    logprobs, entropy = gather_logprobs(logits, torch.tensor([1, 0, 0], device=device))
    log2 = torch.tensor(2.0).log().item()
    assert logprobs.tolist() == pytest.approx([0, -log2, -inf], abs=1e-6)
    assert entropy.tolist() == pytest.approx([0, log2, log2], abs=1e-6)
    (by_logprob,) = torch.autograd.grad(logprobs.sum(), logits, retain_graph=True)
    expected = torch.tensor([[0, 0, 0], [0.5, -0.5, 0], [1, -0.5, -0.5]], device=device)
    torch.testing.assert_close(by_logprob, expected)
    (by_entropy,) = torch.autograd.grad((1e6 * entropy).sum(), logits)
    assert by_entropy.abs().max() < 0.1 + 1e6 * 1e-6


def test_rows_of_nan_and_targets_out_of_range_stay_alone(device):
    logits = torch.randn(7, 9000, device=device)
    logits[1:3, 8500] = float("nan")  # the first of them is ignored
    targets = torch.tensor([3, -100, 4, 9000, -1, 2**31 - 1, 5], device=device)
    upstream = [torch.ones(7, device=device), None]
    outputs, d_logits = gradient(gather_logprobs, logits, targets, upstream, logits.dtype)
    wrong = [False, False, True, True, True, True, False]
    assert outputs[0].isnan().tolist() == wrong
    assert d_logits.isnan().any(1).tolist() == wrong
    assert not any(x[1].any() for x in (*outputs, d_logits))


@pytest.mark.parametrize("layout", ["rows apart", "unaligned", "columns apart", "shared memory"])
@pytest.mark.parametrize("inplace", [False, True])
def test_layouts(layout, inplace, device):
    storage = torch.randn(6, 2100, device=device).bfloat16()
    views = {"rows apart": storage[::2, :1500], "unaligned": storage[:3, 1:1501], "columns apart": storage[:3, ::2]}
    views["shared memory"] = storage[:1, :1500].expand(3, 1500)  # an in-place gradient would be the last row's for all
    view = views[layout]
    targets = torch.randint(0, view.shape[1], (3,), device=device)
    upstream = [torch.randn(3, device=device), None]
    wanted = gradient(gather_logprobs, view.contiguous(), targets, upstream, view.dtype)
    leaf = storage.clone().requires_grad_()
    logprobs, _ = gather_logprobs(
        (leaf * 1).as_strided(view.shape, view.stride(), view.storage_offset()), targets, inplace_backward=inplace
    )
    assert torch.equal(logprobs, wanted[0][0])
    (d_storage,) = torch.autograd.grad((logprobs * upstream[0]).sum(), leaf)
    d_logits = d_storage.as_strided(view.shape, view.stride(), view.storage_offset())
    if layout == "shared memory":
        torch.testing.assert_close(d_logits[0], wanted[1].sum(0), rtol=0.02, atol=0.02)
    else:
        assert torch.equal(d_logits, wanted[1])


# Of logits [batch, length, vocab].
VIEWS = {
    "a position fewer": lambda x: x[:, :-1],
    "length first": lambda x: x.transpose(0, 1),
    "four dimensions": lambda x: x.unflatten(0, (2, 1))[:, :, 1:],
    "too many strides": lambda x: x.unflatten(1, (3, 2))[:, :2, :1],
    "windows": lambda x: x[0].unfold(0, 4, 1).transpose(1, 2),
    "one row": lambda x: x[1, 2],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("inplace", [False, True])
def test_leading_dimensions(view, inplace, device):
    """Values are TRL's selective_log_softmax in float64; bits are those of the rows one below the other."""
    storage = 3 * torch.randn(2, 6, 1037, device=device)
    view = VIEWS[view]
    targets = torch.randint(0, 1037, view(storage).shape[:-1], device=device)
    upstream = list(torch.randn(2, *targets.shape, device=device))
    rows = view(storage).reshape(-1, 1037)
    wanted, d_rows = gradient(gather_logprobs, rows, targets.flatten(), [x.flatten() for x in upstream], rows.dtype)
    outputs, d_logits = gradient(
        lambda x, *others: gather_logprobs(view(x * 1), *others, inplace_backward=inplace), storage, targets, upstream,
        rows.dtype,
    )  # fmt: skip
    exact = view(storage).double().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(outputs[0].double(), exact, rtol=1e-6, atol=1e-6)
    for x, y in zip(outputs, wanted, strict=True):
        assert x.shape == targets.shape
        assert torch.equal(x.flatten(), y)
    leaf = storage.clone().requires_grad_()
    (expected,) = torch.autograd.grad(view(leaf), leaf, d_rows.view(view(leaf).shape))
    assert torch.equal(d_logits, expected)


class Allocations(TorchDispatchMode):
    """The largest tensor that is new."""

    def __init__(self, *given):
        super().__init__()
        self.known, self.largest = {x.untyped_storage().data_ptr() for x in given}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, x.numel())
        return made


@pytest.mark.parametrize("view", ["a position fewer", "length first"])
def test_a_forward_pass_makes_nothing_of_the_logits_size(view, device, monkeypatch):
    monkeypatch.setattr(logprob_torch, "_CHUNK_BYTES", 4 * 300)  # a row
    logits = VIEWS[view](torch.randn(4, 6, 300, device=device))
    with Allocations(logits) as allocations:
        gather_logprobs(logits, torch.zeros(logits.shape[:-1], dtype=torch.int64, device=device))
    assert allocations.largest <= 300


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_entropy_the_log_probs_keep_their_bits(dtype, device, poisoned):
    logits, targets = (3 * torch.randn(4, 20_001, device=device)).to(dtype), torch.tensor([3, 20_000, -100, 9000])
    wanted, d_wanted = gradient(
        gather_logprobs, logits, targets.to(device), [torch.ones(4, device=device), None], dtype
    )
    leaf = logits.requires_grad_()
    logprobs, entropies = gather_logprobs(leaf, targets.to(device), entropy=False)
    assert entropies is None
    assert torch.equal(logprobs, wanted[0])
    assert torch.equal(torch.autograd.grad(logprobs.sum(), leaf)[0], d_wanted)


@pytest.mark.kernels
@pytest.mark.parametrize("entropy", [True, False])
def test_the_operator_says_what_it_does(entropy, device):
    logits = torch.randn(2, 3, 40, device=device)[:, :2].requires_grad_()
    targets = torch.zeros(4, dtype=torch.int64, device=device)
    torch.library.opcheck(logprob._logprob_fwd, (logits, targets, 0.7, False, entropy))


def test_a_gradient_in_place_lies_in_the_logits_which_serve_no_second_time(device):
    leaf, targets = torch.randn(4, 300, device=device, requires_grad=True), torch.arange(4, device=device)
    logits, reference = leaf * 2, (leaf * 2).detach().requires_grad_()
    gather_logprobs(reference, targets)[0].sum().backward()
    logprobs, _ = gather_logprobs(logits, targets, inplace_backward=True)
    logprobs.sum().backward(retain_graph=True)
    assert torch.equal(logits.detach(), reference.grad)
    assert torch.equal(leaf.grad, 2 * reference.grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprobs.sum().backward()


def test_results_may_be_overwritten_before_the_backward_pass(device):
    leaf, targets = torch.randn(4, 50, device=device, requires_grad=True), torch.arange(4, device=device)
    logprobs, _ = gather_logprobs(leaf, targets)
    (wanted,) = torch.autograd.grad(logprobs[2:].sum(), leaf)
    logprobs, _ = gather_logprobs(leaf, targets)
    logprobs.masked_fill_(targets < 2, 0)  # padding, as trainers do it
    assert torch.equal(torch.autograd.grad(logprobs.sum(), leaf)[0], wanted)


def test_a_row_does_not_depend_on_its_neighbours_nor_on_autocast(device):
    logits, targets = torch.randn(6, 3000, device=device).bfloat16(), torch.randint(0, 3000, (6,), device=device)
    with torch.autocast(device.type, torch.float16):
        together = gather_logprobs(logits, targets)
    alone = [gather_logprobs(logits[i : i + 1], targets[i : i + 1]) for i in range(6)]
    for a, b in zip(together, map(torch.cat, zip(*alone, strict=True)), strict=True):
        assert torch.equal(a, b)


def test_targets_of_any_stride(device):
    logits, pairs = torch.randn(6, 40, device=device), torch.randint(0, 40, (6, 2), device=device)
    for targets in (pairs[:, 0], pairs[:1, 0].expand(6)):
        assert torch.equal(gather_logprobs(logits, targets)[0], gather_logprobs(logits, targets.clone())[0])


def test_no_rows(device):
    logits = torch.zeros(0, 5, device=device, requires_grad=True)
    logprobs, entropy = gather_logprobs(logits, torch.zeros(0, dtype=torch.int64, device=device))
    assert logprobs.shape == entropy.shape == (0,)
    assert torch.autograd.grad(logprobs.sum(), logits)[0].shape == (0, 5)


def test_graph_captured_whole_and_double_backward_refused(device):
    logits = torch.randn(2, 3, 500, device=device, requires_grad=True)
    targets = torch.randint(0, 500, (2, 2), device=device)

    def loss(logits):
        logprobs, entropy = gather_logprobs((logits * 2)[:, :-1], targets, inplace_backward=True)
        return logprobs.sum() + 0.1 * entropy.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(logits)
    torch.testing.assert_close(compiled, loss(logits))
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (compiled, loss(logits))))
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss(logits), logits, create_graph=True)


Z, T = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("logits", "targets", "temperature", "error", "message"),
    [
        (Z[0, 0], T, 1.0, ValueError, "logits has shape"),
        (Z[0], T, 1.0, ValueError, r"wanted \[\]"),
        (Z[:, :0], T, 1.0, ValueError, "logits has shape"),
        (Z.long(), T, 1.0, TypeError, "floating"),
        (Z, T[:2], 1.0, ValueError, r"wanted \[3\]"),
        (Z, T.float(), 1.0, TypeError, "targets is torch.float32"),
        (Z, T, 0.0, ValueError, "temperature is 0.0"),
        (Z, T, torch.nan, ValueError, "temperature is nan"),
    ],
)
def test_bad_arguments_are_named(logits, targets, temperature, error, message):
    with pytest.raises(error, match=message):
        gather_logprobs(logits, targets, temperature=temperature)
