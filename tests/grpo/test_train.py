"""The loop as a user runs it: it learns, it resumes bit for bit, and it ends with clear words when it must."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from flashgrpo.grpo.data.problems import load_problems
from flashgrpo.grpo.errors import RecipeError, RewardFailure, RunError, RunInputError
from flashgrpo.grpo.recipe.load import Recipe, build_recipe
from flashgrpo.grpo.rollout.native import NativeGenerator, sample_tokens
from flashgrpo.grpo.rollout.opening import open_generator
from flashgrpo.grpo.run.folder import RunFolder, newest_checkpoint, read_rows
from flashgrpo.grpo.run.progress import console
from flashgrpo.grpo.run.world import open_world
from flashgrpo.grpo.sampling import Sampler
from flashgrpo.grpo.stages.evaluate import open_reward_pool
from flashgrpo.grpo.train import Trainer, train
from flashgrpo.kernels.grpo_loss import LossConfig
from flashgrpo.model.checkpoint import CheckpointError

TIMING = ("time/", "tokens_per_s", "tflops", "idle", "memory/", "sync/")


def changed(recipe: Recipe, section: str, **values) -> Recipe:
    return dataclasses.replace(recipe, **{section: dataclasses.replace(getattr(recipe, section), **values)})


@contextmanager
def open_trainer(kind: type[Trainer], recipe: Recipe):
    problems, held_out = load_problems(recipe.data, recipe.run.seed)
    with (
        open_world(recipe) as world,
        open_reward_pool(recipe, problems[0]) as pool,
        RunFolder(recipe, resume=False, world=world) as folder,
    ):
        yield kind(recipe, folder, world, pool, problems, held_out)


def comparable_rows(folder: Path) -> list[dict]:
    rows = read_rows(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(TIMING)} for row in rows]


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model" / "model.safetensors")


def assert_equal_weights(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_reward_rises(recipe):
    recipe = changed(changed(recipe, "train", steps=25, lr=5e-3), "rollout", prompts_per_step=8, group_size=8)
    train(recipe)
    rewards = [row["reward/mean"] for row in read_rows(Path(recipe.run.output) / "metrics.jsonl")]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.2


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"loss": LossConfig.preset("grpo"), "train": {"ref_refresh_every": 3, "mini_batches": 2, "epochs": 2}},
        {"loss": LossConfig.preset("gspo", behavior_cap=2.0), "rollout": {"refill_limit": 2, "mask_overlong": True}},
    ],
    ids=["on-policy", "kl, refreshed reference, two epochs of two mini-batches", "gspo, refills, masked overlong"],
)
def test_resume_is_bitwise(recipe, tmp_path, variant):
    for section, values in variant.items():
        recipe = dataclasses.replace(recipe, loss=values) if section == "loss" else changed(recipe, section, **values)
    recipe = changed(changed(recipe, "train", steps=6), "eval", every=2, samples=2, problems=3)
    whole = changed(recipe, "run", output=str(tmp_path / "whole"))
    train(whole)
    stopped = changed(recipe, "run", output=str(tmp_path / "stopped"))
    train(changed(stopped, "train", steps=4))
    train(stopped, resume=True)
    assert_equal_weights(weights(whole.run.output), weights(stopped.run.output))
    rows, again = comparable_rows(tmp_path / "whole"), comparable_rows(tmp_path / "stopped")
    assert [row["step"] for row in rows] == list(range(7))
    assert rows == again
    assert read_rows(tmp_path / "whole/samples.jsonl") == read_rows(tmp_path / "stopped/samples.jsonl")


def test_logs_are_cut_back_to_the_checkpoint(recipe):
    folder = Path(train(recipe)).parent
    newest = newest_checkpoint(folder)
    assert newest is not None
    assert newest.name == "step_4"
    shutil.rmtree(newest)  # as if the run had died after step 4's row and before its checkpoint
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')
    train(recipe, resume=True)
    assert [row["step"] for row in read_rows(folder / "metrics.jsonl")] == [1, 2, 3, 4]


def test_on_policy_ratio_is_exactly_one(recipe):
    """New minus old log-probs are 0, not merely small, when scored on the packs that are trained."""
    recipe = dataclasses.replace(recipe, loss=LossConfig.preset("dapo"))
    recipe = changed(recipe, "train", epochs=2, steps=1, lr=1e-12)
    train(recipe)
    (row,) = read_rows(Path(recipe.run.output) / "metrics.jsonl")
    assert row["ratio/max"] == row["ratio/mean"] == 1.0
    assert row["mismatch/max"] < 1e-4


def test_zero_kl_at_the_reference(recipe):
    recipe = changed(dataclasses.replace(recipe, loss=LossConfig.preset("grpo")), "train", steps=2, ref_refresh_every=1)
    train(recipe)
    assert [row["kl"] for row in read_rows(Path(recipe.run.output) / "metrics.jsonl")] == [0.0, 0.0]


def test_final_model_and_checkpoints_load_in_transformers(recipe):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = train(recipe)
    newest = newest_checkpoint(recipe.run.output)
    assert newest is not None
    for folder in (model, newest / "model"):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert AutoTokenizer.from_pretrained(folder).eos_token == "<eos>"
        assert loaded.num_parameters() > 10_000


def test_only_the_newest_checkpoints_are_kept(recipe):
    recipe = changed(recipe, "train", checkpoint_every=1, keep_checkpoints=2)
    train(recipe)
    assert sorted(p.name for p in Path(recipe.run.output, "checkpoints").iterdir()) == ["step_3", "step_4"]


def test_an_existing_output_is_not_overwritten(recipe):
    train(changed(recipe, "train", steps=1))
    with pytest.raises(RunError, match="continue it with --resume, or choose another"):
        train(recipe)


def test_bfloat16_trains_with_fp32_masters(recipe):
    recipe = changed(changed(recipe, "model", dtype="bfloat16"), "train", lr=1e-4)
    train(recipe)
    newest = newest_checkpoint(recipe.run.output)
    assert newest is not None
    name = "model.layers.0.mlp.down_proj.weight"
    final = weights(recipe.run.output)[name]
    master = torch.empty(final.shape)
    dcp.load({name: master}, checkpoint_id=newest / "state", no_dist=True)
    assert final.dtype == torch.bfloat16
    assert torch.equal(master.bfloat16(), final)
    assert not torch.equal(master.bfloat16().float(), master)


def test_non_finite_gradients_are_skipped_and_end_the_run(recipe, monkeypatch):
    """Weights and the last good checkpoint stay; three in a row are an error."""
    recipe = changed(recipe, "train", steps=8)
    original = Trainer._loss

    def poisoned(self, batch, update):
        loss, stats = original(self, batch, update)
        return (loss * float("nan") if self.step >= 3 else loss), stats

    monkeypatch.setattr(Trainer, "_loss", poisoned)
    with pytest.raises(RunError, match="3 updates in a row had a gradient that is not finite, up to step 6"):
        train(recipe)
    rows = read_rows(Path(recipe.run.output) / "metrics.jsonl")
    assert [row["update/skipped"] for row in rows] == [0, 0, 0, 1, 1, 1]
    newest = newest_checkpoint(recipe.run.output)
    assert newest is not None
    saved = load_file(newest / "model" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())


def test_a_single_non_finite_gradient_changes_nothing(recipe, monkeypatch):
    original = Trainer._loss

    def poisoned(self, batch, update):
        loss, stats = original(self, batch, update)
        return (loss * float("inf") if self.step == 1 else loss), stats

    monkeypatch.setattr(Trainer, "_loss", poisoned)
    recipe = changed(recipe, "train", steps=2, checkpoint_every=1)
    train(recipe)
    first, second = (
        load_file(Path(recipe.run.output, "checkpoints", f"step_{n}", "model", "model.safetensors")) for n in (1, 2)
    )
    assert_equal_weights(first, second)


def test_rewards_that_never_come_end_the_run(recipe):
    recipe = changed(changed(recipe, "rewards", functions=["custom_rewards:never"]), "train", steps=5)
    with pytest.raises(RewardFailure, match="3 steps in a row"):
        train(recipe)


def test_dead_groups_still_take_their_step(recipe, monkeypatch):
    """All rewards equal: nothing is packed, the optimizer's moments decay, the step is logged; the third says so."""
    recipe = changed(changed(recipe, "rewards", functions=["format"]), "train", steps=5)
    with console.capture() as captured:
        train(recipe)
    rows = read_rows(Path(recipe.run.output) / "metrics.jsonl")
    assert [(row["groups/dead"], row["grad_norm"], row["loss"]) for row in rows] == [(1.0, 0.0, 0.0)] * 5
    said = " ".join(captured.get().split())
    assert said.count("had nothing to learn from") == 1
    assert "step 3: 3 steps in a row had nothing to learn from" in said
    assert "reward/format 0" in said


