"""A reward model scores what its loss says, whatever the packing, in training and in use, here and in transformers."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

import ranks
from flashgrpo.grpo.errors import DataError, RecipeError, RewardFailure
from flashgrpo.grpo.learn.balance import plan_packs
from flashgrpo.grpo.learn.packing import build_batch
from flashgrpo.grpo.recipe.load import RewardModelRecipe, build_recipe
from flashgrpo.grpo.recipe.schema import ModelSection, PreferenceSection
from flashgrpo.grpo.rewards.models import CARD, OwnProcess, RewardModel, open_preferences, scored_group, scored_ids
from flashgrpo.grpo.rewards.pool import Scorer
from flashgrpo.grpo.run.folder import RunFolder, read_rows
from flashgrpo.grpo.run.policy import Policy, open_policy, open_tokenizer
from flashgrpo.grpo.run.world import open_world
from flashgrpo.grpo.stages.plots import print_summary
from flashgrpo.grpo.stages.reward_model import RewardModelTrainer, Row, load_rows, reward_model
from flashgrpo.grpo.train import train
from flashgrpo.grpo.types import CompletionGroup, Problem
from flashgrpo.model.checkpoint import init_decoder, read_config, save_checkpoint
from flashgrpo.model.config import CheckpointError

pytestmark = pytest.mark.xdist_group("ranks")
TIMES = ("tokens_per_s/trained", "memory/peak_mb")


def text(rng: np.random.Generator, num_digits: int) -> str:
    letters = [*rng.choice([*"abcdefgh"], 8 - num_digits), *rng.choice([*"0123456789"], num_digits)]
    return "".join(rng.permutation(letters))


def make_rows(num: int) -> list[dict]:
    """Pairs of which the better one has more digits; as labelled rows, good with more than four."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(num):
        worse, better = sorted(rng.choice(9, 2, replace=False))
        single = int(rng.choice([0, 1, 2, 6, 7, 8]))
        row = {"prompt": f"q{i}", "chosen": text(rng, better), "rejected": text(rng, worse)}
        rows.append({**row, "completion": text(rng, single), "label": single > 4})
    return rows


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def recipe(model_path, tmp_path) -> RewardModelRecipe:
    values = {
        "model": {"path": str(model_path)},
        "data": {"path": write_rows(tmp_path / "rows.jsonl", make_rows(24)), "template": "none", "held_out": 4},
        "train": {"lr": 1e-3, "batch_size": 8, "token_budget": 64, "checkpoint_every": 2, "epochs": 2},
        "run": {"output": str(tmp_path / "run"), "seed": 3, "device": "cpu"},
    }
    return build_recipe(RewardModelRecipe, values)


def changed(recipe: RewardModelRecipe, section: str, **values) -> RewardModelRecipe:
    return dataclasses.replace(recipe, **{section: dataclasses.replace(getattr(recipe, section), **values)})


@pytest.fixture
def policy(model_path) -> Policy:
    return open_policy(ModelSection(str(model_path)), torch.device("cpu"))


def save_reward_model(causal: Path, folder: Path, seed: int = 1, **card) -> Path:
    """A random reward model with the card of one that was trained."""
    card = {"template": "none", "scores": "whole", "objective": "pairwise", **card}
    model = init_decoder(read_config(causal).as_reward_model(), seed=seed)
    save_checkpoint(model, folder, tokenizer_files_from=causal, json_files={CARD: card})
    return folder


@pytest.fixture
def scoring_path(model_path, tmp_path) -> Path:
    return save_reward_model(model_path, tmp_path / "scoring")


def group(*completions: str, prompt: str = "1+1=") -> CompletionGroup:
    num = len(completions)
    return CompletionGroup(Problem(prompt, {}), prompt, completions, [[7]] * num, ["stop"] * num)


