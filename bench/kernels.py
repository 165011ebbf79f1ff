"""Every kernel against every peer that is installed: time, memory, share of the machine's limit, error.

    flashgrpo bench kernels [--ops OP ...] [--providers NAME ...] [--sizes small|full] [--budget SECONDS]
                            [--peer MODULE:PROVIDERS ...]

What is measured stands in cases.py, by whom in peers.py, and how in timing.py. Before an operation
is timed, every provider runs it on fewer tokens against float64. The error is the RMS of the
difference by the RMS of the truth, the worst among output and gradients; it may be 1.1 times that
of plain torch in the same dtype, and 1e-6. A peer beyond that is timed and marked; flashgrpo beyond
it is not timed, and the exit code is 1. All providers of a case run in turns, each for the same
time in both of two passes.

Writes kernels_DEVICE.jsonl into bench/results, or $OUT: the machine and its limits, then a row a
case and provider, whole after each case; and a plot of time and memory beside it.
"""

import contextlib
import importlib
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from flashgrpo.bench.cases import Case, Results, as_float64, cases, fold_prompts
from flashgrpo.bench.peers import PEERS, PROVIDERS, Peers, Provider, load_peers, providers
from flashgrpo.bench.timing import (
    Limits,
    Row,
    Side,
    in_turns,
    machine,
    markdown,
    measure_limits,
    noted,
    option_parser,
    peak_mib,
    sample_ms,
    show,
    write_results,
)
from flashgrpo.grpo.run.progress import console
from flashgrpo.model.waits import word_for

_PACKAGES = ("liger-kernel", "cut-cross-entropy", "quack-kernels", "trl", "flash-attn", "flash-attn-3", "flash-attn-4")
_ROOM, _FLOOR = 1.1, 1e-6  # of plain torch's error; of the values
_FAULTS = "wrong", "failed", "out of memory"
_BUDGETS_S = {"small": 150.0, "full": 165.0}
_COLUMNS = {  # of the terminal's table, from a row's values; they fit 80 characters
    "ms:": ("p50_ms", "{:.4g}"),
    "spread:": ("spread", "{:.0%}"),
    "peak MiB:": ("peak_mib", "{:.0f}"),
    "TFLOP/s:": ("tflops_per_s", "{:.4g}"),
    "GB/s:": ("gb_per_s", "{:.4g}"),
    "limit:": ("share_of_limit", "{:.0%}"),
    "x ours:": ("ratio", "{:.2f}"),
    "error:": ("error", "{:.0e}"),
}


def check_case(case: Case, device: torch.device, offered: Sequence[Provider]) -> dict[str, Row]:
    """Of each provider `status`, `note`, and `error` and `torch_error` of its worst result.

    A loss is compared on the scale of its tokens' losses, and may be off by as much as they are in
    plain torch.
    """
    inputs = case.make(device)
    exact, plain = case.plain(as_float64(inputs)), case.plain(inputs)
    allowed = _errors(plain, exact)
    if "loss" in exact:
        # A mean of terms that cancel may be near 0, where no relative error is small.
        allowed["loss"] = _rms(plain["terms"].double() - exact["terms"]) / _rms(exact["terms"])
    found: dict[str, Row] = {}
    for provider in offered:
        row = found[provider.name] = {"status": "ok", "note": ""}
        with noted(row):
            results = provider.call(case, inputs)()
            if provider.is_bound:
                continue
            errors = _errors(fold_prompts(case, results) if provider.repeats(case) else results, exact)
            wrong = [name for name in errors if not errors[name] <= _ROOM * allowed[name] + _FLOOR]
            # The worst is the one furthest above what it may be, not the largest.
            times = {name: errors[name] / (allowed[name] + _FLOOR) for name in wrong or errors}
            worst = max(times, key=lambda name: times[name])
            row |= {"error": errors[worst] if math.isfinite(errors[worst]) else None, "torch_error": allowed[worst]}
            if wrong:
                row |= {"status": "wrong", "note": f"{worst} {times[worst]:.1f}x as wrong as torch's"}
    return found


