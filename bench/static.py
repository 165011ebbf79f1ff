"""What the Triton kernels compile to for four chips, without a GPU: registers, spills, tensor cores, shared memory.

    flashgrpo bench static

Compiles every kernel in bf16 with its launcher's configuration for sm_80, sm_90, sm_100 and gfx942, reads the machine
code, prints a table and writes bench/results/static.json. Hot loops are the innermost ones with tensor-core
instructions, else the innermost one with the most 16-byte loads, else with the most loads, else the whole kernel.
Instructions and loads are those of the shortest hot loop, the one without masks; spills are those of all.

Rows of sm_90 have a `prediction` for an H200 at the shapes below: arithmetic, not a measurement. The limit is what
matmul FLOPs or bytes take at the rates below. The expected share of it sets a pass through the hot loop against its
issue, 4 warp instructions a clock, part of which other programs hide; latency counts only where little else does.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton import __version__, knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile, make_backend
from triton.runtime.jit import JITFunction, MockTensor, create_function_from_signature

from flashgrpo.bench.timing import option_parser, results_folder
from flashgrpo.kernels import attention, attention_plan, logprob, loss_triton
from flashgrpo.model.files import write_text

RESULTS = Path(__file__).resolve().parent / "results" / "static.json"
TARGETS = {f"sm_{x}": GPUTarget("cuda", x, 32) for x in (80, 90, 100)} | {"gfx942": GPUTarget("hip", "gfx942", 64)}
TENSOR_CORES = ("wgmma.mma_async", "mma.sync", "tcgen05.mma", "v_mfma")
FLOPS, BANDWIDTH, CLOCK, PROCESSORS, LATENCY = 790e12, 4.3e12, 1.755e9, 132, 3e-7  # of an H200, per second; seconds
ROWS, VOCAB, TOKENS, HEADS, KV_HEADS, LOSS_TOKENS, COMPLETIONS = 8192, 151_936, 8192, 32, 8, 65_536, 64
_MATRIX = re.compile(r"[HQ]GMMA|HMMA|UTC\w*MMA|v_mfma")
_LOAD = re.compile(r"\b(LDG|LDGSTS|UTMALDG)\.|\b(global|buffer)_load_")
_WIDE = re.compile(r"\bLDG\w*\..*\.128|\bUTMALDG|(global|buffer)_load_dwordx4")
_SPILL, _END = re.compile(r"\b(LDL|STL|scratch_load|scratch_store)"), re.compile(r"\bEXIT\b|s_endpgm")
_POINTERS = {
    torch.bfloat16: "q_ptr k_ptr v_ptr out_ptr d_out_ptr dq_ptr dk_ptr dv_ptr logits d_logits x",
    torch.int32: "tiles_ptr offsets",
    torch.int64: "targets sequence_ids sources",
    torch.int8: "live",
    torch.float32: "lse_ptr delta_ptr dk_pieces_ptr dv_pieces_ptr pieces_ptr logprobs entropies peaks log_totals loss "
    "d_logprobs d_entropies rewards old ref behavior partials metrics token_advantages token_lengths "
    "denominator_tensor factors",
}
_COUNTS = (
    "q_stride k_stride v_stride total_tokens num_heads num_kv_heads group_size vocab row_stride d_row_stride n "
    "num_sequences num_blocks first_row num_rows num_rewards width"
)
ARGUMENTS: dict[str, Any] = {name: MockTensor(dtype) for dtype, names in _POINTERS.items() for name in names.split()}
ARGUMENTS |= dict.fromkeys(_COUNTS.split(), 16) | {"advantages": None}
_INPUTS = loss_triton.KernelInputs._make(ARGUMENTS.get(name, 1.0) for name in loss_triton.KernelInputs._fields)
ARGUMENTS["inputs"] = _INPUTS


class Launch(NamedTuple):
    """A kernel as its launcher calls it; arguments that `ARGUMENTS` lacks are numbers passed as floats."""

    kernel: JITFunction
    target: str
    head_dim: int | None
    options: dict[str, Any]

    def specialise(self, **changes: Any) -> tuple[tuple[Any, ...], Any]:
        """What Triton compiles once for, and what it compiles then."""
        backend = make_backend(TARGETS[self.target])
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        given = ARGUMENTS | self.options | changes
        arguments = {name: given.get(name, 1.0) for name in self.kernel.arg_names}
        options = {name: value for name, value in self.options.items() if name not in arguments}
        bound, specialization, rest = bind(**arguments, **options)
        return tuple(specialization), self.kernel._pack_args(backend, options, bound, specialization, rest)

    def compile(self) -> Any:
        options, *source = self.specialise()[1]
        return compile(ASTSource(self.kernel, *source), target=TARGETS[self.target], options=options.__dict__)


def launches(target: str) -> Iterator[Launch]:
    """Every kernel, in the order of the table."""
    kernels = attention._attention_fwd_kernel, attention._attention_bwd_dq_kernel, attention._attention_bwd_dkv_kernel
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    for dim in (64, 128, 256):
        options = {"HEAD_DIM": dim, "BLOCK_D": dim} | ({"matrix_instr_nonkdim": 16} if target == "gfx942" else {})
        tiles = attention_plan.TILES[target, dim]
        for kernel, tile in zip(kernels, tiles, strict=True):
            yield Launch(kernel, target, dim, options | dict(zip(names, tile, strict=True)))
        options |= zip(names[1:], tiles[2][1:], strict=True)
        yield Launch(attention._attention_bwd_sum_kernel, target, dim, options)
    row = {"BLOCK": logprob.BLOCK, "num_warps": logprob.NUM_WARPS}
    yield Launch(logprob._logprob_fwd_kernel, target, None, row | {"SLICE": logprob.SLICE})
    yield Launch(logprob._logprob_bwd_kernel, target, None, row)
    no_bonus = {"SLICE": logprob.SLICE, "inputs": _INPUTS._replace(entropy_coef=None)}
    yield Launch(loss_triton._row_loss_kernel, target, None, row | no_bonus)
    yield Launch(loss_triton._move_rows_kernel, target, None, row)
    yield Launch(loss_triton._scale_kernel, target, None, row)
    row = {"BLOCK": loss_triton.BLOCK, "GROUP_BLOCK": loss_triton.GROUP_BLOCK}
    yield Launch(loss_triton._advantage_kernel, target, None, row)
    yield Launch(loss_triton._grpo_loss_kernel, target, None, row)
    yield Launch(loss_triton._sum_blocks_kernel, target, None, {"ROWS": loss_triton._ROWS})


def _read(assembly: Any) -> tuple[list[str], list[str], list[tuple[int, int]]]:
    """Registers and bytes of stack; instructions; jumps (from, to) as indices into them."""
    if text := assembly.get("amdgcn"):
        resources = re.findall(r"\.(?:vgpr_count|private_segment_fixed_size): +(\d+)", text)[::-1]
        jump, body = r"s_c?branch\w* (\.L\w+)", text.split(".section", 1)[0]
        lines = re.findall(r"^(?:(\.L\w+):|\s+([a-z].*))", body, re.M)
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(assembly["cubin"])
            command = (knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "--dump-sass", file.name)
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        resources, jump = re.findall(r"(?:REG|STACK):(\d+)", text)[:2], r"\bBRA\b.*?0x([0-9a-f]+)"
        lines = re.findall(r"/\*0*([0-9a-f]+)\*/\s+([^;/]*);", text)
    code, labels = [], {}
    for label, instruction in lines:
        labels[label] = len(code)
        code += [instruction] if instruction else []
    return resources, code, [(i, labels[m[1]]) for i, text in enumerate(code) if (m := re.search(jump, text))]


def _count(pattern: re.Pattern[str], code: list[str]) -> int:
    return sum(bool(pattern.search(line)) for line in code)


def _hot_loops(code: list[str], jumps: list[tuple[int, int]]) -> list[list[str]]:
    """A loop is what a jump backwards spans, unless the program ends in it: that is code moved out of the way."""
    spans = [(to, at) for at, to in jumps if to < at and not _count(_END, code[to:at])]
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    loops = [loop for loop in (code[low : high + 1] for low, high in inner) if _count(_LOAD, loop)]
    matrix = [loop for loop in loops if _count(_MATRIX, loop)]
    return matrix or sorted(loops, key=lambda x: (_count(_WIDE, x), _count(_LOAD, x)))[-1:] or [code]


def measure(launch: Launch) -> dict[str, Any]:
    """A row of the results."""
    compiled = launch.compile()
    (registers, stack), code, jumps = _read(compiled.asm)
    loops = _hot_loops(code, jumps)
    loop, text = min(loops, key=len), compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    row = {
        "kernel": launch.kernel.__name__, "target": launch.target, "head_dim": launch.head_dim,
        "registers": int(registers), "stack_bytes": int(stack),
        "hot_loop_spills": sum(_count(_SPILL, x) for x in loops), "shared_bytes": compiled.metadata.shared,
        "tensor_core": {name: text.count(name) for name in TENSOR_CORES if name in text},
        "global_loads": _count(_LOAD, loop), "global_loads_16_byte": _count(_WIDE, loop), "instructions": len(loop),
    }  # fmt: skip
    is_predicted = launch.target == "sm_90" and launch.head_dim in (None, 128)
    return row | ({"prediction": predict(launch, row, compiled.metadata.num_warps)} if is_predicted else {})


def predict(launch: Launch, row: dict[str, Any], warps: int) -> dict[str, Any]:
    """What arithmetic says of an H200."""
    dim, options = launch.head_dim or 0, launch.options
    scores, stats, logits = HEADS * TOKENS * (TOKENS + 1) // 2, 4 * HEADS * TOKENS, 2 * ROWS * VOCAB
    queries, keys = 2 * TOKENS * HEADS * dim, 2 * TOKENS * KV_HEADS * dim
    product = 2 * dim * options.get("BLOCK_M", 0) * options.get("BLOCK_N", 0) / FLOPS
    block = 2 * options.get("BLOCK", 0) / BANDWIDTH
    # Bytes; FLOPs; seconds of a pass through all processors' hot loops at the limit; loads that wait for another.
    size, flops, ideal, chain = {
        "_attention_fwd_kernel": (2 * queries + 2 * keys + stats, 4 * dim * scores, 2 * product, 0),
        "_attention_bwd_dq_kernel": (4 * queries + 2 * keys + 2 * stats, 6 * dim * scores, 3 * product, 0),
        "_attention_bwd_dkv_kernel": (2 * queries + 4 * keys + 2 * stats, 8 * dim * scores, 4 * product, 0),
        "_attention_bwd_sum_kernel": (0, 0, 0.0, 0),  # for prompts above `attention._PIECE`
        "_logprob_fwd_kernel": (logits + 24 * ROWS, 0, block, 0),
        "_logprob_bwd_kernel": (2 * logits + 28 * ROWS, 0, 2 * block, 0),
        "_row_loss_kernel": (2 * logits + 40 * ROWS, 0, 2 * block, 0),  # a pass reads and, from L2, writes
        "_move_rows_kernel": (0, 0, 0.0, 0),
        "_scale_kernel": (0, 0, 0.0, 0),
        "_advantage_kernel": (16 * LOSS_TOKENS, 0, 0.0, 2 * (COMPLETIONS - 1).bit_length() + 4),
        "_grpo_loss_kernel": (28 * LOSS_TOKENS, 0, 0.0, 2 * (COMPLETIONS - 1).bit_length() + 8),
        "_sum_blocks_kernel": (8 * loss_triton.NUM_SUMS * LOSS_TOKENS // loss_triton.BLOCK, 0, 0.0, 2),
    }[row["kernel"]]
    of_registers = 65_536 // (-(-row["registers"] // 8) * 256 * warps)
    programs = min(of_registers, 233_472 // (row["shared_bytes"] + 1024), 64 // warps)
    limit = max(flops / FLOPS, size / BANDWIDTH)
    ideal, issue = ideal * PROCESSORS * CLOCK, row["instructions"] * warps / 4
    share, reason = None, "Not launched at this shape."
    if ideal:
        share = ideal / (max(ideal, issue) + min(ideal, issue) / programs)
        reason = f"A pass takes {ideal:.0f} clocks at the limit and {issue:.0f} to issue; programs at once: {programs}."
    elif chain:
        share = limit / (limit + chain * LATENCY)
        reason = f"{chain} loads, each of which waits for another, of {1e9 * LATENCY:.0f} ns; bytes hardly matter."
    return {
        "bytes": size, "flops": flops, "limit_ms": float(f"{1e3 * limit:.3g}"), "occupancy": programs * warps / 64,
        "expected_share_of_limit": share and round(share, 2), "reason": reason,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print and write."""
    option_parser("static", __doc__).parse_args(arguments)
    console, every = Console(), [launch for target in TARGETS for launch in launches(target)]
    rows = [measure(x) for x in track(every, "compiling", console=console, disable=not console.is_terminal)]
    names = ("kernel", "chip", "dim", "regs", "stack", "spills", "shared", "matrix", "loads", "wide", "loop", "share")
    table = Table(*names, title="Compiled in bf16. share: predicted, of an H200's limit", box=SIMPLE)
    for row in rows:
        _, *values = row.values() if "prediction" in row else (*row.values(), {})
        values[6] = " ".join(f"{count} {name.split('.')[0]}" for name, count in row["tensor_core"].items())
        values[-1] = values[-1].get("expected_share_of_limit")
        table.add_row(row["kernel"][1:-7], *("" if x is None else str(x) for x in values))
    console.print(table)
    write_text(results_folder() / "static.json", json.dumps({"triton": __version__, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
