"""On-policy distillation: what a teacher adds to an advantage, runs with one, and teachers that are refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import ranks
from flashgrpo.grpo.cli import main
from flashgrpo.grpo.learn.learner import distillation_advantages
from flashgrpo.grpo.learn.packing import Completion, Group, build_batch
from flashgrpo.grpo.recipe.load import Recipe, build_recipe, recipe_to_toml
from flashgrpo.grpo.train import train
from flashgrpo.kernels.grpo_loss import LossConfig, group_advantages, grpo_loss
from runs import assert_same_run, changed, rows_of

DAPO = LossConfig.preset("dapo")


@pytest.fixture(scope="module")
def teacher_path(make_model) -> Path:
    """Another model than the policy, and wider, whose embedding has three rows without a token."""
    return make_model(hidden_size=64, vocab_size=101)


@pytest.fixture
def distilled(recipe_values, teacher_path) -> Recipe:
    """A run that learns of its teacher alone."""
    sections = {"teacher": {"path": str(teacher_path)}, "rewards": {"functions": [], "workers": 1}}
    return build_recipe(Recipe, recipe_values | sections)


def with_logprobs(lengths: list[int], old: torch.Tensor, teacher: torch.Tensor):
    """A pack of one group, completions of these lengths."""
    completions = [Completion(np.ones(length, np.int64), number) for number, length in enumerate(lengths)]
    batch = build_batch([Group([1], completions)])
    batch.__dict__.update(old_logprobs=old, teacher_logprobs=teacher)
    return batch


def test_an_advantage_is_that_of_the_rewards_and_of_the_teacher():
    old, teacher = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -1.0, -3.0])
    rewards = torch.tensor([[0.0, 1.0]])
    found, kl = distillation_advantages(with_logprobs([1, 2], old, teacher), rewards, DAPO, coef=0.5)
    low, high = group_advantages(rewards)[0].tolist()
    assert found.tolist() == pytest.approx([low - 0.25, high + 0.5, high])
    assert kl.item() == pytest.approx((0.5 - 1.0 + 0.0) / 3)


def test_its_gradient_is_that_of_the_reverse_kl():
    """In expectation over what the policy samples: here every token, by its probability."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(7, generator=generator, dtype=torch.float64).log_softmax(0)
    (logits.softmax(0) * (logits.log_softmax(0) - teacher)).sum().backward()
    assert logits.grad is not None
    wanted, logits.grad = logits.grad, None
    for token in range(7):
        logprobs = logits.log_softmax(0)[token : token + 1]
        old = logprobs.detach()
        batch = with_logprobs([1], old, teacher[token : token + 1])
        advantages, _ = distillation_advantages(batch, torch.zeros(1, 1, dtype=torch.float64), DAPO, coef=1.0)
        options = {"denominator": 1.0, "token_advantages": advantages, "old_logprobs": old}
        loss, _ = grpo_loss(logprobs, batch.target_cu_seqlens, DAPO, **options)
        (loss * old.exp().squeeze()).backward()
    torch.testing.assert_close(logits.grad, wanted)


def test_a_policy_learns_nothing_of_itself(distilled):
    """Both are scored on the same pack: their difference is 0, and not merely small."""
    rows = rows_of(train(changed(changed(distilled, "teacher", path=distilled.model.path), "train", steps=1)).parent)
    assert [(row["teacher/kl"], row["grad_norm"], row["live"]) for row in rows] == [(0.0, 0.0, 0.0)]


def test_a_run_of_a_teacher_alone(distilled, tmp_path):
    """Nothing is dead or missing; on a device of its own a teacher says the same, and a resume changes nothing."""
    whole = changed(distilled, "run", output=str(tmp_path / "whole"))
    train(whole)
    stopped = changed(distilled, "run", output=str(tmp_path / "stopped"))
    train(changed(stopped, "train", steps=2))
    train(changed(stopped, "teacher", device="cpu"), resume=True)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    for row in rows_of(tmp_path / "whole"):
        assert row["teacher/kl"] > 0
        assert row["grad_norm"] > 0
        found = {name: row[name] for name in ("reward/mean", "reward/missing", "groups/dead", "ratio/max", "live")}
        assert found == {"reward/mean": 0, "reward/missing": 0, "groups/dead": 0, "ratio/max": 1, "live": 1}
    assert "teacher.path" in json.loads((tmp_path / "whole/made_from.json").read_text())


