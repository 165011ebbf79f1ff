import math
from dataclasses import asdict

import pytest
import torch
from torch import Tensor

from flashgrpo.kernels.grpo_loss import (
    LossConfig,
    group_advantages,
    grpo_loss,
    logits_grpo_loss,
    merge_stats,
    pack_padded,
)
from flashgrpo.kernels.logprob import gather_logprobs

LENGTHS = [3, 0, 5, 1, 4, 2]
OFFSETS = torch.tensor([0, 3, 3, 8, 9, 13, 15], dtype=torch.int32)
NUM_TOKENS = 15
PRESETS = ["grpo", "r1", "dapo", "bnpo", "dr_grpo", "gspo", "cispo"]
VARIANTS = {
    **{name: LossConfig.preset(name) for name in PRESETS},
    "k1": LossConfig.preset("grpo", kl_estimator="k1", kl_coef=0.3),
    "k2": LossConfig.preset("grpo", kl_estimator="k2", kl_coef=0.3),
    "k3": LossConfig.preset("dapo", kl_coef=0.7),
    "two_sided": LossConfig(clip_max=1.5, clip_high=0.3),
    "sequence_tokens": LossConfig(ratio_level="sequence", aggregate="token_mean"),
    "sequence_cispo": LossConfig(ratio_level="sequence", objective="cispo", clip_high=0.1),
    "tis": LossConfig(behavior_cap=1.2, kl_coef=0.1),
    "icepop": LossConfig(behavior_cap=1.4, behavior_floor=0.7, behavior_mode="mask"),
    "sequence_tis": LossConfig(ratio_level="sequence", behavior_cap=1.05),
    "cispo_tis": LossConfig.preset("cispo", behavior_cap=1.1),
}


@pytest.fixture
def tokens() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def noisy(base: Tensor | float) -> Tensor:
        return base + 0.4 * torch.randn(NUM_TOKENS, dtype=torch.float64, generator=generator)

    logprobs = noisy(-2.0)
    return {
        "logprobs": logprobs.requires_grad_(),
        "old_logprobs": noisy(logprobs.detach()),
        "ref_logprobs": noisy(logprobs.detach()),
        "behavior_logprobs": noisy(logprobs.detach()),
    }


ADVANTAGES = torch.tensor([1.3, 0.4, -0.8, -2.0, 0.5, 0.0], dtype=torch.float64)


def naive_loss(config, logprobs, old_logprobs, ref_logprobs, behavior_logprobs, advantages, denominator):
    """The formulas of the papers, token by token, differentiated by autograd."""
    total = logprobs.new_zeros(())
    start = 0
    for length, advantage in zip(LENGTHS, advantages, strict=True):
        rows = slice(start, start + length)
        start += length
        if math.isnan(advantage) or not length:
            continue
        new = logprobs[rows]
        old = new.detach() if old_logprobs is None else old_logprobs[rows]
        ratio, behavior = (new - old).exp(), (old - behavior_logprobs[rows]).exp()
        if config.ratio_level == "sequence":
            ratio, behavior = ((r.log().mean()).exp().expand(length) for r in (ratio, behavior))
        loss = logprobs.new_zeros(())
        for i in range(length):
            r = ratio[i]
            if config.objective == "cispo":
                policy = -r.detach().clamp(max=1 + config.clip_high) * advantage * new[i]
            else:
                if advantage < 0 and config.clip_max is not None:
                    r = r.clamp(max=config.clip_max)
                policy = -min(r * advantage, r.clamp(1 - config.clip_low, 1 + config.clip_high) * advantage)
                if advantage < 0 and config.clip_max is not None and r > 1 + config.clip_high:
                    policy = -r * advantage
            if config.behavior_cap is not None:
                b = behavior[i]
                inside = config.behavior_floor <= b <= config.behavior_cap
                truncated = b.clamp(max=config.behavior_cap)
                policy = policy * (truncated if config.behavior_mode == "truncate" else b * inside)
            d = ref_logprobs[rows][i] - new[i]
            kl = {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - d - 1}[config.kl_estimator]
            loss = loss + policy + config.kl_coef * kl
        total = total + (loss / length if config.aggregate == "sequence_mean" else loss)
    return total / denominator


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_method_equals_its_formula_with_gradient(name, on_policy, tokens):
    config = VARIANTS[name]
    if on_policy:
        tokens["old_logprobs"] = None
    expected = naive_loss(config, **tokens, advantages=ADVANTAGES.tolist(), denominator=7)
    logprobs = tokens.pop("logprobs")
    actual, _ = grpo_loss(logprobs, OFFSETS, config, denominator=7, advantages=ADVANTAGES, **tokens)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-12)
    gradients = [torch.autograd.grad(3 * x, logprobs)[0] for x in (actual, expected)]
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", [name for name in VARIANTS if "cispo" not in name])
def test_gradcheck(name, tokens):
    logprobs = tokens.pop("logprobs")

    def loss(x: Tensor) -> Tensor:
        return grpo_loss(x, OFFSETS, VARIANTS[name], denominator=2, advantages=ADVANTAGES, **tokens)[0]

    assert torch.autograd.gradcheck(loss, logprobs)


