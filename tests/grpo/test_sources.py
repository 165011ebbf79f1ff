"""Prompts of several sources: each comes in its share, from its start, and is scored by its own functions alone."""

import json
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import ranks
from flashgrpo.grpo import train as train_module
from flashgrpo.grpo.data.mixture import Mixture, Position, epoch_order, interleaved
from flashgrpo.grpo.errors import RecipeError, RewardError, RewardFailure, RunInputError
from flashgrpo.grpo.recipe.load import Recipe, build_recipe
from flashgrpo.grpo.rewards.pool import RewardPool
from flashgrpo.grpo.rewards.rules import check_names
from flashgrpo.grpo.run.folder import read_rows
from flashgrpo.grpo.sampling import Sampler
from flashgrpo.grpo.train import train
from flashgrpo.grpo.types import CompletionGroup, Problem, Prompt, ScoredGroup, Scores, given_scores
from runs import assert_same_run, checkpoint_of, rows_of

NOWHERE = Position({}, {})

# The log tells which rows a function was called with.
FUNCTIONS = """
import pathlib

def _log(name, kind):
    with open(pathlib.Path(__file__).parent / "calls", "a") as file:
        file.write(f"{name} {kind[0]}\\n")

def digits(prompts, completions, kind, **columns):
    _log("digits", kind)
    return [sum(c.isdigit() for c in text) / 8 for text in completions]

def letters(prompts, completions, kind, tone, **columns):
    _log("letters", kind)
    return [sum(c.isalpha() for c in text) / 8 for text in completions]

def blank(prompts, completions, **columns):
    return [float("nan")] * len(completions)

def constant(prompts, completions, **columns):
    return [0.5] * len(completions)
"""
DIGITS, LETTERS, BLANK = (f"source_rewards:{name}" for name in ("digits", "letters", "blank"))


