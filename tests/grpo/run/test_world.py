"""What goes wrong on one rank ends all of them, soon, with one clear error; Ctrl-C stops them at the same step."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
import torch.distributed as dist

import ranks
from flashgrpo.grpo import train as train_module
from flashgrpo.grpo.cli import main
from flashgrpo.grpo.errors import DataError
from flashgrpo.grpo.recipe.load import Recipe, build_recipe
from flashgrpo.grpo.run import folder as run_folder
from flashgrpo.grpo.run import world
from flashgrpo.grpo.run.folder import newest_checkpoint, read_rows
from flashgrpo.grpo.run.world import open_world
from flashgrpo.grpo.sampling import Sampler
from flashgrpo.grpo.train import Trainer
from flashgrpo.model.checkpoint import init_decoder, read_config, save_checkpoint
from flashgrpo.model.config import ModelConfig

pytestmark = pytest.mark.xdist_group("ranks")


def command(*arguments: str) -> tuple[int, str]:
    """Exit code and errors of `flashgrpo train`, not what it is doing; {rank} in an argument is the rank's number."""
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        code = main(["train", *(argument.format(rank=os.environ["RANK"]) for argument in arguments)])
    lines = errors.getvalue().splitlines(keepends=True)
    return code, "".join(line for line in lines if not line.startswith(("generator: ", "loading ")))


def commands(*each: list[str]) -> list[tuple[int, str]]:
    """One after the other, as after restarts: in the store is what the ones before have left."""
    return [command(*arguments) for arguments in each]


@pytest.fixture
def recipe_file(recipe_values, custom_rewards, tmp_path) -> str:
    file = tmp_path / "recipe.toml"
    file.write_text(tomli_w.dumps(recipe_values))
    return str(file)


FAULTS = {
    "--train.shard_ranks=3": "train.shard_ranks = 3 does not divide the 2 ranks; use one that does, or 0 for all",
    "--train.token_budget=10": "longest prompt and completion together, 4 + 8 - 1 tokens; raise it to 11 or more",
    "--train.lr=0.{rank}1": "the ranks have different recipes: lr = 0.01 on rank 0, lr = 0.11 on rank 1",
    "--model.path=gloo": "gloo: no such folder",
}


def test_a_fault_before_the_first_step_is_one_line_of_rank_0(recipe_file, recipe_values, tmp_path):
    """Of the recipe, or a checkpoint of another model."""
    model = Path(shutil.copytree(recipe_values["model"]["path"], tmp_path / "model"))
    ranks.run(command, 2, recipe_file, f"--model.path={model}", "--train.steps=2")
    raw = {**read_config(model).raw, "intermediate_size": 48}
    save_checkpoint(init_decoder(ModelConfig.from_dict(raw), seed=0), model, tokenizer_files_from=model)
    resumed = [recipe_file, f"--model.path={model}", "--run.accept_changes=true", "--resume"]
    faults = {tuple(resumed): "step_2: broken checkpoint, or one of another model or recipe"}
    faults |= {(recipe_file, f"--run.output={tmp_path / 'new'}", option): text for option, text in FAULTS.items()}
    first, second = ranks.run(commands, 2, *map(list, faults))
    assert second == [(2, "")] * len(faults)
    for (code, errors), message in zip(first, faults.values(), strict=True):
        assert (code, errors.count("\n")) == (2, 1)
        assert message in errors


def open_until(values: dict[str, Any], last: int) -> None:
    with open_world(build_recipe(Recipe, values)) as world:
        # Longer than the others' time between two signs of life.
        time.sleep(2.5 if world.rank == last else 0.3 * world.rank)


@pytest.mark.parametrize("last", [0, 2])
def test_ranks_that_end_apart_end_well(recipe_values, custom_rewards, last):
    ranks.run(open_until, 3, recipe_values, last)


def command_in_own_folder(*arguments: str) -> tuple[int, str]:
    Path(os.environ["RANK"]).mkdir()
    os.chdir(os.environ["RANK"])
    return command(*arguments)


def test_an_output_that_ranks_do_not_share_is_refused(recipe_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code, errors), other = ranks.run(command_in_own_folder, 2, recipe_file, "--run.output=run")
    assert (code, errors.count("\n")) == (2, 1)
    assert "run, which rank 0 has begun to write, is not there on rank 1" in errors
    assert other == (2, "")


