"""Three GEMMs and the kernels between them, against the torch twin in float64."""

import pytest
import torch

from flashgrpo.kernels import grpo_loss, linear_grpo
from flashgrpo.kernels.grpo_loss import LossConfig, logits_grpo_loss
from flashgrpo.kernels.linear_grpo import default_chunk_tokens, linear_grpo_loss, linear_logprobs
from flashgrpo.kernels.logprob import gather_logprobs

pytestmark = pytest.mark.kernels

SPANS = [14, 0, 1, 66, 20]  # few: in the interpreter a row takes 10 ms a kernel
NUM_TARGETS = sum(SPANS)


def make_case(device, dtype=torch.float32, hidden_size=40, vocab=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(NUM_TARGETS, hidden_size, generator=generator)
    weight = torch.randn(vocab, hidden_size, generator=generator) / 4
    targets = torch.randint(0, vocab, (NUM_TARGETS,), generator=generator)
    targets[7] = -100
    noise = [-5 + torch.randn(NUM_TARGETS, generator=generator) for _ in range(3)]
    arguments = {
        "advantages": torch.tensor([1.0, 2.0, float("nan"), 0.0, -0.7]),
        "old_logprobs": noise[0],
        "ref_logprobs": noise[1],
        "behavior_logprobs": noise[2],
    }
    offsets = torch.tensor([0, *SPANS]).cumsum(0)
    move = [x.to(device) for x in (hidden.to(dtype), weight.to(dtype), targets, offsets)]
    return *move, {name: x.to(device) for name, x in arguments.items()}


def evaluate(case, config, dtype, needed=(True, True), upstream=1.0, **options):
    hidden, weight, targets, offsets, arguments = case
    leaves = [x.to(dtype, copy=True).requires_grad_(need) for x, need in zip((hidden, weight), needed, strict=True)]
    typed = {name: x.double() if dtype == torch.float64 else x for name, x in arguments.items()}
    if config.behavior_cap is None:
        del typed["behavior_logprobs"]
    loss, stats = linear_grpo_loss(*leaves, targets, offsets, config, denominator=64.0, **typed, **options)
    (upstream * loss).backward()
    return loss.detach(), *(leaf.grad for leaf in leaves), stats


@pytest.mark.parametrize("chunk_tokens", [32, 1000])
@pytest.mark.parametrize(
    "config",
    [
        LossConfig.preset("grpo"),
        LossConfig.preset("gspo", kl_coef=0.1),
        LossConfig.preset("dapo", entropy_coef=0.01, behavior_cap=2.0),
        LossConfig.preset("cispo"),
    ],
    ids=["grpo", "gspo", "dapo", "cispo"],
)
def test_equals_the_twin(config, chunk_tokens, device, poisoned):
    case = make_case(device)
    ours = evaluate(case, config, torch.float32, chunk_tokens=chunk_tokens, temperature=0.9)
    exact = evaluate(case, config, torch.float64, temperature=0.9)
    for a, b in zip(ours[:3], exact[:3], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-5 * b.abs().max().item())
    assert ours[3].keys() == exact[3].keys()
    for name, value in exact[3].items():
        torch.testing.assert_close(ours[3][name].double(), value.double(), rtol=1e-4, atol=1e-5, msg=name)


def dense(hidden, weight, targets, advantages, denominator):
    """On-policy sum of tokens' losses over the denominator in plain torch."""
    logprobs = torch.log_softmax(
        (hidden @ weight.T).float() if hidden.dtype != torch.float64 else hidden @ weight.T, -1
    )
    chosen = logprobs.gather(1, targets[:, None])[:, 0]
    return -((chosen - chosen.detach()).exp() * advantages.to(chosen.dtype)).sum() / denominator


@pytest.mark.parametrize(
    ("dtype", "denominator", "logits_dtype", "preset", "chunk_tokens"),
    [
        # A denominator that is no power of two rounds what it divides. In fp16 it divides what has been rounded.
        (torch.bfloat16, 37.0, None, "bnpo", 48),
        (torch.bfloat16, 37.0, None, "bnpo", None),
        (torch.bfloat16, 37.0, None, "gspo", 48),
        (torch.bfloat16, 37.0, torch.float32, "bnpo", 48),
        (torch.float16, 64.0, None, "bnpo", 48),
        (torch.float16, 64.0, torch.float32, "bnpo", None),
    ],
)
def test_low_precision_is_as_accurate_as_torch(
    dtype, denominator, logits_dtype, preset, chunk_tokens, device, as_accurate
):
    hidden, weight, targets, _, _ = make_case(device, dtype, hidden_size=64)
    targets[7] = 3
    offsets = torch.arange(NUM_TARGETS + 1, device=device)
    advantages = torch.randn(NUM_TARGETS, device=device)
    config = LossConfig.preset(preset)
    gradients = []
    for function, kind in ((None, dtype), (dense, dtype), (dense, torch.float64)):
        leaves = [x.to(kind, copy=True).requires_grad_() for x in (hidden, weight)]
        if function is None:
            loss, _ = linear_grpo_loss(
                *leaves, targets, offsets, config, denominator=denominator, advantages=advantages,
                logits_dtype=logits_dtype, chunk_tokens=chunk_tokens,
            )  # fmt: skip
        else:
            loss = function(*leaves, targets, advantages, denominator)
        gradients.append(torch.autograd.grad(loss, leaves))
    for name, *values in zip(("d_hidden", "d_weight"), *gradients, strict=True):
        as_accurate(*values, name)


def test_a_tiny_denominator_keeps_fp16_gradients(device):
    """1 / 1e6 inside the GEMMs would flush most of them to 0."""
    hidden, weight, targets, offsets, arguments = make_case(device, torch.float16)
    made = []
    for denominator in (1.0, 1e6):
        loss, _ = linear_grpo_loss(
            hidden.requires_grad_(), weight, targets, offsets, LossConfig(aggregate="token_mean"),
            denominator=denominator, advantages=arguments["advantages"],
        )  # fmt: skip
        made.append(torch.autograd.grad(denominator * loss, hidden)[0])
    assert torch.equal(*made)
    assert (made[1][: SPANS[0]].abs().sum(1) > 0).sum() == SPANS[0] - 1  # all but the ignored one


@pytest.mark.parametrize(("dtype", "rounded_twice"), [(torch.float32, 0), (torch.bfloat16, 2**-8)])
def test_upstream_gradients_scale_what_was_made_and_1_touches_nothing(dtype, rounded_twice, device, monkeypatch):
    hidden, weight = (torch.randn(16, n, device=device).to(dtype).T for n in (6, 20))  # columns in a row
    targets, offsets = torch.arange(6, device=device), torch.tensor([0, 2, 6], device=device)
    given = {"denominator": 7.0, "advantages": torch.tensor([1.0, -2.0], device=device)}

    def gradients(upstream, chunk_tokens=None, **options):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        loss, _ = linear_grpo_loss(
            *leaves, targets, offsets, LossConfig(), chunk_tokens=chunk_tokens, **given, **options
        )
        (upstream * loss).backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        return [leaf.grad for leaf in leaves]

    in_chunks = gradients(1.0, 4)
    main_grad = torch.zeros(20, 16, device=device)
    assert gradients(3.0, 4, main_grad=main_grad)[1] is None
    torch.testing.assert_close(main_grad, 3 * in_chunks[1].float(), rtol=2 * rounded_twice or 1e-6, atol=1e-6)
    monkeypatch.setattr(grpo_loss, "_scaled", None)  # what makes another tensor
    once = gradients(1.0)
    for a, b in zip(once, in_chunks, strict=True):
        torch.testing.assert_close(a, b, rtol=2 * rounded_twice or 1e-5, atol=1e-6)
    for a, b in zip(gradients(3.0), once, strict=True):
        torch.testing.assert_close(a.float(), 3 * b.float(), rtol=rounded_twice, atol=0)


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
@pytest.mark.parametrize("preset", ["dapo", "gspo"])
def test_only_what_is_needed(needed, preset, device):
    case, config = make_case(device), LossConfig.preset(preset)
    both, one = evaluate(case, config, torch.float32), evaluate(case, config, torch.float32, needed)
    for a, b, need in zip(both[1:3], one[1:3], needed, strict=True):
        assert torch.equal(a, b) if need else b is None


@pytest.mark.parametrize(("compact_below", "entropy_coef"), [(2.0, 0.0), (0.9, 0.0), (2.0, 0.01)])
def test_compaction_changes_no_gradient(compact_below, entropy_coef, device, monkeypatch):
    case = make_case(device)
    config = LossConfig.preset("dapo", entropy_coef=entropy_coef)
    monkeypatch.setattr(linear_grpo, "_COMPACT_BELOW", 0.0)
    all_rows = evaluate(case, config, torch.float32, chunk_tokens=32)
    monkeypatch.setattr(linear_grpo, "_COMPACT_BELOW", compact_below)
    live = evaluate(case, config, torch.float32, chunk_tokens=32)
    for a, b in zip(all_rows[:3], live[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert live[1][SPANS[0] + 1 : SPANS[0] + 1 + SPANS[3]].any() == (
        entropy_coef != 0
    )  # an advantage of 0: only the bonus is left


@pytest.mark.parametrize("logits_dtype", [None, torch.float32])
def test_one_log_prob_path(logits_dtype, device):
    """New minus old is exactly 0 at equal weights, so every ratio is exactly 1."""
    hidden, weight, targets, offsets, arguments = make_case(device, torch.bfloat16)
    options = {"chunk_tokens": 32, "logits_dtype": logits_dtype, "temperature": 0.8}
    old, entropies = linear_logprobs(hidden, weight, targets, **options)
    assert torch.equal(linear_logprobs(hidden, weight, targets, entropy=False, **options)[0], old)
    _, stats = linear_grpo_loss(
        hidden.requires_grad_(), weight, targets, offsets, LossConfig(), denominator=3.0, old_logprobs=old,
        advantages=arguments["advantages"], **options,
    )  # fmt: skip
    assert torch.equal(stats["logprobs"], old)
    assert torch.equal(stats["entropies"], entropies)
    assert stats["ratio_mean"] == stats["ratio_max"] == 1


def test_one_log_prob_path_for_rows_of_several_blocks(device):
    """A row's sums in another order would differ in the last bit."""
    hidden, weight = torch.randn(24, 8, device=device), torch.randn(50_257, 8, device=device, requires_grad=True)
    targets, offsets = torch.randint(0, 50_257, (24,), device=device), torch.tensor([0, 24], device=device)
    old, _ = linear_logprobs(hidden, weight, targets)
    gathered, _ = gather_logprobs(hidden @ weight.T, targets)
    for config in (LossConfig(), LossConfig.preset("gspo")):
        arguments = (targets, offsets, config)
        given = {"denominator": 1.0, "advantages": torch.ones(1, device=device)}
        assert torch.equal(linear_grpo_loss(hidden, weight, *arguments, **given)[1]["logprobs"], old)
        assert torch.equal(logits_grpo_loss(hidden @ weight.T, *arguments, **given)[1]["logprobs"], gathered)


def test_linear_logprobs_and_gradients(device, poisoned):
    hidden, weight, targets, _, _ = make_case(device)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(NUM_TARGETS, generator=generator).to(device) for _ in range(2)]
    results = []
    for dtype, chunk in ((torch.float32, 32), (torch.float64, None)):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight)]
        outputs = linear_logprobs(*leaves, targets, temperature=0.7, chunk_tokens=chunk)
        total = sum((x * u.to(dtype)).sum() for x, u in zip(outputs, upstream, strict=True))
        results.append([*outputs, *torch.autograd.grad(total, leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-5 * b.abs().max().item())


def test_no_targets(device, poisoned):
    hidden = torch.zeros(0, 16, device=device, requires_grad=True)
    weight = torch.randn(20, 16, device=device, requires_grad=True)
    offsets = torch.zeros(2, dtype=torch.int64, device=device)
    advantages = torch.ones(1, device=device)
    for config in (LossConfig(), LossConfig.preset("gspo")):
        loss, stats = linear_grpo_loss(
            hidden, weight, offsets[:0], offsets, config, denominator=1.0, advantages=advantages
        )
        assert loss == 0
        assert stats["num_tokens"] == 0
        assert not torch.autograd.grad(loss, weight)[0].any()


def test_graph_captured_whole_and_double_backward_refused(device):
    hidden, weight, targets, offsets, arguments = make_case(device)
    weight.requires_grad_()
    config = LossConfig.preset("grpo")
    del arguments["behavior_logprobs"]

    def loss(hidden):
        old = linear_logprobs(hidden, weight, targets)[0].detach()
        total, _ = linear_grpo_loss(
            hidden, weight, targets, offsets, config, denominator=3.0, **{**arguments, "old_logprobs": old}
        )
        return total

    hidden.requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden)
    assert torch.equal(compiled, loss(hidden))
    gradients = [torch.autograd.grad(value, (hidden, weight)) for value in (compiled, loss(hidden))]
    assert all(map(torch.equal, *gradients))
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss(hidden), hidden, create_graph=True)


