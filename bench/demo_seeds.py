"""The demo with several seeds: held-out score and response length over steps, as a table and a picture.

    flashgrpo bench demo-seeds --seeds 1 2 3

Each seed makes its own problems, model, cold start and run. Writes bench/results/demo.json and
demo.png.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from flashgrpo.bench.plots import draw_demo
from flashgrpo.bench.timing import Row, machine, markdown, option_parser, publish
from flashgrpo.grpo.run.folder import read_rows


def run_seed(seed: int, output: Path) -> Row:
    """One demo in a process of its own: its curves, and wall seconds from start to end."""
    start = time.perf_counter()
    # A user's own start of it: imports and the installation's checks are in the seconds.
    command = [sys.executable, "-m", "flashgrpo.grpo.cli", "demo", "--seed", str(seed), "--output", str(output)]
    subprocess.run(command, check=True)
    run: Row = {"seed": seed, "seconds": time.perf_counter() - start, "pass@1": {}, "length": {}}
    for row in read_rows(output / "grpo" / "metrics.jsonl"):
        for name, key in (("pass@1", "eval/pass@1"), ("length", "length/mean")):
            if key in row:
                run[name][row["step"]] = row[key]
    return run


def table(found: Row) -> list[str]:
    """Of demo.json."""
    cells = []
    for run in found["runs"]:
        first, *_, last = run["pass@1"].values()
        cells.append([str(run["seed"]), f"{first:.1%}", f"{last:.1%}", f"{run['seconds']:.0f}"])
    return markdown(["seed", "after the cold start", "after GRPO", "seconds in all"], cells)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = option_parser("demo-seeds", __doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, default=Path("runs/demo_seeds"), help="folder of the runs")
    options = parser.parse_args(arguments)
    where = machine(torch.device("cpu"))
    runs = [run_seed(seed, options.output / str(seed)) for seed in options.seeds]
    found = {"machine": where, "runs": runs}
    path = publish("demo.json", found, table(found))
    draw_demo(runs, path.with_suffix(".png"))
    return 0
