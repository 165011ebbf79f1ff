from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode

from flashgrpo.kernels import linear_grpo
from flashgrpo.kernels.grpo_loss import LossConfig, logits_grpo_loss
from flashgrpo.kernels.linear_grpo import Head, Wanted, linear_grpo_loss, linear_logprobs, recompute, score
from flashgrpo.kernels.logprob import gather_logprobs

pytestmark = pytest.mark.twin

HIDDEN, VOCAB = 5, 13
OFFSETS = torch.tensor([0, 3, 3, 8, 9, 13, 15], dtype=torch.int32)
NUM_TOKENS = 15
ADVANTAGES = torch.tensor([1.3, 0.4, -0.8, -2.0, 0.5, 0.0], dtype=torch.float64)
CONFIGS = {
    **{name: LossConfig.preset(name) for name in ("grpo", "r1", "dapo", "bnpo", "dr_grpo", "gspo", "cispo", "sapo")},
    "everything": LossConfig(
        kl_coef=0.2, kl_weight="ratio", entropy_coef=0.1, behavior_cap=1.2, behavior_level="geometric", clip_max=2.0
    ),
    "everything_by_sequence": LossConfig(
        ratio_level="sequence", kl_coef=0.2, entropy_coef=0.1, behavior_cap=1.2, off_policy_threshold=0.05
    ),
    "forking_tokens": LossConfig(top_entropy=0.5, kl_coef=0.2, kl_weight="ratio", kl_estimator="k2"),
}
PER_TOKEN = ("old_logprobs", "ref_logprobs", "behavior_logprobs")