def data_missing_on_rank_1(*arguments: str) -> tuple[int, str]:
    original = train_module.load_problems

    def load(*options):
        if os.environ["RANK"] == "1":
            raise DataError("sums.jsonl: no such file or folder")
        return original(*options)

    train_module.load_problems = load
    world.GRACE_S = 1.0
    return command(*arguments)


def test_a_fault_of_one_rank_is_told_with_its_name(recipe_file):
    first, second = ranks.run(data_missing_on_rank_1, 2, recipe_file, check=False)
    code, errors = second.result
    assert (first.exit_code, code) == (1, 2)
    assert "flashgrpo: rank 1 of 2 on " in errors
    assert "sums.jsonl: no such file or folder" in errors


def stuck(kind: str, which: int, recipe_file: str, *options: str) -> tuple[int, str]:
    """A rank dies, stops or is slow in step 2, while the others wait for it or are busy; or in its checkpoint."""
    is_it = os.environ["RANK"] == str(which)
    ends = signal.SIGSTOP if "stopped" in kind else signal.SIGKILL

    class Stuck(Sampler):
        def rollout(self, step, position, clock):
            if step == 2 and "checkpoint" not in kind:
                if is_it and kind != "slow":
                    os.kill(os.getpid(), ends)
                if is_it or kind == "busy":
                    time.sleep(600)
            return super().rollout(step, position, clock)

    def save(*arguments, **options):
        if is_it and "checkpoint" in kind:
            os.kill(os.getpid(), ends)
        return original(*arguments, **options)

    world.GRACE_S = 1.0
    original = run_folder.state_dict_saver.save
    run_folder.state_dict_saver.save = save
    train_module.Sampler = Stuck
    os.dup2(os.open(f"{recipe_file}.{os.environ['RANK']}", os.O_CREAT | os.O_WRONLY), 2)
    return command(recipe_file, *options)


@pytest.mark.parametrize(("kind", "which"), [("waiting", 1), ("busy", 0), ("in a checkpoint", 2)])
def test_a_rank_that_dies_ends_the_others(recipe_file, kind, which):
    """Also those without a connection to it; its name is told by rank 0, and rank 0's by all."""
    outcomes = ranks.run(stuck, 3, kind, which, recipe_file, check=False)
    for rank, outcome in enumerate(outcomes):
        assert outcome.exit_code == (-signal.SIGKILL if rank == which else 1)
        told = Path(f"{recipe_file}.{rank}").read_text()
        news = f"flashgrpo: rank {which} of 3 has died; continue with --resume\n"
        assert told.count(news) == told.count(" has died") == (rank != which and 0 in (rank, which)), told


def test_a_rank_that_is_stopped_is_named(recipe_file):
    started = ranks.start(stuck, 2, "stopped in a checkpoint", 1, recipe_file, "--run.collective_timeout_s=2")
    started[0][0].join(60)
    first, _ = ranks.finish(started, timeout_s=0)
    assert first.exit_code == 1
    told = Path(f"{recipe_file}.0").read_text()
    assert "flashgrpo: rank 1 of 2 has given no sign of life for 4 s, as if stopped; continue with --resume" in told


def test_a_rank_that_is_waited_for_too_long_ends_the_run(recipe_file):
    """Rank 0 waits among those that hold a copy of the weights together, the others for all."""
    options = recipe_file, "--run.collective_timeout_s=2", "--train.shard_ranks=2"
    first, _, third, _ = ranks.run(stuck, 4, "slow", 1, *options, check=False, timeout_s=60)
    for code, errors in (first.result, third.result):
        assert code == 1
        assert "flashgrpo: a rank let the others wait for longer than run.collective_timeout_s = 2; raise it" in errors


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_never_starts_is_not_waited_for_without_end(rank, monkeypatch):
    """What is in the store is of before the restart."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    store: Any = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        store.set("rank 0", f"name {free.getsockname()[1]}")
    with pytest.raises(dist.DistStoreError, match="not all of the 2 ranks have started"):
        world.meet(store, rank, 2, limit_s=0.2)


def interrupted(recipe_file: str) -> tuple[int, str]:
    """Ctrl-C reaches rank 1 alone; rank 0 has something to end beside it, such as servers, that takes its time."""

    class Interrupted(Trainer):
        def run_step(self, step, bar):
            if step == 3 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGINT)
            return super().run_step(step, bar)

        def open_learner(self, total_steps):
            super().open_learner(total_steps)
            if os.environ["RANK"] == "0":
                self.ends.callback(time.sleep, 2.5)

    world.GRACE_S = 0.1
    train_module.Trainer = Interrupted
    return command(recipe_file, "--train.steps=1000")


def test_ctrl_c_on_one_rank_stops_all_at_the_same_step(recipe_file, tmp_path):
    """They wait for what one of them ends: else those that are gone would be taken for dead."""
    (code, errors), (other, _) = ranks.run(interrupted, 2, recipe_file)
    assert (code, other) == (130, 130)
    assert "stopped after step 2; continue with --resume (SIGINT on rank 1)" in errors
    newest = newest_checkpoint(tmp_path / "run")
    assert newest is not None
    assert newest.name == "step_2"


DIES_ONCE = """
import os, signal
from pathlib import Path
from flashgrpo.grpo.train import Trainer
run_step, mark = Trainer.run_step, Path(__file__).with_suffix(".died")
def run_step_or_die(self, step, bar):
    if step == 4 and os.environ["RANK"] == "1" and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return run_step(self, step, bar)
