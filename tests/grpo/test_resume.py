"""A run on several ranks goes on from its newest whole checkpoint, whatever killed it, on any number of ranks."""

import dataclasses
import os
import pickle
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

import ranks
from flashgrpo.grpo import train as train_module
from flashgrpo.grpo.recipe.load import Recipe, build_recipe
from flashgrpo.grpo.run import folder as run_folder
from flashgrpo.grpo.run.folder import read_rows
from flashgrpo.grpo.run.progress import Clock
from flashgrpo.grpo.sampling import Sampler
from flashgrpo.grpo.train import Trainer
from flashgrpo.grpo.types import Prompt
from flashgrpo.kernels.grpo_loss import LossConfig
from flashgrpo.model import checkpoint, files
from flashgrpo.model.sharding import full_tensors
from runs import assert_same_run, changed, checkpoint_of

pytestmark = pytest.mark.xdist_group("ranks")


def train(recipe: Recipe, resume: bool = False) -> None:
    train_module.train(recipe, resume)


def record(recipe: Recipe, file: Path) -> None:
    """Train, and keep every group by its place among the run's prompts."""
    recorded = {}

    class Recording(Sampler):
        def sample_groups(self, step: int, first: int, prompts: Sequence[Prompt], clock: Clock):
            groups = super().sample_groups(step, first, prompts, clock)
            recorded.update(enumerate(groups, start=first))
            return groups

    train_module.Sampler = Recording
    train_module.train(recipe)
    file.write_bytes(pickle.dumps(recorded))


def replay(
    recipe: Recipe, file: Path, resume: bool, num_dead: int = 0
) -> tuple[dict[int, dict[str, np.ndarray]], list[int]]:
    """Train on recorded rollouts, the first `num_dead` groups of a step with equal rewards: the weights after every
    step, and the places of the prompts that were taken.
    """
    recorded = pickle.loads(file.read_bytes())
    weights, places = {}, []

    class Replaying(Sampler):
        def sample_groups(self, step: int, first: int, prompts: Sequence[Prompt], clock: Clock):
            places.extend(range(first, first + len(prompts)))
            groups = [recorded[first + i] for i in range(len(prompts))]
            for group in groups[:num_dead]:
                group.scores.rewards[:] = 1.0
            return groups

    class Watched(Trainer):
        def run_step(self, step, bar):
            metrics = super().run_step(step, bar)
            tensors = full_tensors(self.learner.params, self.policy.model.config)
            weights[step] = {name: tensor.clone().numpy() for name, tensor in tensors}
            return metrics

    train_module.Sampler, train_module.Trainer = Replaying, Watched
    train_module.train(recipe, resume)
    return weights, places


@pytest.fixture
def recorded(recipe, tmp_path) -> tuple[Recipe, Path]:
    """A recipe of six steps with reference, mini-batches and evaluations, and its rollouts on one rank."""
    recipe = dataclasses.replace(recipe, loss=LossConfig.preset("grpo", entropy_coef=0.01))
    recipe = changed(recipe, "train", steps=6, checkpoint_every=3, mini_batches=2, ref_refresh_every=2, token_budget=64)
    ranks.run(record, 1, changed(recipe, "run", output=str(tmp_path / "recorded")), tmp_path / "rollouts")
    return recipe, tmp_path / "rollouts"


@pytest.mark.parametrize(("before", "after"), [(4, 1), (1, 2), (2, 2)])
def test_a_run_goes_on_with_any_number_of_ranks(recorded, before, after, tmp_path):
    recipe, file = recorded
    whole, stopped = (changed(recipe, "run", output=str(tmp_path / name)) for name in ("whole", "stopped"))
    wanted, _ = ranks.run(replay, before, whole, file, False)[0]
    _, first = ranks.run(replay, before, changed(stopped, "train", steps=3), file, False)[0]
    found, second = ranks.run(replay, after, stopped, file, True)[0]
    assert first + second == list(range(6 * recipe.rollout.prompts_per_step))
    assert sorted(found) == [4, 5, 6]
    for step, tensors in found.items():
        for name, tensor in tensors.items():
            off = np.linalg.norm(tensor - wanted[step][name]) / np.linalg.norm(wanted[step][name])
            assert off <= (0 if before == after else 1e-6), f"step {step}, {name}: {off:.1e}"


def test_samples_and_scores_do_not_depend_on_the_number_of_ranks(recipe, tmp_path):
    """Three prompts and five problems: the ranks' shares differ, and one of four has no prompt at all."""
    recipe = changed(changed(recipe, "rollout", prompts_per_step=3), "eval", every=1, samples=2, problems=5)
    recipe = changed(recipe, "train", steps=2, lr=1e-5)
    one, four = tmp_path / "on_1", tmp_path / "on_4"
    for size, folder in ((1, one), (4, four)):
        ranks.run(train, size, changed(recipe, "run", output=str(folder)))
    assert read_rows(four / "samples.jsonl") == read_rows(one / "samples.jsonl")
    scores, others = (
        [{key: row[key] for key in row if key.startswith(("eval", "reward"))} for row in read_rows(f / "metrics.jsonl")]
        for f in (one, four)
    )
    assert scores == others