def test_rewards_of_weight_0_are_watched_beside_a_teacher(distilled, custom_rewards):
    watched = changed(distilled, "rewards", functions=["custom_rewards:count_digits"], weights=[0.0])
    watched = changed(watched, "train", steps=1, mini_batches=2, epochs=2)
    (row,) = rows_of(train(watched).parent)
    assert row["reward/custom_rewards:count_digits"] > 0 == row["reward/mean"]
    assert row["ratio/max"] > 1


def test_rewards_and_a_teacher_add_up(recipe, distilled):
    """The teacher that is the policy adds nothing to what the rewards teach."""
    alone = changed(recipe, "train", steps=1)
    (wanted,) = rows_of(train(alone).parent)
    beside = changed(changed(distilled, "teacher", path=recipe.model.path), "run", output=recipe.run.output + "_2")
    beside = changed(changed(beside, "train", steps=1), "rewards", functions=recipe.rewards.functions)
    (found,) = rows_of(train(beside).parent)
    assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)
    assert found["loss"] == pytest.approx(wanted["loss"], abs=1e-6)


def train_on_a_rank(recipe: Recipe) -> None:
    torch.set_num_threads(1)
    train(recipe)


@pytest.mark.xdist_group("ranks")
def test_ranks_share_a_teacher(distilled, tmp_path):
    """Sharded over two ranks, with packs of unequal number, it says what it says to one."""
    recipe = changed(changed(distilled, "train", steps=1, token_budget=64), "rollout", prompts_per_step=3)
    train(changed(recipe, "run", output=str(tmp_path / "one")))
    ranks.run(train_on_a_rank, 2, changed(recipe, "run", output=str(tmp_path / "two")))
    for found, wanted in zip(rows_of(tmp_path / "two"), rows_of(tmp_path / "one"), strict=True):
        for name in ("teacher/kl", "grad_norm", "loss", "entropy"):
            assert found[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-5), name


def other_tokenizer(folder: Path) -> None:
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(tokenizer))


def fewer_rows(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 97}))


def other_end(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 5}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "#"
    tokenizer.save_pretrained(folder)


REFUSED = {
    other_tokenizer: "its tokenizer, of 98 tokens, is not that of",
    fewer_rows: "its vocabulary has 97 rows, and that of",
    other_end: "it ends a text with token [5], and",
    shutil.rmtree: "no such folder",
}


@pytest.mark.parametrize("fault", REFUSED, ids=lambda fault: fault.__name__)
def test_a_teacher_that_cannot_score_is_one_line_and_exit_2(fault, distilled, teacher_path, tmp_path, capsys):
    teacher = shutil.copytree(teacher_path, tmp_path / "teacher")
    fault(teacher)
    (tmp_path / "recipe.toml").write_text(recipe_to_toml(changed(distilled, "teacher", path=str(teacher))))
    assert main(["train", str(tmp_path / "recipe.toml")]) == 2
    said = capsys.readouterr().err
    assert REFUSED[fault] in " ".join(said.split())
    assert str(teacher) in said.replace("\n", "")
    assert not list(Path(distilled.run.output).glob("*.jsonl"))


def test_a_device_that_is_not_there_is_refused(distilled, tmp_path, capsys):
    (tmp_path / "recipe.toml").write_text(recipe_to_toml(changed(distilled, "teacher", device="cuda:97")))
    assert main(["train", str(tmp_path / "recipe.toml")]) == 2
    assert "teacher.device = cuda:97, and torch finds 0 CUDA devices" in capsys.readouterr().err
