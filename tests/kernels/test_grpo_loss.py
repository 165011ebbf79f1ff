"""Losses from log-probs and from logits against the papers' formulas, differentiated by autograd."""

import itertools
import math

import pytest
import torch

from flashgrpo.kernels.grpo_loss import (
    LossConfig,
    denominator_of,
    group_advantages,
    grpo_loss,
    logits_grpo_loss,
    merge_stats,
    pack_padded,
)
from flashgrpo.kernels.logprob import gather_logprobs

# Of completions: empty ones first, last and between, one beyond a block, and two that start at a block's last token.
SPANS = [0, 700, 1, 0, 0, 322, 512, 30, 0]
FEW = [0, 14, 1, 9]
CONFIGS = {name: LossConfig.preset(name) for name in LossConfig.presets()} | {
    "grpo, k1": LossConfig.preset("grpo", kl_estimator="k1"),
    "grpo, k2": LossConfig.preset("grpo", kl_estimator="k2", kl_coef=0.3),
    "dapo, k3": LossConfig.preset("dapo", kl_coef=0.7),
    "dual clip": LossConfig(clip_max=1.3, aggregate="constant"),
    "truncated": LossConfig(behavior_cap=1.1, kl_coef=0.1),
    "masked": LossConfig(behavior_cap=1.2, behavior_floor=0.9, behavior_mode="mask", advantage_scale="none"),
    "sequence, tokens": LossConfig(ratio_level="sequence", aggregate="token_mean"),
    "sequence, cispo": LossConfig(ratio_level="sequence", objective="cispo", clip_high=0.001),
    "sequence, masked": LossConfig.preset("gspo", behavior_cap=1.01, behavior_floor=0.99, behavior_mode="mask"),
    "sequence, truncated": LossConfig.preset("gspo", behavior_cap=1.001, kl_coef=0.1, clip_max=1.1),
    "cispo, truncated": LossConfig.preset("cispo", behavior_cap=1.1, kl_coef=0.01),
    "two-sided": LossConfig(clip_max=1.05),
    "all but half": LossConfig(clip_max=0.9, aggregate="token_mean"),
    "sapo, sequence": LossConfig(objective="sapo", tau_pos=2.0, tau_neg=0.5, ratio_level="sequence", behavior_cap=1.1),
    "unbiased KL": LossConfig(kl_coef=0.3, kl_weight="ratio"),
    "unbiased k1": LossConfig(objective="sapo", kl_coef=0.3, kl_weight="ratio", kl_estimator="k1"),
    "product, masked": LossConfig(behavior_cap=30.0, behavior_mode="mask", behavior_level="sequence"),
    "mean, truncated": LossConfig.preset("dapo", behavior_cap=1.004, behavior_floor=0.99, behavior_level="geometric"),
    "off-policy": LossConfig(off_policy_threshold=0.0, kl_coef=0.1, kl_weight="ratio", advantage_scale="none"),
}
# What is by entropies is not of log-probs alone.
OF_LOGITS = CONFIGS | {"forking tokens": LossConfig.preset("dapo", top_entropy=0.3, kl_coef=0.1)}


def make_case(device, dtype, spans=SPANS):
    """Log-probs, offsets, and all that a loss may be given: NaN and infinities where a reward is missing."""
    n, num = sum(spans), len(spans)
    logprobs = -3 + torch.randn(n)
    rewards = torch.tensor([[0.1, 1.1, 0.1], [0.1, 1.1, math.nan], [1.1, 0.1, 0.7], [0.7, 0.7, 0.7]])
    given = {"rewards": rewards, "sequence_ids": torch.tensor([2, 0, 9, 4, 1, 6, 3, 5, 11])[:num]}
    for name, noise in (("old", 0.2), ("ref", 0.5), ("behavior", 0.2)):
        given[f"{name}_logprobs"] = logprobs + noise * torch.randn(n)
    offsets = torch.tensor([0, *spans]).cumsum(0).int()
    missing = rewards.flatten()[given["sequence_ids"]].isnan().repeat_interleave(torch.tensor(spans))
    for x, fill in zip((logprobs, *[*given.values()][2:]), (math.nan, math.inf, -math.inf, math.nan), strict=True):
        x[missing] = fill
    given = {name: x.to(device, dtype if x.is_floating_point() else x.dtype) for name, x in given.items()}
    return logprobs.to(device, dtype), offsets.to(device), given