if "RANK" in os.environ:
    Trainer.run_step = run_step_or_die
"""
SLURM = {  # two nodes, on this machine, each with a torchrun that hears Ctrl-C though it was started in the background
    "scontrol": "echo 127.0.0.1",
    "srun": 'for node in 0 1; do env --default-signal=INT "$@" & echo $! > node$node; done; wait; wait',
}


def test_two_nodes_go_on_without_a_rank_that_died_until_ctrl_c(recipe_file, custom_rewards, tmp_path):
    """By the script for Slurm, torchrun and real processes; the nodes do not count restarts alike."""
    for name, line in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / ".venv").symlink_to(Path(sys.executable).parent.parent)
    rewards = custom_rewards / "custom_rewards.py"
    rewards.write_text(rewards.read_text() + DIES_ONCE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {"MASTER_PORT": port, "SLURM_JOB_NODELIST": "nodes", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1"}
    folders = os.pathsep.join([str(custom_rewards), *filter(None, [os.environ.get("PYTHONPATH")])])
    job |= {"SLURM_JOB_ID": "7", "PYTHONPATH": folders, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = Path(__file__).parents[3] / "recipes/slurm.sh"
    arguments = [recipe_file, "--train.steps=100000", "--train.shard_ranks=1"]
    arguments[:0] = ["timeout", "480", "bash", str(script)]  # for where this test is killed
    rows = tmp_path / "run/metrics.jsonl"
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(
            arguments, cwd=tmp_path, env=os.environ | job, stdout=log, stderr=log, process_group=0
        )
        try:
            deadline = time.monotonic() + 300
            while process.poll() is None and len(read_rows(rows)) < 6 and time.monotonic() < deadline:
                time.sleep(0.1)
            for node in (0, 1):
                os.kill(int((tmp_path / f"node{node}").read_text()), signal.SIGINT)
            process.wait(120)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)  # torchrun ends its ranks, which are in sessions of their own
        log.seek(0)
        told = log.read()
    assert rewards.with_suffix(".died").exists(), told
    assert "exitcode: -9" in told
    assert "continue with --resume (SIGINT on rank" in told
    newest = newest_checkpoint(tmp_path / "run")
    assert newest is not None
    steps = [row["step"] for row in read_rows(rows)]
    assert steps == [*range(1, len(steps) + 1)]
    assert json.loads((newest / "state.json").read_text())["step"] == len(steps) >= 6


@pytest.mark.parametrize(("device", "backend"), [("cuda", "cpu:gloo,cuda:nccl"), ("cpu", "gloo")])
def test_nccl_is_given_the_device_when_the_group_is_made(device, backend, recipe, monkeypatch):
    """It makes its communicators then, and those of subgroups with them: later the memory is torch's."""

    class Called(Exception):
        pass

    def init(*arguments, **options):
        raise Called(arguments, options["device_id"])

    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr("flashgrpo.grpo.run.world.resolve_device", torch.device)
    monkeypatch.setattr("torch.distributed.init_process_group", init)
    here = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, device=device))
    with pytest.raises(Called) as caught, open_world(here):
        pass
    own = torch.device("cuda", 3) if device == "cuda" else None
    assert caught.value.args == ((backend,), own)
