"""The pictures of `bench kernels`, from its results file: time over tokens an operation, and memory over targets."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from flashgrpo.model.files import whole_file

_COLUMNS = 3
_OURS = "flashgrpo"


def draw(source: Path, target: Path) -> None:
    """One PNG of a panel an operation, log-log; what was not measured has no point, and no points no panel."""
    header, *rows = (json.loads(line) for line in source.read_text().splitlines())
    lines: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if not row["variant"] and (row.get("peak_mib") if row["op"] == "memory" else row.get("p50_ms")) is not None:
            lines[row["op"]][row["provider"]].append(row)
    ops = sorted(lines, key=lambda op: op == "memory")
    if not ops:
        return
    names = list(dict.fromkeys(name for op in ops for name in lines[op]))
    colours = {name: plt.get_cmap("tab20")(i % 20) for i, name in enumerate(sorted(names, key=lambda x: x != _OURS))}
    height = -(-len(ops) // _COLUMNS)
    width = min(len(ops), _COLUMNS)
    figure, panels = plt.subplots(
        height, width, figsize=(4.6 * width, 3.7 * height + 1.0), squeeze=False, layout="constrained"
    )
    for panel, op in zip(panels.flat, ops, strict=False):
        _panel(panel, op, lines[op], colours)
    for panel in panels.flat[len(ops) :]:
        panel.axis("off")
    handles = {label: x for panel in panels.flat for x, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=max(1, 2 * width), fontsize=8)
    figure.suptitle(f"{header['machine']['device']}, torch {header['machine']['torch']}", fontsize=10)
    with whole_file(target) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


def _panel(panel: Axes, op: str, lines: dict[str, list[dict[str, Any]]], colours: dict[str, Any]) -> None:
    is_memory = op == "memory"
    for name, rows in lines.items():
        rows.sort(key=lambda row: row["tokens"])
        values = [max(row["peak_mib"], 1) if is_memory else row["p50_ms"] for row in rows]
        style: dict[str, Any] = {"lw": 2.4, "zorder": 3} if name == _OURS else {"lw": 1.2}
        panel.plot([row["tokens"] for row in rows], values, "o-", ms=3.5, color=colours[name], label=name, **style)
    if not is_memory:
        limits = sorted({(row["tokens"], row["limit_ms"]) for rows in lines.values() for row in rows})
        panel.plot(*zip(*limits, strict=True), "k--", lw=1, label="limit of the machine")
    ticks = sorted({row["tokens"] for rows in lines.values() for row in rows})
    panel.set(xscale="log", yscale="log", xlabel="targets" if is_memory else "tokens")
    panel.set_xticks(ticks, [f"{x // 1024}k" if x >= 1024 else str(x) for x in ticks])
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.set_title("linear_grpo_loss: peak MiB" if is_memory else f"{op}: ms", fontsize=10)
    panel.grid(True, which="major", alpha=0.3)