def naive(config, logprobs, entropies, offsets, ignored, denominator, advantages=None, token_advantages=None,
          rewards=None, sequence_ids=None, old_logprobs=None, ref_logprobs=None, behavior_logprobs=None):  # fmt: skip
    """The loss, the metrics of `grpo_loss`, and ratio, KL and loss of each token, in float64."""
    if rewards is not None:
        relative = rewards - rewards[:, :1]  # equal rewards deviate by exactly 0
        deviation = relative - relative.nanmean(1, keepdim=True)
        spread = (deviation.square().nansum(1, keepdim=True) / (rewards.isfinite().sum(1, keepdim=True) - 1)).sqrt()
        advantages = deviation / (spread + 1e-4) if config.advantage_scale == "std" else deviation
        advantages = advantages.flatten()[sequence_ids]
    total, seen, forking, per_token = (
        logprobs.new_zeros(()),
        [],
        torch.ones_like(ignored),
        logprobs.new_zeros(3, len(logprobs)),
    )
    of_tokens = token_advantages is not None
    advantages = token_advantages if of_tokens else advantages.repeat_interleave(offsets.diff())
    if config.top_entropy < 1:  # TRL's get_high_entropy_mask
        forking = entropies >= torch.quantile(entropies[~ignored & ~advantages.isnan()], 1 - config.top_entropy)
    for start, stop in itertools.pairwise(offsets):
        rows = torch.arange(start, stop, device=logprobs.device)
        rows = rows[~ignored[rows] & ~advantages[rows].isnan()]
        if not len(rows):
            continue
        advantage = advantages[rows]
        new = logprobs[rows]
        old = new.detach() if old_logprobs is None else old_logprobs[rows]
        mismatch = torch.zeros_like(old) if behavior_logprobs is None else old - behavior_logprobs[rows]
        ratio, weight = (new - old).exp(), mismatch.detach().exp()
        if config.ratio_level == "sequence":
            ratio = ratio.log().mean().exp().expand(len(rows))
            by_tokens = config.behavior_cap is not None and config.behavior_level == "token"
            if of_tokens or by_tokens:  # GSPO-token: the value is the sequence's, the gradient the token's
                ratio = ratio.detach() * (new - new.detach()).exp()
        if config.behavior_level != "token":
            over = len(rows) if config.behavior_level == "geometric" else 1
            weight = (mismatch.detach().sum() / over).exp().expand(len(rows))
        if config.objective == "cispo":
            policy = -ratio.detach().clamp(max=1 + config.clip_high) * advantage * new
        elif config.objective == "sapo":  # equations 5 and 6 of the paper
            tau = torch.where(advantage > 0, config.tau_pos, torch.full_like(ratio, config.tau_neg))
            policy = -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantage
        else:
            bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
            highest = math.inf if config.clip_max is None else config.clip_max  # INTELLECT-2's delta
            policy = -torch.minimum(ratio.clamp(max=highest) * advantage, bounded * advantage)
        if config.behavior_cap is not None:
            inside = (weight >= config.behavior_floor) & (weight <= config.behavior_cap)
            policy = policy * (
                weight * inside
                if config.behavior_mode == "mask"
                else weight.clamp(config.behavior_floor, config.behavior_cap)
            )
        kept = forking[rows]
        if config.off_policy_threshold is not None:  # equation 9 of DeepSeek-V3.2; its old policy is the sampler
            sampled = old if behavior_logprobs is None else behavior_logprobs[rows]
            kept = kept & ((advantage >= 0) | ((sampled - new.detach()).mean() <= config.off_policy_threshold))
        policy, advantage = policy * kept, advantage * kept
        d = torch.zeros_like(new) if ref_logprobs is None else ref_logprobs[rows] - new
        kl = {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - d - 1}[config.kl_estimator]
        weighted_kl = kl * ratio if config.kl_weight == "ratio" else kl  # equation 7 of DeepSeek-V3.2
        loss = policy + config.kl_coef * weighted_kl - config.entropy_coef * entropies[rows]
        loss = loss / len(rows) if config.aggregate == "sequence_mean" else loss
        total = total + loss.sum()
        per_token[:, rows] = torch.stack((ratio, kl, loss)).detach()
        highest = min(1 + config.clip_high, math.inf if config.clip_max is None else config.clip_max)
        low, high = (ratio < 1 - config.clip_low) & (advantage < 0), (ratio > highest) & (advantage > 0)
        live = torch.autograd.grad(loss.sum(), logprobs, retain_graph=True)[0][rows] != 0
        seen.append(
            torch.stack((ratio, low, high, live | bool(config.entropy_coef), kl, mismatch.abs(), entropies[rows]))
        )
    ratio, low, high, live, kl, mismatch, entropy = torch.cat(seen, 1).detach()
    stats = {"num_tokens": torch.tensor(float(len(ratio))), "ratio_mean": ratio.mean(), "ratio_max": ratio.max()}
    stats |= {"clip_low_fraction": low.mean(), "clip_high_fraction": high.mean(), "live_fraction": live.mean()}
    stats |= {} if ref_logprobs is None else {"kl": kl.mean()}
    if behavior_logprobs is not None:
        stats |= {"behavior_mismatch_mean": mismatch.mean(), "behavior_mismatch_max": mismatch.max()}
    return total / denominator, stats | {"entropy": entropy.mean()}, per_token


def wide(given):
    return {name: x.double() if x.is_floating_point() else x for name, x in given.items()}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("on_policy", [False, True])
