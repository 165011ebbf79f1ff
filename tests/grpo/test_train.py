"""The loop as a user runs it: it learns, it resumes bit for bit, and it ends with clear words when it must."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from flashgrpo.grpo import train as train_module
from flashgrpo.grpo.errors import RecipeError, RewardFailure, RunError, RunInputError
from flashgrpo.grpo.recipe.load import Recipe, build_recipe
from flashgrpo.grpo.rollout.generator import open_generator
from flashgrpo.grpo.rollout.native import NativeGenerator, sample_tokens
from flashgrpo.grpo.run.folder import RunFolder, read_rows
from flashgrpo.grpo.run.progress import console
from flashgrpo.grpo.run.world import open_world
from flashgrpo.grpo.sampling import Sampler
from flashgrpo.grpo.train import Trainer, train
from flashgrpo.kernels.grpo_loss import LossConfig
from flashgrpo.model.checkpoint import CheckpointError
from runs import assert_same_run, changed, checkpoint_of, rows_of


def trained(recipe: Recipe) -> list[dict]:
    """The log of a run."""
    return read_rows(train(recipe).parent / "metrics.jsonl")


def poison_losses(monkeypatch, poison) -> None:
    """`poison(number, model, loss)` in place of the loss of each step, counted from 1."""
    original, calls = train_module.packed_loss, []

    def poisoned(model, batch, config, **options):
        loss, stats = original(model, batch, config, **options)
        calls.append(loss)  # a step has one micro-batch
        return poison(len(calls), model, loss), stats

    monkeypatch.setattr(train_module, "packed_loss", poisoned)


def test_reward_rises(recipe):
    recipe = changed(changed(recipe, "train", steps=18, lr=5e-3), "rollout", prompts_per_step=8, group_size=8)
    rewards = [row["reward/mean"] for row in trained(recipe)]
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.2


@pytest.mark.parametrize(
    ("loss", "train_keys", "rollout_keys"),
    [
        (LossConfig.preset("grpo"), {"ref_refresh_every": 3, "mini_batches": 2, "epochs": 2}, {}),
        (LossConfig.preset("gspo", behavior_cap=2.0), {}, {"refill_limit": 2, "mask_overlong": True}),
    ],
    ids=["kl, refreshed reference, two epochs of two mini-batches", "gspo, refills, masked overlong"],
)
def test_resume_is_bitwise(recipe, tmp_path, loss, train_keys, rollout_keys):
    recipe = changed(dataclasses.replace(recipe, loss=loss), "train", steps=5, checkpoint_every=3, **train_keys)
    recipe = changed(changed(recipe, "rollout", **rollout_keys), "eval", every=3, samples=2, problems=3)
    whole = changed(recipe, "run", output=str(tmp_path / "whole"))
    train(whole)
    stopped = changed(recipe, "run", output=str(tmp_path / "stopped"))
    train(changed(stopped, "train", steps=3))
    train(stopped, resume=True)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    assert [row["step"] for row in rows_of(tmp_path / "whole")] == list(range(6))


def test_logs_are_cut_back_to_the_checkpoint(recipe):
    folder = Path(train(recipe)).parent
    shutil.rmtree(checkpoint_of(folder))  # as if the run had died after step 4's row and before its checkpoint
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')
    train(recipe, resume=True)
    assert [row["step"] for row in read_rows(folder / "metrics.jsonl")] == [1, 2, 3, 4]


def test_on_policy_ratio_is_exactly_one(recipe):
    """New minus old log-probs are 0, not merely small, when scored on the packs that are trained."""
    (row,) = trained(changed(recipe, "train", epochs=2, steps=1, lr=1e-12))
    assert row["ratio/max"] == row["ratio/mean"] == 1.0
    assert row["mismatch/max"] < 1e-4
    assert not [name for name in row if name.startswith("source/")]  # it has none


def test_later_mini_batches_are_compared_with_the_weights_of_before_the_step(recipe):
    (row,) = trained(changed(recipe, "train", mini_batches=2, steps=1, lr=1e-2))
    assert row["ratio/max"] > 1.0


def test_zero_kl_at_the_reference(recipe):
    recipe = changed(dataclasses.replace(recipe, loss=LossConfig.preset("grpo")), "train", steps=2, ref_refresh_every=1)
    assert [row["kl"] for row in trained(recipe)] == [0.0, 0.0]


def test_final_model_and_the_newest_checkpoints_load_in_transformers(recipe):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = train(changed(recipe, "train", checkpoint_every=1, keep_checkpoints=2))
    checkpoints = sorted(Path(recipe.run.output, "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["step_3", "step_4"]
    for folder in (model, checkpoints[1] / "model"):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert AutoTokenizer.from_pretrained(folder).eos_token == "<eos>"
        assert loaded.num_parameters() > 10_000


def test_bfloat16_trains_with_fp32_masters(recipe):
    model = train(changed(changed(recipe, "model", dtype="bfloat16"), "train", lr=1e-4))
    name = "model.layers.0.mlp.down_proj.weight"
    final = load_file(model / "model.safetensors")[name]
    master = torch.empty(final.shape)
    dcp.load({name: master}, checkpoint_id=checkpoint_of(model.parent) / "state", no_dist=True)
    assert final.dtype == torch.bfloat16
    assert torch.equal(master.bfloat16(), final)
    assert not torch.equal(master.bfloat16().float(), master)


def test_non_finite_gradients_are_skipped_and_the_third_in_a_row_ends_the_run(recipe, monkeypatch):
    """Also where a resume lies between them; weights and the last good checkpoint stay."""
    poison_losses(monkeypatch, lambda step, model, loss: loss * float("nan") if step >= 4 else loss)
    train(changed(recipe, "train", steps=5))
    with pytest.raises(RunError, match="3 updates in a row had a gradient that is not finite, up to step 6"):
        train(changed(recipe, "train", steps=8), resume=True)
    rows = read_rows(Path(recipe.run.output) / "metrics.jsonl")
    assert [row["update/skipped"] for row in rows] == [0, 0, 0, 1, 1, 1]
    saved = load_file(checkpoint_of(recipe.run.output) / "model" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())


def test_rewards_that_never_come_end_the_run(recipe):
    with pytest.raises(RewardFailure, match="3 steps in a row"):
        train(changed(recipe, "rewards", functions=["custom_rewards:never"]))


def test_dead_groups_still_take_their_step(recipe):
    """All rewards equal: nothing is packed, the optimizer's moments decay, the step is logged; the third says so."""
    with console.capture() as captured:
        rows = trained(changed(recipe, "rewards", functions=["format"]))
    assert [(row["groups/dead"], row["grad_norm"], row["loss"]) for row in rows] == [(1.0, 0.0, 0.0)] * 4
    said = " ".join(captured.get().split())
    assert said.count("had nothing to learn from") == 1
    assert "step 3: 3 steps in a row had nothing to learn from" in said
    assert "reward/format 0" in said


