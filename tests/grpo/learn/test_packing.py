"""Packing decides what is trained on: a wrong row here is a silently wrong gradient."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashgrpo.grpo.errors import PackingError
from flashgrpo.grpo.learn.packing import (
    Completion,
    Group,
    best_fit,
    build_batch,
    centred,
    has_signal,
    live_groups,
    loss_denominator,
)
from flashgrpo.grpo.types import Rollout, ScoredGroup, Scores
from flashgrpo.kernels.grpo_loss import LossConfig, group_advantages

NAN = float("nan")


def group(prompt_length: int, *completion_lengths: int, first_id: int = 0, base: int = 100) -> Group:
    """Token ids are unique within the group, so that a misplaced row shows."""
    completions, start = [], base + prompt_length
    for i, length in enumerate(completion_lengths):
        ids = np.arange(start, start + length)
        completions.append(Completion(ids, first_id + i, behavior_logprobs=-ids.astype(np.float32)))
        start += length
    return Group(list(range(base, base + prompt_length)), completions)


def test_completions_keep_their_rewards_beside_those_that_are_left_out():
    rollouts = [Rollout([1], np.array([2]), np.zeros(1, np.float32), "stop", 0, ((0, 1),))] * 3
    assert [c.sequence_id for c in Group.of(rollouts, 4, [True, False, True]).completions] == [4, 6]


def pack_groups(groups: list[Group], token_budget: int):
    return [build_batch(pack) for pack in best_fit(groups, token_budget)]


def test_layout_of_the_documented_example():
    batch = build_batch([group(3, 2, 3)])
    assert batch.input_ids.tolist() == [100, 101, 102, 103, 105, 106]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 3, 4]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert batch.prefix.tolist() == [-1, 0, 0]
    assert batch.targets.tolist() == [103, 104, 105, 106, 107]
    assert batch.target_cu_seqlens.tolist() == [0, 2, 5]
    assert batch.predictors.tolist() == [2, 3, 2, 4, 5]
    assert batch.behavior_logprobs is not None
    assert batch.behavior_logprobs.tolist() == [-103, -104, -105, -106, -107]
    assert batch.cu_seqlens.dtype == batch.prefix.dtype == batch.target_cu_seqlens.dtype == torch.int32


def test_kept_sets_lie_target_by_target_in_the_order_of_the_pack():
    counts, ids = np.array([2, 0], np.int32), np.array([7, 5], np.int32)  # the second token is of the whole vocabulary
    rollout = Rollout([1], np.array([5, 2]), np.zeros(2, np.float32), "stop", 0, ((0, 2),), counts, ids)
    other = dataclasses.replace(rollout, kept_counts=counts[::-1], kept_ids=ids[::-1])
    batch = build_batch([Group.of([rollout, other])])
    assert batch.kept is not None
    assert [x.tolist() for x in batch.kept] == [[7, 5, 5, 7], [0, 2, 2, 2, 4]]
    assert {x.dtype for x in batch.kept} == {torch.int32}
    without = dataclasses.replace(rollout, kept_counts=None, kept_ids=None)
    assert build_batch([Group.of([without])]).kept is build_batch([]).kept is None
    with pytest.raises(PackingError, match="1 of 2 completions have kept_counts, wanted all or none"):
        build_batch([Group.of([rollout, without])])


@st.composite
def group_lists(draw):
    groups, first_id = [], 0
    for i in range(draw(st.integers(1, 6))):
        lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
        groups.append(group(draw(st.integers(1, 7)), *lengths, first_id=first_id, base=1000 * (i + 1)))
        first_id += len(lengths)
    return groups


@settings(max_examples=60, deadline=None)
@given(groups=group_lists(), budget=st.integers(16, 60))
def test_every_target_once_within_budget_behind_its_own_prompt(groups, budget):
    batches = pack_groups(groups, budget)
    seen = {}
    for batch in batches:
        assert batch.total_tokens <= budget
        assert batch.max_seqlen == int(batch.cu_seqlens.diff().max())
        offsets, target_offsets = batch.cu_seqlens.tolist(), batch.target_cu_seqlens.tolist()
        completion_segments = [s for s, parent in enumerate(batch.prefix.tolist()) if parent >= 0]
        assert len(completion_segments) == len(batch.sequence_ids)
        for i, segment in enumerate(completion_segments):
            parent = int(batch.prefix[segment])
            prompt = batch.input_ids[offsets[parent] : offsets[parent + 1]].tolist()
            targets = batch.targets[target_offsets[i] : target_offsets[i + 1]].tolist()
            rows = batch.predictors[target_offsets[i] : target_offsets[i + 1]]
            assert batch.input_ids[rows].tolist() == [prompt[-1], *targets[:-1]]
            assert batch.position_ids[rows].tolist() == list(range(len(prompt) - 1, len(prompt) - 1 + len(targets)))
            seen[int(batch.sequence_ids[i])] = (prompt, targets)
    wanted = {c.sequence_id: (list(g.prompt_ids), c.token_ids.tolist()) for g in groups for c in g.completions}
    assert seen == wanted


def test_best_fit_fills_what_first_fit_would_waste():
    # 6 + 5 + 5 + 4 tokens into bins of 10: best-fit decreasing needs two, in the order given three
    groups = [group(1, 4 + 1), group(1, 5 + 1), group(1, 3 + 1), group(1, 4 + 1)]
    assert [batch.total_tokens for batch in pack_groups(groups, 10)] == [10, 10]


def test_group_over_the_budget_repeats_its_prompt():
    batches = pack_groups([group(5, 6, 6, 6)], 16)
    assert [batch.completions_per_prompt.tolist() for batch in batches] == [[2], [1]]
    assert all(batch.input_ids[:5].tolist() == list(range(100, 105)) for batch in batches)


def test_budget_below_the_longest_member_names_the_budget_wanted():
    with pytest.raises(PackingError, match=r"token_budget = 8; raise train.token_budget to 10 or more"):
        pack_groups([group(5, 6)], 8)


def test_empty_micro_batch_has_no_rows():
    batch = build_batch([])
    assert batch.total_tokens == batch.num_targets == 0
    assert batch.cu_seqlens.tolist() == batch.target_cu_seqlens.tolist() == [0]


@pytest.mark.parametrize(
    ("bad", "message"),
    [(group(0, 3), "empty prompt"), (group(3, 2, 0), "without tokens"), (group(3), "prompt without completions")],
)
def test_empty_prompt_or_completion_is_refused(bad, message):
    with pytest.raises(PackingError, match=message):
        build_batch([bad])


@pytest.mark.parametrize(
    ("rewards", "dead"),
    [
        ([1, 1, 1], True),
        ([0, 1, 1], False),
        ([NAN, 1, 1], True),
        ([NAN, NAN, 1], True),
        ([NAN, 0, 1], False),
        ([0.1, 0.1, 0.1], True),
        ([1e8, 1e8 + 1, 1e8], False),
        ([1e-60, 0, 0], True),  # which fp32 cannot hold
        ([1e39, 1e39, 1e39], True),
    ],
)
def test_dead_groups(rewards, dead):
    assert has_signal(np.array([rewards], dtype=float)).tolist() == [not dead]


@pytest.mark.parametrize(
    "rewards", [[0.0, 1, 2, 3], [1e8, 1e8 + 1, 1e8 + 2, 1e8 + 3], [1e20, 1e-20, NAN, 1e-20], [1e39, 1, 1e39, -1e100]]
)
def test_rewards_that_fp32_cannot_hold_have_the_advantages_of_float64(rewards):
    """1e8 + {0..3} would be equal, the deviation of 1e20 infinite, and 1e39 missing: a run that learns nothing."""
    rewards = np.array([rewards, [0.0, 1, 1, 1]])
    config = LossConfig.preset("grpo")
    found = group_advantages(centred(rewards, config), scale="std")
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), group_advantages(torch.from_numpy(rewards), scale="std"), rtol=1e-5, atol=1e-6, equal_nan=True
    )


def test_unscaled_rewards_beyond_fp32_are_no_missing_ones():
    """Their gradient is not finite, which is said, where none at all would pass for an equal group."""
    found = centred(np.array([[1e39, 0.0, NAN]]), LossConfig.preset("dr_grpo"))
    assert found.abs()[0, :2].tolist() == [torch.finfo(torch.float32).max] * 2
    assert found[0, 2].isnan()


def test_only_what_has_a_gradient_is_packed():
    groups = [group(2, 3, 3, first_id=0), group(2, 3, 3, first_id=2), group(2, 3, 3, first_id=4)]
    rewards = np.array([[1.0, 1.0], [0.0, 1.0], [NAN, 1.0]])
    assert live_groups(groups, rewards, LossConfig.preset("dapo")) == [groups[1]]
    for config in (LossConfig.preset("grpo"), LossConfig.preset("dapo", entropy_coef=0.01)):
        assert live_groups(groups, rewards, config) == groups


@pytest.mark.parametrize(("preset", "wanted"), [("grpo", 5), ("dapo", 3 + 4 + 5 + 6), ("dr_grpo", 5 * 64)])
def test_denominator_counts_dead_groups_and_masked_completions(preset, wanted):
    dead, live = group(2, 3, 4, first_id=0), group(2, 5, 6, first_id=2)
    rewards = np.array([[1.0, 1.0], [0.0, 1.0], [NAN, 1.0]])
    arrays = np.array([7]), np.zeros(1, dtype=np.float32)
    rollouts = [Rollout([1], *arrays, finish_reason, 2, ((0, 1),)) for finish_reason in ("stop", "length")]
    scored = ScoredGroup(rollouts, Scores(rewards[2], {}))
    assert scored.is_trained(mask_overlong=False) == [False, True]
    masked = Group.of(rollouts, 4, scored.is_trained(mask_overlong=True))
    assert loss_denominator([dead, live, masked], rewards, LossConfig.preset(preset), 64) == wanted