def test_every_method(name, on_policy, device, dtype, close, poisoned):
    config = CONFIGS[name]
    logprobs, offsets, given = make_case(device, dtype)
    unused = {"old_logprobs": on_policy, "ref_logprobs": not config.kl_coef}
    unused["behavior_logprobs"] = config.behavior_cap is None and config.off_policy_threshold is None
    given = {key: x for key, x in given.items() if not unused.get(key)}
    leaf, exact = logprobs.requires_grad_(), logprobs.detach().double().requires_grad_()
    loss, stats = grpo_loss(leaf, offsets, config, denominator=37.0, **given)
    nothing = torch.zeros_like(exact)
    expected, metrics, _ = naive(config, exact, nothing, offsets, nothing > 0, 37.0, **wide(given))
    close(loss, expected, "loss")
    gradient, (expected,) = torch.autograd.grad(3 * loss, leaf)[0], torch.autograd.grad(3 * expected, exact)
    assert gradient.abs().max() > 1e-5
    close(gradient, expected, "gradient")
    del metrics["entropy"]
    assert [*stats] == [*metrics]
    for key, value in stats.items():
        torch.testing.assert_close(value, metrics[key].float(), rtol=1e-5, atol=1e-6, msg=key, check_device=False)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.3])
@pytest.mark.parametrize(
    "name",
    [
        *("grpo", "dapo", "gspo", "cispo", "sapo", "truncated", "unbiased KL", "product, masked", "mean, truncated"),
        *("off-policy", "forking tokens"),
    ],
)
def test_from_logits_with_ignored_targets_and_the_entropy_bonus(name, entropy_coef, device, dtype, close, poisoned):
    config = LossConfig(**{**vars(OF_LOGITS[name]), "entropy_coef": entropy_coef})
    _, offsets, given = make_case(device, dtype, FEW)
    targets, logits = torch.randint(0, 40, (sum(FEW),), device=device), torch.randn(sum(FEW), 40, device=device)
    targets[3::4] = -100
    leaf, exact = logits.to(dtype).requires_grad_(), logits.double().requires_grad_()
    options = {"denominator": 37.0, "temperature": 0.8, "per_token": True}
    loss, stats = logits_grpo_loss(leaf, targets, offsets, config, **options, **given)
    log_p, ignored = torch.log_softmax(exact / 0.8, 1), targets == -100
    logprobs = torch.where(ignored, 0, log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0])
    entropies = torch.where(ignored, 0, -(log_p.exp() * log_p).sum(1))
    expected, metrics, per_token = naive(config, logprobs, entropies, offsets, ignored, 37.0, **wide(given))
    close(loss, expected, "loss")
    close(torch.autograd.grad(2 * loss, leaf), torch.autograd.grad(2 * expected, exact), "gradient")
    expected = [*per_token, logprobs, entropies]
    close([stats.pop(name) for name in ("ratios", "kls", "losses", "logprobs", "entropies")], expected, "per token")
    assert [*stats] == [*metrics]
    for key, value in stats.items():
        torch.testing.assert_close(value, metrics[key].float(), rtol=1e-4, atol=1e-5, msg=key, check_device=False)


@pytest.mark.twin
def test_gradcheck_from_logits():
    logits, targets = torch.randn(15, 4, dtype=torch.float64, requires_grad=True), torch.arange(15) % 4
    offsets, config = (
        torch.tensor([0, 3, 3, 8, 15]),
        LossConfig.preset("gspo", clip_high=0.3, clip_low=0.3, entropy_coef=0.1),
    )
    old = gather_logprobs(logits.detach(), targets)[0] + 0.3 * torch.randn(15, dtype=torch.float64)

    def loss(x):
        given = {"advantages": torch.tensor([1.3, 0.4, -0.8, -2.0]), "old_logprobs": old}
        return logits_grpo_loss(x, targets, offsets, config, denominator=2, temperature=0.7, **given)[0]

    assert torch.autograd.gradcheck(loss, logits)


@pytest.mark.parametrize("of_tokens", [False, True])
@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo"])
def test_own_advantages_and_a_denominator_on_the_device(name, of_tokens, device, dtype, close, poisoned):
    config = LossConfig.preset(name, kl_coef=0.1)
    logprobs, offsets, given = make_case(device, dtype)
    del given["rewards"], given["sequence_ids"]
    advantages = torch.randn(sum(SPANS) if of_tokens else len(SPANS), device=device, dtype=dtype)
    advantages[[1, 7]] = float("nan")
    if of_tokens:
        advantages[logprobs.isnan()] = float("nan")
    given["token_advantages" if of_tokens else "advantages"] = advantages
    leaf, exact = logprobs.requires_grad_(), logprobs.detach().double().requires_grad_()
    nothing = torch.zeros_like(exact)
    expected, _, per_token = naive(config, exact, nothing, offsets, nothing > 0, 37.0, **wide(given))
    results = []
    for denominator in (37.0, torch.tensor(37.0, device=device, dtype=torch.float64)):
        loss, stats = grpo_loss(leaf, offsets, config, denominator=denominator, per_token=True, **given)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
        close(results[-1], [expected, *torch.autograd.grad(expected, exact, retain_graph=True)])
        close([stats[name] for name in ("ratios", "kls", "losses")], [*per_token], "per token")
    for x, y in zip(*results, strict=True):
        assert x.dtype == dtype
        assert torch.equal(x, y)


