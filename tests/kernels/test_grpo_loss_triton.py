"""The two launches of the loss against the torch twin in float64, whose own tests have the formulas."""

import pytest
import torch

from flashgrpo.kernels.grpo_loss import LossConfig, grpo_loss, logits_grpo_loss
from flashgrpo.kernels.logprob import gather_logprobs
from flashgrpo.kernels.loss_triton import move_live_rows

# Of completions: empty ones first, last and between, one beyond a block, and two that start at a block's last token.
SPANS = [0, 700, 1, 0, 0, 322, 512, 30, 0]
CONFIGS = {name: LossConfig.preset(name) for name in LossConfig.presets()} | {
    "grpo, k1": LossConfig.preset("grpo", kl_estimator="k1"),
    "grpo, k2": LossConfig.preset("grpo", kl_estimator="k2", kl_coef=0.3),
    "dual clip": LossConfig(clip_max=3.0, aggregate="constant"),
    "truncated": LossConfig(behavior_cap=1.1, kl_coef=0.1),
    "masked": LossConfig(behavior_cap=1.2, behavior_floor=0.9, behavior_mode="mask", advantage_scale="none"),
    "sequence, masked": LossConfig.preset("gspo", behavior_cap=1.01, behavior_floor=0.9, behavior_mode="mask"),
    "sequence, truncated": LossConfig.preset("gspo", behavior_cap=1.001, kl_coef=0.1, clip_max=1.1),
    "cispo, truncated": LossConfig.preset("cispo", behavior_cap=1.1, kl_coef=0.01),
}


def make_case(device, spans=SPANS, ignored=False):
    generator = torch.Generator().manual_seed(0)
    n, num = sum(spans), len(spans)

    def noise(scale):
        return scale * torch.randn(n, generator=generator)

    logprobs = -3 + noise(1.0)
    rewards = torch.randint(0, 2, (4, 3), generator=generator).float() + 0.1
    rewards[1, 2] = float("nan")
    rewards[2] = 0.7
    tensors = {
        "rewards": rewards,
        "sequence_ids": torch.randperm(12, generator=generator)[:num],
        "old_logprobs": logprobs + noise(0.2),
        "behavior_logprobs": logprobs + noise(0.2),
        "ref_logprobs": logprobs + noise(0.5),
    }
    offsets = torch.tensor([0, *spans]).cumsum(0).int()
    targets = torch.randint(0, 40, (n,), generator=generator)
    if ignored:
        targets[torch.rand(n, generator=generator) < 0.3] = -100
    move = {name: x.to(device) for name, x in tensors.items()}
    return logprobs.to(device), offsets.to(device), targets.to(device), move


def evaluate(logprobs, offsets, config, tensors, dtype):
    leaf = logprobs.detach().to(dtype, copy=True).requires_grad_()
    typed = {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}
    loss, stats = grpo_loss(leaf, offsets, config, denominator=37.0, **typed)
    loss.backward()
    return loss.detach(), leaf.grad, stats


