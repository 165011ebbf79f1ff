"""`flashgrpo report RUN`: the paper's two curves (score and response length over steps), rewards, and the time's shares."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from flashgrpo.grpo.run_folder import RunError, read_rows

_PHASES = ("generate", "reward", "pack", "score", "train", "sync")
_NOT_REWARDS = {"mean", "std", "missing"}


def write_report(run: str | Path) -> Path:
    """Draw RUN/report.png from RUN/metrics.jsonl; returns its path. Raises RunError where there is nothing to draw."""
    run = Path(run)
    rows = read_rows(run / "metrics.jsonl")
    steps = [row for row in rows if "reward/mean" in row]
    if not steps:
        raise RunError(f"{run / 'metrics.jsonl'}: no training step found; is {run} the folder of a GRPO run?")
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    _draw_scores(axes[0, 0], rows, steps)
    _draw_lengths(axes[0, 1], steps)
    _draw_rewards(axes[1, 0], steps)
    _draw_times(axes[1, 1], steps)
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(str(run))
    path = run / "report.png"
    temporary = path.with_name("report.tmp.png")
    figure.savefig(temporary, dpi=120)
    plt.close(figure)
    temporary.rename(path)
    return path


def print_summary(run: str | Path, num_samples: int = 3) -> None:
    """Held-out score before and after, last rewards, and the newest sampled completions, to standard output."""
    run, console = Path(run), Console()
    rows = read_rows(run / "metrics.jsonl")
    evaluations = [row for row in rows if "eval/pass@1" in row]
    steps = [row for row in rows if "reward/mean" in row]
    table = Table(title=str(run), title_justify="left")
    for column in ("step", "held-out pass@1", "reward", "length", "sampled tokens/s"):
        table.add_column(column, justify="right")
    for row in evaluations or steps[:1] + steps[-1:]:
        cells = [row.get("eval/pass@1"), row.get("reward/mean"), row.get("length/mean"), row.get("tokens_per_s")]
        formats = ("{:.1%}", "{:.3f}", "{:.1f}", "{:,.0f}")
        table.add_row(
            str(row["step"]), *["" if c is None else f.format(c) for f, c in zip(formats, cells, strict=True)]
        )
    console.print(table)
    for sample in read_rows(run / "samples.jsonl")[-num_samples:]:
        title = f"step {sample['step']}, reward {sample['reward']}"
        console.print(Panel(f"[dim]{_plain(sample['prompt'])}[/dim]\n{_plain(sample['completion'])}", title=title))


def _draw_scores(axis: Axes, rows: list[dict], steps: list[dict]) -> None:
    evaluations = [row for row in rows if row.get("eval/pass@1") is not None]
    if any(row.get("reward/accuracy") is not None for row in steps):
        axis.plot(*_series(steps, "reward/accuracy"), color="0.7", label="accuracy of the rollouts")
    if evaluations:
        axis.plot(*_series(evaluations, "eval/pass@1"), "o-", color="tab:blue", label="held-out pass@1")
        if evaluations[-1]["eval/k"] > 1:
            label = f"held-out cons@{evaluations[-1]['eval/k']:.0f}"
            axis.plot(*_series(evaluations, "eval/cons@k"), "s--", color="tab:green", label=label)
    axis.set_title("score")
    axis.set_ylim(-0.02, 1.02)
    axis.legend(loc="lower right")


def _draw_lengths(axis: Axes, steps: list[dict]) -> None:
    axis.plot(*_series(steps, "length/mean"), color="tab:blue", label="mean")
    axis.fill_between(
        *_series(steps, "length/min"), _series(steps, "length/max")[1], alpha=0.12, label="shortest to longest"
    )
    axis.set_title("response length, tokens")
    axis.set_ylim(bottom=0)
    axis.legend(loc="lower right")


def _draw_rewards(axis: Axes, steps: list[dict]) -> None:
    names = [key for key in steps[0] if key.startswith("reward/") and key.removeprefix("reward/") not in _NOT_REWARDS]
    for name in names:
        axis.plot(*_series(steps, name), label=name.removeprefix("reward/"))
    axis.plot(*_series(steps, "reward/mean"), color="black", label="weighted sum")
    axis.set_title("mean reward")
    axis.legend(loc="lower right")


def _draw_times(axis: Axes, steps: list[dict]) -> None:
    x = [row["step"] for row in steps]
    seconds = {phase: [row.get(f"time/{phase}_s") or 0.0 for row in steps] for phase in _PHASES}
    shown = {phase: values for phase, values in seconds.items() if sum(values)}
    axis.stackplot(x, *shown.values(), labels=list(shown), alpha=0.85)
    axis.set_title("seconds a step")
    axis.legend(loc="upper right")


def _series(rows: list[dict], key: str) -> tuple[list[int], list[float]]:
    return [row["step"] for row in rows], [float("nan") if row.get(key) is None else row[key] for row in rows]


def _plain(text: str) -> str:
    return text.strip().replace("[", "\\[")