def test_many_completions_of_a_token(device, dtype):
    """More than a program reads the ends of at once, with empty ones between; losses and gradients by hand."""
    spans, advantages = torch.arange(2500) % 3 % 2, torch.randn(2500, device=device, dtype=dtype)
    offsets, config = torch.nn.functional.pad(spans.cumsum(0), (1, 0)).int(), LossConfig.preset("bnpo")
    leaf = torch.zeros(int(offsets[-1]), device=device, dtype=dtype, requires_grad=True)
    loss, _ = grpo_loss(leaf, offsets.to(device), config, denominator=37.0, advantages=advantages)
    kept = advantages[spans.to(device) == 1]
    torch.testing.assert_close(loss, -kept.sum() / 37, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], -kept / 37)


@pytest.mark.twin
def test_group_advantages_follow_the_formula():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 2.0], [3.0, 4.0, 8.0, 9.0]], dtype=torch.float64)
    centered = rewards - rewards.mean(1, keepdim=True)
    torch.testing.assert_close(group_advantages(rewards), centered / (rewards.std(1, keepdim=True) + 1e-4))
    torch.testing.assert_close(group_advantages(rewards, scale="none"), centered)
    torch.testing.assert_close(group_advantages(rewards, eps=1.0), centered / (rewards.std(1, keepdim=True) + 1))


@pytest.mark.twin
def test_missing_rewards_leave_the_group():
    nan = torch.nan
    rewards = torch.tensor([[nan, 1.0, 0.0, 0.0], [nan, nan, 5.0, nan], [nan] * 4, [0.1, nan, 0.1, 0.1]])
    advantages = group_advantages(rewards)
    assert torch.equal(advantages.isnan(), rewards.isnan())
    torch.testing.assert_close(advantages[0, 1:], group_advantages(rewards[:1, 1:])[0])
    assert advantages[1, 2] == 0
    assert advantages[3].nansum() == 0


@pytest.mark.parametrize(
    "rewards",
    [
        torch.full((1, 4), 3.3),
        torch.tensor([[5.0]]),
        1e6 + torch.tensor([[0.0, 0.0625, 0.0, 0.125]]),
        torch.rand(1, 300),
        torch.tensor([[1.0, float("nan"), float("inf"), 0.25], [float("nan")] * 4]),
    ],
    ids=["equal", "one", "large", "300", "missing"],
)
@pytest.mark.parametrize("scale", ["std", "none"])
def test_groups(rewards, scale, device):
    """Advantages are read off the gradient on-policy: -A for one token a completion."""
    chosen = torch.arange(0, rewards.numel(), 1 + rewards.numel() // 10, device=device)
    config, leaf = LossConfig(aggregate="token_mean", advantage_scale=scale), torch.zeros(len(chosen), device=device)
    given = {"rewards": rewards.to(device), "sequence_ids": chosen, "denominator": 1.0}
    loss, _ = grpo_loss(leaf.requires_grad_(), torch.arange(len(chosen) + 1, device=device), config, **given)
    (gradient,) = torch.autograd.grad(loss, leaf)
    shifted = rewards.double() - rewards.nan_to_num(torch.inf).amin()
    expected = group_advantages(shifted, scale=scale).flatten().to(device)[chosen]
    torch.testing.assert_close(-gradient.double(), expected.nan_to_num(0), rtol=1e-5, atol=1e-7)
    if rewards.isfinite().all() and (rewards == rewards[0, 0]).all():
        assert not gradient.any()


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float16])
def test_rewards_of_any_dtype(kind, device):
    """Correctness is naturally a bool; masked lanes of an integer load hold no NaN."""
    rewards, offsets = torch.tensor([[1, 0, 1], [1, 1, 1]], device=device), torch.arange(7, device=device)
    gradients = []
    for given in (rewards.float(), rewards.to(kind)):
        leaf = torch.zeros(6, device=device, requires_grad=True)
        loss, _ = grpo_loss(leaf, offsets, LossConfig(), denominator=37.0, rewards=given)
        gradients += torch.autograd.grad(loss, leaf)
    assert torch.equal(*gradients)
    assert gradients[1].ne(0).tolist() == [True] * 3 + [False] * 3