def test_packed_scores_are_those_of_transformers(scoring_path):
    from transformers import AutoModelForSequenceClassification

    theirs = AutoModelForSequenceClassification.from_pretrained(scoring_path, dtype=torch.float32)
    tokenizer = open_tokenizer(scoring_path)
    completions = ["7", "", "a longer one", "7"]
    model = RewardModel(str(scoring_path), "cpu", 64, "reward_models.a")
    found = model.score(group(*completions))
    for completion, score in zip(completions, found, strict=True):
        ids = tokenizer("1+1=")["input_ids"] + tokenizer(completion)["input_ids"] + [tokenizer.eos_token_id]
        assert score == pytest.approx(theirs(torch.tensor([ids])).logits.item(), abs=1e-5)
    assert len(set(found.tolist())) == 3
    assert found[0] == found[3]
    split = RewardModel(str(scoring_path), "cpu", 18, "reward_models.a").score(group(*completions))
    np.testing.assert_allclose(split, found, atol=1e-6)


@pytest.mark.parametrize(("objective", "token_budget"), [("pairwise", 32), ("pointwise", 32), ("pairwise", 4096)])
def test_loss_and_gradients_are_those_of_float64_on_single_sequences(recipe, scoring_path, objective, token_budget):
    recipe = changed(changed(recipe, "train", objective=objective), "data", held_out=0)
    with open_world(recipe) as world, RunFolder(recipe, resume=False, world=world) as folder:
        trainer = RewardModelTrainer(recipe, folder, world)
        trainer.recipe = changed(recipe, "train", token_budget=token_budget)
        scoring = RewardModel(str(scoring_path), "cpu", 64, "").model
        trainer.policy.model.load_state_dict(scoring.state_dict())  # its head is not 0
        batches, signs = trainer._pack(trainer._groups(trainer.rows)), trainer._shared(trainer.rows)
        assert (len(batches) == 1) == (token_budget == 4096)
        loss = 0.0
        for batch in batches:
            part, _ = trainer._loss(batch, signs)
            part.backward()
            loss += part.item()
    model = scoring.double()
    margins = []
    for row in trainer.rows:
        single = [model.scores(build_batch([scored_group(row.prompt_ids, [ids])]))[0] for ids in row.texts]
        margins.append(sum(sign * score for sign, score in zip(row.signs, single, strict=True)))
    wanted = -torch.nn.functional.logsigmoid(torch.stack(margins)).mean()
    wanted.backward()
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    for name, p in model.named_parameters():
        grad = trainer.policy.model.get_parameter(name).grad
        assert grad is not None
        assert p.grad is not None
        assert (grad - p.grad).norm() <= 1e-4 * p.grad.norm(), name


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_pair_is_never_split(recipe, num_ranks):
    """Neither where a pack has no room for it, nor to even out ranks; every rank has as many micro-batches."""
    rng = np.random.default_rng(1)
    with open_world(recipe) as world, RunFolder(recipe, resume=False, world=world) as folder:
        trainer = RewardModelTrainer(recipe, folder, world)
        for num_pairs in (1, 2, 7):
            lengths = rng.integers(1, 30, (num_pairs, 3))
            rows = [Row([1] * a, [np.ones(b), np.ones(c)], [1.0, -1.0]) for a, b, c in lengths.tolist()]
            groups, whole = trainer._groups(rows), trainer.keeps_groups_whole
            plan = plan_packs(groups, 100, num_ranks, trainer.flops, keep_whole=whole)
            found = [group for rank in plan.packs for pack in rank for group in pack]
            assert [len(group.completions) for group in found] == [2] * num_pairs
            assert len({len(rank) for rank in plan.packs}) == 1
            assert max(sum(g.num_tokens for g in pack) for rank in plan.packs for pack in rank) <= 100


