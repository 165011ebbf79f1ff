"""`flashgrpo report RUN`: the paper's two curves (score and response length over steps), rewards, the time's shares.

Of an SFT run or a reward model's, the loss.
"""

import fnmatch
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from flashgrpo.grpo.errors import RunInputError
from flashgrpo.grpo.metrics import PHASES
from flashgrpo.grpo.run.folder import read_rows
from flashgrpo.model.files import whole_file

Draw = Callable[[Axes, list[dict], list[dict]], None]  # of all rows, and those of training steps

_SHOWN_SHARE = 0.005  # of the time; a thinner band could not be seen
_LEGEND_COLUMNS = 3
_LARGEST = 1e300  # beyond it a picture has no place
_MARKED = 20  # steps that are few enough for a mark each
_COLOURS = {phase: f"C{number}" for number, phase in enumerate(PHASES)}  # in every picture
# Of a pipeline's picture: keys of metrics.jsonl, or patterns; the first of two, measured at times, is drawn strong.
_STAGE_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")
_PIPELINE_PANELS = {
    "score: held-out pass@1, accuracy of the rollouts": ("eval/pass@1", "reward/accuracy"),
    "response length, tokens": ("length/mean",),
    "reasoning in the target language": ("reward/language_consistency",),
    "reflective phrases per 1,000 tokens": ("reflection/per_1000_tokens",),
    "reward of the prompts of [sources]": ("source/*/reward",),
}
_SHARES = ("reward/language_consistency", "eval/pass@1")
_NOT_REWARDS = {"mean", "std", "group_std", "missing"}
_GRPO_SUMMARY = {  # column: key and format
    "held-out pass@1": ("eval/pass@1", "{:.1%}"),
    "reward": ("reward/mean", "{:.3f}"),
    "length": ("length/mean", "{:.1f}"),
    "sampled tokens/s": ("tokens_per_s", "{:,.0f}"),
}
_SFT_SUMMARY = {"loss": ("loss", "{:.4f}"), "trained tokens/s": ("tokens_per_s/trained", "{:,.0f}")}
_REWARD_MODEL_SUMMARY = {"held-out accuracy": ("eval/accuracy", "{:.1%}"), **_SFT_SUMMARY}


