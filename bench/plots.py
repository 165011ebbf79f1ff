"""The pictures of results: `bench kernels`, time and memory over tokens; `bench demo-seeds`, its curves over steps."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from flashgrpo.bench.timing import Row
from flashgrpo.model.files import whole_file

Points = dict[int, float]  # a value at each number of tokens
_COLUMNS = 3
_OURS = "flashgrpo"


def draw(source: Path, target: Path) -> None:
    """One PNG of a panel an operation, log-log; what was not measured has no point, and no points no panel."""
    header, *rows = map(json.loads, source.read_text().splitlines())
    lines: dict[str, dict[str, Points]] = defaultdict(lambda: defaultdict(dict))
    limits: dict[str, Points] = defaultdict(dict)
    for row in rows:
        value = row.get("peak_mib" if row["op"] == "memory" else "p50_ms")
        # Variants are other layouts, and no points of an operation's line.
        if value is not None and not row["variant"]:
            lines[row["op"]][row["provider"]][row["tokens"]] = max(value, 1) if row["op"] == "memory" else value
            limits[row["op"]][row["tokens"]] = row["limit_ms"]
    if not lines:
        return
    width, height = min(len(lines), _COLUMNS), -(-len(lines) // _COLUMNS)
    size = 4.6 * width, 3.7 * height + 1.0
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(height, width, squeeze=False)
    # A provider has the same colour in all panels.
    colours: dict[str, Any] = {}
    handles = {}
    for panel, (op, of_op) in zip(panels.flat, lines.items(), strict=False):
        for name in of_op:
            colours.setdefault(name, colormaps["tab20"](len(colours) % 20))
        _draw_operation(panel, op, of_op, limits[op], colours)
        handles |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    for panel in panels.flat[len(lines) :]:
        panel.axis("off")
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2 * width, fontsize=8)
    figure.suptitle(f"{header['machine']['device']}, torch {header['machine']['torch']}", fontsize=10)
    _save(figure, target)


def _draw_operation(panel: Axes, op: str, lines: dict[str, Points], limits: Points, colours: dict[str, Any]) -> None:
    for name, points in lines.items():
        width = 2.4 if name == _OURS else 1.2
        style = {"ms": 3.5, "lw": width, "zorder": 1 + width, "color": colours[name], "label": name}
        panel.plot(*zip(*sorted(points.items()), strict=True), "o-", **style)
    if op != "memory":
        limit = zip(*sorted(limits.items()), strict=True)
        panel.plot(*limit, "k_--", lw=1, label="limit of the machine")  # a mark where a line has one point
    panel.set(xscale="log", yscale="log", xlabel="targets" if op == "memory" else "tokens")
    ticks = sorted(limits)
    panel.set_xticks(ticks, [f"{x // 1024}k" if x >= 1024 else str(x) for x in ticks])
    # The labels are those of the shapes that were measured, between them matplotlib would add its own.
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.set_title("linear_grpo_loss: peak MiB" if op == "memory" else f"{op}: ms", fontsize=10)
    panel.grid(True, which="major", alpha=0.3)


def draw_demo(runs: Sequence[Row], target: Path) -> None:
    """The paper's two curves, one line a seed."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, 2)
    curves = {"pass@1": "held-out pass@1", "length": "response length, tokens"}
    for axis, (key, title) in zip(axes, curves.items(), strict=True):
        for run in runs:
            axis.plot([*map(int, run[key])], [*run[key].values()], label=f"seed {run['seed']}")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(0, 1)
    axes[1].set_ylim(bottom=0)
    axes[0].legend(loc="lower right")
    _save(figure, target)


def _save(figure: Figure, target: Path) -> None:
    with whole_file(target) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
