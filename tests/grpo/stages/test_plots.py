"""A run's folder becomes a picture and a summary, also where the run went badly."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from flashgrpo.grpo.errors import RunError
from flashgrpo.grpo.stages.plots import print_summary, write_report


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


LEARNED = {"kl": 0.02, "entropy": 0.8, "clip/low": 0.0, "clip/high": 0.01, "grad_norm": 0.3}


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
    (line,) = drawn(rows)["entropy, nats a token"].lines
    assert line.get_markevery() == [29]


def test_only_panels_with_something_in_them_are_drawn(drawn):
    learned = {"KL to the reference, nats a token", "share of tokens whose ratio is clipped"}
    assert learned <= drawn([step_row(1, **LEARNED)]).keys()
    without = drawn([step_row(1, **(LEARNED | {"kl": 0.0, "clip/high": 0.0}))])
    assert not learned & without.keys()
    without = drawn([step_row(1, **{"reward/accuracy": None, "reward/mean": None})])
    assert without.keys() == {"response length, tokens", "seconds a step"}


def test_a_score_has_its_interval(drawn):
    ends = {"eval/pass@1/low": 0.2, "eval/pass@1/high": 0.4}
    for rows in ([evaluated(0, 0.3) | ends, step_row(1)], [step_row(1) | evaluated(1, 0.3) | ends, step_row(2)]):
        (band,) = drawn(rows)["score"].collections
        heights = [y for path in band.get_paths() for _, y in path.vertices]
        assert (min(heights), max(heights)) == (0.2, 0.4)


def test_a_phase_has_its_colour_in_every_picture(drawn):
    colours = []
    for rows in ([step_row(1)], [step_row(1, **{"time/generate_s": 0.0})], [step_row(i) for i in range(1, 40)]):
        handles, labels = drawn(rows)["seconds a step"].get_legend_handles_labels()
        (handle,) = [h for h, label in zip(handles, labels, strict=True) if label.startswith("train")]
        colours.append(tuple(np.ravel(getattr(handle, "patches", [handle])[0].get_facecolor())))
    assert len(set(colours)) == 1


def test_a_log_that_no_run_has_written_is_named(make_run):
    for value in ("x", [1], 10**400, {"a": 1}):
        run = make_run([step_row(1), step_row(2, **{"length/mean": value})])
        for show in (write_report, print_summary):
            with pytest.raises(RunError, match=r"metrics\.jsonl: length/mean is .* in step 2, wanted a number"):
                show(run)
    run = make_run([step_row(1)], [{"step": 1}, {"step": 1, "prompt": 3, "completion": None, "reward": "x"}])
    print_summary(run)


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


def test_a_reward_that_is_no_number_of_this_world_is_one_line(make_run):
    run = make_run([step_row(1)], [{"step": 1, "prompt": "a", "completion": "b", "reward": 10**400}])
    with pytest.raises(RunError, match=r"samples\.jsonl: reward is 1000+ in step 1, wanted a number"):
        print_summary(run)


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