def test_rewards_beyond_fp32_are_learnt_from(recipe, custom_rewards):
    recipe = changed(changed(recipe, "rewards", functions=["custom_rewards:far_apart"]), "train", steps=1)
    train(recipe)
    (row,) = read_rows(Path(recipe.run.output) / "metrics.jsonl")
    assert row["grad_norm"] > 0
    assert (row["live"], row["groups/dead"]) == (1.0, 0.0)


def test_masked_overlong_completions_are_not_packed(recipe):
    def packed(mask_overlong: bool) -> set[int]:
        variant = changed(recipe, "rollout", mask_overlong=mask_overlong, max_new_tokens=40)
        trained: set[int] = set()

        class Recording(Trainer):
            def _pack(self, data):
                updates = super()._pack(data)
                nonlocal cut
                flat = [rollout for group in data.rollouts for rollout in group]
                cut = {i for i, rollout in enumerate(flat) if rollout.finish_reason == "length"}
                trained.update(int(i) for update in updates for batch in update.batches for i in batch.sequence_ids)
                return updates

        cut: set[int] = set()
        with open_trainer(Recording, changed(variant, "train", steps=1)) as trainer:
            trainer.run()
        shutil.rmtree(variant.run.output)
        assert cut
        assert len(cut) < 16
        return trained & cut

    assert packed(mask_overlong=False)
    assert not packed(mask_overlong=True)