@pytest.mark.parametrize("objective", ["pairwise", "pointwise"])
def test_it_learns_to_prefer_digits_and_says_so(recipe, tmp_path, objective, capsys):
    data = write_rows(tmp_path / "many.jsonl", make_rows(200))
    recipe = changed(recipe, "data", path=data, held_out=50)
    recipe = changed(
        recipe, "train", objective=objective, lr=1e-2, epochs=3, batch_size=25, token_budget=2048, checkpoint_every=0
    )
    model = reward_model(recipe)
    first, *steps = read_rows(Path(recipe.run.output) / "metrics.jsonl")
    assert first == {"step": 0, "eval/loss": pytest.approx(np.log(2)), "eval/accuracy": 0.5} | {
        "eval/margin": 0.0,
        "eval/std": 0.0,
    }
    assert steps[-1]["eval/accuracy"] > 0.9
    print_summary(recipe.run.output)
    assert "held-out accuracy" in (summary := capsys.readouterr().out)
    assert "50.0%" in summary
    assert f"{steps[-1]['eval/accuracy']:.1%}" in summary
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]
    assert steps[0]["loss"] == pytest.approx(np.log(2))
    card = json.loads((model / CARD).read_text())
    assert card["template"] == "none"
    assert card["objective"] == objective
    found = RewardModel(str(model), "cpu", 256, "").score(group("12345678", "abcdefgh", prompt="q"))
    assert found[0] > found[1]
    if objective == "pointwise":
        assert 0 <= found[1] < 0.3 < 0.7 < found[0] <= 1


def test_ctrl_c_and_resume_is_bitwise(recipe, tmp_path, monkeypatch):
    recipe = changed(recipe, "train", token_budget=4096)
    whole, stopped = (changed(recipe, "run", output=str(tmp_path / name)) for name in ("whole", "stopped"))
    reward_model(whole)
    original = RewardModelTrainer._loss

    def interrupted(self, batch, shared):
        if self.step == 2 and torch.is_grad_enabled():  # not in the evaluation
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch, shared)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RewardModelTrainer, "_loss", interrupted)
        reward_model(stopped)
    assert (tmp_path / "stopped/checkpoints/step_3/model" / CARD).exists()
    torch.manual_seed(99)
    reward_model(stopped, resume=True)
    models = [load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "stopped")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    rows, again = (logged(tmp_path / name) for name in ("whole", "stopped"))
    assert [row["step"] for row in rows] == list(range(7))
    assert rows == again