@pytest.fixture
def values(recipe_values, tmp_path, monkeypatch) -> dict:
    """A recipe of sums, and of chat from the middle of the run on."""
    (tmp_path / "source_rewards.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, extra in {"sums": {}, "chat": {"tone": "kind"}}.items():
        rows = [{"prompt": f"{name[0]}{i:02}=", "answer": "0", "kind": name, **extra} for i in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat = {"path": str(tmp_path / "chat.jsonl"), "template": "none", "share": 0.25, "start": 0.5, "rewards": [LETTERS]}
    return recipe_values | {
        "data": {"path": str(tmp_path / "sums.jsonl"), "template": "none", "held_out": 4},
        "sources": {"chat": chat},
        "rewards": {"functions": [DIGITS], "workers": 1},
        "train": recipe_values["train"] | {"steps": 6, "checkpoint_every": 0},
    }


def recipe_of(values: dict, **changes) -> Recipe:
    """`section__key=value` over the dictionaries."""
    return build_recipe(Recipe, values, overrides=[f"--{k.replace('__', '.')}={v}" for k, v in changes.items()])


def run(recipe: Recipe) -> None:
    train(recipe)


def mixture_of(values: dict, sizes: dict[str, int], sources: dict, steps: int = 100, levels=()) -> Mixture:
    sections = {name: {"path": "unread", **section} for name, section in sources.items()}
    recipe = build_recipe(Recipe, values | {"sources": sections, "train": {"steps": steps}})
    prompts = {
        name: [
            Prompt(Problem(f"{name} {i}", {"level": levels[i] if levels else 0}), [i], name, name) for i in range(size)
        ]
        for name, size in sizes.items()
    }
    return Mixture(recipe, prompts)


def test_shares_are_exact_over_time_and_epochs_are_whole(values):
    sizes = {"data": 7, "chat": 7, "safety": 4}
    mixture = mixture_of(values, sizes, {"chat": {"share": 0.25}, "safety": {"share": 0.1, "start": 0.5}})
    position, taken = NOWHERE, {name: [] for name in sizes}
    for step in range(1, 101):
        prompts, position = mixture.take(position, step, 3)
        position = Position(**json.loads(json.dumps(position._asdict())))  # as in a checkpoint
        for prompt in prompts:
            taken[prompt.source].append(prompt.token_ids[0])
        assert abs(len(taken["chat"]) - 0.75 * step) < 1
        assert abs(len(taken["safety"]) - 0.3 * max(0, step - 50)) < 1
    assert position.taken == {name: len(numbers) for name, numbers in taken.items()}
    assert position.taken == {"data": 210, "chat": 75, "safety": 15}
    first = np.concatenate([epoch_order(3, epoch, 7) for epoch in range(30)])
    assert taken["data"] == first.tolist()  # as in a run without sources
    for name in ("chat", "safety"):
        size = sizes[name]
        epochs = [taken[name][i : i + size] for i in range(0, len(taken[name]) - size + 1, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert epochs[0] != epochs[1]
    assert taken["chat"][:7] != taken["data"][:7]


def test_a_curriculum_goes_from_easy_to_hard_in_every_pass(values, capsys):
    """Of its own source alone, and from a position in the middle of a pass, too."""
    levels = [3, 1, 2.5, 1, -4, 1]
    mixture = mixture_of(values, {"data": 5, "chat": 6}, {"chat": {"share": 0.5, "curriculum": "level"}}, levels=levels)
    prompts, _ = mixture.take(NOWHERE, 1, 40)
    taken = [prompt.token_ids[0] for prompt in prompts if prompt.source == "chat"]
    epochs = [taken[first : first + 6] for first in range(0, 18, 6)]
    assert [[levels[number] for number in epoch] for epoch in epochs] == [[-4, 1, 1, 1, 2.5, 3]] * 3
    assert len({*map(tuple, epochs)}) > 1  # equal ones are drawn anew
    half, position = mixture.take(NOWHERE, 1, 17)
    assert half + mixture.take(position, 1, 23)[0] == prompts
    plain, _ = mixture_of(values, {"data": 5, "chat": 6}, {"chat": {"share": 0.5}}, levels=levels).take(NOWHERE, 1, 40)
    assert [one.source for one in prompts] == [one.source for one in plain]
    for source in ("data", "chat"):
        own, others = ([one for one in each if one.source == source] for each in (prompts, plain))
        assert (own == others) == (source == "data")
    assert "easiest" not in capsys.readouterr().err
    mixture_of(values, {"data": 5, "chat": 6}, {"chat": {"share": 0.5, "curriculum": "level"}}, 2, levels)
    assert "chat: the run takes about 4 of 6 problems, the easiest by its curriculum" in capsys.readouterr().err


def test_the_order_of_the_sources_in_the_recipe_is_no_matter(values):
    """A resumed run may have them in another."""
    sizes, sources = {"data": 7, "chat": 7, "safety": 7}, {"chat": {"share": 0.3}, "safety": {"share": 0.3}}
    mixtures = [mixture_of(values, sizes, dict(order)) for order in (sources.items(), [*sources.items()][::-1])]
    one, other = (mixture.take(NOWHERE, 1, 20) for mixture in mixtures)
    assert one == other


@pytest.mark.parametrize(("start", "steps", "first"), [(0, 10, 1), (0.29, 100, 30), (0.75, 1, 1), (0.7, 9, 7)])
def test_a_source_starts_after_its_share_of_the_steps(values, start, steps, first):
    mixture = mixture_of(values, {"data": 4, "chat": 4}, {"chat": {"share": 0.5, "start": start}}, steps)
    shares = {step: mixture.shares(step) for step in range(1, steps + 1)}
    assert [step for step in shares if "chat" in shares[step]] == list(range(first, steps + 1))
    assert all(sum(each.values()) == 1 for each in shares.values())


def test_a_source_discarded_is_owed_others_of_its_own(values):
    """Three of four chat groups are thrown away: what a step keeps has the shares nevertheless."""
    mixture = mixture_of(values, {"data": 7, "chat": 5}, {"chat": {"share": 0.3}})
    position, kept, number = NOWHERE, Counter(), 0
    for step in range(1, 101):
        missing = 5
        while missing:
            prompts, position = mixture.take(position, step, missing)
            discarded = []
            for prompt in prompts:
                number += prompt.source == "chat"
                if prompt.source == "chat" and number % 4:
                    discarded.append(prompt)
                else:
                    kept[prompt.source] += 1
            position = mixture.owe(position, step, discarded)
            missing = len(discarded)
    assert kept == {"data": 350, "chat": 150}
    assert position.taken == {"data": 350, "chat": 600}


def test_mini_batches_are_of_all_sources(values):
    """Also where most of one source stands at the end, as after a refill."""
    mixture = mixture_of(values, {"data": 7, "chat": 5}, {"chat": {"share": 0.25}})
    prompts, _ = mixture.take(NOWHERE, 1, 32)
    groups = [ScoredGroup([], Scores(np.array([i]), {}), "chat" if i >= 24 else "data") for i in range(32)]
    for order in (prompts, interleaved(groups)):
        assert all([each.source for each in order[i : i + 4]].count("chat") == 1 for i in range(0, 32, 4))
    assert interleaved(groups[:9]) == groups[:9]


def test_each_source_is_scored_by_its_own_functions(values, tmp_path):
    recipe = recipe_of(values)
    train(recipe)
    rows = rows_of(recipe.run.output)
    calls = Counter((tmp_path / "calls").read_text().splitlines())
    assert calls == {"digits sums": 21, "letters chat": 3}  # six steps of four, a quarter of three of them is chat
    assert [LETTERS in str(row) for row in rows] == [False] * 3 + [True] * 3
    assert [row["source/chat/share"] for row in rows] == [0] * 3 + [0.25] * 3
    assert [row["source/data/share"] for row in rows] == [1] * 3 + [0.75] * 3
    assert rows[0]["source/chat/reward"] is None
    for row in rows[3:]:
        assert row["source/chat/reward"] == row[f"reward/{LETTERS}"]
        assert row["source/data/reward"] == row[f"reward/{DIGITS}"]
        assert row["reward/mean"] == pytest.approx(0.75 * row["source/data/reward"] + 0.25 * row["source/chat/reward"])
    assert all(row["reward/missing"] == 0 for row in rows)


def test_refilled_groups_keep_the_shares(values):
    values["sources"]["chat"]["rewards"] = ["source_rewards:constant"]  # every group of it is dead
    values["sources"]["chat"]["start"] = 0.0
    recipe = recipe_of(values, train__steps=3, rollout__refill_limit=2, train__mini_batches=2)
    train(recipe)
    assert [(row["source/chat/share"], row["source/chat/reward"]) for row in rows_of(recipe.run.output)] == [
        (0.25, 0.5)
    ] * 3
    taken = json.loads((checkpoint_of(recipe.run.output) / "state.json").read_text())["position"]["taken"]
    assert taken["chat"] == 9  # one a step, replaced twice
    assert taken["data"] >= 9


def test_a_resumed_run_is_the_uninterrupted_one(values, monkeypatch):
    """Stopped before the step in which a source and a reward start, and after it."""
    values["rewards"] |= {"functions": [DIGITS, "format", "repetition"], "start": {"repetition": 0.5}}
    values["rollout"] |= {"prompts_per_step": 5, "refill_limit": 1, "max_new_tokens": 3}
    whole, parts = (recipe_of(values, run__output=f"{values['run']['output']}_{name}") for name in ("whole", "parts"))
    train(whole)
    rollout = Sampler.rollout
    for stop, resume in ((3, False), (5, True)):

        def stopped(self, step, position, clock, stop=stop):
            if step == stop:
                raise KeyboardInterrupt
            return rollout(self, step, position, clock)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Sampler, "rollout", stopped)
            train(parts, resume)
    train(parts, resume=True)
    assert_same_run(parts.run.output, whole.run.output)
    assert ["reward/repetition" in row for row in rows_of(whole.run.output)] == [False] * 3 + [True] * 3


def test_sources_stay_those_that_the_run_began_with(values):
    train(recipe_of(values, train__steps=1))
    with pytest.raises(RunInputError, match=r"sources.chat.share is 0.5, and the run in .* began with"):
        train(recipe_of(values, sources__chat__share=0.5), resume=True)


@pytest.mark.xdist_group("ranks")
def test_ranks_take_the_same_prompts(values):
    """The shares of the ranks differ; a rank may have no prompt of a source, or none at all."""
    values["rollout"] |= {"prompts_per_step": 3, "refill_limit": 2, "max_new_tokens": 2}
    values["sources"]["chat"]["start"] = 0.5
    alone, together = (
        recipe_of(values, train__lr=1e-5, train__steps=4, run__output=f"{values['run']['output']}_{size}")
        for size in (1, 2)
    )
    train(alone)
    ranks.run(run, 2, together)
    one, other = (Path(recipe.run.output) for recipe in (alone, together))
    assert read_rows(one / "samples.jsonl") == read_rows(other / "samples.jsonl")
    scores, again = (
        [{k: v for k, v in row.items() if k.startswith(("reward/", "source/", "groups/"))} for row in rows_of(folder)]
        for folder in (one, other)
    )
    assert scores == again
    assert sum(row["source/chat/share"] for row in scores) > 0
    states = [(checkpoint_of(folder) / "state.json").read_text() for folder in (one, other)]
    assert states[0] == states[1]


class Taste:
    """A scorer by the number of letters, which remembers what it was given."""

    def __init__(self):
        self.submitted, self.scored, self.is_closed = [], [], False

    def submit(self, group: CompletionGroup) -> None:
        self.submitted.append(group)

    def score(self, groups) -> np.ndarray:
        self.scored += groups
        return np.array([[float(len(text)) for text in group.completions] for group in groups])

    def close(self) -> None:
        self.is_closed = True


def test_a_reward_model_counts_from_its_start_on(values, monkeypatch, tmp_path):
    path = tmp_path / "taste"
    path.mkdir()
    taste, opened, generators, held = Taste(), [], [], []
    open_generator, score = train_module.open_generator, taste.score

    def open_one(*arguments):
        generators.append(open_generator(*arguments))
        return generators[0]

    def score_too(groups):
        held.append(generators[0].weight_version)
        return score(groups)

    monkeypatch.setattr(train_module, "open_generator", open_one)
    monkeypatch.setattr(taste, "score", score_too)

    def open_preferences(sections, policy, world, questions, max_new_tokens):
        opened.append((sections["taste"].path, policy.tokenizer.eos_token, world.size))
        assert sorted(problem.prompt for problem in questions["taste"]) == [f"c{i:02}=" for i in range(20)]
        assert max_new_tokens == values["rollout"]["max_new_tokens"]
        return {"taste": taste}

    module = types.ModuleType("flashgrpo.grpo.rewards.models")
    module.open_preferences = open_preferences
    monkeypatch.setitem(sys.modules, module.__name__, module)
    values["sources"]["chat"] |= {"rewards": [LETTERS, "taste"], "weights": [1, 0.5], "start": 0.0}
    values["rewards"] |= {"start": {"taste": 0.5}}
    recipe = recipe_of(values | {"reward_models": {"taste": {"path": str(path)}}})
    train(recipe)
    rows = rows_of(recipe.run.output)
    assert opened == [(str(path), "<eos>", 1)]
    assert ["reward/taste" in row for row in rows] == [False] * 3 + [True] * 3
    for row in rows:
        wanted = row[f"reward/{LETTERS}"] + 0.5 * row.get("reward/taste", 0)
        assert row["source/chat/reward"] == pytest.approx(wanted)
    assert taste.submitted == taste.scored
    assert [group.source for group in taste.scored] == ["chat"] * 3
    assert taste.is_closed
    assert held == [-1] * 3  # the generator's weights do not stand beside those of a reward model


def group(source: str, *completions: str) -> CompletionGroup:
    num = len(completions)
    columns = {"kind": source} | ({"tone": "kind"} if source == "chat" else {})
    return CompletionGroup(Problem("q", columns), "q", completions, [[0]] * num, ["stop"] * num, source)


@pytest.fixture
def pool(values):
    weights = {"data": {DIGITS: 1.0}, "chat": {BLANK: 1.0, DIGITS: 1.0}}
    examples = {"data": group("data").problem, "chat": group("chat").problem}
    with RewardPool(weights, examples, max_new_tokens=1, num_workers=1, first_steps={BLANK: 3}) as pool:
        yield pool


def step_of(pool: RewardPool, step: int, *sources: str) -> list[Scores]:
    for source in sources:
        pool.submit(group(source, "1", "a"), step)
    scores = pool.collect(step)
    pool.check_step(scores)
    return scores


def test_a_function_that_does_not_apply_is_not_missing(pool, caplog):
    scores = step_of(pool, 2, "data", "chat")
    assert [each.rewards.tolist() for each in scores] == [[1 / 8, 0], [1 / 8, 0]]
    assert given_scores(scores, BLANK) == []
    assert not caplog.messages
    scores = step_of(pool, 3, "data", "chat", "data")
    assert [np.isnan(each.rewards).tolist() for each in scores] == [[False] * 2, [True] * 2, [False] * 2]
    assert caplog.messages == [f"reward {BLANK!r}: 2 of 2 scores missing: it returned nan"]


def test_steps_without_a_group_of_a_function_are_not_steps_without_its_number(pool):
    for step, source in ((1, "chat"), (2, "chat"), (3, "chat"), (4, "data"), (5, "data"), (6, "chat"), (7, "data")):
        step_of(pool, step, source)
    with pytest.raises(RewardFailure, match="blank' gave no number in 3 steps in a row: it returned nan"):
        step_of(pool, 8, "chat")


def test_a_function_must_fit_the_columns_of_the_source_that_it_scores(values):
    with pytest.raises(RewardError, match="letters': missing a required argument: 'tone'"):
        train(recipe_of(values, rewards__functions=f'["{LETTERS}"]'))
    assert not Path(values["run"]["output"]).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources__chat__share": 0.6, "sources__b__share": 0.4, "sources__b__path": "x"}, "come to 1, wanted less"),
        ({"rewards__functions": '["acuracy"]'}, "rewards: unknown reward 'acuracy'.*did you mean accuracy"),
        ({"sources__chat__rewards": '["acuracy"]'}, "sources.chat: unknown reward 'acuracy'.*did you mean accuracy"),
        ({"rewards__start": '{"safety" = 0.5}'}, "'safety' is in rewards.start or .* and no list of rewards has it"),
        ({"sources__data__share": 0.1, "sources__data__path": "x"}, "sources.data: found the name that .data. has"),
        (
            {"rewards__start": f'{{"{LETTERS}" = 0.8}}'},
            "rewards.start: in step 4 the completions of chat have no reward yet, .*letters",
        ),
        ({"rewards__start": f'{{"{DIGITS}" = 0.2}}'}, "in step 1 the completions of data have no reward yet"),
        ({"reward_models__taste__path": "x", "reward_models__taste__device": "gpu"}, "taste.device: .* found 'gpu'"),
        ({"reward_models__std__path": "x", "sources__chat__rewards": '["std"]'}, "reward_models.std: found the name"),
        (
            {"reward_models__format__path": "x", "sources__chat__rewards": '["format"]'},
            "reward_models.format: found the name of a built-in reward",
        ),
        ({"sources__chat__weights": "[1, 2]"}, "sources.chat: found 2 weights for 1 functions"),
    ],
)
def test_a_faulty_mixture_is_one_line(values, changes, message):
    with pytest.raises(RecipeError, match=message):
        check_names(recipe_of(values, **changes))