def assert_equal(ours, exact):
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=2e-5, atol=1e-8)
    assert ours[2].keys() == exact[2].keys()
    for name, value in exact[2].items():
        torch.testing.assert_close(ours[2][name].double(), value.double(), rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("on_policy", [False, True])
def test_every_method(name, on_policy, device, poisoned):
    config = CONFIGS[name]
    logprobs, offsets, _, tensors = make_case(device)
    if on_policy:
        del tensors["old_logprobs"]
    if not config.kl_coef:
        del tensors["ref_logprobs"]
    if config.behavior_cap is None:
        del tensors["behavior_logprobs"]
    ours = evaluate(logprobs, offsets, config, tensors, torch.float32)
    assert_equal(ours, evaluate(logprobs, offsets, config, tensors, torch.float64))
    assert torch.equal(ours[1], evaluate(logprobs, offsets, config, tensors, torch.float32)[1])


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo"])
def test_own_advantages_and_a_denominator_on_the_device(name, device, poisoned):
    config = LossConfig.preset(name, kl_coef=0.1)
    logprobs, offsets, _, tensors = make_case(device)
    del tensors["rewards"], tensors["sequence_ids"]
    tensors["advantages"] = torch.randn(len(SPANS), device=device)
    tensors["advantages"][1] = float("nan")
    ours = evaluate(logprobs, offsets, config, tensors, torch.float32)
    assert_equal(ours, evaluate(logprobs, offsets, config, tensors, torch.float64))
    on_device, _ = grpo_loss(logprobs, offsets, config, denominator=torch.tensor(37.0, device=device), **tensors)
    assert torch.equal(on_device, ours[0])


@pytest.mark.parametrize("name", ["dapo", "grpo", "gspo"])
def test_ignored_targets_and_the_entropy_bonus(name, device, poisoned):
    config = LossConfig.preset(name, entropy_coef=0.02, kl_coef=0.1)
    _, offsets, targets, tensors = make_case(device, [0, 30, 1, 50], ignored=True)
    logits = torch.randn(len(targets), 40, device=device)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaf = logits.to(dtype, copy=True).requires_grad_()
        typed = {key: x.to(dtype) if x.is_floating_point() else x for key, x in tensors.items()}
        loss, stats = logits_grpo_loss(leaf, targets, offsets, config, denominator=37.0, temperature=0.8, **typed)
        (2 * loss).backward()
        results.append((loss.detach(), leaf.grad, stats))
    torch.testing.assert_close(results[0][1].double(), results[1][1], rtol=1e-4, atol=1e-7)
    assert_equal(
        (*[results[0][0], results[0][1].double()], results[0][2]),
        (results[1][0], results[0][1].double(), results[1][2]),
    )


@pytest.mark.parametrize(
    "rewards",
    [
        torch.full((1, 4), 3.3),
        torch.tensor([[5.0]]),
        1e6 + 0.0625 * torch.randint(0, 2, (2, 8)),
        torch.rand(1, 1025),
        torch.tensor([[1.0, float("nan"), float("inf"), 0.25], [float("nan")] * 4]),
    ],
    ids=["equal", "one", "large", "1,025", "missing"],
)
@pytest.mark.parametrize("scale", ["std", "none"])
def test_groups(rewards, scale, device):
    """Advantages are read off the gradient on-policy: -A for one token a completion."""
    chosen = torch.arange(0, rewards.numel(), 1 + rewards.numel() // 100, device=device)
    config = LossConfig(aggregate="token_mean", advantage_scale=scale)
    offsets = torch.arange(len(chosen) + 1, dtype=torch.int32, device=device)
    tensors = {"rewards": rewards.to(device), "sequence_ids": chosen}
    ours, exact = (
        evaluate(torch.full((len(chosen),), -1.0, device=device), offsets, config, tensors, dtype)
        for dtype in (torch.float32, torch.float64)
    )
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=1e-5, atol=1e-8)
    if rewards.isfinite().all() and (rewards == rewards[0, 0]).all():
        assert not ours[1].any()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16])
def test_rewards_of_any_dtype(dtype, device):
    """Correctness is naturally a bool; masked lanes of an integer load hold no NaN."""
    rewards = torch.tensor([[1, 0, 1], [1, 1, 1]], device=device)
    offsets, logprobs = torch.arange(7, device=device), torch.zeros(6, device=device)
    wanted = evaluate(logprobs, offsets, LossConfig(), {"rewards": rewards.float()}, torch.float32)
    leaf = logprobs.clone().requires_grad_()
    loss, _ = grpo_loss(leaf, offsets, LossConfig(), denominator=37.0, rewards=rewards.to(dtype))
    loss.backward()
    assert torch.equal(leaf.grad, wanted[1])
    assert leaf.grad[:3].all()
    assert not leaf.grad[3:].any()


def test_ids_beyond_the_rewards_leave_their_completion_out(device):
    """Compiled, and on a GPU, nobody looks at the values before the kernel does."""
    offsets, config, leaf = torch.arange(5, device=device), LossConfig(), torch.zeros(4, device=device)
    rewards, ids = torch.tensor([[1.0, 0.0]], device=device), torch.tensor([1, -1, 2, 0], device=device)

    def loss(x):
        return grpo_loss(x, offsets, config, denominator=1.0, rewards=rewards, sequence_ids=ids)

    value, stats = torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf.requires_grad_())
    value.backward()
    assert stats["num_tokens"] == 2
    assert leaf.grad.ne(0).tolist() == [True, False, False, True]
    assert torch.equal(leaf.grad[0], -leaf.grad[3])


def test_nan_shows_in_every_metric(device):
    logprobs, offsets, _, tensors = make_case(device)
    logprobs[900] = float("nan")
    stats = [
        evaluate(logprobs, offsets, CONFIGS["truncated"], tensors, dtype)[2] for dtype in (torch.float32, torch.float64)
    ]
    for name in stats[0]:
        assert stats[0][name].isnan() == stats[1][name].isnan(), name
    assert stats[0]["ratio_max"].isnan()


