"""One training step of a model of real shape, with random weights: forward, loss, backward, clipping, AdamW.

    flashgrpo bench step                                           # Qwen2.5-1.5B on a GPU, a small model on a CPU
    flashgrpo bench step --model Qwen2.5-1.5B Qwen3-4B --groups 4 --prompt-tokens 512 --mean 2048 --cap 16384

Our step, with prompts shared and repeated, and transformers' (with Liger's loss where that is
installed) train on the same completions with the same weights, each in turn, twice over. Before a
side is timed, the hidden states of two completions and the gradient norm must be those of the first
side: within 1e-4 in fp32, and 5% in bf16, where rounding makes about 1% and a wrong position or
mask 15% or more. Tests compare every gradient.

Tokens are counted with each completion's prompt, and useful FLOPs are those of the shared prompts,
without recomputation, for all sides: the same work done sooner has the higher tokens/s, and useful
MFU, in the same ratio. Shares are of the time of operators (on a GPU of kernels) in one step.
Writes bench/results/step_<device>.jsonl, a line a side, after each.

Qwen2.5-1.5B at the defaults of a GPU: 131,000 completion tokens and 1.4e15 FLOPs with shared
prompts, 3.5 seconds a step at 40% of an H200; with the peer at half of that, five steps a side in
two passes take about 90 seconds. Weights, gradients and moments take 16 bytes a parameter;
micro-batches are sized for what is left.
"""

import argparse
import gc
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import Progress
from torch import Tensor
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile

from flashgrpo.bench.shapes import SHAPES
from flashgrpo.bench.step_sides import Ours, Peer, Workload
from flashgrpo.bench.timing import (
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
from flashgrpo.grpo.run.machines import peak_flops
from flashgrpo.grpo.run.progress import console
from flashgrpo.model.config import ModelConfig
from flashgrpo.model.cost import BlockActivations, ModelSize

SHARED, REPEATED = "flashgrpo, shared prompts", "flashgrpo, repeated prompts"
PARTS = "attention", "linear", "loss", "optimizer", "other"
_PATTERNS = {
    "optimizer": re.compile(r"^Optimizer\.step"),
    "loss": re.compile(r"^loss$|GRPO|grpo_loss|SelectiveLogProb"),
    "attention": re.compile(r"[Aa]ttention|attn"),
}
_PRODUCT = re.compile(r"::(add)?mm_?$|::bmm$|linear_pointwise")
_TOLERANCE = {"cpu": 1e-4, "cuda": 0.05}  # of fp32, and of bf16
_BACKWARD = "autograd::engine::evaluate_function"


def shares(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Which part of a step's operator time is spent where; the parts of the backward pass count with their forward."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    events = [event for event in profiler.events() or [] if event.device_type == DeviceType.CPU]
    of_loss = {event.sequence_nr for event in events if event.sequence_nr >= 0 and _part(event, set()) == "loss"}
    totals: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    for event in events:
        on_gpu = sum(kernel.duration for kernel in event.kernels)
        # A GPU's kernels count with the operator that has launched them.
        totals[_part(event, of_loss)] += on_gpu if device.type == "cuda" else event.self_cpu_time_total
    return {part: seconds / sum(totals.values()) for part, seconds in totals.items()}


def _part(event: Any, of_loss: set[int]) -> str:
    """By the innermost operator around an event that tells; `of_loss` are the forward's that belong to the loss."""
    found, is_product = None, False
    while event is not None:
        is_product |= bool(_PRODUCT.search(event.name))
        # A backward function has its forward's number, and not always a name that tells.
        if event.name.startswith(_BACKWARD) and event.sequence_nr in of_loss:
            return "loss"
        found = found or next((part for part, pattern in _PATTERNS.items() if pattern.search(event.name)), None)
        event = event.cpu_parent
    return found or ("linear" if is_product else "other")


@dataclass
class Reference:
    """What the first side that runs has found, and all others must."""

    side: str
    hidden: Tensor
    grad_norm: float


@dataclass
class Turns:
    """The sides' turns at a step: what the first of them has found is what all others must find."""

    device: torch.device
    steps: int
    reference: Reference | None = None

    def take(self, open_side: Callable[[str], Any], work: Workload, row: Row) -> list[float]:
        """Open a side, check it against the reference, time `steps` more; in the first pass find its shares, too."""

        def open_and_step() -> tuple[Any, Reference]:
            opened = open_side(row["checkpointing"])
            row["side"] = getattr(opened, "name", row["side"])
            opened.load(work, row["token_budget"])
            hidden = opened.probe(work).cpu()
            row["loss"], row["grad_norm"] = map(float, opened.step())
            return opened, Reference(row["side"], hidden, row["grad_norm"])

        # One side at a time is in memory: what the one before has held is needed now.
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        peak, (opened, found) = peak_mib(open_and_step, self.device)
        self.reference = self.reference or found
        _compare(row, found, self.reference, _TOLERANCE[self.device.type])
        row |= {"peak_mib": max(peak, row.get("peak_mib", 0.0)), "fed_tokens": opened.num_tokens}
        row["micro_batches"] = len(opened.batches)
        taken = sample_ms(opened.step, self.device, rounds=self.steps)
        if "shares" not in row:
            row["shares"] = shares(opened.step, self.device)
        return taken


def time_sides(
    name: str, options: argparse.Namespace, device: torch.device, peak: float, write: Callable[[list[Row]], object]
) -> list[Row]:
    """A row a side of the model of this name; `write` is given those that there are after each turn."""
    shape, dtype = SHAPES[name], torch.bfloat16 if device.type == "cuda" else torch.float32
    config = ModelConfig.from_dict(shape)
    sizes = {key: getattr(options, key) for key in ("groups", "group_size", "prompt_tokens", "mean", "cap")}
    work = Workload.random(**sizes, vocab_size=config.vocab_size)
    ours = partial(Ours, shape, init_device_mesh(device.type, (1,)), dtype)
    openers: dict[str, tuple[Any, Workload]] = {
        SHARED: (ours, work),
        REPEATED: (ours, work.repeated()),
        "transformers": (partial(Peer, shape, device, dtype), work),
    }
    flops, longest = 3 * work.forward_flops(config), max(work.lengths)
    turns = Turns(device, options.steps)
    rows: dict[str, Row] = {}
    sides: dict[str, Side] = {}
    for side, (open_side, own_work) in openers.items():
        row = rows[side] = {"model": name, "side": side, "status": "ok", "note": "", "useful_flops": flops, **sizes}
        row["checkpointing"], row["token_budget"] = _room(config, options, device, longest, open_side is not ours)
        sides[side] = partial(turns.take, open_side, own_work, row)

    with Progress(console=console) as progress:
        task = progress.add_task(name, total=2 * len(sides))

        @contextmanager
        def turn(side: str) -> Iterator[None]:
            progress.update(task, advance=1, description=f"{name}: {rows[side]['side']}")
            # What fails is a peer, or the device's memory: the other sides still run.
            with noted(rows[side]):
                yield
            write([*rows.values()])

        for side, times in in_turns(sides, turn):
            rows[side] |= times | _rates(times["p50_ms"] / 1e3, work, flops, peak)
            write([*rows.values()])
    return [*rows.values()]


def _compare(row: Row, found: Reference, reference: Reference, tolerance: float) -> None:
    """Raises ValueError where a side does not compute what the first has."""
    row["hidden_error"] = float((found.hidden - reference.hidden).norm() / reference.hidden.norm())
    if not row["hidden_error"] <= tolerance:
        wanted = f"those of {reference.side}, wanted {tolerance:g}"
        raise ValueError(f"hidden states are {row['hidden_error']:.2g} off {wanted}")
    if not math.isclose(found.grad_norm, reference.grad_norm, rel_tol=tolerance):
        wanted = f"{reference.grad_norm:.6g}, that of {reference.side}"
        raise ValueError(f"grad_norm is {found.grad_norm:.6g}, wanted {wanted}")


def _rates(seconds: float, work: Workload, flops: float, peak: float) -> Row:
    rates = {"tokens_per_s": work.num_tokens / seconds, "trained_tokens_per_s": work.num_targets / seconds}
    return rates | {"tflops": flops / seconds / 1e12, "useful_mfu": flops / seconds / peak}


def _room(
    config: ModelConfig, options: argparse.Namespace, device: torch.device, longest: int, is_peer: bool
) -> tuple[str, int]:
    """Activation checkpointing and tokens a micro-batch, as asked for, or the least of the first that leaves room."""
    kinds = ["none", "full"] if is_peer else ["none", "selective", "full"]
    if options.checkpointing:
        # transformers knows no selective kind.
        kinds = [options.checkpointing if options.checkpointing in kinds else "full"]
    if device.type != "cuda":
        return kinds[0], options.token_budget or max(2048, longest)
    num_weights = ModelSize.of(config).total
    # The last term is for chunks of logits.
    left = 0.85 * torch.cuda.mem_get_info(device)[1] - 16 * num_weights - 6e9
    # Autocast's weights, Liger's logits of a sequence, layers that keep 2.2 times as much as ours.
    if is_peer:
        left = (left - 2 * num_weights - 16 * longest * config.vocab_size) / 2.5

    def fitting(checkpointing: str) -> int:
        block = BlockActivations.of(config, checkpointing, 2)
        return int(left / (config.num_layers * block.kept + block.recomputed + block.working))

    checkpointing = next((kind for kind in kinds if fitting(kind) >= longest), kinds[-1])
    return checkpointing, options.token_budget or max(min(fitting(checkpointing), 65_536), longest)


def table(found: Sequence[Row]) -> list[str]:
    """Of a results file."""
    cells = []
    for row in found[1:]:
        if row.get("status", "ok") != "ok":
            cells.append([row["model"], row["side"], f"{row['status']}: {row['note']}", *[""] * 5])
            continue
        kept = "" if row["checkpointing"] == "none" else f", {row['checkpointing']} activation checkpointing"
        rates = f"{row['tokens_per_s']:,.0f}", f"{row['trained_tokens_per_s']:,.0f}", f"{row['useful_mfu']:.0%}"
        seconds, size = f"{row['p50_ms'] / 1e3:.2f}", f"{row['peak_mib'] / 1024:.2f}"
        parts = ", ".join(f"{share:.0%}" for share in row["shares"].values())
        cells.append([row["model"], row["side"] + kept, seconds, *rates, size, parts])
    columns = ["model", "", "seconds:", "tokens/s:", "of completions:", "useful MFU:", "peak GiB:", ", ".join(PARTS)]
    return markdown(columns, cells)


def headline(found: Sequence[Row]) -> tuple[str, str]:
    seconds = {row["side"]: row["p50_ms"] for row in found[1:] if "p50_ms" in row}
    ours, peer = seconds[SHARED], next(side for side in seconds if "transformers" in side)
    factors = f"{seconds[REPEATED] / ours:.1f} times as fast as with repeated ones, {seconds[peer] / ours:.1f} times as"
    return "a training step, prompts shared", f"{factors} {peer}"


def main(arguments: Sequence[str] | None = None) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler writes into the progress bar
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    defaults = {"groups": 4, "group_size": 16, "prompt_tokens": 512, "mean": 2048, "cap": 16_384, "steps": 1}
    if not on_gpu:
        defaults = {"groups": 2, "group_size": 8, "prompt_tokens": 256, "mean": 64, "cap": 256, "steps": 6}
    parser = option_parser("step", __doc__)
    parser.add_argument("--model", nargs="+", choices=SHAPES, default=["Qwen2.5-1.5B" if on_gpu else "small"])
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--token-budget", type=int, help="of a micro-batch; default: what fits")
    parser.add_argument("--checkpointing", choices=("none", "selective", "full"), help="default: the least that fits")
    options = parser.parse_args(arguments)
    store: Any = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=store, rank=0, world_size=1)
    try:
        where, rate = machine(device), measure_limits(device).flops_per_s
        peak = (peak_flops(where["device"]) if on_gpu else None) or rate
        lines: list[Row] = [{"machine": where, "mfu_of": peak, "matmul_flops_per_s": rate}]

        def write(rows: list[Row]) -> Path:
            return write_results("step_{device}.jsonl", [*lines, *rows])

        for name in options.model:
            lines += time_sides(name, options, device, peak, write)
        path = write([])
    finally:
        dist.destroy_process_group()
    notes, is_faulty = [], False
    for row in lines[1:]:
        if row["status"] == "ok":
            outcome = f"the medians of the two passes are {row['spread']:.0%} apart"
        else:
            outcome = f"{row['status']}: {row['note']}"
            is_faulty |= row["side"] in (SHARED, REPEATED)
        notes.append(f"{row['model']}, {row['side']}: {outcome}")
    show(table(lines), *notes, f"written to {path}")
    return int(is_faulty)
