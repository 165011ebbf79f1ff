"""A pipeline in one picture: the RL stages one after the other, and what each model scores in the end."""

import fnmatch
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from flashgrpo.grpo.run.folder import read_rows

_COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")
_PANELS = {  # keys of metrics.jsonl, or patterns of them; the first of two, which is measured at times, is drawn strong
    "score: held-out pass@1, accuracy of the rollouts": ("eval/pass@1", "reward/accuracy"),
    "response length, tokens": ("length/mean",),
    "reasoning in the target language": ("reward/language_consistency",),
    "reflective phrases per 1,000 tokens": ("reflection/per_1000_tokens",),
    "reward of the prompts of [sources]": ("source/*/reward",),
}
_SHARES = ("reward/language_consistency", "eval/pass@1")


def draw_pipeline(stages: dict[str, Path], scores: list[dict[str, Any]], path: Path) -> Path:
    """Draw the metrics of runs, by the names of their stages, side by side, and the rows of an evaluation; returns
    `path`.
    """
    runs = {name: read_rows(folder / "metrics.jsonl") for name, folder in stages.items()}
    figure = Figure(figsize=(16, 8), layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    for axis, (title, keys) in zip(panels, _PANELS.items(), strict=False):
        _draw_stages(axis, runs, keys)
        axis.set_title(title, loc="left", fontweight="bold", pad=20)
        if keys[0] in _SHARES:
            axis.set_ylim(-0.02, 1.02)
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    _draw_scores(panels[-1], scores)
    temporary = path.with_name(f"{path.stem}.tmp.png")
    figure.savefig(temporary, dpi=110)
    temporary.rename(path)
    return path


def _draw_stages(axis: Axes, runs: dict[str, list[dict[str, Any]]], keys: tuple[str, ...]) -> None:
    start = 0
    for (name, rows), color in zip(runs.items(), _COLORS * len(runs), strict=False):
        found = dict.fromkeys(key for pattern in keys for row in rows for key in fnmatch.filter(row, pattern))
        found.pop("source/data/reward", None)  # the others' are on a scale of their own
        for number, key in enumerate(found):
            known = [row for row in rows if row.get(key) is not None]
            steps, values = [start + row["step"] for row in known], [row[key] for row in known]
            is_sparse = number == 0 and len(keys) > 1
            axis.plot(steps, values, "o-" if is_sparse else "-", markersize=3, color=color, alpha=0.35 if number else 1)
        end = start + max((row["step"] for row in rows), default=0)
        axis.text((start + end) / 2, 1.01, name, color=color, transform=axis.get_xaxis_transform(), ha="center")
        axis.axvline(end, color="0.85", linewidth=0.8)
        start = end
    axis.set_xlim(0, max(start, 1))
    axis.set_xlabel("step, of all RL stages")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_scores(axis: Axes, rows: list[dict[str, Any]]) -> None:
    """pass@1 with its interval, and the majority's score, of the models on the first benchmark."""
    rows = [row for row in rows if row["benchmark"] == rows[0]["benchmark"]]
    places = range(len(rows))
    scores = [row["pass@1"] for row in rows]
    errors = [[row["pass@1"] - row["pass@1/low"] for row in rows], [row["pass@1/high"] - row["pass@1"] for row in rows]]
    axis.barh(places, scores, xerr=errors, color="tab:blue", alpha=0.75, label="pass@1, 95% interval")
    if rows:
        axis.plot([row["cons@k"] for row in rows], places, "s", color="tab:green", label=f"cons@{rows[0]['k']:.0f}")
        axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.3, 1.0), ncols=2, fontsize="small")
    axis.set_yticks(places, [row["model"] for row in rows])
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_title("held-out", loc="left", fontweight="bold", pad=20)
    axis.spines[["top", "right"]].set_visible(False)