def test_refills_replace_dead_groups(recipe, monkeypatch):
    recipe = changed(recipe, "rollout", refill_limit=8, max_new_tokens=2)
    recipe = changed(recipe, "train", steps=1)
    train(recipe)
    (row,) = read_rows(Path(recipe.run.output) / "metrics.jsonl")
    state = json.loads((Path(recipe.run.output) / "checkpoints/step_1/state.json").read_text())
    assert row["groups/dead"] == 0.0
    assert state["position"]["taken"]["data"] > recipe.rollout.prompts_per_step


def run_command(recipe_values: dict, custom_rewards: Path, tmp_path: Path, *flags: str, **options) -> subprocess.Popen:
    import tomli_w

    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(recipe_values))
    environment = os.environ | {"PYTHONPATH": str(custom_rewards), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "flashgrpo.grpo.cli", "train", str(path), *flags]
    return subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options
    )


def wait_for_rows(output: Path, number: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while len(read_rows(output / "metrics.jsonl")) < number:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_ctrl_c_writes_a_checkpoint_and_exits_130(recipe_values, custom_rewards, tmp_path):
    recipe_values["train"] |= {"steps": 10_000, "checkpoint_every": 0}
    process = run_command(recipe_values, custom_rewards, tmp_path)
    wait_for_rows(tmp_path / "run", 3, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    newest = newest_checkpoint(tmp_path / "run")
    assert newest is not None
    state = json.loads((newest / "state.json").read_text())
    assert state["step"] == read_rows(tmp_path / "run/metrics.jsonl")[-1]["step"] >= 3
    assert "continue with --resume" in errors


def test_a_killed_run_resumes(recipe_values, custom_rewards, tmp_path):
    """SIGKILL at a random moment, twice: the run ends as if it had never been killed."""
    recipe_values["train"] |= {"steps": 9, "checkpoint_every": 1}
    rng = np.random.default_rng(time.time_ns())
    for number in (2, 5):
        process = run_command(recipe_values, custom_rewards, tmp_path, "--resume")
        wait_for_rows(tmp_path / "run", number, process)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.communicate()
    process = run_command(recipe_values, custom_rewards, tmp_path, "--resume")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    recipe_values["run"]["output"] = str(tmp_path / "whole")
    train(build_recipe(Recipe, recipe_values))
    assert_equal_weights(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert comparable_rows(tmp_path / "run") == comparable_rows(tmp_path / "whole")


def test_a_full_disk_keeps_the_last_good_checkpoint(recipe_values, custom_rewards, tmp_path):
    """The limit on file size stands in for a full disk: from the second checkpoint on, writing fails."""
    import resource

    recipe_values["train"] |= {"steps": 1, "checkpoint_every": 1}
    train(build_recipe(Recipe, recipe_values))
    recipe_values["train"]["steps"] = 3

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = run_command(recipe_values, custom_rewards, tmp_path, "--resume", preexec_fn=limit)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert "step_1 is kept: free some space and continue with --resume" in errors
    assert [p.name for p in Path(tmp_path, "run/checkpoints").iterdir()] == ["step_1"]


def test_ctrl_c_in_an_evaluation_is_made_up_for(recipe, tmp_path, monkeypatch):
    recipe = changed(changed(recipe, "eval", every=2, samples=2, problems=3), "train", checkpoint_every=0)
    whole = changed(recipe, "run", output=str(tmp_path / "whole"))
    train(whole)
    original = Sampler.evaluate

    def interrupted(self, step):
        if step == 2:
            seen.append(read_rows(Path(recipe.run.output) / "metrics.jsonl")[-1]["step"])
            raise KeyboardInterrupt
        return original(self, step)

    seen = []
    monkeypatch.setattr(Sampler, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(recipe)
    with pytest.raises(KeyboardInterrupt):  # and in making up for it
        train(recipe, resume=True)
    assert seen == [2, 2]  # the row of the step stands before its evaluation
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(tmp_path / "user_code"))
    train(recipe, resume=True)
    assert comparable_rows(Path(recipe.run.output)) == comparable_rows(tmp_path / "whole")


def test_the_log_counts_every_weight_sync(recipe, monkeypatch):
    """Those before an evaluation, too, after which the next step needs none."""
    original, synced = NativeGenerator.load_weights, []

    def slow(self, source, version):
        synced.append(version)
        time.sleep(0.01)
        original(self, source, version)

    monkeypatch.setattr(NativeGenerator, "load_weights", slow)
    recipe = changed(changed(recipe, "eval", every=2, samples=1, problems=2), "train", steps=3)
    train(recipe)
    rows = read_rows(Path(recipe.run.output) / "metrics.jsonl")
    assert synced == [0, 1, 2, 3]
    assert all(row["time/sync_s"] >= least for row, least in zip(rows, (0.01, 0.0, 0.02, 0.01), strict=True))
    assert ["sync/gb_per_s" in row for row in rows] == [True, False, True, True]


def test_ctrl_c_in_a_checkpoint_waits_for_it(recipe, monkeypatch):
    original = RunFolder.save

    def interrupted(self, *arguments):
        os.kill(os.getpid(), signal.SIGINT)
        original(self, *arguments)

    monkeypatch.setattr(RunFolder, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(recipe)
    assert [p.name for p in Path(recipe.run.output, "checkpoints").iterdir()] == ["step_2"]


def test_a_failing_reward_leaves_a_checkpoint(recipe, monkeypatch):
    original = Sampler.rollout

    def failing(self, step, position, clock):
        if step == 2:
            raise RewardFailure("the judge is gone")
        return original(self, step, position, clock)

    monkeypatch.setattr(Sampler, "rollout", failing)
    with pytest.raises(RewardFailure):
        train(changed(recipe, "train", checkpoint_every=0))
    newest = newest_checkpoint(recipe.run.output)
    assert newest is not None
    assert newest.name == "step_1"


@pytest.mark.parametrize("broken", ["state.json", "state/.metadata", "state/__0_0.distcp"])
def test_a_broken_checkpoint_is_a_clear_error(recipe, broken):
    train(changed(recipe, "train", steps=2))
    file = Path(recipe.run.output) / "checkpoints/step_2" / broken
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises((RunInputError, CheckpointError), match="step_2"):
        train(recipe, resume=True)


def test_another_seed_or_data_set_is_not_the_same_run(recipe):
    train(changed(recipe, "train", steps=2))
    with pytest.raises(RunInputError, match=r"run.seed is 4, and the run in .* began with 3"):
        train(changed(recipe, "run", seed=4), resume=True)
    with pytest.raises(RunInputError, match=r"data.held_out is 9, .* began with 8"):
        train(changed(recipe, "data", held_out=9), resume=True)


def test_a_resume_tells_what_changed(recipe, capsys):
    train(changed(recipe, "train", steps=2))
    train(recipe, resume=True)
    train(recipe, resume=True)
    train(changed(dataclasses.replace(recipe, loss=LossConfig.preset("cispo")), "train", lr=2e-3), resume=True)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("changed on resume: ")]
    assert lines[0] == "changed on resume: train.steps 2 -> 4"
    assert "train.lr 0.001 -> 0.002" in lines[1]
    assert "loss.objective 'clip' -> 'cispo'" in lines[1]
    assert len(lines) == 2


def test_the_model_is_looked_for_before_the_data(recipe, tmp_path):
    """A data set may take minutes to fetch."""
    recipe = changed(recipe, "data", path=str(tmp_path / "none.jsonl"))
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        train(changed(recipe, "model", path=str(tmp_path / "nowhere")))


def test_a_faulty_start_leaves_nothing_behind(recipe, tmp_path):
    with pytest.raises(CheckpointError):
        train(changed(recipe, "model", path=str(tmp_path / "nowhere")))
    assert not Path(recipe.run.output).exists()


def test_a_completion_over_the_token_budget_is_found_before_the_first_step(recipe):
    with pytest.raises(RecipeError, match=r"4 \+ 300 - 1 tokens; raise it to 303"):
        train(changed(recipe, "rollout", max_new_tokens=300))


def test_logs_keep_every_row_whatever_the_text(recipe, tmp_path):
    with open_world(recipe) as world, RunFolder(recipe, resume=False, world=world) as folder:
        folder.start()
        folder.log_samples(1, [{"completion": "line\u2028paragraph\u2029next\u0085"}, {"completion": "2"}])
    assert [row["completion"] for row in read_rows(tmp_path / "run/samples.jsonl")][1] == "2"


def test_skipped_updates_in_a_row_survive_a_resume(recipe, monkeypatch):
    original = Trainer._loss

    def poisoned(self, batch, update):
        loss, stats = original(self, batch, update)
        return (loss * float("nan") if self.step >= 1 else loss), stats

    monkeypatch.setattr(Trainer, "_loss", poisoned)
    train(changed(recipe, "train", steps=3))
    with pytest.raises(RunError, match="3 updates in a row"):
        train(recipe, resume=True)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.5}, {"top_k": 3}])
