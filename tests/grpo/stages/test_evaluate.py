"""Scores mean what the paper means by them, and the same weights, seed and step always give the same ones."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import ranks
from flashgrpo.grpo.data.prompts import render_prompts
from flashgrpo.grpo.errors import DataError, RecipeError, RewardFailure, RunInputError
from flashgrpo.grpo.recipe.load import Recipe, build_recipe
from flashgrpo.grpo.recipe.schema import DataSection, ModelSection
from flashgrpo.grpo.rewards.pool import RewardPool, open_reward_pool
from flashgrpo.grpo.rollout.native import NativeGenerator
from flashgrpo.grpo.run.policy import Policy, open_policy
from flashgrpo.grpo.stages.evaluate import evaluate, evaluate_models, newest_model, sample_texts
from flashgrpo.grpo.stages.scores import Graded, clustered_interval, markdown_of, scores_of, table_of, wilson_interval
from flashgrpo.grpo.types import Problem, Rollout, Sampling

NAN = float("nan")


@pytest.mark.parametrize(
    ("answers", "correct", "pass_1", "pass_k", "cons_k"),
    [
        (["778"], ["110"], 2 / 3, 1, 1),
        (["788"], ["100"], 1 / 3, 1, 0),
        (["8778"], ["0110"], 1 / 2, 1, 0),  # tie: the first sampled wins
        (["7887"], ["1001"], 1 / 2, 1, 1),
        (["--7"], ["001"], 1 / 3, 1, 1),  # no answer is no vote
        (["--"], ["00"], 0, 0, 0),
        (["7", "8"], ["1", "0"], 1 / 2, 1 / 2, 1 / 2),
        (["77", "12", "34"], ["11", "01", "00"], 1 / 2, 2 / 3, 1 / 3),
    ],
)
def test_scores_of_hand_made_tables(answers, correct, pass_1, pass_k, cons_k):
    """A row a problem and a character a sample; the ranks' shares of the problems are counted as one."""
    parts: list[dict[int, list[Graded]]] = [{}, {}]
    for i, row in enumerate(zip(answers, correct, strict=True)):
        samples = [
            Graded(ok == "1", {"-": None}.get(text, text), 2, False, 0, {}) for text, ok in zip(*row, strict=True)
        ]
        parts[i % 2][i] = samples
    scores = scores_of(parts)
    assert [scores["pass@1"], scores["pass@k"], scores["cons@k"]] == pytest.approx([pass_1, pass_k, cons_k])
    assert (scores["num_problems"], scores["k"], scores["length"]) == (len(answers), len(answers[0]), 2)


def test_scores_have_intervals_and_means_over_all_tokens():
    first = [Graded(True, "1", 10, False, 3, {"format": 1.0}), Graded(False, "2", 30, True, 1, {"format": NAN})]
    scores = scores_of([{0: first}])
    assert (scores["length"], scores["truncated"], scores["reflection"], scores["format"]) == (20, 0.5, 100.0, 1.0)
    assert scores_of([{0: [sample._replace(quality={"format": NAN}) for sample in first]}]).keys() == scores.keys() - {
        "format"
    }
    assert scores["cons@k/low"] == pytest.approx(0.2065, abs=1e-4)
    assert scores["cons@k/high"] == 1.0
    assert scores["pass@1/low"] < 0.5 < scores["pass@1/high"]


class TableGenerator:
    """Gives the texts of a table, groups in reverse order, as a generator may."""

    def __init__(self, texts: list[list[str]], tokenizer):
        self.texts, self.tokenizer = texts, tokenizer

    def generate(self, requests, sampling):
        for request in reversed(requests):
            ids = [np.array(self.tokenizer(text)["input_ids"]) for text in self.texts[request.group]]
            yield [Rollout(request.prompt_ids, each, np.zeros(0), "stop", request.group, ()) for each in ids]


class TablePool(RewardPool):
    """Gives the scores of a table, by the texts of the prompts."""

    def __init__(self, scores: dict[str, list[float]]):
        self.scores = {prompt: iter(row) for prompt, row in scores.items()}
        self.asked: list[tuple[str, str]] = []

    def score(self, groups, name):
        self.asked += [(name, group.prompt) for group in groups]
        assert all(len(group.completions) == 1 for group in groups)
        return np.array([[next(self.scores[group.prompt])] for group in groups])


@pytest.fixture
def policy(model_path):
    return open_policy(ModelSection(str(model_path)), torch.device("cpu"))


def prompts_of(policy: Policy, *problems: Problem) -> dict:
    return dict(enumerate(render_prompts(problems, policy, DataSection(path="unused", template="none"))))


def eval_recipe(seed: int = 0, temperature: float = 0.6) -> Recipe:
    values = {"model": {"path": "unused"}, "data": {"path": "unused"}, "rollout": {"max_new_tokens": 8}}
    values |= {"eval": {"samples": 2, "temperature": temperature}, "run": {"output": "unused", "seed": seed}}
    return build_recipe(Recipe, values)


