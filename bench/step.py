"""One training step of a model of real shape, with random weights: forward, loss, backward, clipping, AdamW.

    flashgrpo bench step                                           # Qwen2.5-1.5B on a GPU, a small model on a CPU
    flashgrpo bench step --model Qwen2.5-1.5B Qwen3-4B --groups 4 --prompt-tokens 512 --mean 2048 --cap 16384

Our step, with prompts shared and repeated, and transformers' (with Liger's loss where that is installed) train on the
same completions with the same weights, each in turn, twice over. Before a side is timed, the hidden states of two
completions and the gradient norm must be those of the first side: within 1e-4 in fp32, and 5% in bf16, where rounding
makes about 1% and a wrong position or mask 15% or more. Tests compare every gradient.

Tokens are counted with each completion's prompt, and useful FLOPs are those of the shared prompts, without
recomputation, for all sides: the same work done sooner has the higher tokens/s, and useful MFU, in the same ratio.
Shares are of the time of operators (on a GPU of kernels) in one step. Writes bench/results/step_<device>.jsonl, a line
a side, after each.

Qwen2.5-1.5B at the defaults of a GPU: 131,000 completion tokens and 1.4e15 FLOPs with shared prompts, 3.5 seconds a
step at 40% of an H200; with the peer at half of that, five steps a side in two passes take about 90 seconds. Weights,
gradients and moments take 16 bytes a parameter; micro-batches are sized for what is left.
"""

import argparse
import gc
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile

from flashgrpo.bench.shapes import SHAPES
from flashgrpo.bench.step_sides import Ours, Peer, Workload
from flashgrpo.bench.timing import (
    Timing,
    call_ms,
    console,
    machine,
    measure_limits,
    option_parser,
    peak_mib,
    results_folder,
    slug,
)
from flashgrpo.grpo.run.machines import peak_flops
from flashgrpo.model.config import ModelConfig
from flashgrpo.model.cost import BlockActivations, ModelSize
from flashgrpo.model.files import write_text

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
        totals[_part(event, of_loss)] += on_gpu if device.type == "cuda" else event.self_cpu_time_total
    return {part: seconds / sum(totals.values()) for part, seconds in totals.items()}


def _part(event: Any, of_loss: set[int]) -> str:
    """By the innermost operator around an event that tells; `of_loss` are the forward's that belong to the loss."""
    found, is_product = None, False
    while event is not None:
        is_product |= bool(_PRODUCT.search(event.name))
        if event.name.startswith(_BACKWARD) and event.sequence_nr in of_loss:
            return "loss"
        found = found or next((part for part, pattern in _PATTERNS.items() if pattern.search(event.name)), None)
        event = event.cpu_parent
    return found or ("linear" if is_product else "other")


