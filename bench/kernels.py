"""Every kernel against every peer that is installed: time, memory, share of the machine's limit, error.

    flashgrpo bench kernels [--ops OP ...] [--providers NAME ...] [--sizes small|full] [--budget SECONDS]

What is measured stands in cases.py, by whom in peers.py, and how in timing.py. Before an operation is timed, every
provider runs it on fewer tokens against float64. The error is the RMS of the difference by the RMS of the truth, the
worst among output and gradients; it may be 1.1 times that of plain torch in the same dtype, and 1e-6. A peer beyond
that is timed and marked; flashgrpo beyond it is not timed, and the exit code is 1. All providers of a case run in turns
on rotating inputs, but those that take 20 times as long as the fastest, which run alone and but twice.

Writes kernels_DEVICE.jsonl into bench/results, or $OUT: the machine and its limits, then a row a case and provider,
whole after each case; and a plot of time and memory beside it.
"""

import contextlib
import importlib
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from torch import Tensor

from flashgrpo.bench.cases import Case, Results, as_float64, cases, fold_prompts
from flashgrpo.bench.peers import PROVIDERS, Call, Provider, providers
from flashgrpo.bench.timing import (
    Limits,
    call_ms,
    machine,
    measure_limits,
    option_parser,
    peak_mib,
    results_folder,
    slug,
    time_turns,
)
from flashgrpo.bench.timing import console as open_console
from flashgrpo.model.files import write_text

Row = dict[str, Any]
_PACKAGES = ("liger-kernel", "cut-cross-entropy", "quack-kernels", "trl", "flash-attn", "flash-attn-3", "flash-attn-4")
_INPUT_SETS = 2
_ROOM, _FLOOR = 1.1, 1e-6  # of plain torch's error; of the values
_NOTE_LENGTH = 120
_SLOW = 20  # times the fastest
_BUDGETS_S = {"small": 150.0, "full": 165.0}
_COLUMNS = (
    "shape",
    "provider",
    "p20 ms",
    "p50",
    "p80",
    "spread",
    "peak MiB",
    "rate",
    "limit",
    "x ours",
    "error",
    "note",
)


def check(case: Case, device: torch.device, offered: Sequence[Provider]) -> dict[str, Row]:
    """Of each provider `status`, `note`, and `error` and `torch_error` of its worst result.

    A loss is compared on the scale of its tokens' losses, and may be off by as much as they are in plain torch.
    """
    inputs = case.make(0, device)
    exact, plain = case.plain(as_float64(inputs)), case.plain(inputs)
    allowed = _errors(plain, exact)
    if "loss" in exact:
        allowed["loss"] = _rms(plain["terms"].double() - exact["terms"]) / _rms(exact["terms"])
    found: dict[str, Row] = {}
    for provider in offered:
        row = found[provider.name] = {"status": "ok", "note": ""}
        with _noted(row):
            results = provider.call(case, inputs)()
            if provider.is_bound:
                continue
            errors = _errors(fold_prompts(case, results) if provider.repeats(case) else results, exact)
            wrong = [name for name in errors if not errors[name] <= _ROOM * allowed[name] + _FLOOR]
            times = {name: errors[name] / (allowed[name] + _FLOOR) for name in wrong or errors}
            worst = max(times, key=lambda name: times[name])
            row |= {"error": errors[worst] if math.isfinite(errors[worst]) else None, "torch_error": allowed[worst]}
            if wrong:
                row |= {"status": "wrong", "note": f"{worst} {times[worst]:.1f}x as wrong as torch's"}
    return found