def test_weights_gathered_for_scoring_are_not_used_after_an_update(recorded, tmp_path):
    """The second mini-batch is scored, then the first one, all dead, changes the weights without a backward pass."""
    recipe, file = recorded
    recipe = changed(dataclasses.replace(recipe, loss=LossConfig.preset("dapo")), "train", steps=3)
    kept = changed(changed(recipe, "train", reshard_after_forward=False), "run", output=str(tmp_path / "kept"))
    (wanted, _), (found, _) = (ranks.run(replay, 2, each, file, False, 2)[0] for each in (recipe, kept))
    assert all(np.array_equal(found[3][name], wanted[3][name]) for name in wanted[3])
    assert any(not np.array_equal(wanted[2][name], wanted[3][name]) for name in wanted[3])


def die(*_: object) -> None:
    os._exit(1)


CRASHES = {  # the function in place of which a rank dies
    "before the shards": (run_folder.state_dict_saver, "save"),
    "in the model": (checkpoint, "save_file"),
    "before the state": (run_folder, "write_text"),
    "before the sync": (files, "_sync"),
    "after the rename": (run_folder, "list_checkpoints"),
}


def crash(recipe: Recipe, point: str, ranks_that_die: list[int]) -> None:
    """Train until the save of step 3 comes to `point`."""
    module, name = CRASHES[point]

    class Crashing(Trainer):
        def save(self):
            if self.step == 3 and int(os.environ["RANK"]) in ranks_that_die:
                setattr(module, name, die)
            super().save()

    train_module.Trainer = Crashing
    train_module.train(recipe)


@pytest.fixture(scope="module")
def whole_run(model_path, tmp_path_factory) -> Iterator[tuple[Recipe, Path]]:
    """A recipe of six steps with a checkpoint after each, and the folder of its run on two ranks."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "resumed_rewards.py").write_text(
        "def digits(prompts, completions, **columns):\n"
        "    return [sum(c.isdigit() for c in text) for text in completions]\n"
    )
    sys.path.append(str(folder))
    (folder / "sums.jsonl").write_text("".join(f'{{"prompt": "{i}+1=", "answer": "{i + 1}"}}\n' for i in range(16)))
    values = {
        "model": {"path": str(model_path)},
        "data": {"path": str(folder / "sums.jsonl"), "template": "none", "held_out": 0},
        "rewards": {"functions": ["resumed_rewards:digits"], "workers": 1},
        "rollout": {"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 8},
        "train": {"steps": 6, "lr": 1e-3, "token_budget": 256, "checkpoint_every": 1},
        "run": {"output": str(folder / "run"), "device": "cpu"},
    }
    recipe = build_recipe(Recipe, values)
    ranks.run(train, 2, recipe)
    assert [row["grad_norm"] > 0 for row in read_rows(folder / "run/metrics.jsonl")] == [True] * 6
    yield recipe, folder / "run"
    sys.path.remove(str(folder))


@pytest.mark.parametrize("point", CRASHES)
def test_a_crash_while_saving_leaves_a_whole_checkpoint(whole_run, point, tmp_path):
    recipe = changed(whole_run[0], "run", output=str(tmp_path / "crashed"))
    dying = [1] if point == "before the shards" else [0]
    outcomes = ranks.run(crash, 2, recipe, point, dying, check=False)
    assert [outcome.exit_code for outcome in outcomes] != [0, 0]
    assert checkpoint_of(tmp_path / "crashed").name == ("step_3" if point == "after the rename" else "step_2")
    ranks.run(train, 2, recipe, True)
    assert_same_run(tmp_path / "crashed", whole_run[1])


def test_a_killed_run_resumes(whole_run, tmp_path):
    """SIGKILL of all ranks at a random moment, several times over: the run ends as if it had never been killed."""
    recipe = changed(whole_run[0], "run", output=str(tmp_path / "killed"))
    rng, killed = np.random.default_rng(time.time_ns()), []
    for _ in range(int(os.environ.get("KILLS", "2"))):
        started = ranks.start(train, 2, recipe, True)
        before = len(read_rows(tmp_path / "killed/metrics.jsonl"))
        deadline = time.monotonic() + 60
        while len(read_rows(tmp_path / "killed/metrics.jsonl")) <= before < 5 and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.2))
        for process, _ in started:
            process.kill()
        killed += [outcome.exit_code == -signal.SIGKILL for outcome in ranks.finish(started, 10)]
    assert any(killed)  # a run that is faster than the last kill may have ended
    ranks.run(train, 2, recipe, True)
    assert_same_run(tmp_path / "killed", whole_run[1])
