"""What goes wrong on one rank ends all of them, soon, with one clear error; Ctrl-C stops them at the same step."""

import contextlib
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
import ranks
import tomli_w
import torch.distributed as dist

from flashgrpo.grpo import train as train_module
from flashgrpo.grpo.cli import main
from flashgrpo.grpo.errors import DataError
from flashgrpo.grpo.run import folder as run_folder
from flashgrpo.grpo.run import world
from flashgrpo.grpo.run.folder import newest_checkpoint, read_rows
from flashgrpo.grpo.run.world import _own_store
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
    return code, "".join(line for line in lines if not line.startswith("loading "))


@pytest.fixture
def recipe_file(recipe_values, custom_rewards, tmp_path) -> str:
    file = tmp_path / "recipe.toml"
    file.write_text(tomli_w.dumps(recipe_values))
    return str(file)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--train.shard_ranks=3", "train.shard_ranks = 3 does not divide the 2 ranks; use one that does, or 0 for all"),
        ("--train.token_budget=10", "longest prompt and completion together, 4 + 8 - 1 tokens; raise it to 11 or more"),
        ("--train.lr=0.{rank}1", "the ranks have different recipes: lr = 0.01 on rank 0, lr = 0.11 on rank 1"),
        ("--model.path=nowhere", "nowhere: no such folder"),
        ("--model.path=gloo", "gloo: no such folder"),
    ],
)
def test_a_fault_before_the_first_step_is_one_line_of_rank_0(recipe_file, override, message):
    (code, errors), other = ranks.run(command, 2, recipe_file, override)
    assert (code, errors.count("\n")) == (2, 1)
    assert message in errors
    assert other == (2, "")


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


def test_a_checkpoint_of_another_model_is_refused(recipe_file, recipe_values, tmp_path):
    ranks.run(command, 2, recipe_file, "--train.steps=2")
    path = Path(shutil.copytree(recipe_values["model"]["path"], tmp_path / "model"))
    stored = tmp_path / "run/recipe.toml"
    stored.write_text(stored.read_text().replace(recipe_values["model"]["path"], str(path)))
    raw = {**read_config(path).raw, "intermediate_size": 48}
    save_checkpoint(init_decoder(ModelConfig.from_dict(raw), seed=0), path, tokenizer_files_from=path)
    (code, errors), other = ranks.run(
        command, 2, recipe_file, f"--model.path={path}", "--run.accept_changes=true", "--resume"
    )
    assert (code, errors.count("\n")) == (2, 1)
    assert "step_2: broken checkpoint, or one of another model or recipe" in errors
    assert other == (2, "")


def data_missing_on_rank_1(*arguments: str) -> tuple[int, str]:
    original = train_module.load_problems

    def load(*options):
        if os.environ["RANK"] == "1":
            raise DataError("sums.jsonl: no such file or folder")
        return original(*options)

    train_module.load_problems = load
    return command(*arguments)


def test_a_fault_of_one_rank_is_told_with_its_name(recipe_file):
    first, second = ranks.run(data_missing_on_rank_1, 2, recipe_file, check=False)
    code, errors = second.result
    assert (first.exit_code, code) == (1, 2)
    assert "flashgrpo: rank 1 of 2 on " in errors
    assert "sums.jsonl: no such file or folder" in errors


def stuck(kind: str, recipe_file: str, *options: str) -> tuple[int, str]:
    """Rank 1 dies, stops or is slow in step 2, while rank 0 is in a collective or busy; or in its checkpoint."""
    is_other = os.environ["RANK"] == "1"
    ends = signal.SIGSTOP if "stopped" in kind else signal.SIGKILL

    class Stuck(Sampler):
        def rollout(self, step, position, clock):
            if step == 2 and "checkpoint" not in kind:
                if kind == ("slow" if is_other else "busy"):
                    time.sleep(60)
                elif is_other:
                    os.kill(os.getpid(), ends)
            return super().rollout(step, position, clock)

    def save(*arguments, **options):
        if is_other and "checkpoint" in kind:
            os.kill(os.getpid(), ends)
        return original(*arguments, **options)

    if kind == "slow":
        world._GRACE_S = 1.0  # nobody has died, and nobody is waited for
    original = run_folder.state_dict_saver.save
    run_folder.state_dict_saver.save = save
    train_module.Sampler = Stuck
    os.dup2(os.open(f"{recipe_file}.{os.environ['RANK']}", os.O_CREAT | os.O_WRONLY), 2)
    return command(recipe_file, *options)


@pytest.mark.parametrize("kind", ["collective", "busy", "in a checkpoint"])
def test_a_rank_that_dies_ends_the_others(recipe_file, kind):
    start = time.monotonic()
    first, second = ranks.run(stuck, 2, kind, recipe_file, check=False, timeout_s=50)
    assert time.monotonic() - start < 30
    assert (first.exit_code, second.exit_code) == (1, -signal.SIGKILL)
    assert "flashgrpo: rank 1 of 2 has died; continue with --resume" in Path(f"{recipe_file}.0").read_text()


def test_a_rank_that_is_stopped_is_named(recipe_file):
    started = ranks.start(stuck, 2, "stopped in a checkpoint", recipe_file, "--run.collective_timeout_s=2")
    started[0][0].join(40)
    first, _ = ranks.finish(started, timeout_s=0)
    assert first.exit_code == 1
    told = Path(f"{recipe_file}.0").read_text()
    assert "flashgrpo: rank 1 of 2 has given no sign of life for 4 s, as if stopped; continue with --resume" in told