def logged(run: Path) -> list[dict]:
    """Its metrics, but for times and memory."""
    rows = read_rows(run / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def trained_on_ranks(recipe: RewardModelRecipe) -> None:
    torch.set_num_threads(1)
    reward_model(recipe)


def test_two_ranks_train_what_one_does(recipe, tmp_path):
    recipe = changed(recipe, "train", epochs=1, token_budget=128)
    one, two = (changed(recipe, "run", output=str(tmp_path / name)) for name in ("one", "two"))
    reward_model(one)
    ranks.run(trained_on_ranks, 2, two)
    rows, again = (logged(tmp_path / name) for name in ("one", "two"))
    assert len(rows) == 4
    assert again == [pytest.approx(row, abs=1e-6) for row in rows]
    weights, others = (load_file(tmp_path / name / "model/model.safetensors") for name in ("one", "two"))
    assert weights["score.weight"].shape == (1, 32)
    assert weights["score.weight"].abs().min() > 0
    for name, tensor in weights.items():
        assert (others[name] - tensor).norm() <= 1e-6 * tensor.norm(), name


@pytest.mark.parametrize(
    ("completion", "read"),
    [
        ("<think>a</think> b ", "b"),
        ("a</think><answer>b</answer>", "b"),
        ("<think>a</think><think>c</think>\nb<answer>7</answer>", "b7"),
        ("no reasoning", "no reasoning"),
        ("<think>cut off", ""),
        ("<think>a</think>", ""),
    ],
)
def test_what_is_read_of_a_completion(policy, completion, read):
    for scores, text in (("answer", read), ("whole", completion)):
        ids = scored_ids(completion, scores, policy.tokenizer, end=0)
        assert ids.tolist() == [*policy.tokenizer(text)["input_ids"], 0]


def test_use_scores_what_training_scored(recipe, policy):
    """The same tokens stand behind the same prompt; reasoning that the policy's prompt has opened counts as such."""
    row = {"prompt": "q", "chosen": "<think>a</think>b", "rejected": "<think>a"}
    recipe = changed(changed(recipe, "data", held_out=0), "train", scores="answer")
    write_rows(Path(recipe.data.path), [row])
    model = RewardModel(str(reward_model(recipe)), "cpu", 64, "")
    trained = load_rows(recipe, policy)[0][0]
    wanted = model.model.scores(build_batch([scored_group(trained.prompt_ids, trained.texts)]))
    asked = CompletionGroup(Problem("q", {}), "User: q <think>", ["a</think>b", "a"], [[1]] * 2, ["stop"] * 2)
    np.testing.assert_array_equal(model.score(asked), wanted.detach().numpy())
    assert wanted[0] != wanted[1]


@pytest.fixture
def world(recipe):
    with open_world(recipe) as world:
        yield world


@pytest.fixture
def opened(scoring_path, policy, world):
    """opened(a={...}) -> the reward models of [reward_models], by name."""
    with contextlib.ExitStack() as stack:

        def open_them(
            questions: Sequence[Problem] = (), max_new_tokens: int = 8, **sections: dict
        ) -> dict[str, Scorer]:
            made = {name: PreferenceSection(str(scoring_path), **values) for name, values in sections.items()}
            scorers = open_preferences(made, policy, world, dict.fromkeys(made, questions), max_new_tokens)
            for scorer in scorers.values():
                stack.callback(scorer.close)
            return scorers

        yield open_them


def test_a_process_of_its_own_scores_as_the_trainer_does(opened):
    groups = [group("1", "22", ""), group("a</think>4", "5" * 9, "6", prompt="2+2=")]
    scorers = opened(a={}, b={"device": "cpu"})
    for each in groups[::-1]:
        scorers["b"].submit(each)
    wanted = scorers["a"].score(groups)
    assert (wanted.shape, wanted.dtype) == ((2, 3), np.float64)
    assert np.isfinite(wanted).all()
    np.testing.assert_array_equal(scorers["b"].score(groups), wanted)
    np.testing.assert_array_equal(scorers["b"].score(groups[1:]), wanted[1:])
    with pytest.raises(RewardFailure, match=r"reward_models\.b: a question .* have 16389 tokens, batch_tokens = 16"):
        scorers["b"].score([group("7" * 16384)])
    scorers["b"].child.process.kill()
    with pytest.raises(RewardFailure, match=r"reward_models\.b ended during score with exit code -9"):
        scorers["b"].score(groups)


def test_out_of_memory_is_a_failure_of_the_reward_model(opened, monkeypatch):
    """The trainer writes a checkpoint before it ends with one."""

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    scorers = opened(a={})
    monkeypatch.setattr(RewardModel, "score", full)
    with pytest.raises(RewardFailure, match=r"reward_models\.a: CUDA out of memory.* Next: lower its batch_tokens"):
        scorers["a"].score([group("1")])


def test_a_device_that_is_not_there_is_told_and_its_process_ended(opened):
    before = set(psutil.Process().children())
    with pytest.raises(RewardFailure) as raised:  # its traceback keeps the pipe open
        opened(a={"device": "cuda:97"})
    assert set(psutil.Process().children()) == before
    assert re.search(r"reward_models\.a: [A-Za-z]+: .*(CUDA|cuda|NVIDIA)", str(raised.value))


def test_the_process_ends_with_the_trainer(scoring_path):
    pids, pids_end = os.pipe()
    if not (trainer := os.fork()):
        try:
            own = OwnProcess(PreferenceSection(str(scoring_path), device="cpu"), "reward_models.a")
            os.write(pids_end, str(own.child.process.pid).encode())
        finally:  # whatever it raised, a copy of this session must not go on
            os.kill(os.getpid(), signal.SIGKILL)
    os.close(pids_end)
    said = os.read(pids, 99)
    assert said
    pid = int(said)
    os.waitpid(trainer, 0)
    deadline = time.monotonic() + 60
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f, m: (f / CARD).unlink(),
            r"has no reward_model\.json; make a reward model by `flashgrpo reward-model",
        ),
        (lambda f, m: (f / CARD).write_text('{"template": "r1"}'), r"reward_model\.json: scores: Field required"),
        (lambda f, m: shutil.copy(m / "config.json", f), "holds a causal language model; a reward model is wanted"),
        (
            lambda f, m: (f / "tokenizer.json").write_text((f / "tokenizer.json").read_text().replace('"z"', '"ζ"')),
            "scoring: its tokenizer is not that of .*tiny.*model; train a reward model",
        ),
    ],
    ids=["no card", "half a card", "causal", "tokenizer"],
)
def test_what_is_no_reward_model_for_this_policy_is_refused(scoring_path, model_path, opened, spoil, message):
    spoil(scoring_path, model_path)
    with pytest.raises(CheckpointError, match=message):
        opened(a={"device": "cpu"})


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("12345", RecipeError, r"reward_models\.a\.batch_tokens = 20 is below the longest .*, 21; raise it"),
        ([{"role": "user", "content": "1"}], DataError, r"reward_models\.a: .*template 'none' wants text, found chat"),
    ],
)
def test_questions_that_it_cannot_score_are_found_before_the_first_step(opened, prompt, error, message):
    """And not when it begins to count, which may be in the last share of the steps."""
    section = {"batch_tokens": 20}
    with pytest.raises(error, match=message):
        opened([Problem("1", {}), Problem(prompt, {})], 15, a=section)
    opened([Problem("1", {})], 15, a=section)


