"""Kernels stay as good as bench/results/static.json says they compile; nothing here needs a GPU."""

import ast
import json
import random
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
import torch
import triton
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from flashgrpo.bench import static
from flashgrpo.bench.static import RESULTS, TARGETS, compile_row, launches
from flashgrpo.kernels import attention, attention_gluon, attention_plan, decode_attention, elementwise
from flashgrpo.kernels import kept as kept_sets
from flashgrpo.kernels.decode_attention import DecodeRows
from flashgrpo.kernels.logprob import TritonRows
from flashgrpo.kernels.loss_config import LossConfig, LossInputs
from flashgrpo.kernels.loss_triton import RowLoss, live_rows, loss_of_logprobs, scale_rows

KERNELS = Path(__file__).parents[2] / "kernels"
RECORDED = json.loads(RESULTS.read_text())
ROWS = {(row["kernel"], row["target"], row["head_dim"]): row for row in RECORDED["rows"]}
LARGE, SMALL = 232_448, 101_376
SHARED_LIMITS = {"sm_80": 166_912, "sm_90": LARGE, "sm_100": LARGE, "gfx942": 65_536}
SHARED_LIMITS |= dict.fromkeys(("sm_86", "sm_89", "sm_120"), SMALL)
MATRIX_INSTRUCTION = dict.fromkeys(TARGETS, "mma.sync")
MATRIX_INSTRUCTION |= {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
MATMULS = ("_attention_fwd_kernel", "_attention_bwd_dq_kernel", "_attention_bwd_dkv_kernel")
ELEMENTWISE = (
    ("_rope_fwd_kernel", 64),
    ("_rope_fwd_kernel", 128),
    ("_rope_bwd_kernel", 64),
    ("_rope_bwd_kernel", 128),
    ("_rms_norm_fwd_kernel", None),
    ("_rms_norm_bwd_kernel", None),
    ("_sum_partials_kernel", None),
    ("_swiglu_fwd_kernel", None),
    ("_swiglu_bwd_kernel", None),
)
ROW_KERNELS = ("_logprob_fwd_kernel", "_logprob_bwd_kernel", "_row_loss_kernel")
WORST = [
    ("_attention_fwd_kernel", 128),
    ("_attention_bwd_dq_kernel", 128),
    ("_attention_bwd_dkv_kernel", 128),
    ("_attention_bwd_dkv_kernel", 256),
    ("_attention_fwd_gluon", 128),
    ("_attention_bwd_dq_gluon", 128),
    ("_attention_bwd_dkv_gluon", 128),
    ("_decode_split_kernel", 128),
    *((kernel, None) for kernel in (*ROW_KERNELS, "_grpo_loss_kernel")),
    ("_rope_bwd_kernel", 128),
    ("_rms_norm_bwd_kernel", None),
    ("_swiglu_bwd_kernel", None),
]


# ptxas moves a wait up where it can, and waits for every single product where it lacks registers.
SCHEDULES = {
    "_attention_fwd_gluon": ["products", "wait 1", "exponentials", "wait 0"],
    "_attention_bwd_dq_gluon": ["products", "wait 1", "exponentials", "wait 0", "products", "wait 0"],
    "_attention_bwd_dkv_gluon": ["products", "wait 1", "exponentials", "wait 0", "products", "wait 1", "wait 0"],
}


def find_launch(kernel, head_dim):
    return next(x for x in launches("sm_90") if (x.kernel.__name__, x.head_dim) == (kernel, head_dim))


def defined_kernels():
    for path in KERNELS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and re.fullmatch(r"_\w+_kernel", node.name):
                assert any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
                yield node.name


@pytest.mark.parametrize("target", TARGETS)
def test_a_chip_runs_every_kernel(target):
    """A kernel that nobody compiles may spill, or need more shared memory than there is, until a GPU says so."""
    rows = {key: row for key, row in ROWS.items() if key[1] == target}
    assert {kernel for kernel, _, _ in rows} == {*defined_kernels(), *(SCHEDULES if target == "sm_90" else ())}
    assert [(x.kernel.__name__, x.target, x.head_dim) for x in launches(target)] == [*rows]
    # Triton compiles what needs more shared memory than there is; it fails at the first launch.
    assert {key: row for key, row in rows.items() if row["shared_bytes"] > SHARED_LIMITS[target]} == {}
    # A tile that the best instruction does not take falls back to one of half its rate, or to none.
    products = {key: [*row["tensor_core"]] for key, row in rows.items() if key[0] in MATMULS}
    assert products == {(name, target, dim): [MATRIX_INSTRUCTION[target]] for dim in (64, 128, 256) for name in MATMULS}
    for dim in (64, 128, 256):
        assert MATRIX_INSTRUCTION[target] in rows["_decode_split_kernel", target, dim]["tensor_core"]
    if target.startswith("sm_"):
        assert {key: row for key, row in rows.items() if any(loop["spills"] for loop in row["loops"])} == {}
    # With narrower loads the row kernels are bound by their instructions, not by memory.
    forward, backward, fused = (rows[name, target, None]["loops"] for name in ROW_KERNELS)
    assert (len(forward), len(backward), len(fused)) == (1, 1, 2)
    for loop in (*forward, *fused):
        assert loop["global_loads"] == loop["global_loads_16_byte"] == forward[0]["global_loads"] > 0
    assert backward[0]["global_loads_16_byte"] == forward[0]["global_loads_16_byte"]
    for key in ELEMENTWISE:
        row = rows[key[0], target, key[1]]
        if target.startswith("sm_"):
            assert row["loops"][0]["global_loads"] == row["loops"][0]["global_loads_16_byte"] > 0, key
        assert not row["stack_bytes"], key


@pytest.mark.parametrize("kernel", MATMULS)
def test_loads_have_a_whole_pass(kernel):
    """On sm_90 a pass waits for what the pass before last asked for: at least two groups of copies stay under way.

    With `num_stages` 2 it waits for all (num = 0), asked for behind the last product, and only that product hides them.
    """
    for dim in (64, 128, 256):
        assert ROWS[kernel, "sm_90", dim]["loops"][0]["copies_in_flight"] >= 2
    loops = find_launch(kernel, 128).compile().asm["ttgir"].split("scf.for")[1:]
    waits = [[int(n) for n in re.findall(r"async_wait.*num = (\d+)", loop.split("scf.yield")[0])] for loop in loops]
    assert min(waits[0]) >= 2
    assert waits[1:] == ([] if kernel == MATMULS[2] else [[0]])  # the masked one, which is short


def test_exponentials_run_beneath_the_product_of_d_out_and_v():
    _, code, jumps = static._read(find_launch(MATMULS[2], 128).compile().asm)
    ((low, high),) = static._hot_loops(code, jumps)
    found = [re.search(r"WARPGROUP.DEPBAR|HGMMA|MUFU.EX2", line) for line in code[low : high + 1]]
    order = [x[0] for x in found if x]
    scores_wait, last = order.index("WARPGROUP.DEPBAR"), len(order) - 1 - order[::-1].index("MUFU.EX2")
    assert order[:scores_wait] == ["HGMMA"] * 8
    assert order[scores_wait:last].count("HGMMA") >= 4


@pytest.mark.parametrize("kernel", SCHEDULES)
def test_a_second_product_is_under_way_beneath_the_exponentials(kernel):
    for dim in attention.GLUON_HEAD_DIMS:
        row = ROWS[kernel, "sm_90", dim]
        assert {tuple(loop["schedule"]) for loop in row["loops"]} == {tuple(SCHEDULES[kernel])}
        ptx = find_launch(kernel, dim).compile().asm["ptx"]
        threads = int(re.search(r"\.reqntid (\d+)", ptx)[1])
        assert threads * row["registers"] <= 65_536
        # Two consumers, of which one has what the kernel began with, and the producer.
        consumer, producer = (int(n) for n in attention_gluon._REGISTERS.value)
        assert {int(n) for n in re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32 \t?(\d+)", ptx)} >= {
            consumer,
            producer,
        }
        assert 128 * (2 * consumer + producer) <= threads * row["registers"]


def written_while_read(loop):
    """Instructions that write a register which a product that no wait has ended yet may still read."""
    group, under_way, found = set(), [], []
    for instruction in [*loop, *loop]:  # a product may be under way into the next pass
        name, *operands = re.sub(r"^@\S+ |,|\.reuse", "", instruction).split()
        first = [int(x[1:]) for x in operands[:2] if re.fullmatch(r"R\d+", x)]
        if name.startswith("HGMMA"):  # 4 registers a thread are 16 columns of the left operand
            group |= {first[1] + i for i in range(4)} if first[1:] else set()
            if operands[-1] == "gsb0":
                under_way, group = [*under_way, group], set()
        elif name == "WARPGROUP.DEPBAR.LE":
            under_way = under_way[len(under_way) - int(operands[-1], 16) :]
        elif first and re.match(r"R|PT?\d*", operands[0]) and not name.startswith(("ST", "BAR")):
            width = 4 if ".128" in name else 2 if re.search(r"\.64|WIDE", name) else 1
            found += [instruction] * (not group.union(*under_way).isdisjoint(range(first[0], first[0] + width)))
    return found


@pytest.mark.parametrize("kernel", [*MATMULS, *SCHEDULES])
def test_no_register_is_written_that_a_product_under_way_reads(kernel):
    """ptxas before CUDA 13.3 gives them away once the product is issued (github.com/triton-lang/triton/pull/11781)."""
    planted = ["HGMMA.64x64x16.F32.BF16 R24, R60, gdesc[UR4], R24, gsb0", "IADD3 R63, R1, R2, RZ"]
    assert written_while_read(planted) == [planted[1]] * 2
    assert not written_while_read([planted[0], "WARPGROUP.DEPBAR.LE gsb0, 0x0", planted[1]])
    for dim in attention.GLUON_HEAD_DIMS:
        _, code, jumps = static._read(find_launch(kernel, dim).compile().asm)
        assert any(re.search(r"HGMMA.* R\d+, R\d+, gdesc", line) for line in code)
        for low, high in static._hot_loops(code, jumps):
            assert not written_while_read(code[low : high + 1])


def test_a_chip_that_no_table_knows_takes_the_smallest_tiles():
    """sm_86, sm_89 and sm_120 have 99 KB of shared memory."""
    chips = {attention_plan.of_capability(chip) for chip in ((8, 6), (8, 9), (12, 0), (12, 1), (13, 0))}
    assert chips == {"sm_86"}
    assert attention_plan.of_capability((10, 3)) == "sm_100"


@pytest.mark.skipif(triton.__version__ != RECORDED["triton"], reason="figures are those of another Triton")
@pytest.mark.parametrize(("kernel", "head_dim"), WORST)
def test_kernels_compile_no_worse_than_recorded(kernel, head_dim):
    """Run `flashgrpo bench static` where a change is meant."""
    now, recorded = compile_row(find_launch(kernel, head_dim)), ROWS[kernel, "sm_90", head_dim]
    for name in ("registers", "stack_bytes", "shared_bytes"):
        assert now[name] <= recorded[name], name
    for loop, before in zip(now["loops"], recorded["loops"], strict=True):
        for name in ("instructions", "shortest_pass", "spills"):
            assert loop[name] <= before[name], name
        assert loop.get("schedule") == before.get("schedule")
        assert loop["global_loads_16_byte"] >= before["global_loads_16_byte"]
        assert (loop["copies_in_flight"] or 0) >= (before["copies_in_flight"] or 0)
    assert now["tensor_core"].keys() == recorded["tensor_core"].keys()
    assert all(now["tensor_core"][name] >= count for name, count in recorded["tensor_core"].items())


@pytest.mark.parametrize("kernel", [*ROW_KERNELS, "_move_rows_kernel"])
def test_an_odd_vocabulary_compiles_as_well_as_any(kernel, monkeypatch):
    """A chunk's rows begin at multiples of 16 bytes; that 16 does not divide their width must not narrow a loop."""
    launch = find_launch(kernel, None)
    even = compile_row(launch)
    strides = dict.fromkeys(("row_stride", "d_row_stride"), 50272)
    monkeypatch.setattr(static, "ARGUMENTS", static.ARGUMENTS | {"vocab": 50257, "width": 50257} | strides)
    odd = compile_row(launch)
    assert not odd["stack_bytes"]
    assert odd["registers"] <= even["registers"]
    for loop, same in zip(odd["loops"], even["loops"], strict=True):
        assert not loop["spills"]
        assert loop["global_loads_16_byte"] == same["global_loads_16_byte"] > 0


def arithmetic(launch):
    """A kernel's fp32 operations up to its first store of a result, in the order of its PTX."""
    ptx = launch.compile().asm["ptx"].split("st.global", 1)[0]
    return re.findall(r"^\s*(?:@\S+ )?((?:add|sub|mul|fma|max|ex2|div)\.\S*f32)", ptx, re.M)


def test_log_probs_are_the_same_instructions_in_every_kernel():
    """A product that one compiler fuses with an addition and another does not is a ratio that is not 1."""
    forward, fused = (find_launch(kernel, None) for kernel in ("_logprob_fwd_kernel", "_row_loss_kernel"))
    whole, bare = arithmetic(forward._replace(options=forward.options | {"ENTROPY": True})), arithmetic(forward)
    assert arithmetic(fused) == whole
    rest = iter(whole)
    assert all(operation in rest for operation in bare)
    assert bare[-1] == "fma.rn.f32"  # of the log-prob, so that no subtraction of an old one takes in its product


@cache
def products(kernel):
    """The integer products of registers in a kernel's PTX: bits of the result, and where each factor comes from.

    That is a set of names of arguments, special registers, and "load" for what was read from memory.
    """
    launch = find_launch(kernel, 128 if re.search("attention|decode|rope", kernel) else None)
    _, signature, *_ = launch.specialise()
    arguments = []
    for name, kind in signature.items():  # a tuple's entries are arguments of their own
        kinds = kind if isinstance(kind, tuple) else (kind,)
        arguments += [name] * sum(each != "constexpr" for each in kinds)
    ptx = launch.compile().asm["ptx"]
    origins, found = defaultdict(set), []
    lines = re.findall(r"^\s*(?:@\S+ )?([a-z][\w.:]*)\s+([^;]*%[^;]*);", ptx, re.M)
    for _ in range(3):  # values go round loops
        found = []
        for operation, operands in lines:
            if operation.startswith(("st.", "setp", "cp.async", "wgmma")):
                continue
            first, _, rest = operands.partition("}" if operands.startswith("{") else ",")
            sources = re.findall(r"%[\w.]+", rest)
            came = [origins[name] | ({name[1:]} if name.startswith(("%ctaid", "%tid")) else set()) for name in sources]
            if parameter := re.search(r"_param_(\d+)\]", rest):
                came = [{arguments[int(parameter[1])]}]
            elif operation.startswith("ld."):
                came = [{"load"}]
            for name in re.findall(r"%\w+", first):
                origins[name] |= set().union(*came)
            if operation.startswith(("mul.wide", "mad.wide", "mul.lo", "mad.lo")) and len(re.findall(",", rest)) >= 1:
                factors = [x.strip() for x in rest.split(",")][:2]
                if all(x.startswith("%") for x in factors):
                    bits = 64 if "wide" in operation or operation.endswith("64") else 32
                    found.append((bits, *(origins[x] for x in factors)))
    return found


@pytest.mark.parametrize(
    ("kernel", "row", "stride"),
    [
        ("_logprob_fwd_kernel", "ctaid.x", "row_stride"),
        ("_logprob_fwd_kernel", "ctaid.x", "outer_stride"),
        ("_logprob_bwd_kernel", "ctaid.x", "row_stride"),
        ("_logprob_bwd_kernel", "ctaid.x", "d_row_stride"),
        ("_logprob_bwd_kernel", "ctaid.x", "outer_stride"),
        ("_logprob_bwd_kernel", "ctaid.x", "d_outer_stride"),
        ("_row_loss_kernel", "ctaid.x", "row_stride"),
        ("_row_loss_kernel", "ctaid.x", "d_row_stride"),
        ("_move_rows_kernel", "ctaid.x", "row_stride"),
        ("_scale_kernel", "ctaid.x", "row_stride"),
        ("_rms_norm_fwd_kernel", "ctaid.x", "width"),
        ("_rms_norm_bwd_kernel", "ctaid.x", "width"),
        ("_swiglu_fwd_kernel", "ctaid.x", "width"),
        ("_swiglu_bwd_kernel", "ctaid.x", "width"),
        *(("_rope_fwd_kernel", "ctaid.x", f"{name}_stride") for name in ("qkv", "out")),
        *(("_rope_bwd_kernel", "ctaid.x", f"{name}_stride") for name in ("qkv", "q", "k", "v")),
        *((kernel, "load", f"{name}_row") for kernel in MATMULS for name in "qkv"),
        *((kernel, "ctaid.x", f"{name}_head") for kernel in MATMULS for name in "qkv"),
        *((kernel, "load", "num_heads") for kernel in MATMULS),
        *((kernel, "ctaid.x", "total_tokens") for kernel in MATMULS),
        ("_attention_bwd_sum_kernel", "load", "num_kv_heads"),
        *(("_decode_split_kernel", "load", name) for name in ("q_stride", "room")),
        *(("_decode_split_kernel", "ctaid.x", name) for name in ("k_stride", "v_stride", "own_splits")),
        ("_decode_sum_kernel", "ctaid.x", "own_splits"),
    ],
)
def test_row_offsets_are_computed_in_64_bits(kernel, row, stride):
    """8,192 rows of 300k logits, or 1M tokens of 32 heads of 128, are more elements than 32 bits count."""
    bits = {n for n, *pair in products(kernel) for a, b in (pair, pair[::-1]) if row in a and stride in b}
    if row == "load":
        assert bits == {64}
    else:  # a program's number also counts heads, in 32 bits
        assert 64 in bits


@pytest.fixture
def compiled_keys(monkeypatch):
    """By kernel, what Triton would have compiled it for."""
    backend = make_backend(TARGETS["sm_90"])
    keys = defaultdict(set)

    def record(kernel, *args, grid, warmup, **kwargs):
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, specialization, options = binder(*args, **kwargs)
        keys[kernel.__name__].add(str((specialization, sorted(options.items()))))

    monkeypatch.setattr(JITFunction, "run", record)
    return keys


def draw_cu_seqlens(rng, total):
    return torch.tensor([0, *sorted(rng.choices(range(total + 1), k=rng.randint(0, 9))), total], dtype=torch.int32)


def test_sizes_do_not_recompile(compiled_keys, monkeypatch):
    """Compiling takes seconds; were it done for every new length, a training step would never reach its speed."""
    monkeypatch.setattr(kept_sets, "by_triton", lambda logits: True)
    rng = random.Random(0)
    for _ in range(200):
        n, vocab = rng.randint(1, 40), rng.choice([1, rng.randint(2, 5000), 16 * rng.randint(1, 300)])
        group_size, groups = rng.randint(1, 20), rng.randint(1, 9)
        values = torch.zeros(n)
        rows = TritonRows.of(
            torch.zeros(n, vocab, dtype=torch.bfloat16), torch.zeros(n, dtype=torch.int64), rng.random()
        )
        rows.gradients(torch.zeros(n, dtype=torch.int64), values, values, rng.choice([1, 0.7]))

        offsets, rewards = draw_cu_seqlens(rng, n), torch.zeros(groups, group_size)
        config = LossConfig.preset(rng.choice(["grpo", "dapo", "cispo", "gspo"]), kl_coef=rng.choice([1, 0.04]))
        ids = torch.zeros(offsets.shape[0] - 1, dtype=torch.int64)
        tensors = {"rewards": rewards, "sequence_ids": ids, "old_logprobs": values, "ref_logprobs": values}
        missing = dict.fromkeys(("targets", "advantages", "token_advantages", "behavior_logprobs"))
        inputs = LossInputs.of(values, config, offsets, rng.choice([1, 0.5]), **tensors, **missing)
        for several_blocks in (False, True):
            loss_of_logprobs(torch.zeros(1024 + n) if several_blocks else values, None, inputs)
        inputs = inputs._replace(targets=torch.zeros(n, dtype=torch.int64))
        logits = torch.zeros(n, vocab, dtype=torch.bfloat16)
        RowLoss(inputs, values, rng.random()).take(logits, 0, logits)
        first, kept = rng.randint(0, 40), (torch.zeros(2 * n, dtype=torch.int32), torch.arange(0, 2 * n + 1, 2).int())
        rows = rng.choice([slice(0, n), torch.arange(n)])
        if isinstance(rows, slice) and first:
            padding = torch.zeros(first, dtype=torch.int32)
            kept, rows = (kept[0], torch.cat([padding, kept[1]])), slice(first, first + n)
        kept_sets.keep_only(logits, torch.zeros(n + first, dtype=torch.int64), kept, rows)
        live_rows(logits, (torch.arange(n) % 2).to(torch.int8), n // 2)
        scale_rows(logits, values[0])

        # Only the number of rows changes in a run; 600 rows are more than there are partial sums.
        n = rng.choice([1, 16, rng.randint(1, 600)])
        x, qkv, table = torch.zeros(n, 48), torch.zeros(n, 8, 16), torch.zeros(n, 1, 16)
        elementwise._rms_norm_fwd(x, x, x[0], 1e-6)
        elementwise._rms_norm_bwd(x, x, x, x[0], 1e-6)
        norm = elementwise.QKNorm(qkv[0, 0], qkv[0, 0], 1e-6)
        elementwise._rope(qkv, table, table, *norm, 4, rng.choice([False, True]))
        elementwise._rope_bwd(qkv[:, :4], qkv[:, 4:6], qkv[:, 6:], table, table, [qkv, *norm[:2]], 1e-6)
        product = elementwise._swiglu_fwd(x)
        elementwise._swiglu_bwd(x, product)

        total = rng.choice([rng.randint(1, 700), 16 * rng.randint(1, 40)])
        kv_heads, ratio = rng.choice([1, 2, 8]), rng.choice([1, 4, 16])
        q = torch.zeros(total, kv_heads * ratio, 64, requires_grad=True)
        kv = torch.zeros(total, kv_heads, 64)
        cu_seqlens = draw_cu_seqlens(rng, total)
        blocks = [64, 32, 32, 32]
        tiles = attention_plan.attention_tiles(cu_seqlens, None, total, (kv_heads * ratio, kv_heads), blocks)
        out, _ = attention._attention_fwd(q, kv, kv, tiles, rng.choice([1.0, 0.125]), False)
        out.sum().backward()

        q, k = torch.zeros(n, kv_heads * 4, 64), torch.zeros(n, kv_heads, 64)  # the ratio is a model's own
        prompts, own = [(x, x) for x in (kv, torch.zeros(n, rng.randint(1, 200), kv_heads, 64))]
        index = torch.zeros(n, dtype=torch.int32)
        decode_rows = DecodeRows(torch.zeros(n + 1, dtype=torch.int32), *[index] * 5, rng.randint(1, 90), total)
        decode_attention._by_kernels(q, k, k, prompts, own, decode_rows, rng.choice([1.0, 0.125]))
    # A vocabulary, and with it the rows' stride, of 1, a multiple of 16, and any other.
    expected = {kernel: 3 if re.search("logprob|row", kernel) else 1 for kernel in defined_kernels()}
    expected["_scale_kernel"], expected["_grpo_loss_kernel"] = 3, 2  # of one block, or of several
    expected["_keep_kernel"] = 6  # as a row's, and of all rows or of chosen ones
    assert {kernel: len(keys) for kernel, keys in compiled_keys.items()} == expected