@pytest.mark.parametrize("shard_ranks", [0, 2])
def test_a_rank_that_is_waited_for_too_long_ends_the_run(recipe_file, shard_ranks):
    """Also where only those wait that hold a copy of the weights together."""
    options = recipe_file, "--run.collective_timeout_s=2", f"--train.shard_ranks={shard_ranks}"
    first, *_ = ranks.run(stuck, 4, "slow", *options, check=False, timeout_s=50)
    code, errors = first.result
    assert code == 1
    assert "flashgrpo: a rank let the others wait for longer than run.collective_timeout_s = 2; raise it" in errors


def test_a_rank_that_never_starts_is_not_waited_for_without_end():
    """It has failed after a restart: its name is on the roster of before, but will not confirm one."""
    store: Any = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    store.set("member 1", "of before")
    with pytest.raises(dist.DistStoreError, match="not all of the 2 ranks have started"):
        _own_store(store, 0, 2, limit_s=0.2)


def interrupted(recipe_file: str) -> tuple[int, str, int]:
    """Ctrl-C reaches rank 1 alone."""

    class Interrupted(Trainer):
        def run_step(self, step, bar):
            if step == 3 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGINT)
            return super().run_step(step, bar)

    train_module.Trainer = Interrupted
    return command(recipe_file, "--train.steps=1000")


def test_ctrl_c_on_one_rank_stops_all_at_the_same_step(recipe_file, tmp_path):
    (code, errors), (other, _) = ranks.run(interrupted, 2, recipe_file)
    assert (code, other) == (130, 130)
    assert "stopped after step 2; continue with --resume (SIGINT on rank 1)" in errors
    newest = newest_checkpoint(tmp_path / "run")
    assert newest is not None
    assert newest.name == "step_2"


def slow_to_end(recipe_file: str) -> tuple[int, str]:
    """Rank 0 has something to end beside it, such as servers, that takes its time."""

    class SlowToEnd(Trainer):
        def run_step(self, step, bar):
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().run_step(step, bar)

        def open_learner(self, total_steps):
            super().open_learner(total_steps)
            if os.environ["RANK"] == "0":
                self.ends.callback(time.sleep, 2)

    world._GRACE_S = 0.2
    train_module.Trainer = SlowToEnd
    return command(recipe_file, "--train.steps=1000")


def test_ranks_wait_for_what_one_of_them_ends(recipe_file):
    """Else those that are gone would be taken for dead, and the last one's exit code would be 1."""
    (code, _), (other, _) = ranks.run(slow_to_end, 2, recipe_file)
    assert (code, other) == (143, 143)


DRIVER = """
import os, signal, sys
from flashgrpo.grpo import cli
from flashgrpo.grpo import train

class Dying(train.Trainer):
    def run_step(self, step, bar):
        if step == 3 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run_step(step, bar)

train.Trainer = Dying
cli.end_process_after(lambda: cli.main(["train", *sys.argv[1:]]))
"""


def torchrun(custom_rewards: Path, *arguments: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(custom_rewards), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *arguments],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_torchrun_restarts_a_run_from_its_checkpoint(recipe_file, custom_rewards, tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER)
    process = torchrun(custom_rewards, "--max-restarts", "1", str(tmp_path / "driver.py"), recipe_file, "--resume")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "Signal 9 (SIGKILL)" in errors or "exitcode: -9" in errors
    assert [row["step"] for row in read_rows(tmp_path / "run/metrics.jsonl")] == [1, 2, 3, 4]
    assert (tmp_path / "run/model/model.safetensors").exists()


def test_torchrun_hands_ctrl_c_to_all_ranks(recipe_file, custom_rewards, tmp_path):
    process = torchrun(custom_rewards, "-m", "flashgrpo.grpo.cli", "train", recipe_file, "--train.steps=100000")
    deadline = time.monotonic() + 60
    while len(read_rows(tmp_path / "run/metrics.jsonl")) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "continue with --resume" in errors
    newest = newest_checkpoint(tmp_path / "run")
    assert newest is not None
    state = json.loads((newest / "state.json").read_text())
    assert state["step"] == read_rows(tmp_path / "run/metrics.jsonl")[-1]["step"] >= 3


STUBS = {  # Slurm on one node
    "scontrol": "echo 127.0.0.1",
    "srun": 'exec "$@"',
}


def test_the_slurm_script_trains(recipe_file, custom_rewards, tmp_path):
    for name, line in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / ".venv").symlink_to(Path(sys.executable).parent.parent)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {
        "MASTER_PORT": port,
        "SLURM_JOB_NODELIST": "node",
        "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_JOB_ID": "7",
    }
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = os.environ | job | {"PYTHONPATH": str(custom_rewards), "OMP_NUM_THREADS": "1", "PATH": path}
    script = Path(__file__).parents[3] / "recipes/slurm.sh"
    run = subprocess.run(
        ["bash", str(script), recipe_file, "--train.shard_ranks=1"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert [row["step"] for row in read_rows(tmp_path / "run/metrics.jsonl")] == [1, 2, 3, 4]
