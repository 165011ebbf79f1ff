"""Scores mean what the paper means by them, and the same weights, seed and step always give the same ones."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from flashgrpo.grpo.data import DataError, Problem
from flashgrpo.grpo.evaluate import (
    Evaluation,
    completion_group,
    evaluate,
    evaluate_recipe,
    open_reward_pool,
    sample_texts,
)
from flashgrpo.grpo.native_generator import NativeGenerator
from flashgrpo.grpo.policy import Policy, Prompt, open_policy, render_prompts
from flashgrpo.grpo.recipe import Recipe, RecipeError, build_recipe
from flashgrpo.grpo.reward_pool import CompletionGroup, RewardPool
from flashgrpo.grpo.rollout import Rollout, Sampling
from flashgrpo.grpo.sections import DataSection, ModelSection


def scores_of(answers: list[list[str | None]], correct: list[list[bool]]) -> dict[str, float]:
    table = np.array(correct)
    lengths = np.arange(table.size).reshape(table.shape)
    return Evaluation(table, answers, lengths, truncated=lengths == 0).scores()


@pytest.mark.parametrize(
    ("answers", "correct", "pass_1", "pass_k", "cons_k"),
    [
        ([["7", "7", "8"]], [[True, True, False]], 2 / 3, 1, 1),
        ([["7", "8", "8"]], [[True, False, False]], 1 / 3, 1, 0),
        ([["8", "7", "7", "8"]], [[False, True, True, False]], 1 / 2, 1, 0),  # tie: the first sampled wins
        ([["7", "8", "8", "7"]], [[True, False, False, True]], 1 / 2, 1, 1),
        ([[None, None, "7"]], [[False, False, True]], 1 / 3, 1, 1),  # no answer is no vote
        ([[None, None]], [[False, False]], 0, 0, 0),
        ([["7"], ["8"]], [[True], [False]], 1 / 2, 1 / 2, 1 / 2),
        ([["7", "7"], ["1", "2"], ["3", "4"]], [[True, True], [False, True], [False, False]], 1 / 2, 2 / 3, 1 / 3),
    ],
)
def test_scores_of_hand_made_tables(answers, correct, pass_1, pass_k, cons_k):
    scores = scores_of(answers, correct)
    assert [scores["pass@1"], scores["pass@k"], scores["cons@k"]] == pytest.approx([pass_1, pass_k, cons_k])
    assert (scores["num_problems"], scores["k"]) == np.shape(correct)


def test_lengths_and_truncation_are_means_over_all_samples():
    scores = scores_of([["1", "2"], ["3", "4"]], [[True, True], [True, True]])
    assert scores["length"] == 1.5
    assert scores["truncated"] == 0.25


class TableGenerator:
    """Gives the texts of a table, groups in reverse order, as a generator may."""

    def __init__(self, texts: list[list[str]], tokenizer):
        self.texts, self.tokenizer = texts, tokenizer

    def generate(self, requests, sampling):
        for request in reversed(requests):
            yield [
                Rollout(
                    request.prompt_ids, np.array(self.tokenizer(t)["input_ids"]), np.zeros(0), "stop", request.group, 0
                )
                for t in self.texts[request.group]
            ]


class TablePool(RewardPool):
    """Gives the scores of a table, and fails for any reward but accuracy."""

    def __init__(self, scores: list[list[float]]):
        self.scores = scores

    def score(self, groups, name):
        assert name == "accuracy"
        assert [group.problem.columns["number"] for group in groups] == list(range(len(self.scores)))
        return np.array(self.scores)


@pytest.fixture
def policy(model_path):
    return open_policy(ModelSection(str(model_path)), torch.device("cpu"))


def eval_recipe(seed: int = 0, temperature: float = 0.6) -> Recipe:
    return build_recipe(
        Recipe,
        {
            "model": {"path": "unused"},
            "data": {"path": "unused"},
            "rollout": {"max_new_tokens": 8},
            "eval": {"samples": 2, "temperature": temperature},
            "run": {"output": "unused", "seed": seed},
        },
    )


@pytest.fixture
def prompts(policy):
    problems = [Problem(f"{i}+1=", {"answer": str(i + 1), "number": i}) for i in range(3)]
    return render_prompts(problems, policy, DataSection(path="unused", template="none"))


def test_partial_credit_and_missing_scores_count_as_wrong(policy, prompts):
    """And rows stay with their problems, in whatever order groups are finished."""
    texts = [["<answer>1</answer>"] * 2, ["a\n2", "3"], ["4", "<think>5"]]
    pool = TablePool([[1.0, 1.0], [0.99, np.nan], [np.nan, 1.0]])
    result = evaluate(dict(enumerate(prompts)), policy, TableGenerator(texts, policy.tokenizer), pool, eval_recipe())
    assert result.correct.tolist() == [[True, True], [False, False], [False, True]]
    assert result.answers == [["1", "1"], ["2", "3"], ["4", None]]
    assert result.lengths[2].tolist() == [1, 8]


def test_answers_are_extracted_as_the_accuracy_reward_does(policy):
    """Where the prompt opens <think>, what was never closed is no answer, and must not vote."""
    problems = [Problem("1+1=<think>", {"answer": "2", "number": 0})]
    prompts = render_prompts(problems, policy, DataSection(path="unused", template="none"))
    generator = TableGenerator([["so it is 2", "</think>2"]], policy.tokenizer)
    result = evaluate(dict(enumerate(prompts)), policy, generator, TablePool([[0.0, 1.0]]), eval_recipe())
    assert result.answers == [[None, "2"]]
    assert result.scores()["cons@k"] == 1.0


def test_an_evaluation_depends_on_weights_seed_and_step_alone(policy, prompts):
    """Not on what was generated before it, nor on the global random generators."""

    def answers(seed: int, step: int) -> list:
        pool = TablePool([[0.0, 0.0]] * 3)
        return evaluate(
            dict(enumerate(prompts)), policy, generator, pool, eval_recipe(seed, temperature=1.0), step
        ).answers

    generator = NativeGenerator(policy.model, policy.stop_token_ids)
    first = answers(seed=1, step=5)
    torch.rand(7)
    np.random.rand(7)  # noqa: NPY002
    generator.weight_version = 9
    other = answers(seed=1, step=6)
    assert answers(seed=1, step=5) == first
    assert other != first
    assert answers(seed=2, step=5) != first


def test_evaluating_a_recipe(recipe_values, custom_rewards, model_path):
    """The run's final model is preferred to its newest checkpoint, that to where it started, and a named one to all."""
    recipe_values["eval"] = {"samples": 2, "problems": 3}
    recipe = build_recipe(Recipe, recipe_values)
    scores = evaluate_recipe(recipe)
    assert (scores["k"], scores["num_problems"]) == (2, 3)
    assert 0 <= scores["pass@1"] <= scores["pass@k"] <= 1
    assert evaluate_recipe(recipe) == scores
    renamed = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, path="nowhere"))
    run = Path(recipe.run.output)
    shutil.copytree(model_path, run / "checkpoints" / "step_10" / "model")
    (run / "checkpoints" / "step_9" / "model").mkdir(parents=True)
    assert evaluate_recipe(renamed) == scores
    shutil.copytree(model_path, run / "model")
    shutil.rmtree(run / "checkpoints" / "step_10" / "model")
    assert evaluate_recipe(renamed) == scores
    assert evaluate_recipe(renamed, model=str(model_path)) == scores