@pytest.mark.kernels
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


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_ratio_on_its_bound_has_the_full_gradient(advantage, device):
    logprobs, offsets = torch.zeros(2, device=device, requires_grad=True), torch.tensor([0, 2], device=device)
    config = LossConfig(clip_low=0, clip_high=0, aggregate="token_mean")
    given = {"advantages": torch.tensor([advantage], device=device), "old_logprobs": torch.zeros(2, device=device)}
    loss, stats = grpo_loss(logprobs, offsets, config, denominator=1, **given)
    assert torch.autograd.grad(loss, logprobs)[0].tolist() == [-advantage, -advantage]
    assert stats["live_fraction"] == 1
    assert stats["clip_low_fraction"] == stats["clip_high_fraction"] == 0


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_extreme_ratios_stay_finite_and_lose_their_gradient(level, device):
    logprobs = torch.tensor([-1.0, -1.0, -500.0, -torch.inf], device=device, requires_grad=True)
    config = LossConfig(ratio_level=level, aggregate="token_mean", kl_coef=1.0)
    given = {
        "advantages": torch.tensor([-1.0, 1.0, 1.0, 1.0], device=device),
        "old_logprobs": torch.tensor([-60.0, -1.0, -1.0, -1.0], device=device),
        "ref_logprobs": torch.tensor([-1.0, 60.0, -500.0, -1.0], device=device),
    }
    loss, stats = grpo_loss(logprobs, torch.arange(5, device=device), config, denominator=1, **given)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, logprobs)[0].tolist() == [0, -1, 0, 0]
    assert stats["ratio_max"].item() == pytest.approx(math.exp(20), rel=1e-5)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_token_that_the_reference_rules_out_stays_finite(estimator, device):
    logprobs = torch.tensor([-1.0, -1.0], device=device, requires_grad=True)
    config, offsets = LossConfig(kl_coef=1.0, kl_estimator=estimator), torch.tensor([0, 2], device=device)
    given = {"advantages": torch.zeros(1, device=device)}
    given["ref_logprobs"] = torch.tensor([-torch.inf, -31.0], device=device)
    loss, stats = grpo_loss(logprobs, offsets, config, denominator=1, **given)
    assert loss.isfinite()
    assert stats["kl"].isfinite()
    slope = 30.0 if estimator == "k2" else 1.0  # a rare token is still pulled back
    assert torch.autograd.grad(loss, logprobs)[0].tolist() == pytest.approx([0, slope / 2])