def test_rewards_beyond_fp32_are_learnt_from(recipe):
    (row,) = trained(changed(changed(recipe, "rewards", functions=["custom_rewards:far_apart"]), "train", steps=1))
    assert row["grad_norm"] > 0
    assert (row["live"], row["groups/dead"]) == (1.0, 0.0)


@pytest.mark.parametrize("mask_overlong", [False, True])
def test_masked_overlong_completions_are_not_trained_on(recipe, mask_overlong, monkeypatch):
    def open_endless(*arguments):
        generator = open_generator(*arguments)
        generator.stop_token_ids = []
        return generator

    monkeypatch.setattr(train_module, "open_generator", open_endless)
    (row,) = trained(changed(changed(recipe, "rollout", mask_overlong=mask_overlong), "train", steps=1))
    assert row["length/truncated"] == 1.0
    assert (row["grad_norm"] > 0) != mask_overlong


def test_refills_replace_dead_groups(recipe):
    recipe = changed(changed(recipe, "rollout", refill_limit=8, max_new_tokens=2), "train", steps=1)
    (row,) = trained(recipe)
    state = json.loads((checkpoint_of(recipe.run.output) / "state.json").read_text())
    assert row["groups/dead"] == 0.0
    assert state["position"]["taken"]["data"] == recipe.rollout.prompts_per_step + row["groups/discarded"] > 4