@pytest.mark.parametrize("vocab", [1, 289, 304])
def test_rows_of_a_chunk_begin_16_elements_apart_whatever_the_vocabulary(vocab, device, monkeypatch):
    """Else kernels read two bytes at a time, and spill (tests/bench/test_static.py)."""
    chunks, plain = [], linear_grpo.sweep

    def sweep(head, step, *rest):
        def watched(logits, rows):
            chunks.append(logits)
            return step(logits, rows)

        return plain(head, watched, *rest)

    monkeypatch.setattr(linear_grpo, "sweep", sweep)
    hidden, weight, targets, offsets, arguments = make_case(device, vocab=vocab)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    linear_logprobs(*leaves, targets, chunk_tokens=40)[0].sum().backward()
    loss = linear_grpo_loss(
        *leaves, targets, offsets, LossConfig.preset("bnpo"), denominator=9.0, chunk_tokens=40,
        advantages=arguments["advantages"],
    )  # fmt: skip
    loss[0].backward()
    assert len(chunks) == 9
    assert {(x.stride(0) % 16, x.stride(1), x.shape[1]) for x in chunks} == {(0, 1, vocab)}


def test_default_chunks_are_few_and_equal():
    for num_rows in (0, 1, 128, 129, 6144, 6145, 8192, 9000, 65_536, 288_769):
        chunk = default_chunk_tokens(num_rows, 6144)
        assert chunk % 128 == 0 < chunk <= 6144
        few, rest = -(-num_rows // 6144), num_rows % chunk or chunk
        assert -(-num_rows // chunk) in (few - 1, few)
        assert chunk - num_rows / max(few, 1) < 128 or num_rows == 0
        assert few < 2 or chunk - rest < 128 * few