def test_group_advantages_follow_the_formula():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 2.0], [3.0, 4.0, 8.0, 9.0]], dtype=torch.float64)
    centered = rewards - rewards.mean(1, keepdim=True)
    torch.testing.assert_close(group_advantages(rewards), centered / (rewards.std(1, keepdim=True) + 1e-4))
    torch.testing.assert_close(group_advantages(rewards, scale="none"), centered)
    torch.testing.assert_close(group_advantages(rewards, eps=1.0), centered / (rewards.std(1, keepdim=True) + 1))


def test_missing_rewards_leave_the_group():
    nan = torch.nan
    rewards = torch.tensor([[nan, 1.0, 0.0, 0.0], [nan, nan, 5.0, nan], [nan] * 4, [0.1, nan, 0.1, 0.1]])
    advantages = group_advantages(rewards)
    assert torch.equal(advantages.isnan(), rewards.isnan())
    torch.testing.assert_close(advantages[0, 1:], group_advantages(rewards[:1, 1:])[0])
    assert advantages[1, 2] == 0
    assert advantages[3].nansum() == 0


@pytest.mark.parametrize("reward", [torch.inf, -torch.inf])
def test_an_infinite_reward_is_missing_and_spoils_no_other(reward):
    advantages = group_advantages(torch.tensor([[1.0, reward, 0.0, 2.0]]))
    missing = group_advantages(torch.tensor([[1.0, torch.nan, 0.0, 2.0]]))
    torch.testing.assert_close(advantages, missing, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e6 + 0.0625, -7e-5])
@pytest.mark.parametrize("group_size", [1, 3, 7])
def test_equal_rewards_have_advantage_exactly_zero(reward, group_size):
    assert not group_advantages(torch.full((2, group_size), reward)).any()


def test_large_rewards_keep_their_differences():
    small = torch.tensor([[0.0, 0.0625, 0.0, 0.125]])
    torch.testing.assert_close(group_advantages(1e6 + small), group_advantages(small), rtol=1e-6, atol=0)