def test_a_reward_model_is_no_policy(recipe, recipe_values, scoring_path):
    from flashgrpo.grpo.recipe.load import Recipe

    recipe_values["model"]["path"] = str(scoring_path)
    recipe_values["rewards"] = {"functions": ["format"]}
    for run in (
        lambda: train(build_recipe(Recipe, recipe_values)),
        lambda: reward_model(changed(recipe, "model", path=str(scoring_path))),
    ):
        with pytest.raises(CheckpointError, match="holds a reward model; a causal language model is wanted"):
            run()


PAIR = {"prompt": "1", "chosen": "2", "rejected": "3"}
LABELLED = {"prompt": "1", "completion": "2", "label": 1}


@pytest.mark.parametrize(
    ("objective", "row", "message"),
    [
        ("pairwise", {"prompt": "1", "chosen": "2", "reject": "3"}, "2: no column 'rejected'.*reject"),
        ("pairwise", {"prompt": "1", "rejected": "2"}, "2: no column 'chosen'"),
        ("pairwise", PAIR | {"rejected": 5}, "2: column 'rejected' holds int, wanted the text"),
        ("pairwise", PAIR | {"chosen": "2" * 70}, r"2 has 72 tokens, data\.max_tokens = 70"),
        ("pairwise", PAIR | {"chosen": "2" * 40, "rejected": "3" * 40}, r"2 has 83 tokens, train\.token_budget"),
        ("pointwise", LABELLED | {"label": "good"}, "2: column 'label' holds 'good', wanted 0, 1"),
        ("pointwise", LABELLED | {"label": 2}, "2: column 'label' holds 2, wanted 0, 1"),
        ("pointwise", LABELLED, " all labels of column 'label' are the same"),
    ],
)
def test_bad_rows_are_found_before_the_first_step(recipe, policy, objective, row, message):
    write_rows(Path(recipe.data.path), [PAIR | LABELLED, row])
    recipe = changed(changed(recipe, "data", held_out=0, max_tokens=70), "train", objective=objective)
    with pytest.raises(DataError, match=rf"rows\.jsonl:{message}"):
        load_rows(recipe, policy)