@pytest.mark.xdist_group("vllm")
def test_evaluating_with_vllm(recipe_values, custom_rewards, make_model, monkeypatch):
    """The greedy completions are those of the native generator, at the same weights, to the same end."""
    recipe_values["model"]["path"] = str(make_model(hidden_size=64, head_dim=32))  # heads that its attention takes
    recipe_values["eval"] = {"samples": 2, "problems": 4, "temperature": 0.0}
    recipe_values["vllm"] = {"kv_cache_gb": 0.05}
    completions = []

    def record(prompt: Prompt, group: list[Rollout], policy: Policy) -> CompletionGroup:
        completions.append([rollout.completion_ids.tolist() for rollout in group])
        return completion_group(prompt, group, policy)

    monkeypatch.setattr("flashgrpo.grpo.evaluate.completion_group", record)
    scores = [
        evaluate_recipe(build_recipe(Recipe, recipe_values, overrides=[f"--rollout.generator={name}"]))
        for name in ("native", "vllm")
    ]
    assert scores[0] == scores[1]
    native, vllm = completions[:4], completions[4:]
    assert len({tuple(group[0]) for group in native}) > 1
    assert vllm == native


def test_evaluating_on_servers_is_an_error(recipe_values, custom_rewards):
    recipe_values["rollout"]["generator"] = "vllm_server"
    recipe_values["vllm"] = {"servers": ["http://nowhere:8000"]}
    with pytest.raises(RecipeError, match=r"wanted --rollout\.generator=vllm or native"):
        evaluate_recipe(build_recipe(Recipe, recipe_values))


def test_evaluating_without_answers_is_an_error(recipe_values, custom_rewards, tmp_path):
    (tmp_path / "open.jsonl").write_text("".join(f'{{"prompt": "{i}+1=", "level": 1}}\n' for i in range(9)))
    recipe_values["data"] |= {"path": str(tmp_path / "open.jsonl"), "held_out": 2}
    recipe = build_recipe(Recipe, recipe_values)
    with open_reward_pool(recipe, Problem("1+1=", {"level": 1})) as pool:
        assert pool.functions == recipe.rewards.functions
    with pytest.raises(DataError, match=r"name its column by data\.answer_column; found level"):
        evaluate_recipe(recipe)
    with pytest.raises(DataError, match=r"an evaluation needs a reference answer"):
        open_reward_pool(build_recipe(Recipe, recipe_values | {"eval": {"every": 5}}), Problem("1+1=", {"level": 1}))


def test_nothing_held_out_is_an_error(recipe_values, custom_rewards):
    recipe_values["data"]["held_out"] = 0
    with pytest.raises(DataError, match=r"data\.held_out = 0 leaves no problem to evaluate on"):
        evaluate_recipe(build_recipe(Recipe, recipe_values))


def test_samples_of_one_prompt(model_path):
    sampling = Sampling(max_new_tokens=6, temperature=1.0)
    first = sample_texts(str(model_path), "1+1=", "none", 3, sampling, seed=4)
    assert len(first) == 3
    assert len(set(first)) > 1
    assert sample_texts(str(model_path), "1+1=", "none", 3, sampling, seed=4) == first
    assert sample_texts(str(model_path), "1+1=", "none", 3, sampling, seed=5) != first
