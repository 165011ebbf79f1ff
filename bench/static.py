"""What the Triton kernels compile to for seven chips, without a GPU: registers, spills, tensor cores, shared memory.

    flashgrpo bench static

Compiles every kernel in bf16 with its launcher's configuration for each of `TARGETS`, a process a
core, reads the machine code, prints a table and writes bench/results/static.json. A row has a list of the kernel's
hot loops, in program order: the innermost ones with tensor-core instructions, else those with
16-byte loads, else those with loads, else the whole kernel. Of each loop:

    instructions      of a pass that takes all branches
    shortest_pass     of a pass that has all loads, products and exponentials and jumps over what else it
                      can: the mask of a diagonal, the block of a row that has the target
    spills            loads and stores of registers that did not fit
    copies_in_flight  of asynchronous copies to shared memory, how many groups a pass leaves under
                      way when it waits: with 0 it waits for what it has just asked for; None where
                      there are none
    global_loads      and of these `global_loads_16_byte`
    schedule          of Hopper's asynchronous products: these, what waits until so many of them are under way, and the
                      exponentials, in program order

A row kernel's pass has 32 logits a thread, so its instructions are those of 32 logits.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import track
from triton import __version__, knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, MockTensor, create_function_from_signature

from flashgrpo.bench.timing import ROOT, Row, markdown, option_parser, publish
from flashgrpo.grpo.run.progress import console
from flashgrpo.kernels import (
    attention,
    attention_gluon,
    attention_plan,
    decode_attention,
    elementwise,
    kept,
    logprob,
    loss_triton,
)
from flashgrpo.kernels.loss_config import LossInputs

RESULTS = ROOT / "bench" / "results" / "static.json"
_CAPABILITIES = {
    f"sm_{major}{minor}": (major, minor) for major, minor in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
}
TARGETS = {name: GPUTarget("cuda", 10 * major + minor, 32) for name, (major, minor) in _CAPABILITIES.items()}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
TENSOR_CORES = ("wgmma.mma_async", "mma.sync", "tcgen05.mma", "v_mfma")
HEADS, HIDDEN_SIZE = 36, 4096  # of a decoder of 7 or 8 billion weights
_MATRIX = re.compile(r"[HQ]GMMA|HMMA|UTC\w*MMA|v_mfma")
_EXP = re.compile(r"MUFU\.EX2|v_exp_f32")
_LOAD = re.compile(r"\b(LDG|LDGSTS|UTMALDG)\.|\b(global|buffer)_load_")
_WIDE = re.compile(r"\bLDG\w*\..*\.128|\bUTMALDG|(global|buffer)_load_dwordx4")
# A pass on Nvidia waits until so many groups of copies are under way; what never goes on to the next line.
_WAIT, _SPILL = re.compile(r"DEPBAR\.LE SB0, 0x([0-9a-f]+)"), re.compile(r"\b(LDL|STL|scratch_load|scratch_store)")
_ALWAYS = re.compile(r"(BRA|s_branch) [^,]+|EXIT *|s_endpgm")
_HEADS = 6  # of queries, of a kv head: those of Qwen2.5-1.5B
_POINTERS = {
    torch.bfloat16: "q_ptr k_ptr v_ptr out_ptr d_out_ptr dq_ptr dk_ptr dv_ptr logits d_logits x residual weight normed "
    "summed d_normed d_summed d_x q_weight k_weight qkv out d_q d_k d_v d_qkv gate_up product d_product "
    "prompt_k_ptr prompt_v_ptr own_k_ptr own_v_ptr values",
    torch.int32: "tiles_ptr target_cu_seqlens first_rows prompt_start prompt_length group place length ids offsets",
    torch.int64: "targets sequence_ids sources",
    torch.int8: "live",
    torch.float32: "acc_ptr sums_ptr peaks_ptr "
    "lse_ptr delta_ptr dk_pieces_ptr dv_pieces_ptr pieces_ptr logprobs entropies "
    "bases totals loss d_logprobs d_entropies rewards old_logprobs ref_logprobs behavior_logprobs partials metrics "
    "token_advantages token_lengths token_log_weights denominator_tensor factors cos sin",
}
_COUNTS = (
    "q_row q_head k_row k_head v_row v_head q_stride k_stride v_stride total_tokens num_heads num_kv_heads group_size "
    "vocab row_stride d_row_stride n "
    "num_sequences num_blocks first_row num_rows num_rewards width rows_each num_partials "
    "qkv_stride out_stride "
    "rows outer_stride d_outer_stride room num_groups tiles prompt_splits own_splits"
)
ARGUMENTS: dict[str, Any] = dict.fromkeys(_COUNTS.split(), 16) | {"advantages": None, "per_token": None}
for _dtype, _names in _POINTERS.items():
    ARGUMENTS |= dict.fromkeys(_names.split(), MockTensor(_dtype))
_FIELDS = LossInputs._fields
_INPUTS = LossInputs._make([ARGUMENTS.get(name, 1.0) for name in _FIELDS])._replace(token_advantages=None)
ARGUMENTS["inputs"] = _INPUTS


class Launch(NamedTuple):
    """A kernel as its launcher calls it; arguments that `ARGUMENTS` lacks are numbers passed as floats."""

    kernel: JITFunction
    target: str
    head_dim: int | None
    options: dict[str, Any]

    def specialise(self) -> Any:
        """Options, signature, constants and attributes: what Triton compiles."""
        backend = make_backend(TARGETS[self.target])
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        # Numbers that divide by 16, as those of real shapes do; pointers are aligned.
        given = ARGUMENTS | self.options
        arguments = {name: given.get(name, 1.0) for name in self.kernel.arg_names}
        options = {name: value for name, value in self.options.items() if name not in arguments}
        bound, specialization, rest = bind(**arguments, **options)
        return self.kernel._pack_args(backend, self.options, bound, specialization, rest)

    def compile(self) -> Any:
        options, *source = self.specialise()
        made = (GluonASTSource if self.kernel.is_gluon() else ASTSource)(self.kernel, *source)
        return compile(made, target=TARGETS[self.target], options=options.__dict__)


def launches(target: str) -> Iterator[Launch]:
    """Every kernel, in the order of the table."""
    chip = attention_plan.of_capability(_CAPABILITIES[target]) if target in _CAPABILITIES else target
    kernels = attention._attention_fwd_kernel, attention._attention_bwd_dq_kernel, attention._attention_bwd_dkv_kernel
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    for dim in (64, 128, 256):
        options = {"HEAD_DIM": dim, "BLOCK_D": dim} | ({"matrix_instr_nonkdim": 16} if target == "gfx942" else {})
        tiles = attention_plan.TILES[chip, dim]
        for kernel, tile in zip(kernels, tiles, strict=True):
            yield Launch(kernel, target, dim, options | dict(zip(names, tile, strict=True)))
        options |= zip(names[1:], tiles[2][1:], strict=True)
        yield Launch(attention._attention_bwd_sum_kernel, target, dim, options)
    for dim in attention.GLUON_HEAD_DIMS if target == "sm_90" else ():
        tensor = torch.empty(16, 16, dim, dtype=torch.bfloat16, device="meta")
        for launcher, tile in zip(attention_gluon.LAUNCHERS, attention_plan.TILES[chip, dim], strict=True):
            tensors = dict.fromkeys(launcher.kernel.arg_names, tensor)
            yield Launch(launcher.kernel, target, dim, {"num_warps": 4} | launcher.descriptors(tensors, *tile[:2]))
    for dim in (64, 128, 256):
        block_m, block_n, num_warps, num_stages = decode_attention.TILES[chip, dim]
        shared = {"HEADS": _HEADS, "HEAD_DIM": dim, "BLOCK_D": dim, "SPLIT": decode_attention.SPLIT}
        options = {
            "BLOCK_M": block_m,
            "OWN_M": 16,
            "BLOCK_N": block_n,
            "num_warps": num_warps,
            "num_stages": num_stages,
        }
        options |= {"matrix_instr_nonkdim": 16} if target == "gfx942" else {}
        yield Launch(decode_attention._decode_split_kernel, target, dim, shared | options)
        options = {"BLOCK_H": attention_plan.block_of(_HEADS), "num_warps": decode_attention.SUM_WARPS}
        yield Launch(decode_attention._decode_sum_kernel, target, dim, shared | options)
    row = {"BLOCK": logprob.BLOCK, "num_warps": 4 if target == "gfx942" else 8}
    scoring = {"ENTROPY": False} | (logprob.HOPPER if target == "sm_90" else {})  # row_loss has the entropy's loop
    yield Launch(logprob._logprob_fwd_kernel, target, None, row | scoring)
    yield Launch(logprob._logprob_bwd_kernel, target, None, row)
    yield Launch(kept._keep_kernel, target, None, row | {"chosen": None})
    no_bonus = {"inputs": _INPUTS._replace(entropy_coef=None)}
    yield Launch(loss_triton._row_loss_kernel, target, None, row | no_bonus)
    yield Launch(loss_triton._move_rows_kernel, target, None, row)
    yield Launch(loss_triton._scale_kernel, target, None, row)
    row = {"BLOCK": loss_triton.BLOCK, "GROUP_BLOCK": loss_triton.GROUP_BLOCK, "num_warps": loss_triton.NUM_WARPS}
    yield Launch(loss_triton._advantage_kernel, target, None, row)
    yield Launch(loss_triton._grpo_loss_kernel, target, None, row)
    yield Launch(loss_triton._sum_blocks_kernel, target, None, {"ROWS": loss_triton._ROWS})
    for dim in (64, 128):
        options = elementwise.rope_options(HEADS, dim)
        yield Launch(elementwise._rope_fwd_kernel, target, dim, options)
        yield Launch(elementwise._rope_bwd_kernel, target, dim, options)
    row = elementwise.row_options(HIDDEN_SIZE)
    yield Launch(elementwise._rms_norm_fwd_kernel, target, None, row)
    yield Launch(elementwise._rms_norm_bwd_kernel, target, None, row)
    row = {"ROWS": elementwise.SUM_ROWS, "COLUMNS": elementwise.SUM_COLUMNS}
    yield Launch(elementwise._sum_partials_kernel, target, None, row)
    row = {"BLOCK": elementwise.SWIGLU_BLOCK}
    yield Launch(elementwise._swiglu_fwd_kernel, target, None, row)
    yield Launch(elementwise._swiglu_bwd_kernel, target, None, row)


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
        code += [instruction] if instruction not in ("", "NOP") else []
    jumps = []
    for place, instruction in enumerate(code):
        if to := re.search(jump, instruction):
            jumps.append((place, labels[to[1]]))
    return resources, code, jumps


def _count(pattern: re.Pattern[str], code: list[str]) -> int:
    return sum(map(bool, map(pattern.search, code)))


def _shortest(code: list[str], jumps: list[tuple[int, int]], low: int, high: int) -> int | None:
    """How many instructions a way forwards from `low` to `high` has: of the ways with the most loads, products and
    exponentials the shortest. None, if there is no way.
    """
    targets = dict(jumps)
    steps = {low: (0, 1)}  # those, negative; instructions
    for place in range(low, high):
        after = [targets[place]] if place in targets else []
        if not _ALWAYS.fullmatch(code[place]):
            after.append(place + 1)
        for to in after if place in steps else ():
            work, count = steps[place]
            step = work - any(x.search(code[place]) for x in (_LOAD, _MATRIX, _EXP)), count + 1
            steps[to] = min(steps.get(to, step), step)
    return steps[high][1] if high in steps else None


def _hot_loops(code: list[str], jumps: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """First and last instruction of each. A jump backwards makes a loop, if a way leads from its target to it.

    Else it leaves code that was moved out of the way.
    """
    ends = {to: at for at, to in sorted(jumps) if to < at and _shortest(code, jumps, to, at)}  # the last jump ends it
    # Innermost: no other loop begins within.
    loops = [(low, high) for low, high in sorted(ends.items()) if sum(low <= x <= high for x in ends) == 1]
    for pattern in (_MATRIX, _WIDE, _LOAD):
        if found := [(low, high) for low, high in loops if _count(pattern, code[low : high + 1])]:
            return found
    return [(0, len(code) - 1)]


def _schedule(loop: list[str]) -> list[str]:
    """The first of each run of the same; empty without a wait for products."""
    names = {"HGMMA": "products", "MUFU.EX2": "exponentials"}
    steps = re.findall(r"HGMMA|MUFU\.EX2|WARPGROUP\.DEPBAR\.LE gsb0, 0x[0-9a-f]+", "\n".join(loop))
    steps = [names.get(step) or f"wait {int(step.rpartition('x')[2], 16)}" for step in steps]
    kept = [step for before, step in zip(["", *steps], steps, strict=False) if step != before]
    return kept if any(step.startswith("wait") for step in kept) else []


def compile_row(launch: Launch) -> Row:
    """A row of the results."""
    compiled = launch.compile()
    (registers, stack), code, jumps = _read(compiled.asm)
    loops, text = [], compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    for low, high in _hot_loops(code, jumps):
        loop = code[low : high + 1]
        loops.append(
            {
                "instructions": len(loop),
                "shortest_pass": _shortest(code, jumps, low, high) or len(loop),
                "spills": _count(_SPILL, loop),
                "copies_in_flight": min((int(x[1], 16) for x in map(_WAIT.search, loop) if x), default=None),
                "global_loads": _count(_LOAD, loop),
                "global_loads_16_byte": _count(_WIDE, loop),
            }
        )
        if schedule := _schedule(loop):
            loops[-1]["schedule"] = schedule
    return {
        "kernel": launch.kernel.__name__,
        "target": launch.target,
        "head_dim": launch.head_dim,
        "registers": int(registers),
        "stack_bytes": int(stack),
        "shared_bytes": compiled.metadata.shared,
        "tensor_core": {name: text.count(name) for name in TENSOR_CORES if name in text},
        "loops": loops,
    }


def _rows_of(target: str) -> list[Row]:
    return [*map(compile_row, launches(target))]


def table(rows: Sequence[Row]) -> list[str]:
    """Of rows of the results; what a loop has stands once a loop."""
    cells = []
    for row in rows:
        matrix = [f"{count} {name}" for name, count in row["tensor_core"].items()]
        own = f"`{row['kernel'].strip('_')}`", row["target"], str(row["head_dim"] or "")
        numbers = [str(row[name]) for name in ("registers", "stack_bytes", "shared_bytes")]
        names = "spills", "copies_in_flight", "shortest_pass", "instructions"
        of_loops = [[str(loop[name]) for loop in row["loops"]] for name in names]
        loads = [f"{loop['global_loads_16_byte']} of {loop['global_loads']}" for loop in row["loops"]]
        spills, copies, shortest, longest = (", ".join(x).replace("None", "") for x in of_loops)
        cells.append(
            [*own, *numbers, ", ".join(matrix), spills, copies.strip(", "), ", ".join(loads), shortest, longest]
        )
    columns = ["kernel, in bf16", "chip", "head dim:", "registers:", "stack:", "shared bytes:", "matrix products"]
    return markdown([*columns, "spills:", "copies in flight:", "loads of 16 bytes:", "pass:", "whole loop:"], cells)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print and write."""
    option_parser("static", __doc__).parse_args(arguments)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        chips = track(pool.map(_rows_of, TARGETS), "compiling", total=len(TARGETS), console=console)
        rows = [row for chip in chips for row in chip]
    publish("static.json", {"triton": __version__, "rows": rows}, table(rows))
    return 0