def test_cispo_drops_a_token_that_has_become_impossible(device):
    logprobs = torch.tensor([-torch.inf, -2.0], device=device, requires_grad=True)
    given = {"advantages": torch.ones(1, device=device), "old_logprobs": torch.tensor([-1.0, -2.0], device=device)}
    offsets = torch.tensor([0, 2], device=device)
    loss, _ = grpo_loss(logprobs, offsets, LossConfig.preset("cispo"), denominator=1, **given)
    assert loss == 2
    assert torch.autograd.grad(loss, logprobs)[0].tolist() == [0, -1]


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo", "dual clip"])
def test_extreme_ratios_and_references_are_the_twins(name, device):
    far = torch.tensor([20.0, 100.0, -20.0, -100.0], device=device)[:, None]
    logprobs, advantages = torch.tensor([-1.0, -2.0, -1.0, -3.0], device=device), torch.tensor([1.0, -1.0] * 4)
    given = {
        "advantages": advantages.to(device),
        "old_logprobs": (logprobs - far * torch.tensor([1, 0, 0, 1], device=device)).flatten(),
        "ref_logprobs": (logprobs + far * torch.tensor([0, 1, 1, 0], device=device)).flatten(),
    }
    results = []
    for kind in (torch.float32, torch.float64):
        leaf, typed = logprobs.repeat(4).to(kind).requires_grad_(), {key: x.to(kind) for key, x in given.items()}
        loss, _ = grpo_loss(leaf, torch.arange(0, 17, 2, device=device), CONFIGS[name], denominator=1, **typed)
        results.append((loss.double(), torch.autograd.grad(loss, leaf)[0].double()))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_small_differences_from_the_reference_keep_their_digits(device):
    """k3 of d is d^2 / 2 and smaller: exp(d) - d - 1 in fp32 would round it away."""
    difference = torch.tensor([1e-4, -3e-3, 0.02, 0.29, 0.31, -0.6], device=device)
    given = {"advantages": torch.zeros(6, device=device), "ref_logprobs": difference}
    leaf, config = torch.zeros(6, device=device, requires_grad=True), LossConfig.preset("bnpo", kl_coef=1.0)
    loss, _ = grpo_loss(leaf, torch.arange(7, device=device), config, denominator=1, **given)
    (gradient,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(gradient.double(), -difference.double().expm1(), rtol=1e-6, atol=0)


def test_nan_shows_in_every_metric_that_it_touches(device, dtype):
    logprobs, offsets, given = make_case(device, dtype)
    logprobs[900] = float("nan")
    loss, stats = grpo_loss(logprobs, offsets, CONFIGS["truncated"], denominator=1, **given)
    assert loss.isnan()
    assert {name for name, value in stats.items() if value.isnan()} == {"ratio_mean", "ratio_max", "kl"}


def test_drift_is_from_the_sampler_whatever_the_old_log_probs_are(device):
    behavior, old = torch.tensor([3.0, 3.0], device=device), torch.tensor([torch.nan, 0.0], device=device)
    leaf, config = torch.zeros(2, device=device, requires_grad=True), LossConfig(off_policy_threshold=2.9)
    given = {"advantages": -torch.ones(1, device=device), "old_logprobs": old, "behavior_logprobs": behavior}
    loss, _ = grpo_loss(leaf, torch.tensor([0, 2], device=device), config, denominator=1, **given)
    assert torch.autograd.grad(loss, leaf)[0][1] == 0


def test_low_precision_logprobs_are_raised_to_fp32(device):
    logprobs = torch.full((3,), -1.0, dtype=torch.bfloat16, device=device, requires_grad=True)
    offsets, advantages = torch.tensor([0, 1, 3], device=device), torch.tensor([1.0, -2.0], device=device)
    loss, _ = grpo_loss(logprobs, offsets, LossConfig(), denominator=1, advantages=advantages)
    assert loss.dtype == torch.float32
    assert torch.autograd.grad(loss, logprobs)[0].tolist() == [-1, 1, 1]


def test_merged_metrics_equal_those_of_one_call(device, dtype):
    config, offsets = LossConfig.preset("grpo", clip_low=0.1), [0, 3, 3, 8, 9, 15]
    logits, targets = torch.randn(15, 6, device=device, dtype=dtype), torch.arange(15, device=device) % 6
    given = {f"{name}_logprobs": torch.randn(15, device=device) for name in ("old", "ref", "behavior")}
    advantages = torch.randn(5, device=device)

    def stats_of(first, last):
        start, stop = offsets[first], offsets[last]
        own = torch.tensor(offsets[first : last + 1], device=device) - start
        return logits_grpo_loss(
            logits[start:stop], targets[start:stop], own, config, denominator=1, advantages=advantages[first:last],
            per_token=True, **{key: x[start:stop] for key, x in given.items()},
        )[1]  # fmt: skip

    whole, parts = stats_of(0, 5), [stats_of(0, 2), stats_of(2, 4), stats_of(4, 5)]
    merged = merge_stats(parts)
    assert merged.keys() == whole.keys() >= {"entropy", "logprobs", "entropies", "ratios", "kls", "losses"}
    for key, value in whole.items():
        torch.testing.assert_close(merged[key], value)
    with pytest.raises(ValueError, match="differ in the metrics kl"):
        merge_stats([parts[0], {k: v for k, v in parts[1].items() if k != "kl"}])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("preset", ["grpo", "cispo"])
def test_rows_are_as_accurate_as_torch(preset, kind, device, poisoned, as_accurate):
    """Logits within a wider tensor, against one rounding of the exact gradient; fp16 takes the kernels apart."""
    config = LossConfig.preset(preset, kl_coef=0.1, entropy_coef=0.01)
    _, offsets, given = make_case(device, torch.float32, [0, 20, 1, 9])
    targets = torch.randint(0, 1500, (30,), device=device)
    targets[2::4] = -100
    wide_logits = torch.randn(30, 1600, device=device).to(kind)
    logprobs = gather_logprobs(wide_logits.double()[:, 3:1503], targets, temperature=0.9)[0].float()
    for name, noise in (("old", 0.2), ("ref", 0.5), ("behavior", 0.2)):
        given[f"{name}_logprobs"] = logprobs + noise * torch.randn_like(logprobs)

    def gradient(towards, given):
        leaf = wide_logits.to(towards, copy=True).requires_grad_()
        logits = (leaf * 1)[:, 3:1503]
        loss, _ = logits_grpo_loss(logits, targets, offsets, config, denominator=64.0, temperature=0.9, **given)
        return torch.autograd.grad(2 * loss, leaf)[0]

    exact = gradient(torch.float64, wide(given))
    as_accurate(gradient(kind, given), exact.float().to(kind), exact, "d_logits")


def test_a_target_out_of_range_makes_the_loss_nan(device):
    targets, offsets = torch.tensor([1, 4], device=device), torch.tensor([0, 2], device=device)
    given = {"denominator": 1, "advantages": torch.ones(1, device=device)}
    assert logits_grpo_loss(torch.zeros(2, 4, device=device), targets, offsets, LossConfig(), **given)[0].isnan()


def test_gradient_overwrites_logits_that_are_a_result_once_and_spares_a_leaf(device):
    leaf = torch.randn(3, 4, device=device, requires_grad=True)
    before = leaf.detach().clone()

    def loss(logits):
        targets, offsets = torch.tensor([1, 2, 0], device=device), torch.tensor([0, 3], device=device)
        advantages = torch.ones(1, device=device)
        return logits_grpo_loss(logits, targets, offsets, LossConfig(), denominator=1, advantages=advantages)[0]

    (from_leaf,) = torch.autograd.grad(loss(leaf), leaf)
    (from_view,) = torch.autograd.grad(loss(leaf.view(3, 4)), leaf)
    assert torch.equal(leaf.detach(), before)
    assert torch.equal(from_view, from_leaf)
    result = leaf * 1
    made = loss(result)
    made.backward(retain_graph=True)
    assert torch.equal(result.detach(), from_leaf)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        made.backward()


def test_graph_captured_whole_and_double_backward_refused(device):
    config = LossConfig.preset("dapo", kl_coef=0.1)
    logprobs, offsets, tensors = make_case(device, torch.float32, FEW)

    def loss(logprobs):
        return grpo_loss(logprobs, offsets, config, denominator=3.0, **tensors)[0]

    leaf = logprobs.requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf)
    assert torch.equal(compiled, loss(leaf))
    assert torch.equal(*(torch.autograd.grad(value, leaf)[0] for value in (compiled, loss(leaf))))
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss(leaf), leaf, create_graph=True)


