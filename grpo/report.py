"""`flashgrpo report RUN`: the paper's two curves (score and response length over steps), rewards, the time's shares.

Of an SFT run or a reward model's, the loss.
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from flashgrpo.grpo.metrics import PHASES
from flashgrpo.grpo.run_folder import RunInputError, read_rows

_SHOWN_SHARE = 0.005  # of the time; a thinner band could not be seen
_LEGEND_COLUMNS = 4
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
    rows = read_rows(run / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    if not steps:
        raise RunInputError(f"{run / 'metrics.jsonl'}: no training step found; is {run} the folder of a run?")
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    if "reward/mean" in steps[0]:
        axes = figure.subplots(2, 2, sharex=True).ravel()
        _draw_scores(axes[0], rows, steps)
        _draw_lengths(axes[1], steps)
        _draw_rewards(axes[2], steps)
        _draw_times(axes[3], steps)
    else:
        axes = [figure.subplots()]
        axes[0].plot(*_series(steps, "loss"), color="tab:blue")
        _label(axes[0], "loss, nats a row" if "train/accuracy" in steps[0] else "loss, nats a token")
    for axis in axes:
        axis.set_xlabel("step")
        axis.tick_params(labelbottom=True)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(str(run), fontsize="medium", color="0.4", parse_math=False)
    path = run / "report.png"
    temporary = path.with_name("report.tmp.png")
    figure.savefig(temporary, dpi=120)
    temporary.rename(path)
    return path


def print_summary(run: str | Path, num_samples: int = 3) -> None:
    """Held-out score or loss before and after, and the newest sampled completions, to standard output."""
    run, console = Path(run), Console()
    rows = read_rows(run / "metrics.jsonl")
    evaluations = [row for row in rows if "eval/pass@1" in row or "eval/accuracy" in row]
    steps = [row for row in rows if "loss" in row]
    columns = _GRPO_SUMMARY if any("reward/mean" in row for row in steps) else _SFT_SUMMARY
    if any("train/accuracy" in row for row in steps):
        columns = _REWARD_MODEL_SUMMARY
    table = Table(title=Text(str(run)), title_justify="left")
    for column in ("step", *columns):
        table.add_column(column, justify="right")
    for row in evaluations or steps[:1] + steps[1:][-1:]:
        cells = ["" if row.get(key) is None else form.format(row[key]) for key, form in columns.values()]
        table.add_row(str(row["step"]), *cells)
    console.print(table)
    newest = {sample["prompt"]: sample for sample in read_rows(run / "samples.jsonl")}
    for prompt, sample in list(newest.items())[-num_samples:]:
        reward = "missing" if sample["reward"] is None else f"{sample['reward']:.3g}"
        text = Text.assemble((prompt.strip(), "dim"), "\n", sample["completion"].strip())
        console.print(Panel(text, title=f"step {sample['step']}, reward {reward}"))


def _draw_scores(axis: Axes, rows: list[dict], steps: list[dict]) -> None:
    evaluations = [row for row in rows if row.get("eval/pass@1") is not None]
    if any(row.get("reward/accuracy") is not None for row in steps):
        axis.plot(*_series(steps, "reward/accuracy"), color="0.7", label="accuracy of the rollouts")
    if evaluations:
        axis.plot(*_series(evaluations, "eval/pass@1"), "o-", color="tab:blue", label="held-out pass@1")
        if evaluations[-1]["eval/k"] > 1:
            label = f"held-out cons@{evaluations[-1]['eval/k']:.0f}"
            axis.plot(*_series(evaluations, "eval/cons@k"), "s--", color="tab:green", label=label)
    axis.set_ylim(-0.02, 1.02)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    _label(axis, "score")


def _draw_lengths(axis: Axes, steps: list[dict]) -> None:
    axis.plot(*_series(steps, "length/mean"), color="tab:blue", label="mean")
    axis.fill_between(
        *_series(steps, "length/min"), _series(steps, "length/max")[1], alpha=0.12, label="shortest to longest"
    )
    axis.set_ylim(bottom=0)
    numbers, reflections = _series(steps, "reflection/per_1000_tokens")
    if np.nan_to_num(reflections).any():
        axis.plot([], [], ":", color="tab:red", label="reflections in 1,000")
        right = axis.twinx()
        right.plot(numbers, reflections, ":", color="tab:red")
        right.set_ylim(bottom=0)
        right.tick_params(colors="tab:red")
        right.spines[["top", "right"]].set_visible(False)
    _label(axis, "response length, tokens")


def _draw_rewards(axis: Axes, steps: list[dict]) -> None:
    names = [key for key in steps[0] if key.startswith("reward/") and key.removeprefix("reward/") not in _NOT_REWARDS]
    for name in names:
        axis.plot(*_series(steps, name), label=name.removeprefix("reward/"))
    axis.plot(*_series(steps, "reward/mean"), color="black", label="weighted sum")
    _label(axis, "mean reward")


def _draw_times(axis: Axes, steps: list[dict]) -> None:
    seconds = {phase: [row.get(f"time/{phase}_s") or 0.0 for row in steps] for phase in PHASES}
    total = sum(map(sum, seconds.values()))
    shares = {phase: sum(values) / total for phase, values in seconds.items() if sum(values) > _SHOWN_SHARE * total}
    if shares:
        axis.stackplot(
            [row["step"] for row in steps],
            *[seconds[phase] for phase in shares],
            labels=[f"{phase} {share:.0%}" for phase, share in shares.items()],
            alpha=0.85,
        )
    _label(axis, "seconds a step")


def _label(axis: Axes, title: str) -> None:
    """Title, and the legend between it and the axes, where it hides no curve."""
    handles, labels = axis.get_legend_handles_labels()
    num_lines = -(-len(labels) // _LEGEND_COLUMNS)
    axis.set_title(title, loc="left", pad=8 + 16 * num_lines, fontweight="bold")
    if handles:
        place = {"loc": "lower left", "bbox_to_anchor": (-0.01, 0.99), "frameon": False}
        axis.legend(handles, labels, **place, ncols=_LEGEND_COLUMNS, fontsize="small", columnspacing=1.2)


def _series(rows: list[dict], key: str) -> tuple[list[int], list[float]]:
    return [row["step"] for row in rows], [float("nan") if row.get(key) is None else row[key] for row in rows]
