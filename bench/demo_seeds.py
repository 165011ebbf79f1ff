"""The demo with several seeds: held-out score and response length over steps, as a table and a picture.

    flashgrpo bench demo-seeds --seeds 1 2 3

Each seed makes its own problems, model, cold start and run. Writes bench/results/demo.json and demo.png.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from flashgrpo.bench.timing import machine, option_parser, results_folder
from flashgrpo.grpo.run.folder import read_rows
from flashgrpo.model.files import write_text


def run_seed(seed: int, output: Path) -> dict:
    """One demo in a process of its own: its curves, and wall seconds from start to end."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "flashgrpo.grpo.cli", "demo", "--seed", str(seed), "--output", str(output)]
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - start
    rows = read_rows(output / "grpo" / "metrics.jsonl")
    scores = {row["step"]: row["eval/pass@1"] for row in rows if "eval/pass@1" in row}
    lengths = {row["step"]: row["length/mean"] for row in rows if "length/mean" in row}
    return {"seed": seed, "seconds": seconds, "pass@1": scores, "length": lengths}


def draw(runs: list[dict], path: Path) -> None:
    """The paper's two curves, one line a seed."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    curves = {"pass@1": "held-out pass@1", "length": "response length, tokens"}
    for axis, (key, title) in zip(axes, curves.items(), strict=True):
        for run in runs:
            axis.plot([int(step) for step in run[key]], list(run[key].values()), label=f"seed {run['seed']}")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(0, 1)
    axes[1].set_ylim(bottom=0)
    axes[0].legend(loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = option_parser("demo-seeds", __doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, default=Path("runs/demo_seeds"), help="folder of the runs")
    options = parser.parse_args(arguments)
    runs = [run_seed(seed, options.output / str(seed)) for seed in options.seeds]
    found = {"machine": machine(torch.device("cpu")), "runs": runs}
    write_text(results_folder() / "demo.json", json.dumps(found, indent=1) + "\n")
    draw(runs, results_folder() / "demo.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
