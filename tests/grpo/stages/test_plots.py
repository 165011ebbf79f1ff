"""A run's folder becomes a picture and a summary, also where the run went badly."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from flashgrpo.grpo.cli import main
from flashgrpo.grpo.errors import RunError
from flashgrpo.grpo.stages.plots import print_summary, write_report

ROW = {
    "loss": 0.01,
    "reward/std": 0.5,
    "reward/missing": 0.0,
    "reward/format": 0.9,
    "length/min": 3.0,
    "length/max": 48.0,
    "length/truncated": 0.25,
    "time/generate_s": 1.0,
    "time/train_s": 2.0,
    "time/sync_s": 0.0,
    "tokens_per_s": 4321.0,
}
LEARNED = {"kl": 0.02, "entropy": 0.8, "clip/low": 0.0, "clip/high": 0.01, "grad_norm": 0.3}
REWARDS = "reward/mean", "reward/accuracy", "reward/format"
REFLECTIONS = "reflection/per_1000_tokens"


def step_row(step: int, **values) -> dict:
    scores = {"reward/mean": 0.1 * step, "reward/accuracy": 0.05 * step, "length/mean": 20.0 + step}
    return {"step": step, **ROW, **scores, **values}


def evaluated(step: int, score: float | None) -> dict:
    return {"step": step, "eval/pass@1": score, "eval/pass@k": 0.5, "eval/cons@k": 0.4, "eval/k": 4.0}


@pytest.fixture
def make_run(tmp_path):
    def make(rows: Sequence[dict], samples: Sequence[dict] = (), tail: str = "") -> Path:
        for name, content in (("metrics.jsonl", rows), ("samples.jsonl", samples)):
            (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in content) + tail)
        return tmp_path

    return make


@pytest.fixture
def drawn(make_run, monkeypatch):
    """drawn(rows) -> the axes of their picture, by title."""

    def axes_of(rows: Sequence[dict]) -> dict[str, Axes]:
        figures = []
        with monkeypatch.context() as patch:  # the picture itself takes a second
            patch.setattr(Figure, "savefig", lambda self, path, **_: (figures.append(self), Path(path).touch()))
            write_report(make_run(rows))
        return {axis.get_title(loc="left"): axis for axis in figures[0].axes}

    return axes_of


def labels(axis: Axes) -> list:
    return [str(line.get_label()) for line in axis.lines if not str(line.get_label()).startswith("_")]


def test_the_picture_is_a_file(make_run):
    run = make_run([step_row(i, **{f"reward/{name}": 0.1 for name in "abcdefgh"}) for i in (1, 2)])
    assert write_report(run) == run / "report.png"
    assert [path.name for path in run.glob("*.png*")] == ["report.png"]
    height, width, _ = imread(run / "report.png").shape
    assert width > 1000
    assert height > 700


def test_a_run_is_seen_in_all_that_it_logs(drawn):
    rows = [evaluated(0, 0.1), *[step_row(i, **LEARNED) for i in range(1, 30)], step_row(30) | evaluated(30, 0.6)]
    axes = drawn(rows)
    assert [*axes][:4] == ["score", "response length, tokens", "mean reward", "entropy, nats a token"]
    assert labels(axes["mean reward"]) == ["format", "accuracy", "weighted sum"]
    assert labels(axes["shares of groups, completions, tokens"]) == ["truncated", "clipped high"]
    assert labels(axes["entropy, nats a token"]) == ["entropy", "KL to the reference"]
    rollouts, smoothed, scores, votes = axes["score"].lines
    assert labels(axes["score"]) == ["accuracy of the rollouts", "held-out pass@1", "held-out cons@4"]
    assert rollouts.get_xydata()[4].tolist() == [5, 0.25]
    assert smoothed.get_ydata()[14] == pytest.approx(0.75)
    assert (rollouts.get_alpha(), rollouts.get_color()) == (0.25, smoothed.get_color())
    assert scores.get_xydata().tolist() == [[0, 0.1], [30, 0.6]]
    assert votes.get_ydata().tolist() == [0.4, 0.4]
    # What begins at 0 has room above, however little it varies.
    assert axes["entropy, nats a token"].get_ylim() == pytest.approx((0, 0.84))


def test_runs_are_drawn_over_each_other_and_told_side_by_side(make_run, tmp_path, monkeypatch, capsys):
    figures = []
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: (figures.append(self), Path(path).touch()))
    runs = []
    for name, score, steps in (("a", 0.5, 40), ("b", 0.75, 30)):
        rows = [evaluated(0, 0.125), *[step_row(i, entropy=score) for i in range(1, steps)], evaluated(steps, score)]
        runs.append(make_run(rows).rename(tmp_path.parent / f"{tmp_path.name}_{name}"))
        tmp_path.mkdir()
    picture = tmp_path / "both.png"
    assert main(["report", str(runs[0]), f"second={runs[1]}", "--output", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert picture.exists()
    assert all(part in printed for part in ("12.5% -> 50.0%", "12.5% -> 75.0%", "second", f"picture: {picture}"))
    (figure,) = figures
    axes = {axis.get_title(loc="left"): axis for axis in figure.axes}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [str(runs[0]), "second"]
    assert [line.get_ydata()[-1] for line in axes["held-out pass@1"].lines] == [0.5, 0.75]
    assert "gradient norm, before clipping" not in axes  # no run has it
    assert main(["report", f"x={runs[0]}", f"x={runs[1]}"]) == 2
    assert "two runs are called x" in capsys.readouterr().err


@pytest.mark.parametrize(
    "rows",
    [
        [step_row(1, **dict.fromkeys(("reward/mean", "reward/accuracy", "time/train_s"))), step_row(2)],
        [dict.fromkeys(step_row(1)) | {"step": 1}],
        [evaluated(0, None), {**step_row(1), **evaluated(1, None)}],
        [{k: v for k, v in step_row(i).items() if not k.startswith("time/")} for i in (1, 2)],
    ],
    ids=["nulls", "nothing but nulls", "no score", "no times"],
)
def test_sparse_runs_have_a_picture_too(make_run, drawn, rows, capsys):
    assert drawn(rows)
    # The last line is one that a kill has cut.
    print_summary(make_run(rows, [{"step": 1, "prompt": "p", "completion": "c", "reward": None}], '{"step": 3, "rew'))
    assert "reward missing" in capsys.readouterr().out


def test_a_run_with_one_step_is_seen(drawn):
    axes = drawn([step_row(1, **LEARNED)])
    assert len(axes) == 8
    for title, axis in axes.items():
        marks = [mark for line in axis.lines for mark in line.get_markevery() or []]
        assert marks or axis.patches, title
        low, high = axis.get_xlim()
        assert [tick for tick in axis.get_xticks() if low <= tick <= high] == [1], title


def test_a_number_between_missing_ones_is_seen(drawn):
    rows = [step_row(i, entropy=1.0 if i == 30 else None) for i in range(1, 60)]
    line = drawn(rows)["entropy, nats a token"].lines[0]
    assert line.get_markevery() == [29]


def test_only_what_has_values_is_drawn(drawn):
    without = drawn([step_row(1, **(LEARNED | {"kl": 0.0, "clip/high": 0.0}))])
    assert labels(without["entropy, nats a token"]) == ["entropy"]
    assert labels(without["shares of groups, completions, tokens"]) == ["truncated"]
    without = drawn([step_row(1, **dict.fromkeys(REWARDS))])
    assert without.keys() - {""} == {
        "response length, tokens",
        "shares of groups, completions, tokens",
        "seconds a step",
    }
    for rate, wanted in ((0.0, ["mean"]), (2.0, ["mean", "reflections in 1,000"])):
        axes = drawn([step_row(i, **{REFLECTIONS: rate}) for i in (1, 2)])
        assert labels(axes["response length, tokens"]) == wanted


def test_a_score_has_its_interval(drawn):
    ends = {"eval/pass@1/low": 0.2, "eval/pass@1/high": 0.4}
    for rows in ([evaluated(0, 0.3) | ends, step_row(1)], [step_row(1) | evaluated(1, 0.3) | ends, step_row(2)]):
        (band,) = drawn(rows)["score"].collections
        heights = [y for path in band.get_paths() for _, y in path.vertices]
        assert (min(heights), max(heights)) == (0.2, 0.4)


def test_a_phase_has_its_colour_and_its_share(drawn):
    colours, shares = [], []
    for rows in ([step_row(1)], [step_row(1, **{"time/generate_s": 0.0})], [step_row(i) for i in range(1, 40)]):
        handles, phases = drawn(rows)["seconds a step"].get_legend_handles_labels()
        # What takes next to no time has no place.
        assert not any(phase.startswith("sync") for phase in phases)
        ((handle, phase),) = [pair for pair in zip(handles, phases, strict=True) if pair[1].startswith("train")]
        shares.append(phase)
        colours.append(tuple(np.ravel(getattr(handle, "patches", [handle])[0].get_facecolor())))
    assert len(set(colours)) == 1
    assert shares == ["train 67%", "train 100%", "train 67%"]


@pytest.mark.parametrize("value", ["x", [1], 10**400, {"a": 1}], ids=["text", "list", "too large", "object"])
def test_a_log_that_no_run_has_written_is_named(make_run, value):
    run = make_run([step_row(1), step_row(2, **{"length/mean": value})])
    for show in (write_report, print_summary):
        with pytest.raises(RunError, match=r"metrics\.jsonl: length/mean is .* in step 2, wanted a number"):
            show(run)


def test_samples_that_no_run_has_written_are_printed_or_named(make_run):
    print_summary(make_run([step_row(1)], [{"step": 1}, {"step": 1, "prompt": 3, "completion": None, "reward": "x"}]))
    run = make_run([step_row(1)], [{"step": 1, "prompt": "a", "completion": "b", "reward": 10**400}])
    with pytest.raises(RunError, match=r"samples\.jsonl: reward is 1000+ in step 1, wanted a number"):
        print_summary(run)


@pytest.mark.parametrize("rows", [None, [evaluated(0, 0.1)]], ids=["no log", "nothing but the first score"])
def test_a_run_without_steps_is_an_error(make_run, tmp_path, rows):
    if rows is not None:
        make_run(rows)
    with pytest.raises(RunError, match=r"metrics\.jsonl: no training step found; is .* the folder of a run\?"):
        write_report(tmp_path)


def test_an_sft_run_shows_its_loss(make_run, drawn, capsys):
    rows = [{"step": i, "loss": 1 / i, "tokens_per_s/trained": 4321.0} for i in (1, 2, 3)]
    assert drawn(rows).keys() == {"loss, nats a token"}
    print_summary(make_run(rows))
    printed = capsys.readouterr().out
    # The first and the last step.
    assert [loss in printed for loss in ("1.0000", "0.5000", "0.3333", "4,321")] == [True, False, True, True]
    assert "reward" not in printed
    print_summary(make_run(rows[:1]))
    assert capsys.readouterr().out.count("1.0000") == 1


def test_the_summary_tells_scores_and_the_newest_answers(make_run, capsys, monkeypatch):
    """What a model writes is printed as it is: brackets are mathematics and not mark-up."""
    monkeypatch.setenv("COLUMNS", "100")
    text = r"\[ x \] [bold]y[/bold] [/nothing] \boxed{2}"
    samples = []
    for step in (1, 2, 3, 4):
        for i in range(2):
            own = {"prompt": f"[{step}]", "completion": f"answer {step}.{i} {text}"}
            samples.append({"step": step, "reward": i / 3} | own)
    run = make_run([evaluated(0, 0.125), step_row(1), {**step_row(2), **evaluated(2, 0.75)}], samples)
    print_summary(run)
    printed = capsys.readouterr().out
    for part in ("12.5%", "75.0%", "4,321", f"answer 4.1 {text}", "step 4, reward 0.333"):
        assert part in printed
    assert [f"[{step}]" in printed for step in (1, 2, 3, 4)] == [False, True, True, True]  # three prompts
