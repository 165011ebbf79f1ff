"""Scores mean what the paper means by them, and the same weights, seed and step always give the same ones."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from rich.console import Console

from flashgrpo.grpo.data.prompts import render_prompts
from flashgrpo.grpo.errors import DataError, RecipeError, RewardFailure, RunInputError
from flashgrpo.grpo.recipe.load import Recipe, build_recipe
from flashgrpo.grpo.recipe.schema import DataSection, ModelSection
from flashgrpo.grpo.rewards.pool import RewardPool, open_reward_pool
from flashgrpo.grpo.rollout.native import NativeGenerator
from flashgrpo.grpo.run.policy import open_policy
from flashgrpo.grpo.stages.evaluate import (
    evaluate,
    evaluate_models,
    newest_model,
    sample_texts,
)
from flashgrpo.grpo.stages.scores import Evaluation, Graded, clustered_interval, markdown_of, table_of, wilson_interval
from flashgrpo.grpo.types import CompletionGroup, Problem, Rollout, Sampling

NAN = float("nan")


def scores_of(answers: list[list[str | None]], correct: list[list[bool]]) -> dict[str, float]:
    k = len(correct[0])
    rows = zip(answers, correct, strict=True)
    samples = {
        i: [Graded(ok, answer, i * k + j, i + j == 0, 0, {}) for j, (answer, ok) in enumerate(zip(*row, strict=True))]
        for i, row in enumerate(rows)
    }
    return Evaluation(samples).scores()


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


def column(result: Evaluation, name: str) -> list[list]:
    return [[getattr(sample, name) for sample in result.samples[number]] for number in sorted(result.samples)]


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
        places = [(group.problem.columns["number"], i % 2) for i, group in enumerate(groups)]
        assert all(len(group.completions) == 1 for group in groups)
        return np.array([[self.scores[number][sample]] for number, sample in places])


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
    assert column(result, "is_correct") == [[True, True], [False, False], [False, True]]
    assert column(result, "answer") == [["1", "1"], ["2", "3"], ["4", None]]
    assert column(result, "length")[2] == [1, 8]
    assert (result.scores()["pass@1"], result.scores()["missing"]) == (1 / 2, 1 / 3)


def test_answers_are_extracted_as_the_accuracy_reward_does(policy):
    """Where the prompt opens <think>, what was never closed is no answer, and must not vote."""
    problems = [Problem("1+1=<think>", {"answer": "2", "number": 0})]
    prompts = render_prompts(problems, policy, DataSection(path="unused", template="none"))
    generator = TableGenerator([["so it is 2", "</think>2"]], policy.tokenizer)
    result = evaluate(dict(enumerate(prompts)), policy, generator, TablePool([[0.0, 1.0]]), eval_recipe())
    assert column(result, "answer") == [[None, "2"]]
    assert result.scores()["cons@k"] == 1.0


def test_an_evaluation_depends_on_weights_seed_and_step_alone(policy, prompts):
    """Not on what was generated before it, nor on the global random generators."""

    def answers(seed: int, step: int) -> list:
        pool = TablePool([[0.0, 0.0]] * 3)
        recipe = eval_recipe(seed, temperature=1.0)
        return column(evaluate(dict(enumerate(prompts)), policy, generator, pool, recipe, step), "answer")

    generator = NativeGenerator(policy.model, policy.stop_token_ids)
    first = answers(seed=1, step=5)
    torch.rand(7)
    np.random.rand(7)  # noqa: NPY002
    generator.weight_version = 9
    other = answers(seed=1, step=6)
    assert answers(seed=1, step=5) == first
    assert other != first
    assert answers(seed=2, step=5) != first


def test_the_newest_model_of_a_run(recipe, model_path):
    """Its final one is preferred to its newest checkpoint, that to where it started."""
    assert newest_model(recipe) == str(model_path)
    run = Path(recipe.run.output)
    for step in (9, 10):
        (run / "checkpoints" / f"step_{step}" / "model").mkdir(parents=True)
    assert newest_model(recipe) == str(run / "checkpoints" / "step_10" / "model")
    (run / "model").mkdir()
    assert newest_model(recipe) == str(run / "model")


@pytest.mark.xdist_group("vllm")
def test_evaluating_with_vllm(recipe_values, custom_rewards, make_model, monkeypatch):
    """The greedy completions are those of the native generator, at the same weights, to the same end."""
    recipe_values["model"]["path"] = str(make_model(hidden_size=64, head_dim=32))  # heads that its attention takes
    recipe_values["eval"] = {"samples": 2, "problems": 4, "temperature": 0.0}
    recipe_values["vllm"] = {"kv_cache_gb": 0.05}
    original, completions = CompletionGroup.of, []

    def record(prompt, rollouts, decode):
        completions.append([rollout.completion_ids.tolist() for rollout in rollouts])
        return original(prompt, rollouts, decode)

    monkeypatch.setattr(CompletionGroup, "of", record)
    models = {"tiny": recipe_values["model"]["path"]}
    rows = [
        evaluate_models(build_recipe(Recipe, recipe_values, overrides=[f"--rollout.generator={name}"]), models)
        for name in ("native", "vllm")
    ]
    assert rows[0] == rows[1]
    native, vllm = sorted(completions[:8]), sorted(completions[8:])
    assert len({tuple(group[0]) for group in native}) > 1
    assert vllm == native


def test_evaluating_on_servers_is_an_error(recipe_values, custom_rewards):
    recipe_values["rollout"]["generator"] = "vllm_server"
    recipe_values["vllm"] = {"servers": ["http://nowhere:8000"]}
    with pytest.raises(RecipeError, match=r"wanted --rollout\.generator=vllm or native"):
        evaluate_models(build_recipe(Recipe, recipe_values), {"a": recipe_values["model"]["path"]})


def test_evaluating_without_answers_is_an_error(recipe_values, custom_rewards, tmp_path):
    (tmp_path / "open.jsonl").write_text("".join(f'{{"prompt": "{i}+1=", "level": 1}}\n' for i in range(9)))
    recipe_values["data"] |= {"path": str(tmp_path / "open.jsonl"), "held_out": 2}
    recipe = build_recipe(Recipe, recipe_values)
    with open_reward_pool(recipe, Problem("1+1=", {"level": 1})) as pool:
        assert pool.functions == recipe.rewards.functions
    with pytest.raises(DataError, match=r"name its column by data\.answer_column; found level"):
        evaluate_models(recipe, {"a": recipe.model.path})
    with pytest.raises(DataError, match=r"an evaluation needs a reference answer"):
        open_reward_pool(build_recipe(Recipe, recipe_values | {"eval": {"every": 5}}), Problem("1+1=", {"level": 1}))


def test_nothing_held_out_is_an_error(recipe_values, custom_rewards):
    recipe_values["data"]["held_out"] = 0
    with pytest.raises(DataError, match=r"data\.held_out = 0 leaves no problem to evaluate on"):
        evaluate_models(build_recipe(Recipe, recipe_values), {"a": recipe_values["model"]["path"]})


def test_samples_of_one_prompt(model_path):
    sampling = Sampling(max_new_tokens=6, temperature=1.0)
    first = sample_texts(str(model_path), "1+1=", "none", 3, sampling, seed=4)
    assert len(first) == 3
    assert len(set(first)) > 1
    assert sample_texts(str(model_path), "1+1=", "none", 3, sampling, seed=4) == first
    assert sample_texts(str(model_path), "1+1=", "none", 3, sampling, seed=5) != first


@pytest.mark.parametrize(("a", "b"), [(1, 1), (0.3, 0.7), (0.5, 5), (0.05, 0.05), (9, 1), (50, 50)])
def test_intervals_cover_what_they_promise(a, b):
    """Of problems whose difficulties are beta-distributed: samples of a problem that agree much, or not at all."""
    rng = np.random.default_rng(1)
    draws = 2000
    difficulties = rng.beta(a, b, (draws, 256, 1))
    ends = np.array([clustered_interval(rng.random((256, 4)) < row) for row in difficulties])
    covered = (ends[:, 0] <= a / (a + b)) & (a / (a + b) <= ends[:, 1])
    assert 0.93 <= covered.mean() <= 0.97
    assert ends.min() >= 0
    assert ends.max() <= 1


def test_intervals_at_the_ends():
    """Where nothing varies, every problem counts once; and one is an interval too."""
    nothing = np.zeros((256, 4), dtype=bool)
    low, high = clustered_interval(nothing)
    assert (low, high) == pytest.approx((0.0, 3.8415 / (256 + 3.8415)), abs=1e-5)
    assert clustered_interval(~nothing) == pytest.approx((1 - high, 1.0))
    assert clustered_interval(np.array([[True, False]])) == pytest.approx(wilson_interval(0.5, 1))
    alike = np.tile([True, False, False], (100, 1))
    assert clustered_interval(alike) == pytest.approx(wilson_interval(1 / 3, 100))
    agreeing = np.repeat(np.arange(100) < 30, 8).reshape(100, 8)
    assert clustered_interval(agreeing) == pytest.approx(wilson_interval(0.3, 100), abs=2e-3)
    opposed = np.tile([True, False], (100, 4))
    opposed[0, :] = [True] * 5 + [False] * 3
    assert clustered_interval(opposed) == pytest.approx(wilson_interval(opposed.mean(), 800))


def test_scores_have_intervals_and_reflections():
    samples = {0: [Graded(True, "1", 10, False, 3, {"format": 1.0}), Graded(False, "2", 30, False, 1, {"format": NAN})]}
    scores = Evaluation(samples).scores()
    assert scores["reflection"] == 100.0
    assert scores["format"] == 1.0
    assert "language" not in scores
    assert scores["cons@k/low"] == pytest.approx(0.2065, abs=1e-4)
    assert scores["cons@k/high"] == 1.0
    assert scores["pass@1/low"] < 0.5 < scores["pass@1/high"]


def test_programs_are_scored_by_their_tests(policy):
    class CodePool(RewardPool):
        def __init__(self):
            self.asked = []

        def score(self, groups, name):
            self.asked.append((name, [group.problem.question for group in groups]))
            return np.ones((len(groups), 1))

    problems = [Problem("1+1=", {"answer": "2"}), Problem("write", {"tests": ["assert True"]})]
    prompts = dict(enumerate(render_prompts(problems, policy, DataSection(path="unused", template="none"))))
    pool = CodePool()
    result = evaluate(prompts, policy, TableGenerator([["a", "b"], ["c", "d"]], policy.tokenizer), pool, eval_recipe())
    assert pool.asked == [("accuracy", ["1+1="] * 2), ("code", ["write"] * 2)]
    assert result.scores()["pass@1"] == 1.0


@pytest.fixture
def aime_path(tmp_path) -> str:
    path = tmp_path / "aime.jsonl"
    path.write_text("".join(json.dumps({"Problem": f"{i}+1=", "Answer": i + 1}) + "\n" for i in range(5)))
    return str(path)


@pytest.fixture
def final_recipe(recipe_values, aime_path) -> Recipe:
    recipe_values["eval"] = {"samples": 2, "problems": 3, "benchmarks": [aime_path]}
    return build_recipe(Recipe, recipe_values)


def test_evaluating_models(final_recipe, model_path, make_model, aime_path, tmp_path, monkeypatch):
    """What a call that was killed has written is not evaluated again, and what it was made from must be the same."""
    models = {"one": str(model_path), "two": str(make_model(initializer_range=0.3))}
    output = tmp_path / "made" / "scores.json"
    rows = evaluate_models(final_recipe, models, output)
    assert json.loads(output.read_text()) == rows
    assert [(row["model"], row["benchmark"], row["weights"]) for row in rows] == [
        (label, aime_path, path) for label, path in models.items()
    ]
    wanted = {"k": 2, "num_problems": 5, "temperature": 0.6, "top_p": 0.95, "max_new_tokens": 8, "seed": 3}
    assert all(wanted.items() <= row.items() for row in rows)
    assert {"pass@1/low", "cons@k/high", "format", "language", "reflection"} <= rows[0].keys()

    evaluated = []

    def killed(*arguments, **options):
        if evaluated:
            raise RewardFailure("killed")
        evaluated.append(evaluate(*arguments, **options))
        return evaluated[-1]

    output.unlink()
    with monkeypatch.context() as patch:
        patch.setattr("flashgrpo.grpo.stages.evaluate.evaluate", killed)
        with pytest.raises(RewardFailure, match="killed"):
            evaluate_models(final_recipe, models, output)
        assert json.loads(output.read_text()) == rows[:1]
        evaluated.clear()
        assert evaluate_models(final_recipe, models, output) == rows
        assert len(evaluated) == 1
        assert evaluate_models(final_recipe, {"two": models["two"]}, output) == rows[1:]
    assert json.loads(output.read_text()) == rows

    output.unlink()
    with monkeypatch.context() as patch:  # as of workers that die in turn
        patch.setattr(RewardPool, "score", lambda self, groups, name: np.full((len(groups), 1), np.nan))
        with pytest.raises(RewardFailure, match=r"one on .*aime.jsonl: no completion could be scored"):
            evaluate_models(final_recipe, models, output)
    assert not output.exists()  # "pass@1 0.0%" would be no score of the model
    assert evaluate_models(final_recipe, models, output) == rows

    again = dataclasses.replace(final_recipe, run=dataclasses.replace(final_recipe.run, seed=4))
    with pytest.raises(RunInputError, match=r"has one on .*aime.jsonl by other weights, problems or settings"):
        evaluate_models(again, models, output)
    output.write_text('{"model": 1}')
    with pytest.raises(RunInputError, match="not a file that an evaluation has written"):
        evaluate_models(final_recipe, models, output)


def rows_of(recipe: Recipe, models: dict[str, str]) -> list[dict]:
    torch.set_num_threads(1)
    return evaluate_models(recipe, models)


@pytest.mark.xdist_group("ranks")
def test_ranks_share_the_problems(final_recipe, model_path):
    models = {"one": str(model_path)}
    alone = evaluate_models(final_recipe, models)
    assert ranks.run(rows_of, 2, final_recipe, models) == [alone, alone]


def test_the_table_and_its_markdown():
    def row(model: str, benchmark: str, score: float, **values) -> dict:
        ends = {"pass@1/low": score - 0.1, "pass@1/high": score + 0.1}
        shares = {"pass@1": score, "cons@k": 0.5, "pass@k": 0.75, "truncated": 0.0, **ends}
        return {"model": model, "benchmark": benchmark, "k": 16, "length": 1234.4, **shares, **values}

    rows = [row("base", "held-out", 0.2), row("r[1]", "held-out", 0.7, format=0.9, language=1.0)]
    first, _, base, trained = markdown_of(rows).splitlines()
    assert first == "| model | pass@1 | cons@16 | pass@16 | length | truncated | format | language |"
    assert base == "| base | 20.0% (10.0% to 30.0%) | 50.0% | 75.0% | 1,234 | 0.0% |  |  |"
    assert trained.endswith("| 90.0% | 100.0% |")
    header, _, line = markdown_of([row("a", "held-out", 0.2, missing=0.1)]).splitlines()
    assert header.endswith("| language | missing |")
    assert line.endswith("|  |  | 10.0% |")
    assert (
        markdown_of([*rows, row("base", "data/aime.jsonl", 0.3)]).splitlines()[-1].startswith("| aime | base | 30.0%")
    )
    printer = Console(width=120, record=True)
    printer.print(table_of(rows))
    assert "r[1]" in printer.export_text()
