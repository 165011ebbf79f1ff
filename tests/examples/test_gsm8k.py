"""examples/gsm8k as its pages say: one command in a copy of the folder, from raw files to scores."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from flashgrpo.grpo.cli import main
from flashgrpo.grpo.run.folder import read_rows

EXAMPLE = Path(__file__).parents[2] / "examples/gsm8k"
SMALL = {
    "stand_in": {"options.problems": 150, "options.tests": 8},
    "cold_start": {"train.epochs": 1},
    "grpo": {
        "train.steps": 1,
        "rollout.prompts_per_step": 4,
        "rollout.group_size": 4,
        "rewards.workers": 1,
        "data.held_out": 8,
        "eval.every": 0,
    },
    "scores": {"eval.samples": 1},
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A copy of the example, whose modules are found as they are by who works in it."""
    copy = shutil.copytree(EXAMPLE, tmp_path / "gsm8k")
    monkeypatch.chdir(copy)
    monkeypatch.syspath_prepend(str(copy))
    for module in ("stand_in", "source", "my_rewards"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return copy


def test_one_command_leads_from_raw_files_to_scores(folder):
    overrides = [f"--stages.{name}.{key}={value}" for name, keys in SMALL.items() for key, value in keys.items()]
    assert main(["pipeline", "pipeline.toml", "--run.device=cpu", *overrides]) == 0
    scores = json.loads((folder / "runs/gsm8k/scores/scores.json").read_text())
    assert [row["model"] for row in scores] == ["cold start", "GRPO"]
    assert all(row["num_problems"] == 8 and 0 <= row["pass@1"] <= 1 for row in scores)
    rows = read_rows(folder / "runs/gsm8k/grpo/metrics.jsonl")
    assert 0 <= rows[-1]["reward/my_rewards:shows_work"] <= 1
    assert (folder / "runs/gsm8k/report.png").exists()


def test_a_row_of_gsm8k_is_read(folder):
    import source
    from my_rewards import shows_work

    row = {"question": "How many?", "answer": "In May <<48/2=24>>24.\nBoth <<48+24=72>>72.\n#### 72"}
    (folder / "raw.jsonl").write_text(json.dumps(row) + "\n")
    source.read(folder, 0, "raw.jsonl")
    problem, worked = (json.loads((folder / f"{name}.jsonl").read_text()) for name in ("problems", "worked"))
    assert problem == {"prompt": "How many?", "answer": "72", "calculations": ["48/2=24", "48+24=72"]}
    assert worked["completion"] == "<think>In May 24.\nBoth 72.</think><answer>72</answer>"
    texts = ["48 / 2 = 24, so 72", "48/2=24 and 48+24=72", ""]
    assert shows_work([], texts, [problem["calculations"]] * 3) == [0.5, 1.0, 0.0]
    assert shows_work([], [""], [[]]) == [None]
