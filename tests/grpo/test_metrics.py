"""What a person reads off a run is what was computed, and costs no more memory than a few numbers."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from flashgrpo.grpo.learn.balance import PackPlan, plan_packs
from flashgrpo.grpo.learn.learner import Learner
from flashgrpo.grpo.learn.packing import Completion, Group
from flashgrpo.grpo.metrics import device_metrics, one_line, rollout_metrics, speed_metrics
from flashgrpo.grpo.recipe.schema import OptimizerSection
from flashgrpo.grpo.run.progress import Clock
from flashgrpo.grpo.run.world import open_world
from flashgrpo.grpo.types import Rollout, ScoredGroup, Scores, StepData
from flashgrpo.kernels.grpo_loss import LossConfig
from flashgrpo.model.checkpoint import load_checkpoint
from flashgrpo.model.cost import ModelFlops

NAN = float("nan")


def step_data(rewards: list[list[float]], **values) -> StepData:
    groups = []
    for i, row in enumerate(rewards):
        arrays = np.zeros(2, dtype=np.int64), np.zeros(2, dtype=np.float32)
        rollouts = [Rollout([1], *arrays, "stop", i, ((1, 2),), reflections=3 * n) for n in range(len(row))]
        groups.append(ScoredGroup(rollouts, Scores(np.array(row), {"accuracy": [*row]}), f"source {i}"))
    return StepData(groups, version=1, **values)


def test_advantages_are_those_that_the_loss_uses():
    """Of equal rewards 0, and scaled as the recipe says; rewards that are missing have none."""
    data = step_data([[0.0, 2.0, NAN], [1.0, 1.0, 1.0]], discarded=5)
    unscaled = rollout_metrics(data, LossConfig.preset("dr_grpo"))
    assert unscaled["advantage/abs_mean"] == pytest.approx(2 / 5)
    assert unscaled["advantage/max"] == 1.0
    scaled = rollout_metrics(data, LossConfig.preset("grpo"))
    assert scaled["advantage/max"] == pytest.approx(1 / math.sqrt(2), abs=1e-3)
    assert scaled["reward/group_std"] == pytest.approx(math.sqrt(2))  # of the groups that are not dead
    assert (scaled["groups/dead"], scaled["groups/discarded"]) == (0.5, 5.0)
    assert scaled["reward/missing"] == pytest.approx(1 / 6)


def test_reflections_are_counted_per_token():
    assert rollout_metrics(step_data([[0.0, 1.0]]), LossConfig.preset("grpo"))["reflection/per_1000_tokens"] == 750


def test_scores_are_told_by_function_and_by_source():
    """Without those that a function left to others; what nobody was asked for has no number."""
    data = step_data([[0.0, 2.0, NAN], [1.0, 5.0, 1.0]])
    data.groups[1].scores.by_function.update({"accuracy": [None, 5.0, None], "late": [NAN, 4.0, 2.0]})
    found = rollout_metrics(data, LossConfig.preset("grpo"), ["accuracy", "late", "later"], ["source 0", "source 2"])
    assert found["reward/accuracy"] == pytest.approx(7 / 3)
    assert found["reward/late"] == 3
    assert "reward/later" not in found
    assert (found["source/source 0/reward"], found["source/source 0/share"]) == (1, 0.5)
    assert math.isnan(found["source/source 2/reward"])
    assert found["source/source 2/share"] == 0


def test_a_step_without_any_reward_has_metrics_too():
    metrics = rollout_metrics(step_data([[NAN, NAN]]), LossConfig.preset("grpo"))
    assert math.isnan(metrics["reward/mean"])
    assert math.isnan(metrics["advantage/max"])
    assert (metrics["reward/group_std"], metrics["groups/dead"]) == (0.0, 1.0)


def test_metrics_of_a_step_do_not_copy_what_is_kept_per_token(model_path, recipe):
    """At 8,192 completions of 32k tokens their concatenation would be gigabytes."""
    learner = Learner(load_checkpoint(model_path), OptimizerSection(), 1)
    per_token = {name: torch.empty(1).expand(10**13) for name in ("logprobs", "entropies")}
    scalars = {"loss": 1.0, "num_tokens": 3.0, "entropy": 0.5, "ratio_max": 2.0}
    stats = {name: torch.tensor(value) for name, value in scalars.items()} | per_token
    with open_world(recipe) as world:
        metrics = device_metrics([stats, stats], [torch.tensor(4.0)], learner, world)
    assert (metrics["loss"], metrics["grad_norm"], metrics["entropy"], metrics["ratio/max"]) == (2.0, 4.0, 0.5, 2.0)


def test_speed_counts_what_the_loss_multiplies(recipe, monkeypatch):
    """Attention by its pairs, three passes' FLOPs, the wait for the slowest; and their share of a GPU's peak."""
    flops = ModelFlops(per_token=100.0, per_pair=10.0, per_target=1000.0)
    groups = [Group([1, 2], [Completion(np.array([3, 4, 5]), 0)]), Group([1], [Completion(np.array([3]), 1)])]
    plan = PackPlan([[[groups[0]]], [[groups[1]]]], np.array([[4 * 100 + 10 * 10 + 3000], [100 + 10 + 1000.0]]))
    assert (plan_packs(groups, 8, 2, flops).costs == plan.costs).all()
    clock = Clock()
    clock.seconds |= {"train": 2.0, "generate": 4.0}
    clock.start -= 10.0
    with open_world(recipe) as world:
        world = dataclasses.replace(world, size=2)
        metrics = speed_metrics(step_data([[0.0, 1.0]]), clock, [plan], world)
        assert "mfu" not in metrics  # no peak of a CPU is known
        monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H200")
        monkeypatch.setattr("flashgrpo.grpo.metrics.peak_memory_mb", lambda device: 0.0)
        on_gpu = speed_metrics(
            step_data([[0.0, 1.0]]), clock, [plan], dataclasses.replace(world, device=torch.device("cuda"))
        )
    rate = 3 * (3500 + 1110) / 2.0 / 2
    assert metrics["tflops"] == pytest.approx(rate / 1e12)
    assert on_gpu["mfu"] == pytest.approx(rate / 989e12)
    assert metrics["tokens_per_s/trained"] == pytest.approx(5 / 2.0)
    assert metrics["tokens_per_s/sampled"] == pytest.approx(metrics["tokens_per_s"] * 10 / 4, rel=1e-2)
    assert metrics["tokens_per_s/gpu"] == pytest.approx(metrics["tokens_per_s"] / 2)
    assert metrics["idle"] == pytest.approx(2.0 * (1 - (3500 + 1110) / 7000) / 10, rel=1e-2)


def test_the_line_of_a_step_tells_rewards_first_and_rates_last():
    rewards = {"reward/mean": 0.5, "reward/missing": 0.0, "reward/accuracy": 0.25}
    rates = {"tokens_per_s": 1000.0, "tokens_per_s/trained": 5000.0}
    metrics = rates | {"grad_norm": 0.31, "length/mean": 34.0, "length/truncated": 0.02, "entropy": 0.5} | rewards
    told = "reward 0.500, accuracy 0.250, length 34, truncated 2.0%, entropy 0.50, gradient 0.31, 1,000 tokens/s"
    assert one_line(metrics) == f"{told} (5,000 training)"
    assert one_line(metrics | {"tokens_per_s/sampled": 2000.0}) == f"{told} (2,000 sampling, 5,000 training)"