def write_report(run: str | Path) -> Path:
    """Draw RUN/report.png from RUN/metrics.jsonl; returns its path. Raises RunInputError for no step to draw."""
    run = Path(run)
    rows = _read_metrics(run)
    steps = _with_key(rows, "loss")
    if not steps:
        raise RunInputError(f"{run / 'metrics.jsonl'}: no training step found; is {run} the folder of a run?")
    panels = _panels(rows, steps)
    num_columns = min(2, max(len(panels), 1))
    num_rows = max(-(-len(panels) // num_columns), 1)
    figure = Figure(figsize=(11, max(3.75 * num_rows, 5.0)), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for axis, draw in zip(axes, panels, strict=False):
        draw(axis, rows, steps)
    first, last = rows[0]["step"], rows[-1]["step"]
    margin = max(0.02 * (last - first), 0.5)
    for axis in axes:
        axis.set_xlabel("step")
        axis.set_xlim(first - margin, last + margin)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        axis.grid(alpha=0.25)
        _open_corner(axis)
    # A grid with an odd number of panels has a place too many.
    for axis in axes[max(len(panels), 1) :]:
        axis.remove()
    figure.suptitle(str(run), fontsize="medium", color="0.4", parse_math=False)
    return _save(figure, run / "report.png", dpi=120)


def print_summary(run: str | Path, num_samples: int = 3) -> None:
    """Held-out score or loss before and after, and the newest sampled completions, to standard output."""
    run, console = Path(run), Console()
    rows = _read_metrics(run)
    steps = _with_key(rows, "loss")
    evaluations = _with_key(rows, "eval/pass@1") or _with_key(rows, "eval/accuracy")
    columns = _SFT_SUMMARY
    if _with_key(steps, "reward/mean"):
        columns = _GRPO_SUMMARY
    elif _with_key(steps, "train/accuracy"):
        columns = _REWARD_MODEL_SUMMARY
    table = Table(title=Text(str(run)), title_justify="left")
    for column in ("step", *columns):
        table.add_column(column, justify="right")
    for row in evaluations or steps[:1] + steps[1:][-1:]:
        cells = [str(row["step"])]
        for key, form in columns.values():
            cells.append("" if row.get(key) is None else form.format(row[key]))
        table.add_row(*cells)
    console.print(table)
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


def _read_metrics(run: Path) -> list[dict[str, Any]]:
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


def _panels(rows: list[dict], steps: list[dict]) -> list[Draw]:
    """What draws each panel that has something to show."""

    def has(*keys: str, above_zero: bool = False) -> bool:
        for key in keys:
            values = _series(rows, key)[1]
            if (np.nan_to_num(values) if above_zero else np.isfinite(values)).any():
                return True
        return False

    if _with_key(steps, "reward/mean"):
        found = {
            _draw_scores: has("eval/pass@1", "reward/accuracy"),
            _draw_lengths: has("length/mean"),
            _draw_rewards: has("reward/mean"),
            _draw_times: has(*(f"time/{phase}_s" for phase in PHASES), above_zero=True),
            _one("kl", "KL to the reference, nats a token"): has("kl", above_zero=True),
            _one("entropy", "entropy, nats a token"): has("entropy"),
            _draw_clipped: has("clip/low", "clip/high", above_zero=True),
        }
    else:
        unit = "row" if "train/accuracy" in steps[0] else "token"
        found = {
            _one("loss", f"loss, nats a {unit}", from_zero=False): has("loss"),
            _draw_accuracy: has("train/accuracy", "eval/accuracy"),
        }
    found[_one("grad_norm", "gradient norm, before clipping")] = has("grad_norm")
    return [draw for draw, is_there in found.items() if is_there]


def _draw_scores(axis: Axes, rows: list[dict], steps: list[dict]) -> None:
    evaluations = _known(rows, "eval/pass@1")
    _plot(axis, steps, "reward/accuracy", color="0.7", label="accuracy of the rollouts")
    if evaluations:
        _band(axis, evaluations, "eval/pass@1/low", "eval/pass@1/high", color="tab:blue", label="95% interval")
        _plot(axis, evaluations, "eval/pass@1", marks=True, color="tab:blue", label="held-out pass@1")
        if evaluations[-1].get("eval/k", 1) > 1:
            label = f"held-out cons@{evaluations[-1]['eval/k']:.0f}"
            _plot(axis, evaluations, "eval/cons@k", marks=True, linestyle="--", color="tab:green", label=label)
    _in_percent(axis)
    _label(axis, "score")


def _draw_lengths(axis: Axes, rows: list[dict], steps: list[dict]) -> None:
    _band(axis, steps, "length/min", "length/max", color="tab:blue", label="shortest to longest")
    _plot(axis, steps, "length/mean", color="tab:blue", label="mean")
    axis.set_ylim(bottom=0)
    if np.nan_to_num(_series(steps, "reflection/per_1000_tokens")[1]).any():
        # Its curve is on the other axis, whose legend nobody asks for: an empty one stands for it.
        axis.plot([], [], ":", color="tab:red", label="reflections in 1,000")
        right = axis.twinx()
        _plot(right, steps, "reflection/per_1000_tokens", linestyle=":", color="tab:red")
        right.set_ylim(bottom=0)
        right.tick_params(colors="tab:red")
        _open_corner(right)
    _label(axis, "response length, tokens")


def _draw_rewards(axis: Axes, rows: list[dict], steps: list[dict]) -> None:
    for name in steps[0]:
        if name.startswith("reward/") and name.removeprefix("reward/") not in _NOT_REWARDS:
            _plot(axis, steps, name, label=name.removeprefix("reward/"))
    _plot(axis, steps, "reward/mean", color="black", label="weighted sum")
    _label(axis, "mean reward")


def _draw_times(axis: Axes, rows: list[dict], steps: list[dict]) -> None:
    numbers, _ = _series(steps, "loss")
    seconds = {phase: np.nan_to_num(_series(steps, f"time/{phase}_s")[1]) for phase in PHASES}
    total = np.sum([*seconds.values()])
    bottom = np.zeros(len(steps))
    for phase, values in seconds.items():
        if values.sum() <= _SHOWN_SHARE * total:
            continue
        style = {"color": _COLOURS[phase], "alpha": 0.85, "label": f"{phase} {values.sum() / total:.0%}"}
        if len(steps) <= _MARKED:
            axis.bar(numbers, values, 0.8, bottom, **style)
        else:
            axis.fill_between(numbers, bottom, bottom + values, linewidth=0, **style)
        bottom = bottom + values
    axis.set_ylim(bottom=0)
    _label(axis, "seconds a step")


def _draw_accuracy(axis: Axes, rows: list[dict], steps: list[dict]) -> None:
    _plot(axis, steps, "train/accuracy", color="0.7", label="of a step")
    _plot(axis, _known(rows, "eval/accuracy"), "eval/accuracy", marks=True, color="tab:blue", label="held-out")
    _in_percent(axis)
    _label(axis, "accuracy")


def _draw_clipped(axis: Axes, rows: list[dict], steps: list[dict]) -> None:
    for end in ("low", "high"):
        _plot(axis, steps, f"clip/{end}", label=f"too {end}")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_ylim(bottom=0)
    _label(axis, "share of tokens whose ratio is clipped")


def _one(key: str, title: str, from_zero: bool = True) -> Draw:
    """A panel of one number."""

    def draw(axis: Axes, rows: list[dict], steps: list[dict]) -> None:
        _plot(axis, steps, key, color="tab:blue")
        if from_zero:
            axis.set_ylim(bottom=0)
        _label(axis, title)

    return draw


def _plot(axis: Axes, rows: list[dict], key: str, marks: bool = False, **style: Any) -> None:
    """A line, if there is anything, and marks where it would not be seen: at few steps, and between missing ones."""
    numbers, values = _series(rows, key)
    known = np.isfinite(values)
    if not known.any():
        return
    before, after = np.r_[False, known[:-1]], np.r_[known[1:], False]
    marked = known if marks or len(numbers) <= _MARKED else known & ~before & ~after
    axis.plot(numbers, values, marker="o", markersize=4, markevery=np.flatnonzero(marked).tolist(), **style)


def _band(axis: Axes, rows: list[dict], low_key: str, high_key: str, color: str, label: str) -> None:
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


def _series(rows: list[dict], key: str) -> tuple[list[int], np.ndarray]:
    """Steps, and what they have under a key, NaN where that is nothing."""
    numbers, values = [], np.full(len(rows), np.nan)
    for i, row in enumerate(rows):
        numbers.append(row["step"])
        if row.get(key) is not None:
            values[i] = row[key]
    return numbers, values


def _with_key(rows: list[dict], key: str) -> list[dict]:
    """Rows that have a key, be it null."""
    return [row for row in rows if key in row]


def _known(rows: list[dict], key: str) -> list[dict]:
    return [row for row in rows if row.get(key) is not None]


def draw_pipeline(stages: dict[str, Path], scores: list[dict[str, Any]], path: Path) -> Path:
    """Draw the metrics of runs, by the names of their stages, side by side, and the rows of an evaluation; returns
    `path`.
    """
    runs = {name: read_rows(folder / "metrics.jsonl") for name, folder in stages.items()}
    figure = Figure(figsize=(16, 8), layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    for axis, (title, keys) in zip(panels, _PIPELINE_PANELS.items(), strict=False):
        _draw_stages(axis, runs, keys)
        axis.set_title(title, loc="left", fontweight="bold", pad=20)
        if keys[0] in _SHARES:
            _in_percent(axis)
    _draw_models(panels[-1], scores)
    return _save(figure, path, dpi=110)


def _draw_stages(axis: Axes, runs: dict[str, list[dict[str, Any]]], patterns: tuple[str, ...]) -> None:
    """One run after the other, on an axis of all their steps."""
    start = 0
    for (name, rows), color in zip(runs.items(), _STAGE_COLOURS * len(runs), strict=False):
        for number, key in enumerate(_matching(rows, patterns)):
            steps, values = _series(_known(rows, key), key)
            is_sparse = number == 0 and len(patterns) > 1
            style = {"markersize": 3, "color": color, "alpha": 0.35 if number else 1}
            axis.plot(start + np.array(steps), values, "o-" if is_sparse else "-", **style)
        end = start + (rows[-1]["step"] if rows else 0)
        axis.text((start + end) / 2, 1.01, name, color=color, transform=axis.get_xaxis_transform(), ha="center")
        axis.axvline(end, color="0.85", linewidth=0.8)
        start = end
    axis.set_xlim(0, max(start, 1))
    axis.set_xlabel("step, of all RL stages")
    axis.grid(alpha=0.25)
    _open_corner(axis)


def _matching(rows: list[dict[str, Any]], patterns: tuple[str, ...]) -> list[str]:
    """Keys of the rows, by the patterns' order and then by that in which they come."""
    found: dict[str, None] = {}
    for pattern in patterns:
        for row in rows:
            found |= dict.fromkeys(fnmatch.filter(row, pattern))
    found.pop("source/data/reward", None)  # the others' are on a scale of their own
    return [*found]


def _draw_models(axis: Axes, rows: list[dict[str, Any]]) -> None:
    """pass@1 with its interval, and the majority's score, of the models on the first benchmark."""
    rows = [row for row in rows if row["benchmark"] == rows[0]["benchmark"]]
    names, scores, votes, below, above = [], [], [], [], []
    for row in rows:
        names.append(row["model"])
        scores.append(row["pass@1"])
        votes.append(row["cons@k"])
        below.append(row["pass@1"] - row["pass@1/low"])
        above.append(row["pass@1/high"] - row["pass@1"])
    places = range(len(rows))
    axis.barh(places, scores, xerr=[below, above], color="tab:blue", alpha=0.75, label="pass@1, 95% interval")
    if rows:
        axis.plot(votes, places, "s", color="tab:green", label=f"cons@{rows[0]['k']:.0f}")
        axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.3, 1.0), ncols=2, fontsize="small")
    axis.set_yticks(places, names)
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_title("held-out", loc="left", fontweight="bold", pad=20)
    _open_corner(axis)


def _in_percent(axis: Axes) -> None:
    axis.set_ylim(-0.02, 1.02)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))


def _open_corner(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path, dpi: int) -> Path:
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")  # its name ends otherwise
    return path
