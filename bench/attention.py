"""Which kernels backend "auto" of attention takes on this machine: those of Triton, or for Hopper those of Gluon.

    flashgrpo bench attention                # what was found here
    flashgrpo bench attention --qualify      # finds it out; needs a GPU of sm_90

Gluon's are taken where they have won, by head_dim and dtype. Each of these has a process of its own with a time limit,
so that a hang or a crash costs that entry alone. There output and gradients of both, on random packs with NaN in rows
that others must not read, are compared with float64: the RMS error may be 1.1 times that of plain torch in the same
dtype, the largest 1.5 times, and the size of the whole 0.05% off. Then Gluon's must repeat a larger pack 1,000 times,
forward and backward, bit for bit. Then both are timed at the shapes of `flashgrpo bench kernels`, and Gluon's win if
they take less time for all of these together, forward and backward.

Writes the winners, after each entry, to the file that "auto" reads (kernels/qualified.py), and in the end
attention_DEVICE.json into bench/results, or $OUT.
"""

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product

import torch
from rich.progress import track

from flashgrpo.bench.attention_checks import find_change, find_fault, random_pack
from flashgrpo.bench.cases import cases
from flashgrpo.bench.peers import own_attention
from flashgrpo.bench.timing import Row, machine, markdown, noted, option_parser, publish, time_turns
from flashgrpo.grpo.errors import RunInputError
from flashgrpo.grpo.run.progress import console
from flashgrpo.kernels.attention import GLUON_HEAD_DIMS, plan_attention, planned_attention
from flashgrpo.kernels.qualified import cache_path, input_key, machine_key, read_winners
from flashgrpo.model.files import write_text

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
BACKENDS = "triton", "gluon"
NUM_PACKS, LONGEST, REPETITIONS = 8, 400, 1000
_PASS_S = 0.05  # of a backend, at a shape, forward or backward


def time_backends(head_dim: int, dtype: torch.dtype, device: torch.device, sizes: str) -> Row:
    """Milliseconds of each backend, forward and backward, in all; the largest spread; and who is faster."""
    total: Row = {f"{name}_ms": dict.fromkeys(BACKENDS, 0.0) for name in ("forward", "backward")}
    spread = 0.0
    for case in cases(sizes, dtype):
        if case.op != "attention":
            continue
        case = replace(case, shape={**case.shape, "head_dim": head_dim})
        x, heads = case.make(device), (case.shape["heads"], case.shape["kv_heads"], head_dim)
        forward, backward = {}, {}
        for backend in BACKENDS:
            index = x["cu_seqlens"], x["prefix"], case.tokens, heads, dtype
            plan = plan_attention(*index, max_seqlen=x["max_seqlen"], backend=backend)
            qkv = x["q"], x["k"], x["v"]
            forward[backend] = partial(planned_attention, *qkv, plan)
            backward[backend] = partial(torch.autograd.grad, forward[backend](), qkv, x["d_out"], retain_graph=True)
        for name, calls in (("forward_ms", forward), ("backward_ms", backward)):
            for backend, times in time_turns(calls, device, budget_s=_PASS_S).items():
                total[name][backend] += times["p50_ms"]
                spread = max(spread, times["spread"])
    winner = min(BACKENDS, key=lambda backend: sum(times[backend] for times in total.values()))
    return total | {"spread": spread, "winner": winner}


def measure(head_dim: int, dtype: torch.dtype, device: torch.device) -> Row:
    """`time_backends`, after the checks. Raises ValueError for the first fault."""
    # What no kernel has written is NaN then, and not what the run before has left there.
    torch.use_deterministic_algorithms(True, warn_only=True)
    for seed, backend in product(range(NUM_PACKS), BACKENDS):
        pack = random_pack(seed, LONGEST, head_dim, dtype, device)
        if fault := find_fault(partial(own_attention, backend=backend), pack):
            raise ValueError(f"{backend}, pack {seed}: {fault}")
    pack = random_pack(3, 10 * LONGEST, head_dim, dtype, device)
    if change := find_change(partial(own_attention, backend=BACKENDS[1]), pack, REPETITIONS):
        raise ValueError(f"{BACKENDS[1]}: {change}")
    torch.use_deterministic_algorithms(False)
    return time_backends(head_dim, dtype, device, "full")


