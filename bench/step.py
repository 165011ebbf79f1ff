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
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
    Timing,
    machine,
    markdown,
    measure_limits,
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
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
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
class Contender:
    """A side that takes its turns: how it is opened, by its kind of checkpointing, its work, its row and its times."""

    open: Callable[[str], Any]
    work: Workload
    row: Row
    passes: list[list[float]] = field(default_factory=list)


@dataclass
class Reference:
    """What the first side that runs has found, and all others must."""

    side: str
    hidden: Tensor
    grad_norm: float


def time_sides(
    name: str, options: argparse.Namespace, device: torch.device, peak: float, write: Callable[[list[Row]], object]
) -> list[Row]:
    """A row a side of the model of this name; `write` is given those that there are after each turn."""
    shape, dtype = SHAPES[name], torch.bfloat16 if device.type == "cuda" else torch.float32
    config = ModelConfig.from_dict(shape)
    sizes = {key: getattr(options, key) for key in ("groups", "group_size", "prompt_tokens", "mean", "cap")}
    work = Workload.random(**sizes, vocab_size=config.vocab_size)
    mesh = init_device_mesh(device.type, (1,))
    flops = 3 * work.forward_flops(config)

    ours, peer_name = partial(Ours, shape, mesh, dtype), "transformers"
    openers = {
        SHARED: (ours, work),
        REPEATED: (ours, work.repeated()),
        peer_name: (partial(Peer, shape, device, dtype), work),
    }
    sides, longest = [], max(work.lengths)
    for side, (open_side, own_work) in openers.items():
        row = {"model": name, "side": side, "useful_flops": flops, **sizes}
        row["checkpointing"], row["token_budget"] = _room(config, options, device, longest, side == peer_name)
        sides.append(Contender(open_side, own_work, row))
    rows, reference = [side.row for side in sides], None
    with Progress(console=console) as progress:
        task = progress.add_task(name, total=2 * len(sides))
        # One side at a time is in memory, so that a turn is all of a pass's steps.
        for side in 2 * sides:
            progress.update(task, advance=1, description=f"{name}: {side.row['side']}")
            if "error" not in side.row:
                try:
                    reference = _take_turn(side, reference, options.steps, device)
                # A peer's, or the device's memory: the other sides still run.
                except Exception as error:
                    side.row["error"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                else:
                    side.row |= _rates(Timing.of(side.passes), work, flops, peak)
            # The next side needs the memory of this one.
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            write(rows)
    return rows


def _take_turn(side: Contender, reference: Reference | None, steps: int, device: torch.device) -> Reference:
    """Open a side, check it against the reference, time `steps` more; in the first pass find its shares, too.

    Gives the reference, which is this side where there was none.
    """
    row = side.row

    def open_and_step() -> tuple[Any, Reference]:
        opened = side.open(row["checkpointing"])
        row["side"] = getattr(opened, "name", row["side"])
        opened.load(side.work, row["token_budget"])
        hidden = opened.probe(side.work).cpu()
        row["loss"], row["grad_norm"] = map(float, opened.step())
        return opened, Reference(row["side"], hidden, row["grad_norm"])

    peak, (opened, found) = peak_mib(open_and_step, device)
    reference = reference or found
    _compare(row, found, reference, _TOLERANCE[torch.bfloat16 if device.type == "cuda" else torch.float32])
    row |= {"peak_mib": max(peak, row.get("peak_mib", 0.0)), "fed_tokens": opened.num_tokens}
    row["micro_batches"] = len(opened.batches)
    side.passes.append(sample_ms(opened.step, device, rounds=steps))
    if "shares" not in row:
        row["shares"] = shares(opened.step, device)
    return reference


def _compare(row: Row, found: Reference, reference: Reference, tolerance: float) -> None:
    """Raises ValueError where a side does not compute what the first has."""
    row["hidden_error"] = float((found.hidden - reference.hidden).norm() / reference.hidden.norm())
    if not row["hidden_error"] <= tolerance:
        wanted = f"those of {reference.side}, wanted {tolerance:g}"
        raise ValueError(f"hidden states are {row['hidden_error']:.2g} off {wanted}")
    if not math.isclose(found.grad_norm, reference.grad_norm, rel_tol=tolerance):
        wanted = f"{reference.grad_norm:.6g}, that of {reference.side}"
        raise ValueError(f"grad_norm is {found.grad_norm:.6g}, wanted {wanted}")


def _rates(timing: Timing, work: Workload, flops: float, peak: float) -> Row:
    seconds = timing.p50_ms / 1e3
    rates = {"tokens_per_s": work.num_tokens / seconds, "trained_tokens_per_s": work.num_targets / seconds}
    return vars(timing) | rates | {"tflops": flops / seconds / 1e12, "useful_mfu": flops / seconds / peak}


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
        if "error" in row:
            cells.append([row["model"], row["side"], row["error"], *[""] * 5])
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
    notes = []
    for row in lines[1:]:
        outcome = row.get("error") or f"the medians of the two passes are {row['spread']:.0%} apart"
        notes.append(f"{row['model']}, {row['side']}: {outcome}")
    show(table(lines), *notes, f"written to {path}")
    return int(any("error" in row for row in lines[1:] if row["side"] in (SHARED, REPEATED)))