@pytest.mark.kernels
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


@pytest.mark.parametrize("offsets", [[0], [0, 0, 0]])
@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo"])
def test_no_tokens_give_zero(name, offsets, device):
    logprobs = torch.zeros(0, device=device, requires_grad=True)
    given = dict.fromkeys(("old_logprobs", "ref_logprobs", "behavior_logprobs"), logprobs.detach())
    given["advantages"], offsets = torch.ones(len(offsets) - 1, device=device), torch.tensor(offsets, device=device)
    loss, stats = grpo_loss(logprobs, offsets, CONFIGS[name], denominator=4, **given)
    assert loss == 0
    assert torch.autograd.grad(loss, logprobs)[0].shape == (0,)
    assert not any(value.any() for value in stats.values())


@pytest.mark.twin
def test_padded_tensors_of_other_trainers():
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    for kept in (mask, mask.bool(), mask.int()):
        rows, offsets = pack_padded(kept)
        assert rows.tolist() == [0, 1, 6, 7, 8, 10]
        assert offsets.tolist() == [0, 2, 2, 5, 6]
        assert (rows.dtype, offsets.dtype) == (torch.int64, torch.int32)
    rows, offsets = pack_padded(mask[:0])
    assert (rows.tolist(), offsets.tolist()) == ([], [0])
    with pytest.raises(ValueError, match="completion_mask has shape"):
        pack_padded(mask[0])
    with pytest.raises(TypeError, match="float32"):
        pack_padded(mask.float())


@pytest.mark.twin
def test_denominators_by_name():
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    for counted in (mask, mask.bool(), mask.sum(1)):
        found = {
            name: denominator_of(LossConfig.preset(name), counted, max_length=8) for name in ("r1", "bnpo", "dr_grpo")
        }
        assert found == {"r1": 4, "bnpo": 6, "dr_grpo": 32}
    dapo, constant = LossConfig.preset("dapo"), LossConfig.preset("dr_grpo")
    assert denominator_of(dapo, mask, micro_batches=3) == 18
    assert denominator_of(dapo, mask, micro_batches=3, update_tokens=torch.tensor(40)) == 40
    assert denominator_of(LossConfig(), mask, micro_batches=3) == 12
    assert [denominator_of(x, mask[:0], max_length=8) for x in (LossConfig(), dapo, constant)] == [1, 1, 1]
    with pytest.raises(ValueError, match="max_length is None"):
        denominator_of(constant, mask)
    with pytest.raises(ValueError, match="update_tokens is 40, which aggregate 'sequence_mean'"):
        denominator_of(LossConfig(), mask, update_tokens=40)


LP, CU, A = torch.zeros(3), torch.tensor([0, 1, 3]), torch.zeros(2)


