"""`flashgrpo report RUN ...`: a run's curves, the paper's two (score and response length over steps) first, or those of
several runs over each other, and the ends of the curves as a table.

Of an SFT run or a reward model's, the loss.
"""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from flashgrpo.grpo.errors import RunInputError
from flashgrpo.grpo.metrics import NOT_REWARDS, PHASES
from flashgrpo.grpo.run.folder import read_rows
from flashgrpo.model.files import whole_file

Rows = list[dict[str, Any]]  # of metrics.jsonl

_SHOWN_SHARE = 0.005  # of the time; a thinner band could not be seen
_LEGEND_COLUMNS = 3
_LARGEST = 1e300  # beyond it a picture has no place
_MARKED = 20  # steps that are few enough for a mark each
_FREE, _FROM_0, _FROM_0_TO_1 = (None, None), (0, None), (-0.02, 1.02)
_STAGE_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")
_BLUE = {"color": "tab:blue"}
_COMPARED = (  # of runs beside each other: key, title, format, and whether it has a panel
    ("eval/pass@1", "held-out pass@1", "{:.1%}", True),
    ("eval/accuracy", "held-out accuracy", "{:.1%}", True),
    ("reward/accuracy", "accuracy of the rollouts", "{:.1%}", True),
    ("reward/mean", "mean reward", "{:.3f}", True),
    ("length/mean", "response length, tokens", "{:.1f}", True),
    ("length/truncated", "truncated", "{:.1%}", False),
    ("loss", "loss", "{:.4f}", False),
    ("entropy", "entropy, nats a token", "{:.3f}", True),
    ("kl", "KL to the reference, nats a token", "{:.2g}", True),
    ("teacher/kl", "KL to the teacher, nats a token", "{:.3f}", True),
    ("clip/low", "ratios clipped low", "{:.2%}", False),
    ("clip/high", "ratios clipped high", "{:.2%}", False),
    ("grad_norm", "gradient norm, before clipping", "{:.3g}", True),
    ("mismatch/mean", "mismatch, nats a token", "{:.2g}", True),
    ("tokens_per_s", "sampled tokens/s, whole step", "{:,.0f}", True),
    ("tokens_per_s/sampled", "sampled tokens/s, sampling", "{:,.0f}", False),
    ("tokens_per_s/trained", "trained tokens/s, training", "{:,.0f}", False),
)
_END_SHARE = 0.1  # of the steps, whose mean is an end of a curve
_SMOOTHED_SHARE = 0.08  # of the steps, over which a curve is smoothed


@dataclass(frozen=True)
class Chart:
    """A place of a picture: curves by their keys, each with its style, or of time areas on each other."""

    title: str
    curves: dict[str, dict[str, Any]]
    limits: tuple[float | None, float | None] = _FROM_0  # of its axis; None: those of the curves
    is_share: bool = False  # in percent
    band: tuple[str, str, str] | None = None  # keys of its two ends, and its label
    right: tuple[str, str] = ("", "")  # key of a curve with an axis of its own, and its label
    is_stacked: bool = False

    def has_values(self, rows: Rows) -> bool:
        """Where an axis begins at 0, nothing but zeros is nothing to see."""
        values = np.array([_series(rows, key)[1] for key in self.curves])
        return bool((np.nan_to_num(values) if self.limits == _FROM_0 else np.isfinite(values)).any())


