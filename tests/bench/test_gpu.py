"""`make gpu`, for a bare machine with a GPU: no part takes the others along."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = """#!/bin/sh
case "$*" in
    *is_available*) exit "$NO_GPU";;
    *get_device_capability*) exit "$NO_HOPPER";;
    *pytest*) echo out of memory; exit 1;;
    *kernels*) echo begun; sleep 60;;
    *step*) echo all is well;;
    *attention*) echo qualified;;
esac
"""  # stands in for python3, and for all that it runs


@pytest.fixture
def make_gpu(tmp_path):
    (tmp_path / "python3").write_text(PYTHON)
    (tmp_path / "python3").chmod(0o755)

    def run(no_gpu: int, no_hopper: int = 0) -> subprocess.CompletedProcess:
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        environment |= {"NO_GPU": str(no_gpu), "NO_HOPPER": str(no_hopper)}
        command = ["make", "gpu", f"OUT={tmp_path / 'out'}", "KERNELS_S=1"]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    return run


def test_a_part_that_fails_or_hangs_is_told_and_the_next_one_runs(make_gpu, tmp_path):
    start = time.monotonic()
    ended = make_gpu(no_gpu=0)
    assert time.monotonic() - start < 30
    assert ended.returncode != 0
    outcomes = dict(re.findall(r"^--- (\w+): (.*), \d+ s$", ended.stdout, re.M))
    assert outcomes["tests"].startswith("failed: exit code ")
    assert outcomes["kernels"] == "ended at its limit of 1 s"
    assert outcomes["step"] == outcomes["attention"] == "passed"
    for text in ("out of memory", "begun", "all is well", "qualified"):
        assert text in ended.stdout
    assert (tmp_path / "out" / "gpu_kernels.log").read_text() == "begun\n"


def test_on_another_chip_than_hopper_there_is_nothing_to_qualify(make_gpu):
    assert re.findall(r"^--- (\w+):", make_gpu(no_gpu=0, no_hopper=1).stdout, re.M) == ["tests", "kernels", "step"]


def test_without_a_gpu_nothing_is_run(make_gpu, tmp_path):
    assert make_gpu(no_gpu=1).returncode != 0
    assert not (tmp_path / "out").exists()


def test_a_bare_machine_is_enough():
    """What the benchmarks of kernels, attention and step import, directly or not."""
    missing = "pydantic", "tomli_w", "datasets", "lingua", "math_verify", "reasoning_gym", "tensorboard", "vllm"
    code = f"import sys; sys.modules |= dict.fromkeys({missing})\nimport flashgrpo.grpo.cli, flashgrpo.bench.kernels"
    code += ", flashgrpo.bench.step, flashgrpo.bench.attention"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_all_parts_fit_nine_minutes():
    """With the seconds that each has to end in."""
    limits = re.findall(r"^\w+_S := (\d+)$", (ROOT / "Makefile").read_text(), re.M)
    assert len(limits) == 5
    assert sum(map(int, limits)) + 3 * len(limits) <= 9 * 60