def measure(
    case: Case, device: torch.device, limits: Limits, offered: Sequence[Provider], rows: dict[str, Row],
    *, budget_s: float, deadline: float,
) -> None:  # fmt: skip
    """Time what has passed, in about `budget_s` seconds besides what compiles, into a row a provider.

    Nothing new begins after `deadline`, of time.monotonic().
    """
    sets = [case.make(seed, device) for seed in range(1 if case.op == "memory" else _INPUT_SETS)]
    calls: dict[str, Call] = {}
    once: dict[str, float] = {}
    for provider in offered:
        row = rows[provider.name]
        if row["status"] not in ("ok", "wrong") or (row["status"] == "wrong" and provider.is_ours):
            continue
        with _noted(row):
            _check_time(deadline)
            call = _rotate([provider.call(case, inputs) for inputs in sets])
            if case.op != "memory":
                call()  # compiles
            row["peak_mib"] = peak_mib(call, device)
            if case.op != "memory":
                once[provider.name] = call_ms(call, device)
                calls[provider.name] = call
    slow = [name for name, ms in once.items() if ms > _SLOW * min(once.values())]
    turns = [([name for name in calls if name not in slow], None), *(([name], 1) for name in slow)]
    while turns and calls:
        together, rounds = turns.pop(0)
        try:
            timings = time_turns({x: calls[x] for x in together}, device, budget_s=budget_s, rounds=rounds)
        except Exception:  # one of them: it alone shall be told
            if len(together) > 1:
                turns += [([name], rounds) for name in together]
                continue
            with _noted(rows[together[0]]):
                raise
        else:
            for name, timing in timings.items():
                seconds = timing.p50_ms / 1e3
                rows[name] |= asdict(timing) | {
                    "tflops_per_s": case.flops / seconds / 1e12,
                    "gb_per_s": case.bytes / seconds / 1e9,
                    "share_of_limit": limits.ms(case.flops, case.bytes) / timing.p50_ms,
                }
    ours = rows.get("flashgrpo", {}).get("p50_ms")
    for row in rows.values():
        row["ratio"] = row["p50_ms"] / ours if ours and "p50_ms" in row else None


def run(
    chosen: Sequence[Case], names: Sequence[str] | None, device: torch.device, budget_s: float, console: Console
) -> list[Row]:
    """Measure the cases, and write what there is after each; a row a case and provider."""
    deadline = time.monotonic() + budget_s
    limits, made = measure_limits(device), machine(device)
    rates = {"flops_per_s": limits.flops_per_s, "bytes_per_s": limits.bytes_per_s, "dtype": str(limits.dtype)}
    lines: list[Row] = [{"machine": made, "limits": rates, "peers": _versions(), "budget_s": budget_s}]
    path = results_folder() / f"kernels_{slug(made['device'])}.jsonl"
    gates: dict[str, dict[str, Row]] = {}
    for number, case in enumerate(track(chosen, "measuring", console=console, disable=not console.is_terminal)):
        offered = providers(case, names)
        rows = {x.name: _describe(case, limits) | {"provider": x.name} for x in offered}
        with _noted(*rows.values()):
            _check_time(deadline)
            if (gate := case.reduced()).name not in gates:
                gates[gate.name] = check(gate, device, offered)
            for name, row in rows.items():
                row |= gates[gate.name][name]
            share_s = 0.4 * (deadline - time.monotonic()) / (len(chosen) - number)
            budget = min(max(share_s, 0.01), 2.0)
            measure(case, device, limits, offered, rows, budget_s=budget, deadline=deadline)
        lines += rows.values()
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    console.print(f"results: {path}", soft_wrap=True)
    try:
        importlib.import_module("flashgrpo.bench.plots").draw(path, path.with_suffix(".png"))
    except ImportError as error:  # a bare machine may lack matplotlib
        console.print(f"no plot: {error}")
    return lines[1:]