def write_report(run: str | Path) -> Path:
    """Draw RUN/report.png from RUN/metrics.jsonl; returns its path. Raises RunInputError for no step to draw."""
    run = Path(run)
    rows, steps = _read_run(run)
    charts = [chart for chart in _charts(rows, steps) if chart.has_values(rows)] or [Chart("nothing to see", {})]
    num_rows, num_columns = -(-len(charts) // 2), min(2, len(charts))
    figure = Figure(figsize=(11, max(3.75 * num_rows, 5.0)), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for axis, chart in zip(axes, charts, strict=False):
        _draw(axis, chart, rows, steps)
    _finish(axes, len(charts), rows[0]["step"], rows[-1]["step"])
    figure.suptitle(str(run), fontsize="medium", color="0.4", parse_math=False)
    return _save(figure, run / "report.png", dpi=120)


def compare_runs(runs: Mapping[str, Path], path: Path) -> Path:
    """Draw runs, by their labels, in one picture, and print the ends of their curves; returns `path`.

    Raises RunInputError as `write_report`.
    """
    rows_of = {label: _read_run(run)[0] for label, run in runs.items()}
    every = [row for rows in rows_of.values() for row in rows]
    shown = []
    for key, title, _, has_panel in _COMPARED:
        if has_panel and any(row.get(key) for row in every):
            shown.append((key, title))
    shown = shown or [("loss", "loss")]
    num_columns = min(3, len(shown))
    num_rows = -(-len(shown) // num_columns)
    figure = Figure(figsize=(4.6 * num_columns, 3.2 * num_rows + 0.6), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for axis, (key, title) in zip(axes, shown, strict=False):
        for (label, rows), color in zip(rows_of.items(), _STAGE_COLOURS * len(rows_of), strict=False):
            _plot(axis, _known(rows, key), key, marks=key.startswith("eval/"), color=color, label=label)
        is_share = key.startswith("eval/") or key == "reward/accuracy"
        _scale(axis, Chart(title, {}, _FREE if key in ("reward/mean", "loss") else _FROM_0, is_share=is_share))
        axis.set_title(title, loc="left", fontweight="bold")
    _finish(axes, len(shown), min(row["step"] for row in every), max(row["step"] for row in every))
    handles = [Line2D([], [], color=color) for _, color in zip(runs, _STAGE_COLOURS * len(runs), strict=False)]
    figure.legend(handles, runs, loc="outside upper left", ncols=len(runs), frameon=False)
    print_ends(rows_of)
    return _save(figure, path, dpi=100)


def _finish(axes: np.ndarray, used: int, first: int, last: int) -> None:
    """What all panels over steps have; a grid may have places too many."""
    margin = max(0.02 * (last - first), 0.5)
    for axis in axes[:used]:
        axis.set_xlabel("step")
        axis.set_xlim(first - margin, last + margin)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        axis.grid(alpha=0.25)
        _open_corner(axis)
    for axis in axes[used:]:
        axis.remove()


def print_ends(rows_of: Mapping[str, Rows]) -> None:
    """A table of runs by their labels: where each curve begins and ends, to standard output."""
    table = Table(caption="first -> last: means over a tenth of the steps", caption_justify="left")
    table.add_column()
    for label in rows_of:
        table.add_column(Text(label), justify="right")
    for key, title, form, _ in _COMPARED:
        cells = []
        for rows in rows_of.values():
            values = [row[key] for row in _known(rows, key)]
            width = max(1, round(_END_SHARE * len(values)))
            ends = {form.format(np.mean(part)): None for part in (values[:width], values[-width:]) if part}
            cells.append(" -> ".join(ends))
        if any(cells):
            table.add_row(title, *cells)
    Console().print(table)


def print_summary(run: str | Path, num_samples: int = 3) -> None:
    """Where the run's curves begin and end, and the newest sampled completions, to standard output."""
    run, console = Path(run), Console()
    print_ends({str(run): _read_metrics(run)})
    # Of a prompt the last sample stays, at the place of its first.
    newest = {}
    for sample in read_rows(run / "samples.jsonl"):
        newest[str(sample.get("prompt"))] = sample
    for prompt, sample in list(newest.items())[-num_samples:]:
        reward = "missing"
        if isinstance(sample.get("reward"), float | int):
            _check_number(run / "samples.jsonl", sample, "reward")
            reward = f"{sample['reward']:.3g}"
        text = Text.assemble((prompt.strip(), "dim"), "\n", str(sample.get("completion")).strip())
        console.print(Panel(text, title=f"step {sample['step']}, reward {reward}"))


def _read_run(run: Path) -> tuple[Rows, Rows]:
    """All rows, and those of training steps."""
    rows = _read_metrics(run)
    steps = _with_key(rows, "loss")
    if not steps:
        raise RunInputError(f"{run / 'metrics.jsonl'}: no training step found; is {run} the folder of a run?")
    return rows, steps


def _read_metrics(run: Path) -> Rows:
    """Rows of numbers. Raises RunInputError for anything else."""
    path = run / "metrics.jsonl"
    rows = read_rows(path)
    for row in rows:
        for key in row:
            _check_number(path, row, key)
    return rows


def _check_number(path: Path, row: dict[str, Any], key: str) -> None:
    value = row[key]
    if not (value is None or (isinstance(value, int | float) and abs(value) < _LARGEST)):
        raise RunInputError(f"{path}: {key} is {value!r:.80} in step {row['step']!s:.20}, wanted a number")


def _charts(rows: Rows, steps: Rows) -> list[Chart]:
    """Those of the kind of run that has written these rows, and these of its training steps."""
    norm = Chart("gradient norm, before clipping", {"grad_norm": _BLUE})
    if not _with_key(steps, "reward/mean"):
        unit = "row" if "train/accuracy" in steps[0] else "token"
        accuracy = {
            "train/accuracy": {"color": "0.7", "label": "of a step"},
            "eval/accuracy": {**_BLUE, "label": "held-out"},
        }
        loss = Chart(f"loss, nats a {unit}", {"loss": _BLUE}, limits=_FREE)
        return [loss, Chart("accuracy", accuracy, _FROM_0_TO_1, is_share=True), norm]
    scores: dict[str, dict[str, Any]] = {
        "reward/accuracy": {"color": "0.6", "label": "accuracy of the rollouts"},
        "eval/pass@1": {**_BLUE, "label": "held-out pass@1"},
    }
    samples = max((row["eval/k"] for row in _known(rows, "eval/k")), default=1)
    if samples > 1:
        scores["eval/cons@k"] = {"linestyle": "--", "color": "tab:green", "label": f"held-out cons@{samples:.0f}"}
    rewards = {}
    for key in steps[0]:
        if key.startswith("reward/") and key not in NOT_REWARDS:
            rewards[key] = {"label": key.removeprefix("reward/")}
    # Last, and over the others.
    rewards["reward/mean"] = {"color": "black", "label": "weighted sum"}
    times = {f"time/{phase}_s": {"color": f"C{i}", "label": phase} for i, phase in enumerate(PHASES)}
    lengths = {"length/mean": {**_BLUE, "label": "mean"}}
    shares = {
        "groups/dead": {"color": "0.6", "label": "groups without a gradient"},
        "length/truncated": {"color": "tab:blue", "label": "truncated"},
        "clip/low": {"color": "tab:green", "label": "clipped low"},
        "clip/high": {"color": "tab:red", "label": "clipped high"},
    }
    nats = {
        "entropy": {**_BLUE, "label": "entropy"},
        "teacher/kl": {"color": "tab:orange", "label": "KL to the teacher"},
    }
    interval = ("eval/pass@1/low", "eval/pass@1/high", "95% interval")
    reflections = ("reflection/per_1000_tokens", "reflections in 1,000")
    extremes = ("length/min", "length/max", "shortest to longest")
    return [
        Chart("score", scores, _FROM_0_TO_1, is_share=True, band=interval),
        Chart("response length, tokens", lengths, band=extremes, right=reflections),
        Chart("mean reward", rewards, limits=_FREE),
        Chart("entropy, nats a token", nats, right=("kl", "KL to the reference")),
        Chart("shares of groups, completions, tokens", shares, is_share=True),
        norm,
        Chart("mismatch of sampler and trainer, nats a token", {"mismatch/mean": _BLUE}),
        Chart("seconds a step", times, is_stacked=True, right=("tokens_per_s", "sampled tokens/s")),
    ]


def _draw(axis: Axes, chart: Chart, rows: Rows, steps: Rows) -> None:
    if chart.band:
        low, high, label = chart.band
        _band(axis, _known(rows, low), low, high, label=label, **_BLUE)
    if chart.is_stacked:
        _stack(axis, chart.curves, steps)
    else:
        for key, style in chart.curves.items():
            if chart.limits == _FROM_0 and not np.nan_to_num(_series(rows, key)[1]).any():
                continue
            # What is measured at times only is a line all the same.
            is_evaluated = key.startswith("eval/")
            _plot(axis, _known(rows, key) if is_evaluated else steps, key, marks=is_evaluated, **style)
    _scale(axis, chart)
    key, label = chart.right
    if np.nan_to_num(_series(steps, key)[1]).any():
        # Its curve is on the other axis, whose legend nobody asks for: an empty one stands for it.
        axis.plot([], [], ":", color="tab:red", label=label)
        right = axis.twinx()
        _plot(right, steps, key, linestyle=":", color="tab:red")
        right.set_ylim(bottom=0)
        right.tick_params(colors="tab:red")
        _open_corner(right)
    _label(axis, chart.title)


def _stack(axis: Axes, curves: dict[str, dict[str, Any]], steps: Rows) -> None:
    """Areas, or bars of few steps, one upon the other; each label with its share of all."""
    numbers, _ = _series(steps, "loss")
    values_of = {key: np.nan_to_num(_series(steps, key)[1]) for key in curves}
    total = np.sum([*values_of.values()])
    if not total:
        return
    bottom = np.zeros(len(steps))
    for key, values in values_of.items():
        share = values.sum() / total
        if share <= _SHOWN_SHARE:
            continue
        style = {**curves[key], "alpha": 0.85, "label": f"{curves[key]['label']} {share:.0%}"}
        if len(steps) <= _MARKED:
            axis.bar(numbers, values, 0.8, bottom, **style)
        else:
            axis.fill_between(numbers, bottom, bottom + values, linewidth=0, **style)
        bottom = bottom + values


def _plot(axis: Axes, rows: Rows, key: str, marks: bool = False, **style: Any) -> None:
    """A line, if there is anything, and marks where it would not be seen: at few steps, and between missing ones.

    Of many steps a smoothed line over a pale one of the values.
    """
    numbers, values = _series(rows, key)
    known = np.isfinite(values)
    if not known.any():
        return
    if known.sum() > _MARKED and not marks:
        (pale,) = axis.plot(numbers, values, color=style.get("color"), alpha=0.25, linewidth=1, label="_values")
        style["color"], values = pale.get_color(), _smoothed(values)
    before, after = np.r_[False, known[:-1]], np.r_[known[1:], False]
    marked = known if marks or len(numbers) <= _MARKED else known & ~before & ~after
    marker = "o" if marked.any() else ""
    axis.plot(numbers, values, marker=marker, markersize=4, markevery=np.flatnonzero(marked).tolist(), **style)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Means over the steps around each, of those that have a value; none where there is none."""
    width = max(3, round(_SMOOTHED_SHARE * len(values)))
    known, window = np.isfinite(values), np.hanning(width + 2)[1:-1]
    weights = np.convolve(known, window, "same")
    return np.where(known, np.convolve(np.nan_to_num(values), window, "same") / np.maximum(weights, 1e-9), np.nan)


def _band(axis: Axes, rows: Rows, low_key: str, high_key: str, color: str, label: str) -> None:
    """Between two lines; of a single step a bar."""
    numbers, low = _series(rows, low_key)
    high = _series(rows, high_key)[1]
    if not np.isfinite(low + high).any():
        return
    if len(numbers) == 1:
        axis.vlines(numbers, low, high, color=color, alpha=0.25, linewidth=8, label=label)
    else:
        axis.fill_between(numbers, low, high, color=color, alpha=0.15, linewidth=0, label=label)


def _label(axis: Axes, title: str) -> None:
    """Title, and the legend between it and the axes, where it hides no curve."""
    handles, labels = axis.get_legend_handles_labels()
    num_lines = -(-len(labels) // _LEGEND_COLUMNS)
    axis.set_title(title, loc="left", pad=8 + 16 * num_lines, fontweight="bold")
    if handles:
        place = {"loc": "lower left", "bbox_to_anchor": (-0.01, 0.99), "frameon": False}
        legend = axis.legend(handles, labels, **place, ncols=_LEGEND_COLUMNS, fontsize="small", columnspacing=1.2)
        legend.set_in_layout(False)  # a wide one would make the axes narrow; the title has left it the room


def _series(rows: Rows, key: str) -> tuple[list[int], np.ndarray]:
    """Steps, and what they have under a key, NaN where that is nothing."""
    numbers, values = [], np.full(len(rows), np.nan)
    for i, row in enumerate(rows):
        numbers.append(row["step"])
        if row.get(key) is not None:
            values[i] = row[key]
    return numbers, values


def _with_key(rows: Rows, key: str) -> Rows:
    """Rows that have a key, be it null."""
    return [row for row in rows if key in row]


def _known(rows: Rows, key: str) -> Rows:
    return [row for row in rows if row.get(key) is not None]


# Curves by patterns of keys; the first of two, measured at times, is drawn strong.
_OF_STAGES = (
    Chart(
        "held-out pass@1, accuracy of rollouts",
        {"eval/pass@1": {}, "reward/accuracy": {}},
        _FROM_0_TO_1,
        True,
    ),
    Chart("response length, tokens", {"length/mean": {}}, _FREE),
    Chart("reasoning in the target language", {"reward/language_consistency": {}}, _FROM_0_TO_1, is_share=True),
    Chart("reflective phrases per 1,000 tokens", {"reflection/per_1000_tokens": {}}, _FREE),
    Chart("reward of the prompts of [sources]", {"source/*/reward": {}}, _FREE),
)


def draw_pipeline(stages: dict[str, Path], scores: Rows, path: Path) -> Path:
    """Draw the metrics of runs, by the names of their stages, side by side, and the rows of an evaluation; returns
    `path`.
    """
    runs = {name: read_rows(folder / "metrics.jsonl") for name, folder in stages.items()}
    figure = Figure(figsize=(16, 8), layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    for axis, chart in zip(panels, _OF_STAGES, strict=False):
        _draw_stages(axis, runs, [*chart.curves])
        axis.set_title(chart.title, loc="left", fontweight="bold")
        _scale(axis, chart)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False)
    _draw_models(panels[-1], scores)
    return _save(figure, path, dpi=110)


def _draw_stages(axis: Axes, runs: dict[str, Rows], patterns: list[str]) -> None:
    """One run after the other, on an axis of all their steps."""
    start = 0
    for (name, rows), color in zip(runs.items(), _STAGE_COLOURS * len(runs), strict=False):
        for number, key in enumerate(_matching(rows, patterns)):
            steps, values = _series(_known(rows, key), key)
            is_sparse = number == 0 and len(patterns) > 1
            style = {"markersize": 3, "color": color, "alpha": 0.35 if number else 1}
            axis.plot(start + np.array(steps), values, "o-" if is_sparse else "-", **style)
        end = start + (rows[-1]["step"] if rows else 0)
        axis.plot([], [], color=color, label=name)
        axis.axvline(end, color="0.85", linewidth=0.8)
        start = end
    axis.set_xlim(0, max(start, 1))
    axis.set_xlabel("step, of all RL stages")
    axis.grid(alpha=0.25)
    _open_corner(axis)


def _matching(rows: Rows, patterns: list[str]) -> list[str]:
    """Keys of the rows, by the patterns' order and then by that in which they come."""
    found: dict[str, None] = {}
    for pattern in patterns:
        for row in rows:
            found |= dict.fromkeys(fnmatch.filter(row, pattern))
    found.pop("source/data/reward", None)  # the others' are on a scale of their own
    return [*found]


def _draw_models(axis: Axes, rows: Rows) -> None:
    """pass@1 with its interval, and the majority's score, of the models on the first benchmark."""
    rows = [row for row in rows if row["benchmark"] == rows[0]["benchmark"]]
    names, places = [row["model"] for row in rows], range(len(rows))
    keys = ("pass@1", "pass@1/low", "pass@1/high", "cons@k")
    scores, low, high, votes = np.array([[row[key] for key in keys] for row in rows]).reshape(-1, 4).T
    ends = [scores - low, high - scores]
    axis.barh(places, scores, xerr=ends, color="tab:blue", alpha=0.75, label="pass@1, 95% interval")
    if rows:
        axis.plot(votes, places, "s", color="tab:green", label=f"cons@{rows[0]['k']:.0f}")
        axis.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, fontsize="small")
    axis.set_yticks(places, names)
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_title("held-out", loc="left", fontweight="bold")
    _open_corner(axis)


def _scale(axis: Axes, chart: Chart) -> None:
    if chart.limits == _FROM_0:
        # The room above the curves is a share of what the axis spans, which begins at 0 and not at the lowest value.
        axis.update_datalim([(0, 0)], updatex=False)
        axis.autoscale_view(scalex=False)
    axis.set_ylim(*chart.limits)
    if chart.is_share:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))


def _open_corner(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path, dpi: int) -> Path:
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")  # its name ends otherwise
    return path
