"""Steps that are sampled ahead: how stale they are, which prompts they take, and what a stop leaves of them.

The native generator stands in for servers, and a step that is begun is sampled at once, so that every run is the same.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from flashgrpo.grpo import sampling
from flashgrpo.grpo import train as train_module
from flashgrpo.grpo.errors import GeneratorFailure, RecipeError, RunInputError
from flashgrpo.grpo.recipe.load import Recipe, build_recipe
from flashgrpo.grpo.run.folder import read_rows
from flashgrpo.grpo.sampling import Sampler
from flashgrpo.grpo.train import train
from runs import changed, checkpoint_of, rows_of


class AtOnce:
    """In place of a thread."""

    def __init__(self, target, **_):
        self.start = target


@pytest.fixture
def recipe_ahead(recipe_values, custom_rewards, monkeypatch):
    """make(max_staleness, name of the run, **sections) -> a recipe whose servers are the native generator."""
    original = train_module.open_generator

    def open_native(recipe, *arguments):
        generator = original(changed(recipe, "rollout", generator="native", max_staleness=0), *arguments)
        generator.free_weights = lambda: None  # as servers
        return generator

    monkeypatch.setattr(train_module, "open_generator", open_native)
    monkeypatch.setattr(sampling, "threading", SimpleNamespace(Thread=AtOnce))

    def make(max_staleness: int, name: str, **sections) -> Recipe:
        values = recipe_values | {"vllm": {"devices": ["cpu"]}}
        sections["rollout"] = {"generator": "vllm_server", "max_staleness": max_staleness} | sections.get("rollout", {})
        sections["run"] = {"output": f"{values['run']['output']}_{name}"}
        return build_recipe(
            Recipe, {key: values.get(key, {}) | sections.get(key, {}) for key in {**values, **sections}}
        )

    return make


def prompts_of(recipe: Recipe) -> list[str]:
    """Of each step's first groups, with the completions."""
    rows = read_rows(Path(recipe.run.output) / "samples.jsonl")
    return [(row["step"], row["prompt"], row["completion"]) for row in rows]


@pytest.mark.parametrize(("bound", "wanted"), [(0, [0] * 6), (1, [0, 1, 1, 1, 1, 1]), (3, [0, 1, 2, 3, 3, 3])])
def test_no_token_is_staler_than_the_bound(recipe_ahead, bound, wanted):
    """And as stale as that in every step from which so many lie behind; evaluations are by the newest weights."""
    recipe = recipe_ahead(bound, "run", train={"steps": 6, "lr": 1e-2}, eval={"every": 4, "samples": 1, "problems": 2})
    train(recipe)
    rows = [row for row in rows_of(recipe.run.output) if row["step"]]
    assert [row["staleness/max"] for row in rows] == [row["staleness/mean"] for row in rows] == wanted
    assert all(row["mismatch/max"] < 1e-4 for row in rows)  # probed by the newest weights where a step is stale
    assert all((row["ratio/max"] > 1.0001) == bool(stale) for row, stale in zip(rows, wanted, strict=True))
    position = json.loads((checkpoint_of(recipe.run.output) / "state.json").read_text())["position"]
    assert (position["taken"], position["begun"]) == ({"data": 24}, [])


@pytest.mark.parametrize("refill_limit", [0, 2])
def test_a_run_takes_the_prompts_that_it_would_without_a_stop(recipe_ahead, refill_limit):
    """Those of the steps that were sampled ahead too, and those that came in place of dead groups."""
    rollout = {"refill_limit": refill_limit, "max_new_tokens": 2}
    learn_nothing = {"steps": 7, "lr": 1e-30, "checkpoint_every": 3}
    whole, parts, on_policy = (
        recipe_ahead(bound, name, rollout=rollout, train=learn_nothing)
        for bound, name in ((2, "whole"), (2, "parts"), (0, "on_policy"))
    )
    train(whole)

    def stopped(self, step, position, clock):
        if step == 4:
            raise KeyboardInterrupt
        return rollout_of(self, step, position, clock)

    rollout_of = Sampler.rollout
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Sampler, "rollout", stopped)
        train(parts)
    begun = json.loads((checkpoint_of(parts.run.output) / "state.json").read_text())["position"]["begun"]
    assert len(begun) == 2  # steps 4 and 5; 6 was begun in the step that was stopped
    train(parts, resume=True)
    assert prompts_of(parts) == prompts_of(whole)
    discarded = [row["groups/discarded"] for row in rows_of(whole.run.output)]
    assert [row["groups/discarded"] for row in rows_of(parts.run.output)] == discarded
    assert any(discarded) == bool(refill_limit)
    # The order of the prompts changes only where refills come behind those that were taken ahead.
    train(on_policy)
    assert (prompts_of(on_policy) == prompts_of(whole)) == (not refill_limit)


def test_what_fails_ahead_ends_the_run_at_its_step(recipe_ahead, monkeypatch):
    """With a checkpoint of the steps before it."""

    def failing(self, step, *arguments):
        if step == 3:
            raise GeneratorFailure("no server is left")
        return generate(self, step, *arguments)

    generate = Sampler._generate
    monkeypatch.setattr(Sampler, "_generate", failing)
    recipe = recipe_ahead(2, "run", train={"steps": 5, "checkpoint_every": 0})
    with pytest.raises(GeneratorFailure, match="no server is left"):
        train(recipe)
    assert [row["step"] for row in rows_of(recipe.run.output)] == [1, 2]
    assert checkpoint_of(recipe.run.output).name == "step_2"
    # Steps 3 and 4 have taken their prompts: with more or fewer a step some would come twice, or never.
    with pytest.raises(
        RunInputError, match=r"prompts_per_step is 2, and the run in .* has begun steps of 4 ahead; keep"
    ):
        train(changed(recipe, "rollout", prompts_per_step=2), resume=True)


def test_completions_from_weights_beyond_the_bound_are_refused(recipe_ahead, monkeypatch):
    """As of a server that has missed a sync."""
    sync = Sampler.sync
    monkeypatch.setattr(Sampler, "sync", lambda self, version: sync(self, 0))
    with pytest.raises(GeneratorFailure, match="completions come from weight version 0, wanted 1 or newer"):
        train(recipe_ahead(2, "run", train={"steps": 5}))


def test_a_recipe_of_before_is_told_what_its_key_is_now(recipe_values):
    with pytest.raises(RecipeError, match=r"rollout\.overlap: unknown key; it is rollout\.max_staleness = 1 now"):
        build_recipe(Recipe, recipe_values | {"rollout": {"overlap": True}})
    with pytest.raises(RecipeError, match="max_staleness = 2 needs generator = vllm_server, found native"):
        build_recipe(Recipe, recipe_values | {"rollout": {"generator": "native", "max_staleness": 2}})