def test_what_counts_as_right(policy):
    """Partial credit and what is missing are wrong; programs go by their tests; what <think> holds is no answer. And
    rows stay with their problems, in whatever order groups are finished.
    """
    problems = [Problem(text, {"answer": "1"}) for text in ("0+1=", "1+1=", "2+1=", "Q<think>")]
    prompts = prompts_of(policy, *problems, Problem("write", {"tests": ["assert True"]}))
    texts = [["<answer>1</answer>"] * 2, ["a\n2", "3"], ["4", "<think>5"], ["so it is 1", "</think>1"], ["c", "d"]]
    scores = {"0+1=": [1.0, 1.0], "1+1=": [0.99, NAN], "2+1=": [NAN, 1.0], "Q<think>": [0.0, 1.0], "write": [1.0, 1.0]}
    pool = TablePool(scores)
    samples = evaluate(prompts, policy, TableGenerator(texts, policy.tokenizer), pool, eval_recipe())
    rows = [samples[number] for number in range(5)]
    right = [[sample.is_correct for sample in row] for row in rows]
    assert right == [[True, True], [False, False], [False, True], [False, True], [True, True]]
    answers = [[sample.answer for sample in row] for row in rows]
    assert answers[:4] == [["1", "1"], ["2", "3"], ["4", None], [None, "1"]]
    assert [sample.length for sample in rows[2]] == [1, 8]
    assert {name for name, prompt in pool.asked if prompt == "write"} == {"code"}
    assert {name for name, prompt in pool.asked if prompt != "write"} == {"accuracy"}
    found = scores_of([samples])
    assert (found["pass@1"], found["missing"], found["cons@k"]) == (6 / 10, 2 / 10, 3 / 5)


def test_an_evaluation_depends_on_weights_seed_and_step_alone(policy):
    """Not on what was generated before it, nor on the global random generators."""
    prompts = prompts_of(policy, *(Problem(f"{i}+1=", {"answer": "1"}) for i in range(3)))
    generator = NativeGenerator(policy.model, policy.stop_token_ids)

    def answers(seed: int, step: int) -> list:
        pool = TablePool({f"{i}+1=": [0.0, 0.0] for i in range(3)})
        return [*evaluate(prompts, policy, generator, pool, eval_recipe(seed, temperature=1.0), step).values()]

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
    completions, decode = [], Policy.decode

    def record(self: Policy, token_ids) -> str:
        completions.append(tuple(token_ids))
        return decode(self, token_ids)

    rows = []
    for name in ("native", "vllm"):
        recipe = build_recipe(Recipe, recipe_values, overrides=[f"--rollout.generator={name}"])
        with monkeypatch.context() as patch:
            patch.setattr(Policy, "decode", record)
            rows.append(evaluate_models(recipe, {"tiny": recipe.model.path}))
    assert rows[0] == rows[1]
    half = len(completions) // 2
    assert half >= 8
    assert len(set(completions[:half])) > 1
    assert sorted(completions[:half]) == sorted(completions[half:])


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        (
            {"rollout": {"generator": "vllm_server"}, "vllm": {"servers": ["http://nowhere:8000"]}},
            RecipeError,
            r"wanted --rollout\.generator=vllm or native",
        ),
        ({"data": {"held_out": 0}}, DataError, r"data\.held_out = 0 leaves no problem to evaluate on"),
        ({"data": {"answer_column": None}}, DataError, r"name its column by data\.answer_column; found level"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(recipe_values, custom_rewards, data_path, sections, error, message):
    if error is DataError:
        data_path.write_text("".join(f'{{"prompt": "{i}+1=", "level": 1}}\n' for i in range(9)))
    values = {k: recipe_values.get(k, {}) | sections.get(k, {}) for k in {**recipe_values, **sections}}
    with pytest.raises(error, match=message):
        evaluate_models(build_recipe(Recipe, values), {"a": values["model"]["path"]})


def test_a_run_without_evaluations_needs_no_answers(recipe_values, custom_rewards):
    recipe, example = build_recipe(Recipe, recipe_values), Problem("1+1=", {"level": 1})
    with open_reward_pool(recipe, example) as pool:
        assert pool.functions == recipe.rewards.functions
    with pytest.raises(DataError, match=r"an evaluation needs a reference answer"):
        open_reward_pool(build_recipe(Recipe, recipe_values | {"eval": {"every": 5}}), example)


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


@pytest.fixture
def aime_path(tmp_path) -> str:
    path = tmp_path / "aime.jsonl"
    path.write_text("".join(json.dumps({"Problem": f"{i}+1=", "Answer": i + 1}) + "\n" for i in range(5)))
    return str(path)


@pytest.fixture
def final_recipe(recipe_values, aime_path) -> Recipe:
    recipe_values["eval"] = {"samples": 2, "problems": 1, "benchmarks": [aime_path]}
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