def make_head(num_rows=NUM_TOKENS, hidden_size=HIDDEN, vocab=VOCAB, dtype=torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(num_rows, hidden_size, dtype=torch.float64, generator=generator)
    weight = torch.randn(vocab, hidden_size, dtype=torch.float64, generator=generator)
    targets = torch.randint(0, vocab, (num_rows,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def make_per_token(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(6)
    logprobs = gather_logprobs(hidden.detach() @ weight.detach().T, targets, temperature=temperature)[0]
    return {
        name: logprobs + 0.3 * torch.randn(targets.shape, dtype=torch.float64, generator=generator)
        for name in PER_TOKEN
    }


def assert_same(actual: tuple, expected: tuple, inputs: list[Tensor], tolerance: float = 1e-12) -> None:
    """Equal losses, metrics and gradients."""
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=tolerance)
    assert actual[1].keys() == expected[1].keys()
    for key, value in expected[1].items():
        torch.testing.assert_close(actual[1][key], value)
    pairs = zip(*(torch.autograd.grad(4 * x[0], inputs) for x in (actual, expected)), strict=True)
    for actual_gradient, expected_gradient in pairs:
        torch.testing.assert_close(actual_gradient, expected_gradient, rtol=0, atol=tolerance)


@pytest.mark.parametrize("compact_below", [0.0, 0.9, 2.0])  # never, where few rows are live, always
@pytest.mark.parametrize("chunk_tokens", [1, 4, None])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_loss_of_whole_logits(name, chunk_tokens, compact_below, monkeypatch):
    monkeypatch.setattr(linear_grpo, "_COMPACT_BELOW", compact_below)
    hidden, weight, targets = make_head()
    targets[6] = -100
    advantages = ADVANTAGES.clone()
    advantages[3] = torch.nan
    options = {"denominator": 7, "advantages": advantages, "temperature": 0.8}
    options |= make_per_token(hidden, weight, targets, 0.8)
    actual = linear_grpo_loss(hidden, weight, targets, OFFSETS, CONFIGS[name], chunk_tokens=chunk_tokens, **options)
    expected = logits_grpo_loss(hidden @ weight.T, targets, OFFSETS, CONFIGS[name], **options)
    assert_same(actual, expected, [hidden, weight])


@pytest.mark.parametrize("name", ["dapo", "sapo", "everything", "everything_by_sequence", "forking_tokens"])
def test_gradcheck(name):
    hidden, weight, targets = make_head()
    per_token = make_per_token(hidden, weight, targets, 0.7)
    config = LossConfig(**{**asdict(CONFIGS[name]), "behavior_cap": None})

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_grpo_loss(
            hidden, weight, targets, OFFSETS, config, denominator=2, advantages=ADVANTAGES, temperature=0.7,
            chunk_tokens=4, **per_token,
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(loss, (hidden, weight))


@pytest.mark.parametrize("chunk_tokens", [1, 4, None])
def test_logprobs_equal_those_of_whole_logits_and_differentiate(chunk_tokens):
    hidden, weight, targets = make_head()
    targets[2] = -100
    options = {"temperature": 0.7}
    actual = linear_logprobs(hidden, weight, targets, chunk_tokens=chunk_tokens, **options)
    expected = gather_logprobs(hidden @ weight.T, targets, **options)
    upstream = torch.randn(2, NUM_TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for used in ([0], [1], [0, 1]):
        losses = [sum((upstream[i] * x[i]).sum() for i in used) for x in (actual, expected)]
        pairs = zip(*(torch.autograd.grad(x, (hidden, weight), retain_graph=True) for x in losses), strict=True)
        for pair in pairs:
            torch.testing.assert_close(*pair, rtol=0, atol=1e-12)
    for pair in zip(actual, expected, strict=True):
        torch.testing.assert_close(*pair, rtol=0, atol=1e-12)


def test_gradcheck_of_logprobs():
    hidden, weight, targets = make_head(6)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_logprobs(h, w, targets, temperature=0.6, chunk_tokens=4), (hidden, weight)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["dapo", "gspo"])
def test_scored_logprobs_equal_the_trained_ones_bit_for_bit(name, dtype):
    hidden, weight, targets = make_head(NUM_TOKENS, 64, 300, dtype)
    with torch.no_grad():
        scored, entropies = linear_logprobs(hidden, weight, targets, chunk_tokens=4)
        bare, nothing = linear_logprobs(hidden, weight, targets, chunk_tokens=4, entropy=False)
    assert nothing is None
    assert torch.equal(bare, scored)
    _, stats = linear_grpo_loss(
        hidden, weight, targets, OFFSETS, CONFIGS[name], denominator=1, advantages=ADVANTAGES, old_logprobs=scored,
        chunk_tokens=4,
    )  # fmt: skip
    assert torch.equal(stats["logprobs"], scored)
    assert torch.equal(stats["entropies"], entropies)
    assert stats["ratio_max"] == stats["ratio_mean"] == 1


class Operations(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.matmuls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.matmuls += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


def peak_bytes(step: Callable[[], Tensor]) -> int:
    """Most bytes that forward and backward hold at once, beyond their inputs."""
    with MemTracker() as tracker:
        step().backward()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


@pytest.mark.parametrize("name", ["dapo", "gspo", "everything", "scoring"])
def test_memory_grows_with_the_chunk_and_not_with_the_logits(name):
    num_rows, vocab = 512, 1000
    hidden, weight, targets = make_head(num_rows, 4, vocab, torch.float32)
    per_token = {key: torch.zeros(num_rows) for key in PER_TOKEN}

    def step(chunk_tokens: int) -> Tensor:
        if name == "scoring":  # what linear_logprobs runs as one operator, into which the tracker does not see
            head = Head(hidden, weight, targets, 1.0, chunk_tokens, torch.float32)
            with torch.no_grad():
                score(head)
                recompute(head, torch.ones(num_rows), None, Wanted(True, True, compact=True, narrow=True))
            return hidden.sum()
        return linear_grpo_loss(
            hidden, weight, targets, torch.tensor([0, 100, num_rows]), CONFIGS[name], denominator=1,
            advantages=torch.tensor([1.0, -1.0]), chunk_tokens=chunk_tokens, **per_token,
        )[0]  # fmt: skip

    small, large = (peak_bytes(lambda n=n: step(n)) for n in (16, 64))
    assert small < num_rows * vocab * 4 / 4
    # softmax, its logarithm and for a moment their product
    assert 1.5 <= (large - small) / (48 * vocab * 4) <= 3.5


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2]
)
@pytest.mark.parametrize("name", ["dapo", "gspo"])
def test_autocast_casts_as_it_does_for_products(name, dtypes):
    """Values are those of inputs cast before; gradients come back in the inputs' dtypes."""
    made = make_head(NUM_TOKENS, 64, 200, torch.float32)

    def step(dtypes: tuple, enabled: bool) -> tuple[Tensor, ...]:
        leaves = [x.detach().bfloat16().to(dtype).requires_grad_() for x, dtype in zip(made, dtypes, strict=False)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, stats = linear_grpo_loss(
                *leaves, made[2], OFFSETS, CONFIGS[name], denominator=3, advantages=ADVANTAGES, chunk_tokens=8
            )
            scored, _ = linear_logprobs(*leaves, made[2])
            gradients = [torch.autograd.grad(x, leaves) for x in (loss, scored.sum())]
        assert [x.dtype for pair in gradients for x in pair] == [*dtypes] * 2
        return loss, stats["entropies"], scored, *(x.bfloat16() for pair in gradients for x in pair)

    for actual, expected in zip(step(dtypes, True), step((torch.bfloat16,) * 2, False), strict=True):
        assert torch.equal(actual, expected)


def test_autocast_leaves_float64():
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_logprobs(*make_head())[0].dtype == torch.float64


@pytest.mark.parametrize("name", ["dapo", "gspo"])
def test_main_grad_takes_the_weights_gradient(name):
    hidden, weight, targets = make_head()
    arguments, given = (targets, OFFSETS, CONFIGS[name]), {"denominator": 3, "advantages": ADVANTAGES}
    expected = torch.autograd.grad(linear_grpo_loss(hidden, weight, *arguments, **given)[0], (hidden, weight))
    main_grad = torch.ones_like(weight.detach())
    losses = [linear_grpo_loss(hidden, weight, *arguments, **given, main_grad=main_grad)[0] for _ in range(2)]
    assert torch.equal(main_grad, torch.ones_like(main_grad))  # until the backward pass
    (losses[0] - 3 * losses[1]).backward()
    assert weight.grad is None
    torch.testing.assert_close(hidden.grad, -2 * expected[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(main_grad, 1 - 2 * expected[1], rtol=0, atol=1e-12)
    for wrong in (main_grad.float(), main_grad[1:]):
        with pytest.raises(ValueError, match=r"main_grad is .*; wanted torch.float64 \(13, 5\)"):
            linear_grpo_loss(hidden, weight, *arguments, **given, main_grad=wrong)


def count_matmuls(*, name="dapo", grad=(True, True), advantages=(1.0, -1.0)) -> int:
    hidden, weight, targets = make_head(16, 4, 9, torch.float32)
    hidden.requires_grad_(grad[0])
    weight.requires_grad_(grad[1])
    with Operations() as operations:
        linear_grpo_loss(
            hidden, weight, targets, torch.tensor([0, 8, 16]), CONFIGS[name], denominator=1,
            advantages=torch.tensor(advantages), chunk_tokens=8,
        )  # fmt: skip
    return operations.matmuls


def test_only_the_gemms_that_are_needed_run():
    assert count_matmuls() == 6
    assert count_matmuls(grad=(True, False)) == 4
    assert count_matmuls(grad=(False, True)) == 4
    assert count_matmuls(grad=(False, False)) == 2
    assert count_matmuls(name="gspo") == 8
    assert count_matmuls(name="gspo", grad=(False, False)) == 2
    with torch.no_grad():
        assert count_matmuls() == 2
        assert count_matmuls(name="gspo") == 2


def test_dead_rows_leave_the_gradient_gemms():
    assert count_matmuls(name="gspo", advantages=(0.0, 1.0)) == 2 + 3
    assert count_matmuls(name="gspo", advantages=(0.0, 0.0)) == 2


def test_gradients_wait_for_the_upstream_scalar_and_can_be_taken_again():
    hidden, weight, targets = make_head()
    loss, _ = linear_grpo_loss(
        hidden, weight, targets, OFFSETS, LossConfig(), denominator=torch.tensor(3), advantages=ADVANTAGES
    )
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss * -2.5, (hidden, weight), retain_graph=True)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(-2.5 * a, b)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_a_frozen_input_gets_no_gradient():
    hidden, weight, targets = make_head()
    arguments = (targets, OFFSETS, LossConfig())
    full, _ = linear_grpo_loss(hidden, weight, *arguments, denominator=3, advantages=ADVANTAGES)
    d_hidden, d_weight = torch.autograd.grad(full, (hidden, weight))
    frozen_head, _ = linear_grpo_loss(hidden, weight.detach(), *arguments, denominator=3, advantages=ADVANTAGES)
    assert torch.equal(torch.autograd.grad(frozen_head, hidden)[0], d_hidden)
    frozen_body, _ = linear_grpo_loss(hidden.detach(), weight, *arguments, denominator=3, advantages=ADVANTAGES)
    assert torch.equal(torch.autograd.grad(frozen_body, weight)[0], d_weight)
    nothing, _ = linear_grpo_loss(hidden.detach(), weight.detach(), *arguments, denominator=3, advantages=ADVANTAGES)
    assert not nothing.requires_grad


@pytest.mark.parametrize("name", CONFIGS)
def test_no_rows_give_zero_loss_and_zero_gradients(name):
    hidden, weight, targets = make_head(0)
    empty = {key: torch.zeros(0) for key in PER_TOKEN}
    loss, _ = linear_grpo_loss(
        hidden, weight, targets, torch.tensor([0, 0]), CONFIGS[name], denominator=2, advantages=torch.ones(1), **empty
    )
    d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight))
    assert loss == 0
    assert d_hidden.shape == (0, HIDDEN)
    assert torch.equal(d_weight, torch.zeros_like(weight))
    logprobs, _ = linear_logprobs(hidden, weight, targets)
    assert not torch.autograd.grad(logprobs.sum(), weight)[0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("logits_dtype", [None, torch.float32])
def test_low_precision_is_as_exact_as_plain_torch(logits_dtype, dtype):
    """Error against float64 of the same numbers: at most 1.1x (RMS), 1.5x (largest) that of dense torch.

    A denominator that is no power of two rounds what it divides; fp16 divides what has been rounded.
    """
    num_rows, denominator = 96, 100.0 if dtype == torch.bfloat16 else 32.0
    hidden, weight, targets = make_head(num_rows, 64, 200, dtype)
    with torch.no_grad():
        weight *= 0.2
    offsets, advantages = torch.tensor([0, 50, num_rows]), torch.tensor([1.0, -1.0])
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]

    def naive(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        logits = hidden @ weight.T
        log_p = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), 1)
        logprobs = log_p[torch.arange(num_rows), targets]
        loss = (logprobs[50:].mean() - logprobs[:50].mean()) / denominator
        entropies = -(log_p.exp() * log_p).sum(1)
        return logprobs.detach(), entropies.detach(), *torch.autograd.grad(loss, (hidden, weight))

    loss, stats = linear_grpo_loss(
        hidden, weight, targets, offsets, LossConfig(), denominator=denominator, advantages=advantages,
        chunk_tokens=16, logits_dtype=logits_dtype,
    )  # fmt: skip
    actual = stats["logprobs"], stats["entropies"], *torch.autograd.grad(loss, (hidden, weight))
    assert actual[2].dtype == actual[3].dtype == dtype
    for ours, plain, true in zip(actual, naive(hidden, weight), naive(*wide), strict=True):
        floor = 1e-6 * true.abs().max()
        error, plain_error = (x.double() - true for x in (ours, plain))
        assert error.square().mean().sqrt() <= 1.1 * plain_error.square().mean().sqrt() + floor
        assert error.abs().max() <= 1.5 * plain_error.abs().max() + floor


def test_float16_gradients_survive_a_large_denominator():
    hidden, weight, targets = make_head(NUM_TOKENS, dtype=torch.float16)
    arguments = (hidden, weight, targets, OFFSETS, LossConfig.preset("bnpo"))
    scaled, _ = linear_grpo_loss(*arguments, denominator=2.0**20, advantages=ADVANTAGES)
    plain, _ = linear_grpo_loss(*arguments, denominator=1, advantages=ADVANTAGES)
    for a, b in zip(
        torch.autograd.grad(scaled * 2**20, (hidden, weight)), torch.autograd.grad(plain, (hidden, weight)), strict=True
    ):
        assert torch.equal(a, b)


def test_a_target_out_of_range_is_nan():
    hidden, weight, targets = make_head()
    targets[4] = VOCAB
    logprobs, _ = linear_logprobs(hidden, weight, targets)
    assert logprobs.isnan().nonzero().tolist() == [[4]]
    loss, _ = linear_grpo_loss(hidden, weight, targets, OFFSETS, LossConfig(), denominator=1, advantages=ADVANTAGES)
    assert loss.isnan()


H, W, T = torch.zeros(3, 4), torch.zeros(7, 4), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((H[0], W, T), {}, ValueError, "hidden has shape"),
        ((H, W[:, :3], T), {}, ValueError, r"lm_head_weight has shape \(7, 3\); wanted \[vocab, 4\]"),
        ((H, W[:0], T), {}, ValueError, "lm_head_weight has shape"),
        ((H, W.double(), T), {}, TypeError, "lm_head_weight torch.float64"),
        ((H.long(), W.long(), T), {}, TypeError, "floating"),
        ((H, W, T[:2]), {}, ValueError, r"targets has shape \(2,\); wanted \[3\]"),
        ((H, W, T.float()), {}, TypeError, "targets is torch.float32"),
        ((H, W, T), {"temperature": -1.0}, ValueError, "temperature is -1"),
        ((H, W, T), {"chunk_tokens": 0}, ValueError, "chunk_tokens is 0"),
        ((H, W, T), {"logits_dtype": torch.bfloat16}, ValueError, "logits_dtype is torch.bfloat16"),
        ((H.double(), W.double(), T), {"logits_dtype": torch.float32}, ValueError, "logits_dtype is torch.float32"),
    ],
)
def test_bad_arguments_are_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        linear_logprobs(*arguments, **options)
    with pytest.raises(error, match=message):
        linear_grpo_loss(
            *arguments, torch.tensor([0, 3]), LossConfig(), denominator=1, advantages=torch.ones(1), **options
        )


def test_a_bad_denominator_is_named():
    with pytest.raises(ValueError, match="denominator is 0"):
        linear_grpo_loss(H, W, T, torch.tensor([0, 3]), LossConfig(), denominator=0, advantages=torch.ones(1))