@pytest.mark.parametrize("off", [0.0, 0.2, float("nan")])
def test_log_probs_that_are_not_the_trainers_raise_an_alarm(recipe, options, off, monkeypatch, capsys):
    """Also where top_p and top_k leave tokens out, whose share of the probability is not the sampler's fault."""

    def sample(logits, uniforms, sampling):
        tokens, logprobs, kept = sample_tokens(logits, uniforms, sampling)
        return tokens, logprobs + off, kept

    monkeypatch.setattr("flashgrpo.grpo.rollout.native.sample_tokens", sample)
    recipe = changed(changed(recipe, "train", steps=1), "rollout", **options)
    train(recipe)
    told = " ".join(capsys.readouterr().err.split())
    (row,) = read_rows(Path(recipe.run.output) / "metrics.jsonl")
    if off == 0:
        assert "the sampler's log-probs are" not in told
        assert row["mismatch/max"] < 1e-4
    elif off > 0:
        assert "the sampler's log-probs are 0.2 off the trainer's on average (train.mismatch_alarm = 0.1)" in told
    else:
        assert "the sampler's log-probs are not finite in 16 of 16 completions" in told


def test_where_log_probs_cannot_be_compared_the_run_says_so(recipe, monkeypatch, capsys):
    """vLLM reports them renormalised over what top_k kept, and never what that was."""
    recipe = changed(recipe, "train", steps=1)
    original = NativeGenerator._rollout

    def rollout(self, request, tokens, logprobs, kept, stopped):
        return original(self, request, tokens, logprobs, None, stopped)

    monkeypatch.setattr(NativeGenerator, "_rollout", rollout)
    monkeypatch.setattr("flashgrpo.grpo.train.open_generator", lambda _, *rest: open_generator(recipe, *rest))
    train(changed(recipe, "rollout", top_k=3, generator="vllm"))
    assert "cannot be checked (train.mismatch_alarm)" in " ".join(capsys.readouterr().err.split())
    (row,) = read_rows(Path(recipe.run.output) / "metrics.jsonl")
    assert not [name for name in row if name.startswith("mismatch/")]


