"""Ctrl-C and the signals of schedulers, containers and closed terminals: a checkpoint, and 128 + n as exit code."""

import contextlib
import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import tomli_w

from flashgrpo.grpo.cli import main
from flashgrpo.grpo.rollout.native import NativeGenerator
from flashgrpo.grpo.run.folder import newest_checkpoint, read_rows
from flashgrpo.grpo.run.interrupts import SIGNALS, Interrupts, Stopped
from flashgrpo.grpo.stages.collect import _Parts
from flashgrpo.grpo.stages.sft import SftTrainer
from flashgrpo.grpo.train import Trainer


@pytest.fixture(autouse=True)
def not_ignored():
    """Whatever the suite was started by, as nohup or a shell's background job."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_interrupts_wait_for_a_block_that_allows_them(number):
    before, order = signal.getsignal(number), []
    with Interrupts() as interrupts:
        os.kill(os.getpid(), number)
        order.append("update finished")
        with pytest.raises(Stopped) as stop, interrupts.allowed():
            order.append("the next rollout began")
    assert order == ["update finished"]
    assert stop.value.signum == number
    assert signal.getsignal(number) == before


def test_a_signal_that_comes_twice_does_not_cost_the_checkpoint():
    """From a scheduler, which sends it to every process, and from torchrun. The first one ends what is allowed to."""
    with Interrupts() as interrupts:
        with pytest.raises(Stopped), interrupts.allowed():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)


def test_a_run_under_nohup_goes_on_without_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts, interrupts.allowed():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_interrupt_ends_the_process_with_nothing_saved():
    code = (
        "import os, signal\n"
        "from flashgrpo.grpo.run.interrupts import Interrupts\n"
        "try:\n"
        "    with Interrupts():\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "finally:\n"
        "    print('saved what was half updated')\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGINT
    assert ended.stdout == ""


CLOSED = """
import sys, time
from flashgrpo.grpo.run.interrupts import Interrupts, Stopped
with Interrupts() as interrupts:
    print("ready", flush=True)
    try:
        with interrupts.allowed():
            for _ in range(600):  # one that comes just before a sleep begins is heard after it
                time.sleep(0.1)
    except Stopped as stop:
        print("stopped", flush=True)
        print("stopped", file=sys.stderr, flush=True)
        with open(sys.argv[1], "w") as file:
            file.write(str(stop.signum))
"""


def test_a_closed_terminal_leaves_the_time_for_a_checkpoint(tmp_path):
    """What is printed after it has gone must not raise."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", CLOSED, str(tmp_path / "saved")],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    assert os.read(ours, 5) == b"ready"
    os.close(ours)
    assert process.wait(60) == 0
    assert (tmp_path / "saved").read_text() == str(signal.SIGHUP.value)


NOBODY_READS = """
import os, sys
os.read(0, 1)  # until the pipe's other end is closed
{begin}
for stream in sys.stdout, sys.stderr:
    print("step 1 of 2", file=stream, flush=True)
os.write(2, b"what is started now has somewhere to write")
open(sys.argv[1], "w").close()
"""
HELD = "from flashgrpo.grpo.run.interrupts import Interrupts; Interrupts().__enter__()"
BEGINNINGS = {  # how a process of a run's begins, and what comes to it
    "SIGTERM": f"{HELD}; os.kill(os.getpid(), 15)",
    "nothing": HELD,
    "nothing, beside the trainer": "from flashgrpo.grpo.run.child import ignore_signals; ignore_signals()",
}


