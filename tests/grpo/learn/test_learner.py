"""An update is AdamW's on the sum of its gradients, or nothing at all where they are not finite."""

import math

import pytest
import torch
from torch import Tensor

from flashgrpo.grpo.learn.learner import Learner
from flashgrpo.grpo.recipe.schema import OptimizerSection
from flashgrpo.model.checkpoint import load_checkpoint


@pytest.fixture
def make_learner(model_path):
    def make(total_steps: int = 10, **config) -> Learner:
        config = {"lr": 1e-2, "grad_clip": 1e9, **config}
        return Learner(load_checkpoint(model_path), OptimizerSection(**config), total_steps)

    return make


def linear_loss(learner: Learner, gradients: dict[str, Tensor]):
    """The loss whose gradient is `gradients`, for every batch scaled by the batch itself, a number."""

    def loss_of(batch):
        loss = sum((learner.params[name].float() * g * batch).sum() for name, g in gradients.items())
        return loss, {}

    return loss_of


def random_gradients(learner: Learner, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator) for name, p in learner.params.items()}


def snapshot(learner: Learner) -> dict[str, Tensor]:
    tensors = learner.state_tensors()
    del tensors["skipped"]  # the counter, which is to change
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_updates_are_those_of_adamw(make_learner):
    learner = make_learner(betas=(0.8, 0.95), weight_decay=0.1)
    expected = {name: p.detach().clone().requires_grad_() for name, p in learner.params.items()}
    matrices = [p for p in expected.values() if p.dim() == 2]
    vectors = [p for p in expected.values() if p.dim() == 1]
    assert matrices
    assert vectors
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95), foreach=False, fused=False)
    for step in range(1, 6):
        gradients = random_gradients(learner, step)
        learner.set_lr(step)
        learner.update([1.0], linear_loss(learner, gradients))
        for name, p in expected.items():
            p.grad = gradients[name]
        adamw.step()
    for name, p in expected.items():
        torch.testing.assert_close(learner.params[name], p, rtol=1e-5, atol=1e-6)


def test_weight_decay_spares_norms_and_biases(make_learner):
    learner = make_learner(weight_decay=0.5)
    before = snapshot(learner)
    learner.update([], linear_loss(learner, {}))
    for name, p in learner.params.items():
        expected = before[name] * (1 - 0.5 * 1e-2) if p.dim() == 2 else before[name]
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0)


def test_an_update_without_batches_decays_the_moments(make_learner):
    """All groups dead: the step counts, and momentum moves the weights."""
    learner = make_learner(betas=(0.75, 0.5))
    learner.update([1.0], linear_loss(learner, random_gradients(learner, 0)))
    before = snapshot(learner)
    stats, norm = learner.update([], linear_loss(learner, {}))
    after = learner.state_tensors()
    assert (stats, norm.item()) == ([], 0.0)
    for name in learner.params:
        torch.testing.assert_close(after[f"optimizer.{name}.exp_avg"], before[f"optimizer.{name}.exp_avg"] * 0.75)
        torch.testing.assert_close(after[f"optimizer.{name}.exp_avg_sq"], before[f"optimizer.{name}.exp_avg_sq"] * 0.5)
        assert after[f"optimizer.{name}.step"] == 2
        assert not torch.equal(learner.params[name], before[name])


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(make_learner, value):
    learner = make_learner(weight_decay=0.1, grad_clip=1.0)
    learner.update([1.0], linear_loss(learner, random_gradients(learner, 1)))
    before = snapshot(learner)
    poisoned = random_gradients(learner, 2)
    poisoned["model.layers.1.mlp.down_proj.weight"][3, 5] = value
    _, norm = learner.update([1.0], linear_loss(learner, poisoned))
    assert not norm.isfinite()
    assert_same(snapshot(learner), before)

    learner.update([1.0], linear_loss(learner, random_gradients(learner, 3)))
    spared = make_learner(weight_decay=0.1, grad_clip=1.0)
    for seed in (1, 3):
        spared.update([1.0], linear_loss(spared, random_gradients(spared, seed)))
    assert_same(snapshot(learner), snapshot(spared))


def test_skipped_updates_are_counted_since_the_last_look(make_learner):
    """Three in a row are counted as such across looks, and a good one between them starts anew."""
    learner = make_learner()
    good = linear_loss(learner, random_gradients(learner, 0))

    def run(*scales: float) -> tuple[float, float]:
        for scale in scales:
            learner.update([scale], good)
        taken = learner.take_skipped()
        return taken["update/skipped"].item(), taken["update/skipped_in_a_row"].item()

    assert run(1.0, math.nan, 1.0) == (1, 1)
    assert run(1.0) == (0, 0)
    assert run(math.nan, math.nan, 1.0, math.nan) == (3, 2)
    assert run(math.nan, math.nan) == (2, 3)
    assert run(1.0) == (0, 3)  # the row lasted until then
    assert run(1.0) == (0, 0)


@pytest.mark.parametrize("grad_clip", [0.5, 1e6])
def test_gradients_above_the_norm_are_clipped_to_it(make_learner, grad_clip):
    learner = make_learner(grad_clip=grad_clip, betas=(0.9, 0.999))
    gradients = random_gradients(learner, 0)
    total = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
    _, norm = learner.update([1.0], linear_loss(learner, gradients))
    assert norm.item() == pytest.approx(total, rel=1e-5)
    for name, gradient in gradients.items():
        moment = learner.state_tensors()[f"optimizer.{name}.exp_avg"]
        torch.testing.assert_close(moment / 0.1, gradient * min(grad_clip / total, 1), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [1, 1, 1, 1, 1]),
        ({"warmup_steps": 4}, [0.25, 0.5, 0.75, 1, 1]),
        ({"warmup_steps": 10}, [0.1, 0.2, 0.3, 0.4, 0.5]),
        ({"schedule": "cosine", "lr_end_share": 0.0, "warmup_steps": 1}, [1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0]),
        ({"schedule": "cosine", "lr_end_share": 0.2, "warmup_steps": 3}, [1 / 3, 2 / 3, 1, 0.6, 0.2]),
        ({"schedule": "cosine", "lr_end_share": 0.1, "warmup_steps": 5}, [0.2, 0.4, 0.6, 0.8, 1]),
    ],
)
def test_schedule(make_learner, config, expected):
    """Warm-up reaches the peak at its last step, cosine its end at the last step of all; the optimizer uses it."""
    learner = make_learner(total_steps=5, lr=2.0, **config)
    rates = [learner.set_lr(step) for step in range(1, 6)]
    assert rates == pytest.approx([2.0 * share for share in expected], abs=1e-12)
    assert {group["lr"] for group in learner.optimizer.param_groups} == {rates[-1]}
