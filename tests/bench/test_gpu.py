"""One command for a bare machine with a GPU: no part takes the others along."""

import os
import subprocess
import sys
import time

from flashgrpo.bench.gpu import PARTS, main, run_parts


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_part_that_fails_or_hangs_is_told_and_the_next_one_runs(tmp_path, capsys):
    child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).wait()"
    parts = {
        "broken": (python("raise SystemExit('out of memory')"), 30),
        "hangs": (python(f"print('begun', flush=True)\n{child}"), 2),
        "fine": (python("print('all is well')"), 30),
    }
    start = time.monotonic()
    outcomes = run_parts(parts, tmp_path, os.environ)
    assert time.monotonic() - start < 30
    assert [outcome for outcome, _ in outcomes.values()] == [
        "failed: exit code 1",
        "ended at its limit of 2 s",
        "passed",
    ]
    assert outcomes["hangs"][1] >= 2
    printed = capsys.readouterr().out
    for text in ("out of memory", "begun", "all is well"):
        assert text in printed
    assert (tmp_path / "gpu_hangs.log").read_text() == "begun\n"


def test_a_bare_machine_is_enough():
    """What the kernels' and the step's benchmarks import, directly or not."""
    missing = "pydantic", "tomli_w", "datasets", "lingua", "math_verify", "reasoning_gym", "tensorboard", "vllm"
    code = f"import sys; sys.modules |= dict.fromkeys({missing})\nimport flashgrpo.bench.gpu, flashgrpo.bench.kernels"
    ended = subprocess.run(python(f"{code}, flashgrpo.bench.step"), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_all_parts_fit_nine_minutes():
    assert sum(limit for _, limit in PARTS.values()) <= 9 * 60


def test_without_a_gpu_it_says_what_runs_on_a_cpu(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main([]) == 2
    assert "flashgrpo bench kernels" in capsys.readouterr().err