def test_rewards_are_gathered_by_sequence_id(tokens):
    rewards = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([5, 0, 7, 1, 2, 4], dtype=torch.int32)
    logprobs, config = tokens["logprobs"], LossConfig.preset("dr_grpo")
    fused, _ = grpo_loss(logprobs, OFFSETS, config, denominator=3, rewards=rewards, sequence_ids=ids)
    advantages = group_advantages(rewards, scale="none").flatten()[ids]
    own, _ = grpo_loss(logprobs, OFFSETS, config, denominator=3, advantages=advantages)
    assert torch.equal(fused, own)
    in_order, _ = grpo_loss(logprobs, OFFSETS, config, denominator=3, rewards=rewards.flatten()[:6].view(2, 3))
    advantages = group_advantages(rewards.flatten()[:6].view(2, 3), scale="none").flatten()
    own, _ = grpo_loss(logprobs, OFFSETS, config, denominator=3, advantages=advantages)
    assert torch.equal(in_order, own)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_completion_without_reward_changes_nothing(name, tokens):
    advantages = ADVANTAGES.clone()
    advantages[2] = torch.nan
    poisoned = {k: v.detach().clone() for k, v in tokens.items()}
    for fill, key in zip((torch.nan, torch.inf, -torch.inf, torch.nan), poisoned, strict=True):
        poisoned[key][3:8] = fill
    logprobs = poisoned.pop("logprobs").requires_grad_()
    loss, stats = grpo_loss(logprobs, OFFSETS, VARIANTS[name], denominator=2, advantages=advantages, **poisoned)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    kept = [i for i in range(NUM_TOKENS) if not 3 <= i < 8]
    short = {k: v.detach()[kept] for k, v in tokens.items()}
    reference = short.pop("logprobs").requires_grad_()
    offsets = torch.tensor([0, 3, 3, 4, 8, 10])
    present = advantages[~advantages.isnan()]
    wanted, wanted_stats = grpo_loss(reference, offsets, VARIANTS[name], denominator=2, advantages=present, **short)
    torch.testing.assert_close(loss, wanted)
    assert not gradient[3:8].any()
    torch.testing.assert_close(gradient[kept], torch.autograd.grad(wanted, reference)[0])
    assert stats.keys() == wanted_stats.keys()
    for key, value in stats.items():
        torch.testing.assert_close(value, wanted_stats[key])


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_ratio_on_its_bound_has_the_full_gradient(advantage):
    logprobs = torch.zeros(2, requires_grad=True)
    config = LossConfig(clip_low=0, clip_high=0, aggregate="token_mean")
    loss, stats = grpo_loss(
        logprobs, torch.tensor([0, 2]), config, denominator=1, advantages=torch.tensor([advantage]),
        old_logprobs=torch.zeros(2),
    )  # fmt: skip
    assert torch.autograd.grad(loss, logprobs)[0].tolist() == [-advantage, -advantage]
    assert stats["live_fraction"] == 1
    assert stats["clip_low_fraction"] == stats["clip_high_fraction"] == 0


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_extreme_ratios_stay_finite_and_lose_their_gradient(level):
    logprobs = torch.tensor([-1.0, -1.0, -500.0, -torch.inf], requires_grad=True)
    config = LossConfig(ratio_level=level, aggregate="token_mean", kl_coef=1.0)
    loss, stats = grpo_loss(
        logprobs, torch.tensor([0, 1, 2, 3, 4]), config, denominator=1,
        advantages=torch.tensor([-1.0, 1.0, 1.0, 1.0]),
        old_logprobs=torch.tensor([-60.0, -1.0, -1.0, -1.0]), ref_logprobs=torch.tensor([-1.0, 60.0, -500.0, -1.0]),
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert loss.isfinite()
    assert gradient.tolist() == [0, -1, 0, 0]
    assert stats["ratio_max"] == pytest.approx(math.exp(20), rel=1e-5)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_token_that_the_reference_rules_out_stays_finite(estimator):
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    config = LossConfig(kl_coef=1.0, kl_estimator=estimator)
    loss, stats = grpo_loss(
        logprobs, torch.tensor([0, 2]), config, denominator=1, advantages=torch.zeros(1),
        ref_logprobs=torch.tensor([-torch.inf, -31.0]),
    )  # fmt: skip
    assert loss.isfinite()
    assert stats["kl"].isfinite()
    slope = 30.0 if estimator == "k2" else 1.0  # a rare token is still pulled back
    assert torch.autograd.grad(loss, logprobs)[0].tolist() == pytest.approx([0, slope / 2])


def test_a_float64_denominator_leaves_the_loss_in_fp32():
    logprobs = torch.zeros(3, requires_grad=True)
    denominator = torch.tensor(3.0, dtype=torch.float64)
    loss, _ = grpo_loss(logprobs, torch.tensor([0, 3]), LossConfig(), denominator=denominator, advantages=torch.ones(1))
    assert loss.dtype == torch.float32


def test_tokens_with_an_entropy_gradient_are_live():
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    arguments = (logits, torch.arange(4), torch.tensor([0, 4]))
    for coef, live in ((0.0, 0), (0.1, 1)):
        _, stats = logits_grpo_loss(*arguments, LossConfig(entropy_coef=coef), denominator=1, advantages=torch.zeros(1))
        assert stats["live_fraction"] == live


def test_cispo_drops_a_token_that_has_become_impossible():
    logprobs = torch.tensor([-torch.inf, -2.0], requires_grad=True)
    loss, _ = grpo_loss(
        logprobs, torch.tensor([0, 2]), LossConfig.preset("cispo"), denominator=1, advantages=torch.ones(1),
        old_logprobs=torch.tensor([-1.0, -2.0]),
    )  # fmt: skip
    assert loss == 2
    assert torch.autograd.grad(loss, logprobs)[0].tolist() == [0, -1]


def test_metrics(tokens):
    config = LossConfig(kl_coef=0.0, clip_low=0.05, clip_high=0.1)
    logprobs = tokens["logprobs"]
    _, stats = grpo_loss(
        logprobs, OFFSETS, config, denominator=1, advantages=ADVANTAGES,
        **{k: v for k, v in tokens.items() if k != "logprobs"},
    )  # fmt: skip
    new, old, ref, behavior = (x.detach() for x in tokens.values())
    ratio = (new - old).exp()
    advantages = ADVANTAGES.repeat_interleave(torch.tensor(LENGTHS))
    low, high = (ratio < 0.95) & (advantages < 0), (ratio > 1.1) & (advantages > 0)
    d = ref - new
    assert low.any()
    assert high.any()
    expected = {
        "num_tokens": 15,
        "ratio_mean": ratio.mean(),
        "ratio_max": ratio.max(),
        "clip_low_fraction": low.double().mean(),
        "clip_high_fraction": high.double().mean(),
        "live_fraction": (~low & ~high & (advantages != 0)).double().mean(),
        "kl": (d.exp() - d - 1).mean(),
        "behavior_mismatch_mean": (old - behavior).abs().mean(),
        "behavior_mismatch_max": (old - behavior).abs().max(),
    }
    assert {k: v.item() for k, v in stats.items()} == pytest.approx({k: float(v) for k, v in expected.items()})
    assert {v.dtype for v in stats.values()} == {torch.float32}


def test_merged_metrics_equal_those_of_one_call(tokens):
    config = LossConfig.preset("grpo", clip_low=0.1)
    logits = torch.randn(NUM_TOKENS, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    targets = torch.arange(NUM_TOKENS) % 6
    per_token = {k: v for k, v in tokens.items() if k != "logprobs"}

    def stats_of(rows: slice, completions: slice) -> dict[str, Tensor]:
        return logits_grpo_loss(
            logits[rows], targets[rows], OFFSETS[completions.start : completions.stop + 1] - rows.start, config,
            denominator=1, advantages=ADVANTAGES[completions], **{k: v[rows] for k, v in per_token.items()},
        )[1]  # fmt: skip

    whole = stats_of(slice(0, 15), slice(0, 6))
    parts = [
        stats_of(slice(0, 3), slice(0, 2)),
        stats_of(slice(3, 9), slice(2, 4)),
        stats_of(slice(9, 15), slice(4, 6)),
    ]
    merged = merge_stats(parts)
    assert merged.keys() == whole.keys() >= {"entropy", "logprobs", "entropies"}
    for key, value in whole.items():
        torch.testing.assert_close(merged[key], value)
    with pytest.raises(ValueError, match="at least one"):
        merge_stats([])
    with pytest.raises(ValueError, match="differ in the metrics kl"):
        merge_stats([parts[0], {k: v for k, v in parts[1].items() if k != "kl"}])


@pytest.mark.parametrize("entropy_coef", [0.0, 0.3])
@pytest.mark.parametrize("name", VARIANTS)
def test_loss_from_logits_is_the_loss_of_their_logprobs(name, entropy_coef, tokens):
    config = LossConfig(**{**asdict(VARIANTS[name]), "entropy_coef": entropy_coef})
    logits = torch.randn(NUM_TOKENS, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    logits.requires_grad_()
    targets = torch.arange(NUM_TOKENS) % 6
    per_token = {k: v for k, v in tokens.items() if k != "logprobs"}
    actual, stats = logits_grpo_loss(
        logits, targets, OFFSETS, config, denominator=torch.tensor(5), advantages=ADVANTAGES, temperature=0.8,
        **per_token,
    )  # fmt: skip
    log_p = torch.log_softmax(logits / 0.8, 1)
    logprobs = log_p[torch.arange(NUM_TOKENS), targets]
    expected = naive_loss(VARIANTS[name], logprobs, **per_token, advantages=ADVANTAGES.tolist(), denominator=5)
    entropies = -(log_p.exp() * log_p).sum(1)
    lengths = torch.tensor(LENGTHS)
    weights = 1 / lengths.repeat_interleave(lengths).double() if config.aggregate == "sequence_mean" else 1
    expected = expected - entropy_coef * (entropies * weights).sum() / 5
    assert actual.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(stats["entropy"], entropies.mean().float())
    torch.testing.assert_close(stats["logprobs"], logprobs.detach())
    assert not stats["logprobs"].requires_grad
    gradients = [torch.autograd.grad(x, logits)[0] for x in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-13)


def test_gradcheck_from_logits(tokens):
    logits = torch.randn(NUM_TOKENS, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    targets = torch.arange(NUM_TOKENS) % 4
    old = tokens["logprobs"].detach()
    config = LossConfig.preset("gspo", clip_low=0.3, clip_high=0.3, entropy_coef=0.1)

    def loss(x: Tensor) -> Tensor:
        return logits_grpo_loss(
            x, targets, OFFSETS, config, denominator=2, advantages=ADVANTAGES, temperature=0.7, old_logprobs=old
        )[0]

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())


def test_ignored_targets_do_not_count(tokens):
    config = LossConfig(entropy_coef=0.2)
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(2)).requires_grad_()
    advantages = torch.tensor([1.0, -2.0])
    targets = torch.tensor([1, -100, 3, 0, -100])
    loss, stats = logits_grpo_loss(
        logits, targets, torch.tensor([0, 3, 5]), config, denominator=2, advantages=advantages
    )
    kept = [0, 2, 3]
    expected, expected_stats = logits_grpo_loss(
        logits[kept].detach(), targets[kept], torch.tensor([0, 2, 3]), config, denominator=2, advantages=advantages
    )
    torch.testing.assert_close(loss, expected)
    assert stats["num_tokens"] == 3
    torch.testing.assert_close(stats["entropy"], expected_stats["entropy"])
    assert torch.autograd.grad(loss, logits)[0].any(1).tolist() == [True, False, True, True, False]


def test_a_target_out_of_range_makes_the_loss_nan():
    logits = torch.zeros(2, 4, requires_grad=True)
    loss, _ = logits_grpo_loss(
        logits, torch.tensor([1, 4]), torch.tensor([0, 2]), LossConfig(), denominator=1, advantages=torch.ones(1)
    )
    assert loss.isnan()


def test_gradient_overwrites_logits_that_are_a_result_and_spares_a_leaf():
    leaf = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    before = leaf.detach().clone()
    arguments = (torch.tensor([1, 2, 0]), torch.tensor([0, 3]), LossConfig())
    loss, _ = logits_grpo_loss(leaf, *arguments, denominator=1, advantages=torch.ones(1))
    (from_leaf,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(leaf.detach(), before)
    view = leaf.view(3, 4)
    logits_grpo_loss(view, *arguments, denominator=1, advantages=torch.ones(1))[0].backward()
    assert torch.equal(leaf.detach(), before)
    assert torch.equal(leaf.grad, from_leaf)
    result = leaf * 1
    loss, _ = logits_grpo_loss(result, *arguments, denominator=1, advantages=torch.ones(1))
    loss.backward()
    assert torch.equal(result.detach(), from_leaf)


@pytest.mark.parametrize("offsets", [[0], [0, 0, 0]])
@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo"])
def test_no_tokens_give_zero(name, offsets):
    logprobs = torch.zeros(0, requires_grad=True)
    empty = torch.zeros(0)
    loss, stats = grpo_loss(
        logprobs, torch.tensor(offsets), VARIANTS[name], denominator=4, advantages=torch.ones(len(offsets) - 1),
        old_logprobs=empty, ref_logprobs=empty, behavior_logprobs=empty,
    )  # fmt: skip
    assert loss == 0
    assert torch.autograd.grad(loss, logprobs)[0].shape == (0,)
    assert not any(value.any() for value in stats.values())


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


LP, CU, A = torch.zeros(3), torch.tensor([0, 1, 3]), torch.zeros(2)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (LossConfig(), {}, "neither of rewards and advantages"),
        (LossConfig(), {"advantages": A, "rewards": A[None]}, "both of rewards and advantages"),
        (LossConfig(kl_coef=0.1), {"advantages": A}, "needs ref_logprobs"),
        (LossConfig(behavior_cap=2.0), {"advantages": A}, "needs behavior_logprobs"),
        (LossConfig(entropy_coef=0.1), {"advantages": A}, "entropy_coef is 0.1"),
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
        (LossConfig(), {"advantages": A, "denominator": torch.ones((), device="meta")}, "denominator is on meta"),
    ],
)
def test_bad_arguments_are_named(config, options, message):
    arguments = {"logprobs": LP, "target_cu_seqlens": CU, "denominator": 1} | options
    with pytest.raises(ValueError, match=message):
        grpo_loss(config=config, **arguments)


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
    ],
)
def test_wrong_dtypes_are_named(options, message):
    arguments = {"logprobs": LP, "target_cu_seqlens": CU, "advantages": A, "denominator": 1} | options
    with pytest.raises(TypeError, match=message):
        grpo_loss(config=LossConfig(), **arguments)


def test_an_unknown_advantage_scale_is_named():
    with pytest.raises(ValueError, match="scale is 'mad'"):
        group_advantages(torch.zeros(1, 2), scale="mad")


def test_low_precision_logprobs_are_raised_to_fp32():
    logprobs = torch.full((3,), -1.0, dtype=torch.bfloat16, requires_grad=True)
    loss, _ = grpo_loss(logprobs, CU, LossConfig(), denominator=1, advantages=torch.tensor([1.0, -2.0]))
    assert loss.dtype == torch.float32
    assert torch.autograd.grad(loss, logprobs)[0].tolist() == [-1, 1, 1]
    assert gather_logprobs(torch.zeros(3, 2), torch.zeros(3).long())[0].dtype == torch.float32
