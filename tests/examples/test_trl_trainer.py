"""TRL's trainer with our loss, in TRL's own environment, which `make test` makes."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRL_PYTHON = ROOT / ".venv-trl/bin/python"


@pytest.mark.skipif(not (ROOT / ".venv-trl/peft").exists(), reason="TRL has no environment: make .venv-trl/peft")
def test_loss_gradients_and_runs_are_those_of_trl(tmp_path):
    paths = ":".join(str(ROOT / path) for path in (".types", "examples", ".venv-trl/peft"))
    program = [TRL_PYTHON, "-P", ROOT / "tests/examples/trl_grid.py", tmp_path]
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["grid"]) >= 25
    bounds = {name: (2e-6, 1e-6) for name in found["grid"]}
    bounds["autocast"] = (2e-3, 2e-2)  # TRL's head is in bf16 then
    for name, (loss, gradients) in found["grid"].items():
        assert loss <= bounds[name][0], name
        assert gradients <= bounds[name][1], name
    for movement, log in found["runs"].values():
        assert movement <= 1e-5
        assert log <= 1e-4
    assert "loss_type='vespo'" in found["refused"]["vespo"]
    assert "entropy bonus" in found["refused"]["entropy bonus"]
