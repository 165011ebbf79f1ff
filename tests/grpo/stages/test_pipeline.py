"""Pipelines: what a file says, what is run again and what is not, and that kills at any moment change nothing."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks

from flashgrpo.grpo.cli import main
from flashgrpo.grpo.errors import DataError, RecipeError, RunInputError
from flashgrpo.grpo.run.folder import read_rows
from flashgrpo.grpo.stages.pipeline import _check_given, load_pipeline, run_pipeline

ROOT = Path(__file__).resolve().parents[3]
IS_SOAK = "KILLS" in os.environ
MINIATURE = {  # of recipes/r1_tiny.toml: every stage, with next to nothing in it
    "toy.options.sums": 300,
    "toy.options.data.size": 1000,
    **{f"{name}.data.size": 1000 for name in ("r1_zero", "reasoning_rl", "final_rl", "student_rl", "scores")},
    **{f"{name}.data.size": 1000 for name in ("cold_start_data", "examples")},
    "toy.options.requests": 40,
    "base.train.epochs": 1,
    "student_base.train.epochs": 1,
    **{f"{name}.train.steps": 2 for name in ("r1_zero", "reasoning_rl", "final_rl", "student_rl")},
    **{f"{name}.train.checkpoint_every": 1 for name in ("r1_zero", "reasoning_rl", "final_rl", "student_rl")},
    **{f"{name}.rollout.prompts_per_step": 8 for name in ("r1_zero", "reasoning_rl", "final_rl", "student_rl")},
    **{f"{name}.rollout.group_size": 4 for name in ("r1_zero", "reasoning_rl", "final_rl", "student_rl")},
    **{f"{name}.rewards.workers": 1 for name in ("r1_zero", "reasoning_rl", "final_rl", "student_rl", "scores")},
    **{f"{name}.rewards.workers": 1 for name in ("cold_start_data", "examples")},
    **{f"{name}.eval.samples": 1 for name in ("r1_zero", "reasoning_rl", "final_rl", "student_rl")},
    **{f"{name}.eval.problems": 8 for name in ("r1_zero", "reasoning_rl", "final_rl", "student_rl", "scores")},
    **{f"{name}.rollout.prompts": 16 for name in ("cold_start_data", "examples")},
    **{f"{name}.rollout.prompts_per_part": 8 for name in ("cold_start_data", "examples")},
    **{f"{name}.filters.correct": "false" for name in ("cold_start_data", "examples")},
    **{f"{name}.filters.format": "false" for name in ("cold_start_data", "examples")},
    **{f"{name}.filters.min_language": 0 for name in ("cold_start_data", "examples")},
    "scores.eval.samples": 2,
}


@pytest.fixture
def pipeline(recipe_values, custom_rewards, tmp_path) -> Path:
    """Two runs, the second from the model of the first, on data that a function writes."""
    (custom_rewards / "custom_stages.py").write_text(
        "def sums(folder, seed, last):\n"
        '    rows = [f\'{{"prompt": "{a}+{b}=", "answer": "{a + b}"}}\' for a in range(last) for b in range(8)]\n'
        "    (folder / 'sums.jsonl').write_text('\\n'.join(rows))\n"
    )
    reward = recipe_values["rewards"]["functions"][0]
    path = tmp_path / "pipeline.toml"
    path.write_text(
        f"""
        [run]
        output = "{tmp_path / "whole"}"
        seed = 3
        device = "cpu"
        [stages.data]
        kind = "function"
        function = "custom_stages:sums"
        options.last = 8
        [stages.first]
        kind = "train"
        model.path = "{recipe_values["model"]["path"]}"
        data = {{ path = "stage:data/sums.jsonl", template = "none", held_out = 8 }}
        rewards = {{ functions = ["{reward}"], workers = 1 }}
        rollout = {{ prompts_per_step = 4, group_size = 4, max_new_tokens = 8 }}
        loss.preset = "dapo"
        train = {{ steps = 2, lr = 1e-3, token_budget = 256 }}
        [stages.second]
        kind = "train"
        like = "first"
        model.path = "stage:first"
        train.steps = 1
        """
    )
    return path


def entries(output: Path) -> dict:
    return json.loads((output / "stages.json").read_text())


def test_a_stage_is_what_its_likeness_and_its_own_values_make_it(pipeline, tmp_path):
    _, (data, first, second) = load_pipeline(pipeline, ["--stages.second.train.lr=1e-2"])
    assert second.recipe.model.path == str(tmp_path / "whole/first/model")
    assert (second.recipe.train.steps, second.recipe.train.token_budget, second.recipe.train.lr) == (1, 256, 1e-2)
    assert second.recipe.rollout == first.recipe.rollout
    assert {stage.recipe.run.seed for stage in (first, second)} == {3}
    assert second.recipe.run.output == str(tmp_path / "whole/second")
    assert second.inputs[str(tmp_path / "whole/data/sums.jsonl")] == data


def test_a_likeness_of_another_kind_has_the_keys_that_both_have(pipeline):
    pipeline.write_text(pipeline.read_text() + "\n[stages.samples]\nkind = 'collect'\nlike = 'first'\n")
    samples = load_pipeline(pipeline)[1][-1]
    assert (samples.recipe.rollout.group_size, samples.recipe.data.held_out) == (4, 8)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('kind = "function"', 'kind = "funktion"', r"stages.data: kind = 'funktion'; did you mean function\?"),
        ('like = "first"', 'like = "third"', r"stages.second: like = 'third', wanted an earlier stage"),
        ("stage:first", "stage:second", r"stages.second: 'stage:second': wanted an earlier stage"),
        (
            "train.steps = 1",
            "train.stepps = 1",
            r"stages.second: train.stepps: unknown key; did you mean train.steps\?",
        ),
        ("train.steps = 1", "train.steps = 0", r"stages.second: train.steps: .* greater than or equal to 1"),
        ("train.steps = 1", "data = 3", r"stages.second: data: found 3, wanted a section"),
        (
            "train.steps = 1",
            "run.output = 'x'",
            r"stages.second: run.output = x, wanted .*whole/second",
        ),
        ("[stages.second]", '[stages."../x"]', r"stages.../x: wanted a folder's name of letters, digits"),
        (
            "options.last = 8",
            "options.lst = 8",
            r"stages.data: custom_stages:sums: missing .* argument: 'last'",
        ),
        ("custom_stages:sums", "custom_stages:sum", r"stages.data: .*has no function 'sum'; did you mean sums\?"),
        ("[stages.", "[stadges.", r"no \[stages.NAME\]"),
    ],
)
def test_a_fault_in_any_stage_is_found_before_the_first_one_runs(pipeline, tmp_path, old, new, message):
    pipeline.write_text(pipeline.read_text().replace(old, new))
    with pytest.raises(RecipeError, match=message):
        run_pipeline(pipeline)
    assert not (tmp_path / "whole").exists()


def test_an_override_of_no_stage_is_refused(pipeline):
    with pytest.raises(RecipeError, match=r"--stages.secnd.train.steps=3: no such stage; did you mean second\?"):
        load_pipeline(pipeline, ["--stages.secnd.train.steps=3"])
    with pytest.raises(RecipeError, match="an override cannot name a stage; give the path of what it makes"):
        load_pipeline(pipeline, ["--stages.second.model.path=stage:first"])
    with pytest.raises(RecipeError, match=r"no stage 'thrid'; known: data, first, second"):
        run_pipeline(pipeline, until="thrid")


def test_an_input_that_is_missing_is_found_before_the_first_stage_runs(pipeline, tmp_path):
    with pytest.raises(RunInputError, match="stage second wants elsewhere/model: no such file or folder"):
        run_pipeline(pipeline, ["--stages.second.model.path=elsewhere/model"])
    assert not (tmp_path / "whole").exists()


@pytest.mark.parametrize(
    ("kind", "columns", "message"),
    [
        ("train", ["question", "answer"], "no column 'prompt'"),
        ("sft", ["prompt", "answer"], "no column 'completion'"),
        ("reward-model", ["prompt", "chosen"], "no column 'rejected'; known: prompt, chosen"),
        ("reward-model", ["prompt", "chosen", "rejected"], None),
    ],
)
def test_a_column_that_a_late_stage_misses_is_found_before_the_first_stage_runs(
    pipeline, tmp_path, kind, columns, message
):
    (tmp_path / "late.jsonl").write_text(json.dumps(dict.fromkeys(columns, "text")))
    late = f"\n[stages.late]\nkind = '{kind}'\nmodel.path = 'stage:first'\ndata.path = '{tmp_path / 'late.jsonl'}'\n"
    pipeline.write_text(pipeline.read_text() + late)
    if message is None:
        run_pipeline(pipeline, until="data")
        for stage in load_pipeline(pipeline)[1]:
            _check_given(stage)
    else:
        with pytest.raises(DataError, match=message):
            run_pipeline(pipeline)
        assert not (tmp_path / "whole").exists()


def test_finished_stages_stay_and_changed_ones_are_refused(pipeline, tmp_path, capsys):
    """The whole life of a pipeline: up to a stage, on, once more, other values, another input, a stage made anew."""
    output = tmp_path / "whole"
    run_pipeline(pipeline, until="first")
    assert [*entries(output)] == ["data", "first"]
    written = (output / "first/model/model.safetensors").stat().st_mtime_ns
    run_pipeline(pipeline)
    assert (output / "first/model/model.safetensors").stat().st_mtime_ns == written
    assert [row["step"] for row in read_rows(output / "second/metrics.jsonl")] == [1]
    assert (output / "report.png").exists()
    assert (output / "second/report.png").exists()
    assert "data" in capsys.readouterr().out
    with pytest.raises(
        RunInputError, match=r"stage first .* was made from another recipe: train.lr; restore it, remove"
    ):
        run_pipeline(pipeline, ["--stages.first.train.lr=1e-4"])
    with (output / "data/sums.jsonl").open("a") as file:
        file.write('\n{"prompt": "1+1=", "answer": "2"}')
    with pytest.raises(RunInputError, match=r"stage first .* another inputs: .*whole/data/sums.jsonl"):
        run_pipeline(pipeline)
    for name in ("first", "second"):
        (output / name).rename(tmp_path / name)
    run_pipeline(pipeline)
    assert [row["step"] for row in read_rows(output / "second/metrics.jsonl")] == [1]
    weights = (output / "first/model/model.safetensors").read_bytes()
    (output / "first/model").rename(tmp_path / "gone")
    run_pipeline(pipeline)  # what was finished and is gone is made again, and is the same
    assert (output / "first/model/model.safetensors").read_bytes() == weights


def test_a_folder_of_something_else_is_not_touched(pipeline, tmp_path):
    (tmp_path / "whole/data").mkdir(parents=True)
    (tmp_path / "whole/data/mine").touch()
    with pytest.raises(RunInputError, match=r"was not made by this pipeline; choose another run\.output"):
        run_pipeline(pipeline)
    assert (tmp_path / "whole/data/mine").exists()


def test_from_the_command_line(pipeline, tmp_path, capsys):
    assert main(["pipeline", str(pipeline), "--until", "first"]) == 0
    assert "first" in capsys.readouterr().out
    assert main(["pipeline", str(pipeline), "--until", "fist"]) == 2
    assert "did you mean first?" in capsys.readouterr().err


@pytest.mark.xdist_group("ranks")
def test_two_ranks_run_it_together(pipeline, tmp_path):
    """Each stage on both, the same state seen by both; then alone, where all is finished."""
    outputs = ranks.run(run_pipeline, 2, pipeline)
    assert outputs == [tmp_path / "whole"] * 2
    written = (tmp_path / "whole/second/model/model.safetensors").stat().st_mtime_ns
    run_pipeline(pipeline)
    assert (tmp_path / "whole/second/model/model.safetensors").stat().st_mtime_ns == written


def command(output: Path) -> list[str]:
    changes = {} if IS_SOAK else MINIATURE
    overrides = [f"--stages.{key}={value}" for key, value in changes.items()]
    recipe = str(ROOT / "recipes/r1_tiny.toml")
    return [sys.executable, "-m", "flashgrpo.grpo.cli", "pipeline", recipe, f"--run.output={output}", *overrides]


@pytest.mark.timeout(0 if IS_SOAK else 300)
@pytest.mark.xdist_group("pipeline")
def test_all_of_r1_killed_at_any_moment_gives_the_same_table(tmp_path):
    """In CI next to nothing of every stage, and a kill; in `make soak` the toy itself, and five."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start = time.monotonic()
    ended = subprocess.run(command(whole), cwd=tmp_path, capture_output=True, text=True)
    seconds = time.monotonic() - start
    assert ended.returncode == 0, ended.stderr[-3000:]
    rng, kills = random.Random(time.time_ns()), int(os.environ.get("KILLS", "1"))
    for _ in range(kills):
        process = subprocess.Popen(
            command(killed), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(rng.uniform(0, 2 / (kills + 1)) * seconds)  # together, on average, less than a whole run
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    ended = subprocess.run(command(killed), cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    tables = [(output / "scores.md").read_text() for output in (whole, killed)]
    assert tables[0] == tables[1]
    for label in ("base", "R1-Zero", "cold start", "stage-2 RL", "final RL", "distilled student"):
        assert label in tables[0]