@pytest.mark.parametrize("refill_limit", [0, 30])
def test_groups_that_are_too_hard_are_not_learnt_from(recipe, refill_limit, monkeypatch):
    """They are replaced by others, or stay in the log alone: their completions reach no pack."""
    packed, build = [], train_module.build_batch

    def build_and_count(pack):
        packed.append(sum(len(group.completions) for group in pack))
        return build(pack)

    monkeypatch.setattr(train_module, "build_batch", build_and_count)
    bounds = {"keep_mean_reward": (0.04, 1.0), "refill_limit": refill_limit}
    (row,) = trained(changed(changed(recipe, "rollout", max_new_tokens=3, **bounds), "train", steps=1))
    samples = {}
    for sample in read_rows(Path(recipe.run.output) / "samples.jsonl"):
        samples.setdefault(sample["prompt"], []).append(sample["reward"])
    if refill_limit:
        assert (row["groups/filtered"], row["groups/dead"]) == (0, 0)
        assert row["groups/discarded"] > 0
        assert all(np.mean(rewards) >= 0.04 for rewards in samples.values())
    else:
        assert row["groups/filtered"] in (0.25, 0.5, 0.75)
        assert row["groups/discarded"] == 0
    assert sum(packed) == 16 * (1 - row["groups/filtered"])
    assert row["grad_norm"] > 0


@pytest.mark.parametrize("preset", ["dapo", "dr_grpo"])
def test_groups_that_are_left_out_count_in_the_denominator(recipe, preset, tmp_path):
    """As those of equal rewards: bounds that leave out these alone change nothing, whatever the loss is divided by."""
    recipe = changed(changed(recipe, "rollout", max_new_tokens=2), "train", steps=1)
    recipe = dataclasses.replace(recipe, loss=LossConfig.preset(preset))
    (wanted,) = trained(recipe)
    bounded = changed(changed(recipe, "rollout", keep_mean_reward=(1e-3, 1.0)), "run", output=str(tmp_path / "bounded"))
    (found,) = trained(bounded)
    assert found["groups/filtered"] == found["groups/dead"] == wanted["groups/dead"] > 0
    assert (found["grad_norm"], found["loss"]) == (wanted["grad_norm"], wanted["loss"])


def run_command(recipe_values: dict, custom_rewards: Path, tmp_path: Path, *flags: str, **options) -> subprocess.Popen:
    import tomli_w

    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(recipe_values))
    paths = f"{custom_rewards}:{os.environ.get('PYTHONPATH', '')}"
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "flashgrpo.grpo.cli", "train", str(path), *flags]
    return subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options
    )


def test_ctrl_c_writes_a_checkpoint_and_exits_130(recipe_values, custom_rewards, tmp_path):
    recipe_values["train"] |= {"steps": 10_000, "checkpoint_every": 0}
    process = run_command(recipe_values, custom_rewards, tmp_path)
    deadline = time.monotonic() + 120
    while len(read_rows(tmp_path / "run/metrics.jsonl")) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    state = json.loads((checkpoint_of(tmp_path / "run") / "state.json").read_text())
    assert state["step"] == read_rows(tmp_path / "run/metrics.jsonl")[-1]["step"] >= 2
    assert "continue with --resume" in errors


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


def test_ctrl_c_in_an_evaluation_is_made_up_for(recipe, tmp_path, monkeypatch, custom_rewards):
    recipe = changed(changed(recipe, "eval", every=2, samples=2, problems=3), "train", steps=3, checkpoint_every=0)
    whole = changed(recipe, "run", output=str(tmp_path / "whole"))
    train(whole)
    original = Sampler.evaluate

    def interrupted(self, step):
        if step == 2:
            seen.append(read_rows(Path(recipe.run.output) / "metrics.jsonl")[-1]["step"])
            raise KeyboardInterrupt
        return original(self, step)

    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)
        with pytest.raises(KeyboardInterrupt):  # and in making up for it
            train(recipe, resume=True)
    assert seen == [2, 2]  # the row of the step stands before its evaluation
    train(recipe, resume=True)
    assert_same_run(recipe.run.output, tmp_path / "whole")


