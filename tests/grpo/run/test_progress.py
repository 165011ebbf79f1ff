"""What a person sees of a run: on a narrow terminal, on one that lacks a sample's letters, and without any."""

import io
import json
import re
import sys

import pytest
from rich.console import Console

from flashgrpo.grpo.cli import main
from flashgrpo.grpo.run import progress
from flashgrpo.grpo.run.progress import say, step_bar

VALUES = "reward 0.125, accuracy 0.250, held-out 0.300, length 24, 976 tokens/s"


def test_a_run_without_a_terminal_has_a_line_a_step(capsys):
    with step_bar("sft", 3, 7) as bar:
        for step in range(4, 8):
            bar.advance(step, VALUES)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["sft 4/7", "sft 5/7", "sft 6/7", "sft 7/7"]
    assert all(VALUES in line and line.endswith("0:00:00 elapsed, 0:00:00 left") for line in lines)


def test_what_is_said_is_one_line_of_a_log(capsys):
    """Or nobody finds there what the page of troubleshooting quotes."""
    text = "step 1: [/data] :smile: " + 30 * "is long "
    say(text, "yellow")
    assert capsys.readouterr().err == f"{text}\n"


@pytest.mark.parametrize("width", [60, 80, 110])
def test_step_and_times_are_there_on_a_narrow_terminal(width, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=out, force_terminal=True, width=width, color_system=None))
    with step_bar("reward model", 0, 1000) as bar:
        bar.phase("evaluate")
        for step in (1, 2):
            bar.advance(step, VALUES)
            bar.progress.refresh()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).replace("\r", "\n").splitlines()
    assert all(len(line) <= width for line in shown)
    bars = [line for line in shown if line.startswith("reward model")]
    assert re.fullmatch(r"reward model · evaluate .* +2/1000 0:00:0\d \d:\d\d:\d\d *", bars[-1])
    *_, values = "\n".join(shown).rpartition("reward 0.125")
    assert " ".join((f"reward 0.125{values}").split()) == VALUES


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_sample_that_a_terminal_cannot_show_ends_nothing(encoding, tmp_path, monkeypatch):
    sample = {"step": 1, "prompt": "計算 \ud800", "completion": "答え 😀", "reward": 1.0, "rewards": {}}
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.1}\n')
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["report", str(tmp_path)]) == 0
    out.seek(0)
    text = out.read()
    assert "reward 1" in text
    assert ("答え" in text) == (encoding == "utf-8")