@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo", "dual clip"])
@pytest.mark.parametrize("far", [20.0, 100.0, -20.0, -100.0])
def test_extreme_ratios_and_references(name, far, device):
    config = CONFIGS[name]
    logprobs = torch.tensor([-1.0, -2.0, -1.0, -3.0], device=device)
    tensors = {
        "advantages": torch.tensor([1.0, -1.0], device=device),
        "old_logprobs": logprobs - torch.tensor([far, 0.0, 0.0, far], device=device),
        "ref_logprobs": logprobs + torch.tensor([0.0, far, far, 0.0], device=device),
    }
    offsets = torch.tensor([0, 2, 4], device=device)
    ours = evaluate(logprobs, offsets, config, tensors, torch.float32)
    exact = evaluate(logprobs, offsets, config, tensors, torch.float64)
    for a, b in zip(ours[:2], exact[:2], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


def test_small_differences_from_the_reference_keep_their_digits(device):
    """k3 of d is d^2 / 2 and smaller: exp(d) - d - 1 in fp32 would round it away."""
    difference = torch.tensor([1e-4, -3e-3, 0.02, 0.29, 0.31, -0.6], device=device)
    tensors = {"advantages": torch.zeros(6, device=device), "ref_logprobs": difference}
    config = LossConfig.preset("bnpo", kl_coef=1.0)
    offsets = torch.arange(7, device=device)
    ours = evaluate(torch.zeros(6, device=device), offsets, config, tensors, torch.float32)
    exact = evaluate(torch.zeros(6, device=device), offsets, config, tensors, torch.float64)
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=1e-6, atol=0)


def test_graph_captured_whole_and_double_backward_refused(device):
    config = LossConfig.preset("dapo", kl_coef=0.1)
    logprobs, offsets, _, tensors = make_case(device)

    def loss(logprobs):
        return grpo_loss(logprobs, offsets, config, denominator=3.0, **tensors)[0]

    leaf = logprobs.requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf)
    assert torch.equal(compiled, loss(leaf))
    assert torch.equal(*(torch.autograd.grad(value, leaf)[0] for value in (compiled, loss(leaf))))
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss(leaf), leaf, create_graph=True)


def test_a_leaf_keeps_its_values_when_compiled(device):
    """Whether logits are a leaf is not what a compiled function checks when it is called again."""
    offsets, targets = torch.tensor([0, 2, 4], device=device), torch.arange(4, device=device)
    advantages, config = torch.tensor([1.0, -1.0], device=device), LossConfig()

    def loss(logits, denominator):
        return logits_grpo_loss(logits, targets, offsets, config, denominator=denominator, advantages=advantages)[0]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaf = torch.randn(4, 9, device=device, requires_grad=True)
    compiled(leaf * 1, 2.0).backward()
    kept = leaf.detach().clone()
    compiled(leaf, 3.0).backward()
    assert torch.equal(leaf.detach(), kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("preset", ["grpo", "dapo", "cispo"])
def test_rows_are_as_accurate_as_torch(preset, dtype, device, poisoned, as_accurate):
    """The row kernel against log_softmax in fp32 and the loss of log-probs; fp16 takes the kernels apart."""
    config = LossConfig.preset(preset, kl_coef=0.1, entropy_coef=0.01)
    _, offsets, targets, tensors = make_case(device, [0, 20, 1, 9], ignored=True)
    targets = torch.where(targets == -100, -100, targets * 37)
    wide = torch.randn(len(targets), 1600, device=device).to(dtype)
    exact_logprobs = gather_logprobs(wide.double()[:, 3:1503], targets, temperature=0.9)[0].float()
    for name, noise in (("old", 0.2), ("ref", 0.5), ("behavior", 0.2)):
        tensors[f"{name}_logprobs"] = exact_logprobs + noise * torch.randn_like(exact_logprobs)

    def gradient(logits, towards):
        leaf = logits.to(towards, copy=True).requires_grad_()
        exact = {key: x.double() if x.is_floating_point() and towards == torch.float64 else x for key, x in given}
        loss, stats = logits_grpo_loss(
            (leaf * 1)[:, 3:1503], targets, offsets, config, denominator=64.0, temperature=0.9, **exact
        )
        (2 * loss).backward()
        return loss.detach(), leaf.grad, stats

    given = tensors.items()
    ours = gradient(wide, dtype)
    exact = gradient(wide.double(), torch.float64)
    torchs = exact[1].float().to(dtype)  # as good as one rounding
    as_accurate(ours[1], torchs, exact[1], "d_logits")
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-4, atol=1e-5)
    for name, value in exact[2].items():
        torch.testing.assert_close(ours[2][name].double(), value.double(), rtol=1e-4, atol=1e-5, msg=name)


def test_a_gradient_in_place_of_its_logits_is_used_once(device):
    logits = torch.randn(3, 9, device=device, requires_grad=True)
    result = logits * 1
    offsets, targets = torch.tensor([0, 3], device=device), torch.tensor([1, 2, 0], device=device)
    loss, _ = logits_grpo_loss(
        result, targets, offsets, LossConfig(), denominator=1, advantages=torch.ones(1, device=device)
    )
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
def test_live_rows_move_to_the_front(share, device):
    live = (torch.rand(50, device=device) < share).to(torch.int8)
    x = torch.randn(50, 70, device=device)[:, :65]
    wanted = x.clone()
    num_live = int(live.sum())
    sources = move_live_rows(x, live, num_live)
    assert sorted(sources.tolist()) == live.nonzero().flatten().tolist()
    assert torch.equal(x[:num_live], wanted[sources])
