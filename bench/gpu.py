"""All that one GPU can tell, on a machine without a network: `make gpu`, or `flashgrpo bench gpu [--wheels FOLDER]`.

The kernels' tests, then `bench kernels`, then `bench step`, each in a process of its own that is ended at its time
limit, nine minutes in all; what fails is reported and ends nothing else. Needs python3 with torch, triton,
transformers, rich and pytest; peers are what is installed, and the wheels of a folder. Results and logs go to
bench/results, or $OUT.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from flashgrpo.bench.timing import ROOT, option_parser, results_folder

PARTS = {  # command, seconds
    "tests": (["make", "gpu-test"], 180),
    "kernels": ([sys.executable, "-m", "flashgrpo.bench.kernels"], 190),
    "step": ([sys.executable, "-m", "flashgrpo.bench.step"], 140),
}


def run_parts(
    parts: Mapping[str, tuple[Sequence[str], float]], folder: Path, environment: Mapping[str, str]
) -> dict[str, tuple[str, float]]:
    """Run each command to its end or its limit, its output in `folder`/gpu_NAME.log; outcome and seconds of each."""
    outcomes = {}
    for name, (command, limit_s) in parts.items():
        log, start = folder / f"gpu_{name}.log", time.monotonic()
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(limit_s)
                outcome = "passed" if code == 0 else f"failed: exit code {code}"
            except subprocess.TimeoutExpired:
                outcome = f"ended at its limit of {limit_s:.0f} s"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with what it has started
                process.wait()
        outcomes[name] = outcome, time.monotonic() - start
        lines = log.read_text(errors="replace").splitlines()
        print(f"--- {name}: {outcome}", *lines[-60 if name != "tests" or outcome != "passed" else -3 :], sep="\n")
        sys.stdout.flush()
    return outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    parser = option_parser("gpu", __doc__)
    parser.add_argument("--wheels", type=Path, help="folder of wheels, installed beside the repository first")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("flashgrpo: torch finds no GPU; on a CPU run `flashgrpo bench kernels` and `bench step`", file=sys.stderr)
        return 2
    folder = results_folder()
    paths = [path] if (path := os.environ.get("PYTHONPATH")) else []
    if options.wheels:
        site, wheels = str(ROOT / ".wheels"), [str(wheel) for wheel in sorted(options.wheels.glob("*.whl"))]
        install = f"{sys.executable} -m pip install -q --no-index --no-deps --upgrade --target".split()
        run_parts({"wheels": ([*install, site, *wheels], 30)}, folder, os.environ)
        paths.insert(0, site)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "COLUMNS": "160"}
    outcomes = run_parts({name: PARTS[name] for name in options.parts}, folder, environment)
    table = Table("part", "outcome", "seconds", box=SIMPLE)
    for name, (outcome, seconds) in outcomes.items():
        table.add_row(name, outcome, f"{seconds:.0f}")
    Console().print(table, f"results and logs: {folder}")
    return int(any(outcome != "passed" for outcome, _ in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
