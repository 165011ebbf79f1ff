"""Pipelines: what a file says, what is run again and what is not, and that kills at any moment change nothing."""

import json
import os
import random
import signal
import time
from itertools import product
from pathlib import Path

import pytest

import ranks
from flashgrpo.grpo.cli import main
from flashgrpo.grpo.errors import DataError, RecipeError, RunInputError
from flashgrpo.grpo.run.folder import read_rows
from flashgrpo.grpo.stages.pipeline import load_pipeline, run_pipeline

ROOT = Path(__file__).resolve().parents[3]
IS_SOAK = "KILLS" in os.environ
RL = ("r1_zero", "reasoning_rl", "final_rl", "student_rl", "student_on_policy")
COLLECT = ("cold_start_data", "examples")
SMALL = {  # next to nothing of every stage of recipes/r1_tiny.toml
    ("toy",): {"options.sums": 200, "options.data.size": 500, "options.requests": 20},
    ("base", "student_base"): {"train.epochs": 1},
    ("cold_start", "sft", "distilled"): {"train.epochs": 1},
    RL: {"train.steps": 1, "rollout.prompts_per_step": 8, "rollout.group_size": 4, "eval.samples": 1},
    COLLECT: {"rollout.prompts": 8, "filters.correct": "false", "filters.format": "false", "filters.min_language": 0},
    ("scores",): {"eval.samples": 2},
    (*RL, "scores"): {"eval.problems": 8},
    (*RL, *COLLECT, "scores"): {"data.size": 500, "rewards.workers": 1},
}
FUNCTION = """
import json
def sums(folder, seed, last):
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(last) for b in range(8)]
    pairs = [{"prompt": str(a), "chosen": "1", "rejected": "2"} for a in range(8)]
    for name, found in {"sums": rows, "few": rows[:4], "pairs": pairs}.items():
        (folder / f"{name}.jsonl").write_text("\\n".join(map(json.dumps, found)))
"""
LATE = """
        [stages.samples]
        kind = "collect"
        like = "second"
        model.path = "stage:second"
        rollout = { prompts = 6, prompts_per_part = 3, max_new_tokens = 30 }
        filters = { correct = false, format = false }
        [stages.taught]
        kind = "sft"
        model.path = "stage:first"
        data = { path = "stage:samples", template = "none" }
        train = { epochs = 2, batch_size = 4, checkpoint_every = 1 }
        [stages.judge]
        kind = "reward-model"
        like = "taught"
        data = { path = "stage:data/pairs.jsonl", held_out = 2 }
        train = { batch_size = 4, objective = "pairwise", token_budget = 64 }
        [stages.scores]
        kind = "eval"
        like = "first"
        eval = { samples = 1, benchmarks = ["stage:data/few.jsonl"] }
        models = { one = "stage:first", two = "stage:taught" }
        """


@pytest.fixture
def pipeline(recipe_values, custom_rewards, tmp_path) -> Path:
    """Two runs, the second from the model of the first, on data that a function writes."""
    (custom_rewards / "custom_stages.py").write_text(FUNCTION)
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
    with pytest.raises(RunInputError, match="stage second wants no/such/model: no such folder"):
        run_pipeline(pipeline, ["--stages.second.model.path=no/such/model"])
    assert not (tmp_path / "whole").exists()


@pytest.mark.parametrize(
    ("kind", "columns", "message"),
    [
        ("train", ["question", "answer"], "no column 'prompt'"),
        ("sft", ["prompt", "answer"], "no column 'completion'"),
        ("reward-model", ["prompt", "chosen"], "no column 'rejected'; known: prompt, chosen"),
    ],
)
def test_a_column_that_a_late_stage_misses_is_found_before_the_first_stage_runs(
    pipeline, tmp_path, kind, columns, message
):
    (tmp_path / "late.jsonl").write_text(json.dumps(dict.fromkeys(columns, "text")))
    late = f"\n[stages.late]\nkind = '{kind}'\nmodel.path = 'stage:first'\ndata.path = '{tmp_path / 'late.jsonl'}'\n"
    pipeline.write_text(pipeline.read_text() + late)
    with pytest.raises(DataError, match=message):
        run_pipeline(pipeline)
    assert not (tmp_path / "whole").exists()