def time_case(
    case: Case,
    device: torch.device,
    offered: Sequence[Provider],
    rows: dict[str, Row],
    budget_s: float,
    deadline: float,
) -> None:
    """Add peak memory and times to the rows of the providers that have passed, in about `budget_s` seconds.

    Nothing new begins after `deadline`, of time.monotonic().
    """
    inputs = case.make(device)
    passed = []
    for provider in offered:
        status = rows[provider.name]["status"]
        if status == "ok" or (status == "wrong" and not provider.is_ours):
            passed.append(provider)
    sides: dict[str, Side] = {}
    for provider in passed:
        row = rows[provider.name]
        with noted(row):
            _check_time(deadline)
            call = provider.call(case, inputs)
            if case.op != "memory":
                # Compilation takes memory of its own, which is no part of the peak.
                call()
            row["peak_mib"], _ = peak_mib(call, device)
            if case.op != "memory":
                sides[provider.name] = partial(sample_ms, call, device, budget_s=budget_s / 2 / len(passed), rounds=2)
    found = dict(in_turns(sides, lambda name: noted(rows[name])))
    for name, times in found.items():
        # One that failed in its second pass has no times: they would be compared with those of two passes.
        if rows[name]["status"] in ("ok", "wrong"):
            rows[name] |= times | _rates(case, times["p50_ms"], rows[name]["limit_ms"])
    ours = rows.get("flashgrpo", {}).get("p50_ms")
    for row in rows.values():
        row["ratio"] = row["p50_ms"] / ours if ours and "p50_ms" in row else None


def run(
    chosen: Sequence[Case], names: Sequence[str] | None, device: torch.device, budget_s: float, more: Peers
) -> list[Row]:
    """Measure the cases, and write what there is after each; the header, and a row a case and provider."""
    deadline = time.monotonic() + budget_s
    where, limits = machine(device), measure_limits(device)
    lines: list[Row] = [{"machine": where, "limits": asdict(limits), "peers": _versions(), "budget_s": budget_s}]
    path = Path()
    gates: dict[str, dict[str, Row]] = {}
    for number, case in enumerate(track(chosen, "measuring", console=console)):
        offered = providers(case, names, more)
        rows = {provider.name: _describe(case, limits) | {"provider": provider.name} for provider in offered}
        with noted(*rows.values()):
            _check_time(deadline)
            gate = case.reduced()
            # Several cases of one operation have the same gate once they are reduced.
            if gate.name not in gates:
                gates[gate.name] = check_case(gate, device, offered)
            for name, row in rows.items():
                row |= gates[gate.name][name]
            # The rest of the time is for checks, compilation and peak memory.
            share_s = 0.4 * (deadline - time.monotonic()) / (len(chosen) - number)
            time_case(case, device, offered, rows, min(max(share_s, 0.01), 2.0), deadline)
        lines += rows.values()
        # An interrupted run leaves what it has measured.
        path = write_results("kernels_{device}.jsonl", lines)
    print(f"results: {path}")
    # A bare machine may lack matplotlib, and has its numbers all the same.
    try:
        with word_for("drawing the plot"):
            importlib.import_module("flashgrpo.bench.plots").draw(path, path.with_suffix(".png"))
    except ImportError as error:
        print(f"no plot: {error}")
    return lines


def table(found: Sequence[Row]) -> list[str]:
    """Of a results file: the first shape of each operation and variant, and the fastest peer at it that is right."""
    by_case: dict[str, dict[str, Row]] = {}
    first: dict[tuple[str, str], str] = {}
    for row in found[1:]:
        if row["status"] == "ok" and "p50_ms" in row:
            by_case.setdefault(row["case"], {})[row["provider"]] = row
            first.setdefault((row["op"], row["variant"]), row["case"])
    cells = []
    for case in first.values():
        ours = by_case[case].get("flashgrpo")
        peers = [x for name, x in by_case[case].items() if not name.startswith("flashgrpo") and "error" in x]
        if ours:
            own = f"`{case}`", f"{ours['p50_ms']:.3g}", f"{ours['share_of_limit']:.0%}"
            peer = min(peers, key=lambda row: row["p50_ms"], default=None)
            theirs = (peer["provider"], f"{peer['p50_ms']:.3g}", f"{peer['ratio']:.2f}") if peer else ("", "", "")
            cells.append([*own, *theirs])
    return markdown(["operation", "ms:", "of the limit:", "fastest peer", "its ms:", "x ours:"], cells)