def measure(
    name: str,
    options: argparse.Namespace,
    device: torch.device,
    peak: float,
    write: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """A row a side; `write` is given those that there are after each."""
    shape, dtype = SHAPES[name], torch.bfloat16 if device.type == "cuda" else torch.float32
    config = ModelConfig.from_dict(shape)
    work = Workload.random(
        options.groups, options.group_size, options.prompt_tokens, options.mean, options.cap, config.vocab_size
    )
    longest = options.prompt_tokens + max(len(c.token_ids) for group in work.groups for c in group.completions)
    mesh = init_device_mesh(device.type, (1,))
    sides: dict[str, tuple[Callable[[str], Any], Workload]] = {
        SHARED: (lambda checkpointing: Ours(shape, mesh, dtype, checkpointing), work),
        REPEATED: (lambda checkpointing: Ours(shape, mesh, dtype, checkpointing), work.repeated()),
        "transformers": (lambda checkpointing: Peer(shape, device, dtype, checkpointing), work),
    }
    flops = 3 * work.forward_flops(config)
    passes, found = {side: [] for side in sides}, Found()
    sizes = {key: getattr(options, key) for key in ("groups", "group_size", "prompt_tokens", "mean", "cap")}
    rows = {side: {"model": name, "side": side, "useful_flops": flops, **sizes} for side in sides}
    for side, row in rows.items():
        row["checkpointing"], row["token_budget"] = _room(config, options, device, longest, side == "transformers")
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=2 * len(sides))
        for number in range(2):
            for side, (open_side, own_work) in sides.items():
                progress.update(task, description=f"{name}: {side}")
                row = rows[side]
                if "error" not in row:
                    try:
                        _run(row, open_side, own_work, options.steps, passes[side], found, device, not number)
                    except Exception as error:  # a peer's, or the device's memory: the other sides still run
                        row["error"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                    else:
                        row |= _rates(Timing.of(passes[side]), work, flops, peak)
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                write([*rows.values()])
                progress.advance(task)
    return [*rows.values()]


@dataclass
class Found:
    """What the first side that runs has found, and all others must."""

    side: str = ""
    hidden: Tensor | None = None
    grad_norm: float = 0.0


def _rates(timing: Timing, work: Workload, flops: float, peak: float) -> dict[str, Any]:
    seconds = timing.p50_ms / 1e3
    rates = {"tokens_per_s": work.num_tokens / seconds, "trained_tokens_per_s": work.num_targets / seconds}
    return vars(timing) | rates | {"tflops": flops / seconds / 1e12, "useful_mfu": flops / seconds / peak}


def _run(
    row: dict[str, Any],
    open_side: Callable[[str], Any],
    work: Workload,
    steps: int,
    passes: list[list[float]],
    found: Found,
    device: torch.device,
    is_first: bool,
) -> None:
    """Build a side, check it against what was `found`, time `steps` more; in the first pass find its shares, too."""
    opened: list[Any] = []

    def open_and_step() -> None:
        side = open_side(row["checkpointing"])
        opened.append(side)
        row["side"] = getattr(side, "name", row["side"])
        side.load(work, row["token_budget"])
        hidden = side.probe(work).cpu()
        row["loss"], row["grad_norm"] = (float(value) for value in side.step())
        _compare(row, hidden, found, _TOLERANCE[torch.bfloat16 if device.type == "cuda" else torch.float32])

    peak = peak_mib(open_and_step, device)
    side = opened.pop()
    row |= {"peak_mib": max(peak, row.get("peak_mib", 0.0)), "fed_tokens": side.num_tokens}
    row["micro_batches"] = len(side.batches)
    passes.append([call_ms(side.step, device) for _ in range(steps)])
    if is_first:
        row["shares"] = shares(side.step, device)


def _compare(row: dict[str, Any], hidden: Tensor, found: Found, tolerance: float) -> None:
    """Raises ValueError where a side does not compute what the first has."""
    if found.hidden is None:
        found.side, found.hidden, found.grad_norm = row["side"], hidden, row["grad_norm"]
    row["hidden_error"] = float((hidden - found.hidden).norm() / found.hidden.norm())
    if not row["hidden_error"] <= tolerance:
        raise ValueError(f"hidden states are {row['hidden_error']:.2g} off those of {found.side}, wanted {tolerance:g}")
    if not math.isclose(row["grad_norm"], found.grad_norm, rel_tol=tolerance):
        raise ValueError(f"grad_norm is {row['grad_norm']:.6g}, wanted {found.grad_norm:.6g}, that of {found.side}")


def _room(
    config: ModelConfig, options: argparse.Namespace, device: torch.device, longest: int, is_peer: bool
) -> tuple[str, int]:
    """Activation checkpointing and tokens a micro-batch, as asked for, or the least of the first that leaves room."""
    kinds = ["none", "full"] if is_peer else ["none", "selective", "full"]
    if options.checkpointing:
        kinds = [options.checkpointing if options.checkpointing in kinds else "full"]
    if device.type != "cuda":
        return kinds[0], options.token_budget or max(2048, longest)
    num_weights = ModelSize.of(config).total
    left = 0.85 * torch.cuda.mem_get_info(device)[1] - 16 * num_weights - 6e9  # chunks of logits
    if is_peer:  # autocast's weights, Liger's logits of a sequence, layers that keep 2.2 times as much as ours
        left = (left - 2 * num_weights - 16 * longest * config.vocab_size) / 2.5

    def fitting(checkpointing: str) -> int:
        block = BlockActivations.of(config, checkpointing, 2)
        return int(left / (config.num_layers * block.kept + block.recomputed + block.working))

    checkpointing = next((kind for kind in kinds if fitting(kind) >= longest), kinds[-1])
    return checkpointing, options.token_budget or max(min(fitting(checkpointing), 65_536), longest)


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    names = ("model", "side", "checkpointing", "seconds", "spread", "tokens/s", "trained", "useful MFU", "GiB", *PARTS)
    table = Table(*names, title="A training step; shares of its time", box=SIMPLE)
    for row in (row for row in rows if "error" not in row):
        seconds, size = f"{row['p50_ms'] / 1e3:.2f}", f"{row['peak_mib'] / 1024:.2f}"
        parts = (f"{row['shares'][part]:.0%}" for part in PARTS)
        rates = f"{row['tokens_per_s']:,.0f}", f"{row['trained_tokens_per_s']:,.0f}", f"{row['useful_mfu']:.0%}"
        kind, spread = row["checkpointing"], f"{row['spread']:.0%}"
        table.add_row(row["model"], row["side"], kind, seconds, spread, *rates, size, *parts)
    return table


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
        where = machine(device)
        limits = measure_limits(device)
        peak = peak_flops(where["device"]) if on_gpu else None
        header = {"machine": where, "mfu_of": peak or limits.flops_per_s, "matmul_flops_per_s": limits.flops_per_s}
        lines: list[dict[str, Any]] = [header]
        file = results_folder() / f"step_{slug(where['device'])}.jsonl"

        def write(rows: list[dict[str, Any]]) -> None:
            write_text(file, "".join(json.dumps(line) + "\n" for line in [*lines, *rows]))

        for name in options.model:
            lines += measure(name, options, device, header["mfu_of"], write)
        failed = [f"[red]{row['model']}, {row['side']}: {row['error']}" for row in lines[1:] if "error" in row]
        console().print(table_of(lines[1:]), *failed, f"written to {file}", sep="\n")
    finally:
        dist.destroy_process_group()
    return int(any("error" in line for line in lines if line.get("side") in (SHARED, REPEATED)))


if __name__ == "__main__":
    raise SystemExit(main())