@pytest.mark.parametrize("begin", BEGINNINGS.values(), ids=BEGINNINGS)
def test_a_pipe_that_nobody_reads_any_more_costs_nothing(tmp_path, begin):
    """As `| tee log` leaves it at Ctrl-C, and `| head` without a signal."""
    command = [sys.executable, "-c", NOBODY_READS.format(begin=begin), str(tmp_path / "saved")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout
        assert process.stdin
        process.stdout.close()
        process.stdin.close()
        assert process.wait(60) == 0
    assert (tmp_path / "saved").exists()


def test_what_a_child_starts_can_be_ended():
    """A process beside the trainer outlives SIGTERM, but a program or a fork of a reward function's does not."""
    code = (
        "import os, signal, subprocess, time\n"
        "from flashgrpo.grpo.run.child import ignore_signals\n"
        "ignore_signals()\n"
        "for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1:\n"
        "    os.kill(os.getpid(), number)\n"
        "program = subprocess.Popen(['sleep', '60'])\n"
        "program.terminate()\n"
        "ours, theirs = os.pipe()\n"
        "fork = os.fork()\n"
        "if fork == 0:\n"
        "    os.write(theirs, b'.')\n"
        "    time.sleep(60)\n"
        "os.read(ours, 1)\n"
        "os.kill(fork, signal.SIGTERM)\n"
        "print(program.wait(), os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=50)
    assert (ended.stdout, ended.returncode) == ("-15 -15\n", 0), ended.stderr


@pytest.fixture
def recipe_file(recipe_values, custom_rewards, tmp_path) -> str:
    recipe_values["train"] |= {"steps": 100, "checkpoint_every": 0}
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(recipe_values))
    return str(tmp_path / "recipe.toml")


def send(monkeypatch, owner: type, name: str, number: int, call: int) -> None:
    """The signal comes as `owner.name` is called for the `call`th time."""
    original, calls = getattr(owner, name), []

    def method(self, *arguments, **options):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(self, *arguments, **options)

    monkeypatch.setattr(owner, name, method)


def test_a_signal_leaves_a_checkpoint_of_the_last_whole_step(recipe_file, tmp_path, monkeypatch, capfd):
    send(monkeypatch, Trainer, "_update", signal.SIGUSR1, call=3)
    assert main(["train", recipe_file]) == 128 + signal.SIGUSR1
    newest = newest_checkpoint(tmp_path / "run")
    assert newest is not None
    assert newest.name == "step_3"
    assert "SIGUSR1: finishing this update, then a checkpoint" in capfd.readouterr().err


def test_a_signal_stops_sft(recipe_values, data_path, tmp_path, monkeypatch):
    data = {"path": str(data_path), "completion_column": "answer", "template": "none"}
    train = {"batch_size": 4, "epochs": 1, "token_budget": 256}
    recipe = {"model": recipe_values["model"], "run": recipe_values["run"], "data": data, "train": train}
    (tmp_path / "sft.toml").write_text(tomli_w.dumps(recipe))
    send(monkeypatch, SftTrainer, "_loss", signal.SIGTERM, call=2)
    assert main(["sft", str(tmp_path / "sft.toml")]) == 143
    newest = newest_checkpoint(tmp_path / "run")
    assert newest is not None
    assert newest.name == f"step_{read_rows(tmp_path / 'run/metrics.jsonl')[-1]['step']}"


def test_a_signal_keeps_what_was_collected(recipe_values, custom_rewards, tmp_path, monkeypatch):
    del recipe_values["train"], recipe_values["loss"]
    recipe_values["rollout"] = {"group_size": 2, "max_new_tokens": 4, "prompts_per_part": 8}
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(recipe_values))
    send(monkeypatch, _Parts, "_share", signal.SIGTERM, call=3)
    assert main(["collect", str(tmp_path / "recipe.toml")]) == 143
    assert len([*(tmp_path / "run/parts").iterdir()]) == 2


def test_a_signal_stops_an_evaluation(recipe_file, model_path, tmp_path, monkeypatch):
    send(monkeypatch, NativeGenerator, "generate", signal.SIGTERM, call=2)
    models, output = [f"{label}={model_path}" for label in "ab"], tmp_path / "scores.json"
    assert main(["eval", recipe_file, "--model", *models, "--output", str(output), "--eval.samples=1"]) == 143
    assert '"model": "a"' in output.read_text()


SLURM = {  # on one node; a step that saves when it is told to; SIGTERM for the script, too, as before a preemption
    "scontrol": 'echo 127.0.0.1; echo "scontrol $@" >> log',
    "srun": "trap 'echo saved >> log; exit $CODE' TERM; echo $$ > own; mv own step; while :; do sleep 0.05; done",
    "scancel": '[ "$*" = "--signal=TERM 12" ]; kill -TERM $(cat step) $PPID',
}


@pytest.mark.parametrize("code", [7, 0])
def test_the_slurm_script_saves_before_its_time_is_over_and_goes_back_to_the_queue(code, tmp_path):
    """Unless the run was finished in that time."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    for name, lines in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\nset -e\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node", "SLURM_NNODES": "1", "SLURM_JOB_ID": "12", "CODE": str(code)}
    environment = os.environ | job | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = Path(__file__).parents[3] / "recipes/slurm.sh"
    process = subprocess.Popen(["bash", str(script), "recipe.toml"], cwd=tmp_path, env=environment, process_group=0)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "step").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(60) == code
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert (tmp_path / "log").read_text().splitlines()[1:] == ["saved", *["scontrol requeue 12"] * bool(code)]
    assert "#SBATCH --signal=B:USR1@900" in script.read_text()