def listing(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """A table a case of all that was measured; and a line for each reason why something was not, or is wrong."""
    measured, cases_measured = set(), set()
    for row in rows:
        if "peak_mib" in row:
            measured.add((row["op"], row["provider"]))
            cases_measured.add(row["case"])
    # A CPU's would be thousandths.
    is_slow = all(row.get("tflops_per_s", 0) < 1 for row in rows)
    by_case: dict[str, list[list[str]]] = {}
    notes: dict[str, tuple[dict[str, None], dict[str, None]]] = {}  # providers and operations
    for row in rows:
        if row["status"] != "ok":
            providers, ops = notes.setdefault(f"{row['status']}: {row['note']}", ({}, {}))
            providers[row["provider"]] = ops[row["op"]] = None
        if (row["op"], row["provider"]) in measured and row["case"] in cases_measured:
            cells = [row["provider"] if row["status"] == "ok" else f"{row['provider']}: {row['status']}"]
            for name, form in _COLUMNS.values():
                scale = 1e3 if is_slow and name == "tflops_per_s" else 1
                cells.append("" if row.get(name) is None else form.format(scale * row[name]))
            by_case.setdefault(row["case"], []).append(cells)
    lines = []
    for case, cells in by_case.items():
        columns = [name.replace("TFLOP", "GFLOP") if is_slow else name for name in _COLUMNS]
        lines += [f"`{case}`", "", *markdown(["", *columns], cells), ""]
    return lines, [f"{' · '.join(who)}: {note} ({', '.join(ops)})" for note, (who, ops) in notes.items()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; 1 if a kernel of ours is wrong or fails."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = option_parser("kernels", __doc__)
    parser.add_argument("--ops", nargs="+", choices=PROVIDERS, default=list(PROVIDERS), help="default: all")
    parser.add_argument("--providers", nargs="+", help="default: all", metavar="NAME")
    parser.add_argument(
        "--peer", action="append", default=[], help=f"further peers: {PEERS}", metavar="MODULE:PROVIDERS"
    )
    default = "full" if device.type == "cuda" else "small"
    parser.add_argument("--sizes", choices=_BUDGETS_S, default=default, help=f"default here: {default}")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help=f"for all; default: {_BUDGETS_S[default]:.0f}")
    options = parser.parse_args(arguments)
    more: Peers = {}
    for name in options.peer:
        for op, found in load_peers(name).items():
            more.setdefault(op, []).extend(found)
    every = {provider.name: None for provider in itertools.chain(*PROVIDERS.values(), *more.values())}
    for name in options.providers or ():
        if name not in every:
            parser.error(f"--providers: found {name!r}, wanted some of {', '.join(map(repr, every))}")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    chosen = [case for case in cases(options.sizes, dtype) if case.op in options.ops]
    budget_s = _BUDGETS_S[options.sizes] if options.budget is None else options.budget
    _, *rows = run(chosen, options.providers, device, budget_s, more)
    lines, notes = listing(rows)
    faults = [row for row in rows if row["provider"].startswith("flashgrpo") and row["status"] in _FAULTS]
    for row in faults:
        notes.append(f"{row['provider']}, {row['case']}: {row['status']}, not timed. {row['note']}")
    show(lines, *notes)
    return int(bool(faults))


def _check_time(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError("the budget is spent; give more with --budget")


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def _errors(results: Results, exact: Results) -> dict[str, float]:
    """RMS of the difference by RMS of the truth, of every result that is compared."""
    errors = {}
    for name, truth in exact.items():
        if name != "terms":
            scale = exact["terms"] if name == "loss" else truth
            errors[name] = _rms(results[name].double().reshape(truth.shape) - truth) / _rms(scale)
    return errors


def _describe(case: Case, limits: Limits) -> Row:
    own = {"op": case.op, "case": case.name, "variant": case.variant, "tokens": case.tokens, "shape": dict(case.shape)}
    own |= {"dtype": str(case.dtype), "flops": case.flops, "bytes": case.bytes}
    return own | {"limit_ms": limits.ms(case.flops, case.bytes)}


def _rates(case: Case, ms: float, limit_ms: float) -> Row:
    tflops_per_s, gb_per_s = case.flops / ms / 1e9, case.bytes / ms / 1e6
    return {"tflops_per_s": tflops_per_s, "gb_per_s": gb_per_s, "share_of_limit": limit_ms / ms}


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
