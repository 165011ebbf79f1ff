"""A run's folder becomes a picture and a summary, also where the run went badly."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from matplotlib.image import imread

from flashgrpo.grpo.report import print_summary, write_report
from flashgrpo.grpo.run_folder import RunError


def step_row(step: int, **values) -> dict:
    return {
        "step": step,
        "loss": 0.01,
        "reward/mean": 0.1 * step,
        "reward/std": 0.5,
        "reward/missing": 0.0,
        "reward/accuracy": 0.05 * step,
        "reward/format": 0.9,
        "length/mean": 20.0 + step,
        "length/min": 3.0,
        "length/max": 48.0,
        "time/generate_s": 1.0,
        "time/train_s": 2.0,
        "time/sync_s": 0.0,
        "tokens_per_s": 4321.0,
        **values,
    }


def evaluated(step: int, score: float | None) -> dict:
    return {"step": step, "eval/pass@1": score, "eval/pass@k": 0.5, "eval/cons@k": 0.4, "eval/k": 4.0}


@pytest.fixture
def make_run(tmp_path):
    def make(rows: Sequence[dict], samples: Sequence[dict] = (), tail: str = "") -> Path:
        for name, content in (("metrics.jsonl", rows), ("samples.jsonl", samples)):
            (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in content) + tail)
        return tmp_path

    return make


def colours(picture: Path) -> set[tuple[int, ...]]:
    """Distinct saturated colours, to a resolution of an eighth: of curves and areas, not of text."""
    pixels = imread(picture)[..., :3].reshape(-1, 3)
    saturated = pixels[pixels.max(1) - pixels.min(1) > 0.4]
    return set(map(tuple, (saturated * 8).round().astype(int).tolist()))


def test_the_picture_has_the_curves(make_run):
    run = make_run([evaluated(0, 0.1), *[step_row(i) for i in range(1, 10)], {**step_row(10), **evaluated(10, 0.6)}])
    path = write_report(run)
    assert path == run / "report.png"
    height, width, _ = imread(path).shape
    assert width > 1000
    assert height > 700
    with_curves = len(colours(path))
    write_report(make_run([{"step": 1, "loss": 0.1, "reward/mean": 0.5, "length/mean": 3.0}]))
    assert with_curves > len(colours(path)) + 5


def test_reflections_are_drawn_where_there_are_any(make_run):
    pictures = []
    for rate in (None, 0.0, 2.0):
        values = {} if rate is None else {"reflection/per_1000_tokens": rate}
        pictures.append(imread(write_report(make_run([step_row(i, **values) for i in (1, 2, 3)]))))
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] != pictures[2]).any()


@pytest.mark.parametrize(
    "rows",
    [
        [step_row(1)],
        [step_row(1, **{"reward/mean": None, "reward/accuracy": None, "time/train_s": None}), step_row(2)],
        [step_row(1, **{key: None for key in step_row(1) if key != "step"})],
        [evaluated(0, None), {**step_row(1), **evaluated(1, None)}],
        [{k: v for k, v in step_row(i).items() if not k.startswith("time/")} for i in (1, 2)],
        [step_row(i, **{f"reward/{name}": 0.1 for name in "abcdefgh"}) for i in (1, 2)],
    ],
    ids=["one step", "nulls", "nothing but nulls", "no score", "no times", "many rewards"],
)
def test_sparse_runs_have_a_picture_too(make_run, rows, capsys):
    run = make_run(rows, [{"step": 1, "prompt": "p", "completion": "c", "reward": None}], tail='{"step": 3, "rew')
    assert write_report(run).stat().st_size > 10_000
    print_summary(run)
    assert "reward missing" in capsys.readouterr().out
    assert [path.name for path in run.glob("*.png")] == ["report.png"]


@pytest.mark.parametrize(
    "rows", [None, [], [evaluated(0, 0.1)]], ids=["no log", "empty", "nothing but the first score"]
)
def test_a_run_without_steps_is_an_error(make_run, tmp_path, rows):
    if rows is not None:
        make_run(rows)
    with pytest.raises(RunError, match=r"metrics\.jsonl: no training step found; is .* the folder of a run\?"):
        write_report(tmp_path)


def test_an_sft_run_shows_its_loss(make_run, capsys):
    run = make_run([{"step": i, "loss": 1 / i, "tokens_per_s/trained": 4321.0} for i in (1, 2, 3)])
    assert len(colours(write_report(run))) > 0
    print_summary(run)
    printed = capsys.readouterr().out
    assert [loss in printed for loss in ("1.0000", "0.5000", "0.3333", "4,321")] == [True, False, True, True]
    assert "reward" not in printed


def test_the_summary_tells_scores_and_the_newest_answers(make_run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    samples = [
        {"step": step, "prompt": f"What is {step}?", "completion": f"answer {step}.{i}", "reward": i / 3}
        for step in (1, 2, 3, 4)
        for i in range(2)
    ]
    run = make_run([evaluated(0, 0.125), step_row(1), {**step_row(2), **evaluated(2, 0.75)}], samples)
    print_summary(run)
    printed = capsys.readouterr().out
    assert "12.5%" in printed
    assert "75.0%" in printed
    assert "4,321" in printed
    assert [f"What is {step}?" in printed for step in (1, 2, 3, 4)] == [False, True, True, True]  # three prompts
    assert "answer 4.1" in printed
    assert "step 4, reward 0.333" in printed


def test_a_run_without_evaluations_shows_its_first_and_last_step(make_run, capsys):
    print_summary(make_run([step_row(1), step_row(2), step_row(3)]))
    printed = capsys.readouterr().out
    assert "0.100" in printed
    assert "0.200" not in printed
    assert "0.300" in printed
    print_summary(make_run([step_row(1)]))
    assert capsys.readouterr().out.count("0.100") == 1


def test_what_a_model_writes_is_printed_as_it_is(make_run, capsys):
    r"""Brackets are mathematics and not mark-up."""
    text = r"\[ x \] [bold]y[/bold] [/nothing] \boxed{2}"
    print_summary(make_run([step_row(1)], [{"step": 1, "prompt": "[a]", "completion": text, "reward": 1.0}]))
    printed = capsys.readouterr().out
    assert text in printed
    assert "[a]" in printed