def attempt(command: Sequence[str], limit_s: float) -> Row:
    """The row that a process prints as its last line, or how it ended without; the winner is "triton" then."""
    row = {"winner": "triton", "status": "failed"}
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return row | {"note": f"hung after {limit_s:g} s"}
    try:
        return row | json.loads(ended.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = ended.stderr.strip().rpartition("\n")[2]
        return row | {"note": f"exit code {ended.returncode}: {last}"}


def table(found: Row) -> list[str]:
    """Of a results file."""
    columns = [(name, backend) for name in ("forward", "backward") for backend in BACKENDS]
    cells = []
    for row in found["rows"]:
        is_timed = "spread" in row
        times = [f"{row[f'{name}_ms'][backend]:.3g}" if is_timed else "" for name, backend in columns]
        cells.append([row["input"], *times, f"{row['spread']:.0%}" if is_timed else "", row["winner"], row["note"]])
    names = [f"{name} by {backend}, ms:" for name, backend in columns]
    return markdown(["", *names, "spread:", "winner", "note"], cells)


def status(device: torch.device) -> str:
    """What "auto" is, by the file."""
    winners = read_winners().get(machine_key(device))
    if not winners:
        return 'nothing is qualified here, so "auto" is "triton"; `flashgrpo bench attention --qualify` runs both'
    return '"auto" is ' + "".join(f'"{winner}" at {key}; ' for key, winner in winners.items()) + '"triton" elsewhere'


def qualify(dtypes: Sequence[str], limit_s: float, device: torch.device) -> None:
    """Measure, write and print. For "auto" an entry is "triton" until it is done."""
    entries = {input_key(head_dim, DTYPES[x]): (str(head_dim), x) for x in dtypes for head_dim in GLUON_HEAD_DIMS[::-1]}
    every, here, path = read_winners(), machine_key(device), cache_path()
    winners = every.setdefault(here, {})
    found: Row = {"machine": machine(device), "rows": []}

    def write(won: Row) -> None:
        winners.update(won)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(every, indent=1) + "\n")

    write(dict.fromkeys(entries, "triton"))
    for key, entry in track(entries.items(), "qualifying", console=console):
        row = attempt([sys.executable, "-m", "flashgrpo.bench.attention", *entry], limit_s)
        found["rows"].append({"input": key} | row)
        write({key: row["winner"]})
    publish("attention_{device}.json", found, table(found), status(device))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = option_parser("attention", __doc__)
    parser.add_argument("--qualify", action="store_true", help="run both, for minutes")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=[*DTYPES], help="default: both")
    parser.add_argument("--limit", type=float, default=90.0, metavar="SECONDS", help="of an entry; default: 90")
    options = parser.parse_args(arguments)
    if not 0 < options.limit < math.inf:
        parser.error(f"--limit: found {options.limit:g}, wanted a number above 0")
    has_gpu = torch.cuda.is_available()
    chip = torch.cuda.get_device_name() if has_gpu else "no GPU"
    if has_gpu and not torch.version.hip and torch.cuda.get_device_capability() == (9, 0):
        device = torch.device("cuda")
        if options.qualify:
            qualify(options.dtypes, options.limit, device)
        else:
            print(status(device))
    elif options.qualify:
        raise RunInputError(f"--qualify: found {chip}, wanted one of sm_90, as an H100 or H200")
    else:
        print(f'"auto" is "triton": found {chip}, and "gluon" is for sm_90')
    return 0


if __name__ == "__main__":
    made: Row = {"status": "ok", "note": ""}
    with noted(made):
        made |= measure(int(sys.argv[1]), DTYPES[sys.argv[2]], torch.device("cuda"))
    print(json.dumps(made))