def test_the_log_counts_every_weight_sync(recipe, monkeypatch):
    """Those before an evaluation, too, after which the next step needs none."""
    original, synced = NativeGenerator.load_weights, []

    def slow(self, source, version):
        synced.append(version)
        time.sleep(0.01)
        original(self, source, version)

    monkeypatch.setattr(NativeGenerator, "load_weights", slow)
    rows = trained(changed(changed(recipe, "eval", every=2, samples=1, problems=2), "train", steps=3))
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
    assert checkpoint_of(recipe.run.output).name == "step_1"


def test_a_broken_checkpoint_is_a_clear_error(recipe):
    train(changed(recipe, "train", steps=2))
    for broken in ("state.json", "state/.metadata", "state/__0_0.distcp"):
        file = checkpoint_of(recipe.run.output) / broken
        whole = file.read_bytes()
        file.write_bytes(whole[:20])
        with pytest.raises((RunInputError, CheckpointError), match="step_2"):
            train(recipe, resume=True)
        file.write_bytes(whole)


def test_an_output_is_continued_by_its_own_recipe_alone(recipe, capsys):
    """Without --resume it is not overwritten, and a resume tells what has changed."""
    train(changed(recipe, "train", steps=2))
    with pytest.raises(RunError, match="continue it with --resume, or choose another"):
        train(recipe)
    with pytest.raises(RunInputError, match=r"run.seed is 4, and the run in .* began with 3"):
        train(changed(recipe, "run", seed=4), resume=True)
    with pytest.raises(RunInputError, match=r"data.held_out is 9, .* began with 8"):
        train(changed(recipe, "data", held_out=9), resume=True)
    train(recipe, resume=True)
    train(recipe, resume=True)
    train(changed(dataclasses.replace(recipe, loss=LossConfig.preset("cispo")), "train", lr=2e-3), resume=True)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("changed on resume: ")]
    assert lines[0] == "changed on resume: train.steps 2 -> 4"
    assert "train.lr 0.001 -> 0.002" in lines[1]
    assert "loss.objective 'clip' -> 'cispo'" in lines[1]
    assert len(lines) == 2


