"""What the Triton kernels compile to for four chips, without a GPU: registers, spills, tensor cores, shared memory.

    flashgrpo bench static

Compiles every kernel in bf16 with its launcher's configuration for sm_80, sm_90, sm_100 and gfx942,
reads the machine code, prints a table and writes bench/results/static.json. Hot loops are the
innermost ones with tensor-core instructions, else the innermost one with the most 16-byte loads,
else with the most loads, else the whole kernel. Instructions and loads are those of the shortest
hot loop, the one without masks; spills are those of all.
"""

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import track
from triton import __version__, knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile, make_backend
from triton.runtime.jit import JITFunction, MockTensor, create_function_from_signature

from flashgrpo.bench.timing import ROOT, Row, markdown, option_parser, publish
from flashgrpo.grpo.run.progress import console
from flashgrpo.kernels import attention, attention_plan, decode_attention, elementwise, logprob, loss_triton
from flashgrpo.kernels.loss_config import LossInputs

RESULTS = ROOT / "bench" / "results" / "static.json"
TARGETS = {f"sm_{x}": GPUTarget("cuda", x, 32) for x in (80, 90, 100)} | {"gfx942": GPUTarget("hip", "gfx942", 64)}
TENSOR_CORES = ("wgmma.mma_async", "mma.sync", "tcgen05.mma", "v_mfma")
HEADS, HIDDEN_SIZE = 36, 4096  # of a decoder of 7 or 8 billion weights
_MATRIX = re.compile(r"[HQ]GMMA|HMMA|UTC\w*MMA|v_mfma")
_LOAD = re.compile(r"\b(LDG|LDGSTS|UTMALDG)\.|\b(global|buffer)_load_")
_WIDE = re.compile(r"\bLDG\w*\..*\.128|\bUTMALDG|(global|buffer)_load_dwordx4")
_SPILL, _END = re.compile(r"\b(LDL|STL|scratch_load|scratch_store)"), re.compile(r"\bEXIT\b|s_endpgm")
_HEADS = 6  # of queries, of a kv head: those of Qwen2.5-1.5B
_POINTERS = {
    torch.bfloat16: "q_ptr k_ptr v_ptr out_ptr d_out_ptr dq_ptr dk_ptr dv_ptr logits d_logits x residual weight normed "
    "summed d_normed d_summed d_x q_weight k_weight qkv out d_q d_k d_v d_qkv gate_up product d_product "
    "prompt_k_ptr prompt_v_ptr own_k_ptr own_v_ptr",
    torch.int32: "tiles_ptr target_cu_seqlens first_rows prompt_start prompt_length group place length",
    torch.int64: "targets sequence_ids sources",
    torch.int8: "live",
    torch.float32: "acc_ptr sums_ptr peaks_ptr "
    "lse_ptr delta_ptr dk_pieces_ptr dv_pieces_ptr pieces_ptr logprobs entropies peaks "
    "log_totals loss d_logprobs d_entropies rewards old_logprobs ref_logprobs behavior_logprobs partials metrics "
    "token_advantages token_lengths token_log_weights denominator_tensor factors cos sin",
}
_COUNTS = (
    "q_row q_head k_row k_head v_row v_head q_stride k_stride v_stride total_tokens num_heads num_kv_heads group_size "
    "vocab row_stride d_row_stride n "
    "num_sequences num_blocks first_row num_rows num_rewards width rows_each num_partials "
    "qkv_stride out_stride "
    "room num_groups tiles prompt_splits own_splits"
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
        return self.kernel._pack_args(backend, options, bound, specialization, rest)

    def compile(self) -> Any:
        options, *source = self.specialise()
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
    for dim in (64, 128, 256):
        block_m, block_n, num_warps, num_stages = decode_attention.TILES[target, dim]
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
        code += [instruction] if instruction else []
    jumps = []
    for place, instruction in enumerate(code):
        if to := re.search(jump, instruction):
            jumps.append((place, labels[to[1]]))
    return resources, code, jumps


def _count(pattern: re.Pattern[str], code: list[str]) -> int:
    return sum(map(bool, map(pattern.search, code)))


def _hot_loops(code: list[str], jumps: list[tuple[int, int]]) -> list[list[str]]:
    """A loop is what a jump backwards spans.

    Unless the program ends in it: that is code moved out of the way.
    """
    spans = [(to, at) for at, to in jumps if to < at and not _count(_END, code[to:at])]
    loops = []
    for low, high in spans:
        # Innermost: no other loop lies within.
        inside = [span for span in spans if low <= span[0] and span[1] <= high]
        if inside == [(low, high)] and _count(_LOAD, code[low : high + 1]):
            loops.append(code[low : high + 1])
    if matrix := [loop for loop in loops if _count(_MATRIX, loop)]:
        return matrix
    loops.sort(key=lambda loop: (_count(_WIDE, loop), _count(_LOAD, loop)))
    return loops[-1:] or [code]


def compile_row(launch: Launch) -> Row:
    """A row of the results."""
    compiled = launch.compile()
    (registers, stack), code, jumps = _read(compiled.asm)
    loops = _hot_loops(code, jumps)
    loop, text = min(loops, key=len), compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    return {
        "kernel": launch.kernel.__name__,
        "target": launch.target,
        "head_dim": launch.head_dim,
        "registers": int(registers),
        "stack_bytes": int(stack),
        "hot_loop_spills": sum(_count(_SPILL, x) for x in loops),
        "shared_bytes": compiled.metadata.shared,
        "tensor_core": {name: text.count(name) for name in TENSOR_CORES if name in text},
        "global_loads": _count(_LOAD, loop),
        "global_loads_16_byte": _count(_WIDE, loop),
        "instructions": len(loop),
    }


def table(rows: Sequence[Row]) -> list[str]:
    """Of rows of the results; loads are a pass's through the hot loop."""
    cells = []
    for row in rows:
        matrix = [f"{count} {name}" for name, count in row["tensor_core"].items()]
        names = "registers", "stack_bytes", "hot_loop_spills", "shared_bytes"
        loads = f"{row['global_loads_16_byte']} of {row['global_loads']}"
        own = f"`{row['kernel'].strip('_')}`", row["target"], str(row["head_dim"] or "")
        numbers = [str(row[name]) for name in names]
        cells.append([*own, *numbers, ", ".join(matrix), loads, str(row["instructions"])])
    columns = ["kernel, in bf16", "chip", "head dim:", "registers:", "stack:", "spills:", "shared bytes:"]
    return markdown([*columns, "matrix products", "loads of 16 bytes:", "loop:"], cells)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print and write."""
    option_parser("static", __doc__).parse_args(arguments)
    every = [*itertools.chain(*map(launches, TARGETS))]
    rows = [compile_row(launch) for launch in track(every, "compiling", console=console)]
    publish("static.json", {"triton": __version__, "rows": rows}, table(rows))
    return 0