def test_weights_that_are_no_numbers_make_no_checkpoint(recipe, monkeypatch):
    """What a run calls its last good checkpoint must be one."""
    original = Trainer._update

    def learn(self, *rest):
        metrics = original(self, *rest)
        if self.step == 2:  # the third
            self.learner.params["model.norm.weight"].data[3] = float("nan")
        return metrics

    monkeypatch.setattr(Trainer, "_update", learn)
    with pytest.raises(
        RunError, match=r"weights of step 3 hold NaN .* as model\.norm\.weight.*last good one is .*step_2"
    ):
        train(changed(recipe, "train", checkpoint_every=1))
    assert newest_checkpoint(recipe.run.output) == Path(recipe.run.output) / "checkpoints/step_2"


def test_a_checkpoint_of_weights_that_are_no_numbers_is_not_resumed(recipe, monkeypatch):
    monkeypatch.setattr(Trainer, "_check_weights", lambda *_: None)
    original = RunFolder.save

    def save(self, step, write_model, tensors, *rest):
        tensors["model.norm.weight"].data[3] = float("nan")
        original(self, step, write_model, tensors, *rest)

    monkeypatch.setattr(RunFolder, "save", save)
    train(changed(recipe, "train", steps=2))
    monkeypatch.undo()
    with pytest.raises(RunInputError, match=r"weights of step 2 hold NaN .*remove .*step_2 to continue from the one"):
        train(recipe, resume=True)