def test_a_faulty_start_is_told_before_the_first_step_and_leaves_nothing_behind(recipe, tmp_path):
    """The model is looked for before the data, which may take minutes to fetch."""
    nowhere = changed(changed(recipe, "data", path="none.jsonl"), "model", path=str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        train(nowhere)
    with pytest.raises(RecipeError, match=r"4 \+ 300 - 1 tokens; raise it to 303"):
        train(changed(recipe, "rollout", max_new_tokens=300))
    assert not Path(recipe.run.output).exists()


def test_logs_keep_every_row_whatever_the_text(recipe, tmp_path):
    with open_world(recipe) as world, RunFolder(recipe, resume=False, world=world) as folder:
        folder.start()
        folder.log_samples(1, [{"completion": "line\u2028paragraph\u2029next\u0085"}, {"completion": "2"}])
    assert [row["completion"] for row in read_rows(tmp_path / "run/samples.jsonl")][1] == "2"


@pytest.mark.parametrize(
    ("options", "off", "told"),
    [
        ({"top_p": 0.5}, 0.0, ""),
        ({"top_k": 3}, 0.0, ""),
        ({}, 0.2, "the sampler's log-probs are 0.2 off the trainer's on average (train.mismatch_alarm = 0.1)"),
        ({"top_k": 3}, float("nan"), "the sampler's log-probs are not finite in 16 of 16 completions"),
    ],
)
def test_log_probs_that_are_not_the_trainers_raise_an_alarm(recipe, options, off, told, monkeypatch, capsys):
    """Also where top_p and top_k leave tokens out: both sides are of what these kept."""

    def sample(logits, uniforms, sampling):
        tokens, logprobs, *kept_sets = sample_tokens(logits, uniforms, sampling)
        return tokens, logprobs + off, *kept_sets

    monkeypatch.setattr("flashgrpo.grpo.rollout.native.sample_tokens", sample)
    (row,) = trained(changed(changed(recipe, "train", steps=1), "rollout", **options))
    said = " ".join(capsys.readouterr().err.split())
    assert told in said
    if not told:
        assert "the sampler's log-probs are" not in said
        assert row["mismatch/max"] < 1e-4


@pytest.mark.parametrize("truncation", [{"top_p": 0.95}, {"top_k": 20}, {"top_p": 0.95, "kept_limit": 85}], ids=str)
def test_ratios_are_exactly_1_at_equal_weights_whatever_the_sampler_kept(recipe, truncation):
    """The second update's old log-probs are scored, by weights that the first leaves as they are."""
    recipe = changed(recipe, "rollout", **truncation)
    (row,) = trained(changed(recipe, "train", steps=1, mini_batches=2, lr=1e-30))
    assert row["ratio/max"] == row["ratio/mean"] == 1
    assert row["mismatch/max"] < 1e-5
    assert 10 < row["kept/mean"] <= truncation.get("kept_limit", 97)
    assert (row["kept/whole"] > 0) == ("kept_limit" in truncation)
    assert row["grad_norm"] > 0


@pytest.mark.parametrize(
    ("device", "generator", "step", "top_p", "is_told"),
    [
        ("cuda", "vllm", 1, 1.0, True),
        ("cuda", "vllm", 1, 0.9, False),  # the other one does not tell what top_p kept
        ("cuda", "vllm", 2, 1.0, False),
        ("cuda", "native", 1, 1.0, False),
        ("cpu", "vllm", 1, 1.0, False),
    ],
)
def test_log_probs_of_vllms_that_are_off_on_a_gpu_may_be_its_model_runners(
    device, generator, step, top_p, is_told, recipe, capsys
):
    """On a CPU, where it is tested, vLLM has another one."""
    trainer: Any = Trainer.__new__(Trainer)
    trainer.recipe, trainer.device = changed(recipe, "rollout", generator=generator, top_p=top_p), torch.device(device)
    trainer.step, trainer._steps_without_signal = step, 0
    trainer._warn(SimpleNamespace(rollouts=[]), {"mismatch/mean": 0.2, "grad_norm": 1.0, "groups/dead": 0.0})
    said = " ".join(capsys.readouterr().err.split())
    assert f"step {step}: the sampler's log-probs are 0.2 off the trainer's" in said
    assert ("does VLLM_USE_V2_MODEL_RUNNER=0 mend it?" in said) == is_told


def test_where_log_probs_cannot_be_compared_the_run_says_so(recipe, monkeypatch, capsys):
    """vLLM's CPU build reports them renormalised over what top_k kept, and never what that was."""
    recipe = changed(recipe, "train", steps=1)
    original = NativeGenerator.generate

    def generate(*arguments):
        for group in original(*arguments):
            yield [dataclasses.replace(rollout, kept_counts=None, kept_ids=None) for rollout in group]

    monkeypatch.setattr(NativeGenerator, "generate", generate)
    monkeypatch.setattr("flashgrpo.grpo.train.open_generator", lambda _, *rest: open_generator(recipe, *rest))
    (row,) = trained(changed(recipe, "rollout", top_k=3, generator="vllm"))
    assert "cannot be checked (train.mismatch_alarm)" in " ".join(capsys.readouterr().err.split())
    assert not [name for name in row if name.startswith("mismatch/")]


def test_weights_that_are_no_numbers_make_no_checkpoint(recipe, monkeypatch):
    """What a run calls its last good checkpoint must be one."""

    def spoil(step, model, loss):
        if step == 3:
            dict(model.named_parameters())["model.norm.weight"].data[3] = float("nan")
        return loss

    poison_losses(monkeypatch, spoil)
    with pytest.raises(
        RunError, match=r"weights of step 3 hold NaN .*as model\.norm\.weight.*last good one is .*step_2"
    ):
        train(changed(recipe, "train", checkpoint_every=1))
    assert checkpoint_of(recipe.run.output).name == "step_2"


def test_a_checkpoint_of_weights_that_are_no_numbers_is_not_resumed(recipe, monkeypatch):
    original = RunFolder.save

    def save(self, step, write_model, tensors, *rest):
        tensors["model.norm.weight"].data[3] = float("nan")
        original(self, step, write_model, tensors, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", save)
        train(changed(recipe, "train", steps=2))
    with pytest.raises(RunInputError, match=r"weights of step 2 hold NaN .*remove .*step_2 to continue from the one"):
        train(recipe, resume=True)