def test_finished_stages_stay_and_changed_ones_are_refused(pipeline, tmp_path, capsys):
    """The whole life of a pipeline: up to a stage, on, once more, other values, another input, a stage made anew."""
    output = tmp_path / "whole"
    assert main(["pipeline", str(pipeline), "--until", "first"]) == 0
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
    # How it samples and packs makes it no other stage: what is left open was once a default, which was not noted.
    run_pipeline(pipeline, ["--stages.first.train.token_budget=auto", "--stages.first.rollout.generator=native"])
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


@pytest.mark.xdist_group("ranks")
def test_two_ranks_run_it_together(pipeline, tmp_path):
    """Each stage on both, the same state seen by both; then alone, where all is finished."""
    outputs = ranks.run(run_pipeline, 2, pipeline)
    assert outputs == [tmp_path / "whole"] * 2
    written = (tmp_path / "whole/second/model/model.safetensors").stat().st_mtime_ns
    run_pipeline(pipeline)
    assert (tmp_path / "whole/second/model/model.safetensors").stat().st_mtime_ns == written


def run_killed(path: Path, overrides: list[str], number: int) -> None:
    """A pipeline that dies at the n-th moment at which something is made sure to be on the disk."""
    fsync, left = os.fsync, [number]

    def counted(descriptor: int) -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = counted
    run_pipeline(path, overrides)


def products(output: Path) -> dict[str, bytes]:
    """By name: what stages make, and no logs of times."""
    found = {}
    for file in output.rglob("*"):
        is_product = file.suffix in (".safetensors", ".parquet", ".md", ".jsonl") and file.name != "metrics.jsonl"
        if is_product and "checkpoints" not in file.parts:
            found[str(file.relative_to(output))] = file.read_bytes()
    return found


@pytest.mark.timeout(0 if IS_SOAK else 300)
@pytest.mark.parametrize(
    "what",
    [
        "every_kind_of_stage",
        pytest.param("all_of_r1", marks=pytest.mark.skipif(not IS_SOAK, reason="an hour; make soak runs it")),
    ],
)
def test_killed_at_any_moment_a_pipeline_goes_on(pipeline, tmp_path, monkeypatch, what):
    """The same bytes of every product, the table of scores among them."""
    path, overrides = ROOT / "recipes/r1_tiny.toml", [f"--run.output={tmp_path / 'whole'}"]
    if what == "every_kind_of_stage":
        path = pipeline
        path.write_text(path.read_text() + LATE)
    syncs, fsync = [], os.fsync
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (syncs.append(descriptor), fsync(descriptor)))
        whole = products(run_pipeline(path, overrides))
    assert {"data.parquet", "scores.md", "model.safetensors"} <= {Path(name).name for name in whole}
    (tmp_path / "whole").rename(tmp_path / "before")  # products name their models by their paths
    rng, kills = random.Random(time.time_ns()), int(os.environ.get("KILLS", "3"))
    for _ in range(kills):
        # Together the killed runs come about as far as one that is not killed.
        number = rng.randint(1, 2 * len(syncs) // kills)
        (outcome,) = ranks.run(run_killed, 1, path, overrides, number, check=False, timeout_s=1e4)
        assert outcome.exit_code in (-signal.SIGKILL, 0)
    found = products(run_pipeline(path, overrides))
    assert found.keys() == whole.keys()
    assert [name for name in whole if found[name] != whole[name]] == []


def test_all_of_r1_at_toy_size(tmp_path):
    """Every stage of the recipe works on what the ones before it have made, from nothing."""
    overrides = []
    for names, values in SMALL.items():
        for name, (key, value) in product(names, values.items()):
            overrides.append(f"--stages.{name}.{key}={value}")
    output = run_pipeline(ROOT / "recipes/r1_tiny.toml", [f"--run.output={tmp_path / 'r1'}", *overrides])
    table = (output / "scores.md").read_text()
    models = "base", "R1-Zero", "cold start", "stage-2 RL", "final RL"
    for label in (*models, "distilled student", "student, RL alone", "student, on-policy distillation"):
        assert f"| {label} |" in table
    assert all("seconds" in entry for entry in entries(output).values())