@pytest.mark.twin
@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (LossConfig(), {}, "none given; wanted one of rewards, advantages, token_advantages"),
        (LossConfig(), {"advantages": A, "rewards": A[None]}, "rewards and advantages given"),
        (LossConfig(), {"advantages": A, "token_advantages": LP}, "advantages and token_advantages given"),
        (LossConfig(kl_coef=0.1), {"advantages": A}, "needs ref_logprobs"),
        (LossConfig(behavior_cap=2.0), {"advantages": A}, "needs behavior_logprobs"),
        (LossConfig(entropy_coef=0.1), {"advantages": A}, "entropy_coef is 0.1"),
        (LossConfig(top_entropy=0.2), {"advantages": A}, "top_entropy is 0.2"),
        (LossConfig(), {"advantages": A, "denominator": 0}, "denominator is 0"),
        (LossConfig(), {"advantages": A, "denominator": -1.0}, "denominator is -1"),
        (LossConfig(), {"advantages": A, "denominator": math.nan}, "denominator is nan"),
        (LossConfig(), {"advantages": A, "denominator": torch.ones(1)}, "0-d"),
        (LossConfig(), {"advantages": A[:1]}, r"advantages has shape \(1,\); wanted \[2\]"),
        (LossConfig(), {"advantages": A, "sequence_ids": torch.tensor([0, 1])}, "sequence_ids"),
        (LossConfig(), {"rewards": torch.zeros(3, 2)}, "one reward a completion"),
        (LossConfig(), {"rewards": torch.zeros(2)}, "num_groups, group_size"),
        (LossConfig(), {"rewards": A[None], "sequence_ids": torch.tensor([0])}, "sequence_ids has shape"),
        (LossConfig(), {"advantages": A, "old_logprobs": torch.zeros(2)}, "old_logprobs has shape"),
        (LossConfig(), {"advantages": A, "ref_logprobs": torch.zeros(2)}, "ref_logprobs has shape"),
        (LossConfig(), {"token_advantages": A}, r"token_advantages has shape \(2,\); wanted \(3,\)"),
        (LossConfig(), {"advantages": A, "behavior_logprobs": torch.zeros(2)}, "behavior_logprobs has shape"),
        (LossConfig(), {"advantages": A, "target_cu_seqlens": CU[None]}, "target_cu_seqlens has shape"),
        (LossConfig(), {"advantages": A, "target_cu_seqlens": CU[:0]}, "target_cu_seqlens has shape"),
        (LossConfig(), {"advantages": A, "target_cu_seqlens": torch.tensor([0, 1, 4])}, "number of target rows, 3"),
        (LossConfig(), {"advantages": A, "target_cu_seqlens": torch.tensor([1, 1, 3])}, "goes from 1 to 3"),
        (LossConfig(), {"advantages": A, "target_cu_seqlens": torch.tensor([0, 5, 3])}, "rise from 0"),
        (LossConfig(), {"advantages": A, "logprobs": torch.zeros(3, 1)}, "logprobs has shape"),
        (
            LossConfig(),
            {"rewards": A[None], "sequence_ids": torch.tensor([-1, 2])},
            r"-1, 2\]; wanted entries of 2",
        ),
        (LossConfig(), {"advantages": A.to("meta")}, "advantages is on meta; wanted cpu"),
        (LossConfig(), {"rewards": A[None].to("meta")}, "rewards is on meta; wanted cpu"),
        (LossConfig(), {"advantages": A, "old_logprobs": LP.to("meta")}, "old_logprobs is on meta; wanted cpu"),
        (LossConfig(), {"advantages": A, "ref_logprobs": LP.to("meta")}, "ref_logprobs is on meta; wanted cpu"),
        (LossConfig(), {"advantages": A, "behavior_logprobs": LP.to("meta")}, "behavior_logprobs is on meta"),
        (
            LossConfig(),
            {"advantages": A, "denominator": torch.ones((), device="meta")},
            "is on meta; wanted a number, or a 0-d tensor on cpu",
        ),
    ],
)
def test_bad_arguments_are_named(config, options, message):
    arguments = {"logprobs": LP, "target_cu_seqlens": CU, "denominator": 1} | options
    with pytest.raises(ValueError, match=message):
        grpo_loss(config=config, **arguments)


@pytest.mark.twin
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logprobs": LP.long()}, "logprobs is torch.int64"),
        ({"target_cu_seqlens": CU.float()}, "target_cu_seqlens is torch.float32"),
        ({"advantages": None, "rewards": A[None], "sequence_ids": A}, "sequence_ids is torch.float32"),
        ({"advantages": A.long()}, "advantages is torch.int64; wanted a floating dtype"),
        ({"old_logprobs": LP.int()}, "old_logprobs is torch.int32"),
        ({"ref_logprobs": LP.long()}, "ref_logprobs is torch.int64"),
        ({"behavior_logprobs": LP.bool()}, "behavior_logprobs is torch.bool"),
        ({"target_cu_seqlens": CU.tolist()}, "target_cu_seqlens is list; wanted a tensor of int32 or int64"),
        ({"advantages": None, "rewards": A[None].tolist()}, "rewards is list; wanted a tensor"),
        ({"advantages": A.numpy()}, "advantages is ndarray; wanted a tensor"),
    ],
)
def test_wrong_dtypes_are_named(options, message):
    arguments = {"logprobs": LP, "target_cu_seqlens": CU, "advantages": A, "denominator": 1} | options
    with pytest.raises(TypeError, match=message):
        grpo_loss(config=LossConfig(), **arguments)


def test_padded_logits_are_refused_by_their_name():
    with pytest.raises(ValueError, match=r"logits has shape \(1, 3, 5\); wanted \[num_targets, vocab\]"):
        logits_grpo_loss(torch.zeros(1, 3, 5), torch.zeros(1, 3).long(), CU, LossConfig(), denominator=1, advantages=A)


def test_an_unknown_advantage_scale_is_named():
    with pytest.raises(ValueError, match="scale is 'mad'"):
        group_advantages(torch.zeros(1, 2), scale="mad")