def show(rows: Sequence[Row], console: Console) -> None:
    """A table an operation; what a provider could measure nowhere stands once below it."""
    for op in dict.fromkeys(row["op"] for row in rows):
        group = [row for row in rows if row["op"] == op]
        table = Table(*_COLUMNS, title=op, box=SIMPLE)
        measured = {row["provider"] for row in group if "peak_mib" in row}
        for case, of_case in itertools.groupby(group, lambda row: row["case"]):
            shape = case.removeprefix(f"{op} ")
            for row in of_case:
                if row["provider"] in measured:
                    table.add_row(shape, *_cells(row), style="red" if _is_fault(row) else None)
                    shape = ""
            table.add_section()
        console.print(table)
        notes = {row["provider"]: _note(row) for row in reversed(group) if row["provider"] not in measured}
        for name, note in reversed(notes.items()):
            console.print(escape(f"  {name}: {note}"), soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; 1 if a kernel of ours is wrong or fails."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    every = dict.fromkeys(x.name for offered in PROVIDERS.values() for x in offered)
    parser = option_parser("kernels", __doc__)
    parser.add_argument("--ops", nargs="+", choices=PROVIDERS, default=list(PROVIDERS), help="default: all")
    parser.add_argument("--providers", nargs="+", choices=every, help="default: all", metavar="NAME")
    default = "full" if device.type == "cuda" else "small"
    parser.add_argument("--sizes", choices=_BUDGETS_S, default=default, help=f"default here: {default}")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help=f"for all; default: {_BUDGETS_S[default]:.0f}")
    options = parser.parse_args(arguments)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    chosen = [case for case in cases(options.sizes, dtype) if case.op in options.ops]
    console = open_console()
    budget_s = _BUDGETS_S[options.sizes] if options.budget is None else options.budget
    rows = run(chosen, options.providers, device, budget_s, console)
    show(rows, console)
    faults = [row for row in rows if _is_fault(row)]
    for row in faults:
        console.print(f"[red]{row['provider']}, {row['case']}: {row['status']}, not timed. {escape(row['note'])}[/red]")
    return int(bool(faults))


@contextlib.contextmanager
def _noted(*rows: Row) -> Iterator[None]:
    """An error becomes the rows' `status` and `note`: a benchmark goes on without what cannot be measured."""
    try:
        yield
    except Exception as error:
        kinds = {ImportError: "not installed", TimeoutError: "not measured", torch.OutOfMemoryError: "out of memory"}
        status = next((name for kind, name in kinds.items() if isinstance(error, kind)), "failed")
        text = str(error).strip().partition("\n")[0][:_NOTE_LENGTH]
        for row in rows:
            row |= {"status": status, "note": text if status != "failed" else f"{type(error).__name__}: {text}"}
        if status == "out of memory":
            error.__traceback__ = None  # its frames hold what was allocated
            torch.cuda.empty_cache()


def _check_time(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError("the budget is spent; give more with --budget")


def _rotate(calls: Sequence[Call]) -> Call:
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def _errors(results: Results, exact: Results) -> dict[str, float]:
    """RMS of the difference by RMS of the truth, of every result that is compared."""
    scales = exact | ({"loss": exact["terms"]} if "loss" in exact else {})
    compared = [name for name in exact if name != "terms"]
    return {
        name: _rms(results[name].double().reshape(exact[name].shape) - exact[name]) / _rms(scales[name])
        for name in compared
    }


def _describe(case: Case, limits: Limits) -> Row:
    return {
        "op": case.op, "case": case.name, "variant": case.variant, "tokens": case.tokens, "shape": dict(case.shape),
        "dtype": str(case.dtype), "flops": case.flops, "bytes": case.bytes,
        "limit_ms": limits.ms(case.flops, case.bytes),
    }  # fmt: skip


def _is_fault(row: Row) -> bool:
    return row["provider"].startswith("flashgrpo") and row["status"] in ("wrong", "failed", "out of memory")


def _cells(row: Row) -> list[str]:
    def cell(name: str, form: str) -> str:
        value = row.get(name)
        return "" if value is None else form.format(value)

    by_flops = row["flops"] > 0 and row.get("tflops_per_s") is not None
    rate = cell("tflops_per_s", "{:.4g} TFLOP/s") if by_flops else cell("gb_per_s", "{:.4g} GB/s")
    return [
        row["provider"], *(cell(name, "{:.4g}") for name in ("p20_ms", "p50_ms", "p80_ms")),
        cell("spread", "{:.1%}"), cell("peak_mib", "{:.0f}"), rate, cell("share_of_limit", "{:.0%}"),
        cell("ratio", "{:.2f}"), cell("error", "{:.1e}"), escape(_note(row)),
    ]  # fmt: skip


def _note(row: Row) -> str:
    return row["note"] if row["status"] == "ok" else f"{row['status']}: {row['note']}"


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


if __name__ == "__main__":
    sys.exit(main())
