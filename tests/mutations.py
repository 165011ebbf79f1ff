"""Plants faults in the kernels, one at a time in a copy of the tracked files, and shows that a test fails for each.

Tests run in Triton's interpreter, first without a fault. Only a failed assertion catches one: a fault that keeps the
kernels from running shows nothing. Exits 1 if a fault survives, or its text is not found exactly once. Left out is
what only a GPU shows: 32-bit offsets that overflow, races, the tiles of other architectures.
"""

import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).parents[1]
FORKS = multiprocessing.get_context("forkserver")
PYTEST = ["-qx", "--color=no", "--tb=short", "-p", "pytest_timeout", "--timeout=60"]
ENVIRONMENT = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "COLUMNS": "400"}
# (module, test module): (fault, text, text in its place, -k expression of the tests that should fail)
FAULTS = {
    ("logprob", "logprob"): [
        ("tail counts as 0", '+ columns < whole, other=float("-inf")', "+ columns < whole, other=0.0", "every_voc"),
        ("last few logits left out", "row + rest, mask=rest < vocab", "row + rest, mask=rest < 0", "every_voc"),
        ("last few gradients left out", "if (whole < vocab) &", "if (whole > vocab) &", "every_voc"),
        ("running maximum starts at 0", "[_LANES], _LOWEST_BASE", "[_LANES], 0.0", "extreme_rows"),
        ("sums overflow where all logits are masked", "tl.constexpr(-(2.0**31))", "tl.constexpr(-(2.0**126))",
         "extreme_rows"),
        ("earlier sums not rescaled", "tl.fma(fade, total, tl.sum", "tl.fma(1.0, total, tl.sum", "extreme_rows"),
        ("earlier entropies not moved", "tl.fma(fade, tl.fma(total, rise, moment)", "tl.fma(fade, moment",
         "extreme_rows"),
        ("entropy of the wrong sign", "(log_total - mean) * LN_2", "(mean - log_total) * LN_2", "every_dtype"),
        ("entropy's gradient of the wrong sign", "level += to_entropy", "level -= to_entropy", "every_dtype"),
        ("entropy's gradient without its tilt", "if TILTED:", "if False:", "every_dtype"),
        ("1/temperature left out of d_logits", 'float("nan")) * (scale / _LOG2_E)', 'float("nan"))', "temperatures"),
        ("target's block missed", "(column >= start) &", "(column > start) &", "every_vocabulary"),
        ("target looked for in the first block", "(column < start + BLOCK)", "(column < BLOCK)", "every_vocabulary"),
        ("ignored row read", "tl.where(is_live, stop, 0)", "stop", "stay_alone"),
        ("batches overlap", "(n // rows).to(tl.int64) *", "0 *", "leading and fewer"),
        ("rows of the first batch alone", "(n % rows).to", "(0 * n).to", "leading and fewer"),
        ("sliced logits copied", "if rows.stride(0) == rows.shape[1] * rows.stride(1) else rows", "", "logits_size"),
        ("gradients in windows that overlap", "and wide >= (size - 1)", "and wide >= 0 * (size - 1)", "leading"),
        ("d_logits is 0", "d_row + columns, gradient,", "d_row + columns, 0 * gradient,", "every_dtype"),
        ("ignored target's row counted", "if target != -100", "if target != -101", "every_vocabulary"),
        ("logits overwritten unasked", "logits if ctx.inplace_backward", "logits if True", "temperatures"),
    ],
    ("kept", "kept"): [
        ("the last id of a set left out", "tl.load(offsets + source), tl.load(offsets + source + 1)",
         "tl.load(offsets + source), tl.load(offsets + source + 1) - 1", "entropies and hidden"),
        ("sets of the rows before", "source = first_row + n", "source = n", "entropies and hidden"),
        ("sets of compacted rows taken for the first ones", "source = tl.load(chosen + n)", "source = n", "gspo"),
        ("columns behind the first block not filled", "for start in range(0, whole, BLOCK)",
         "for start in range(0, 0, BLOCK)", "entropies and hidden"),
        ("a token outside of its set counts", "tl.sum(times_kept, 0) == 0", "tl.sum(times_kept, 0) < 0", "outside"),
    ],
    ("loss_config", "grpo_loss"): [
        ("clip bounds swapped", "min(bounds) - 1, max(bounds)", "max(bounds) - 1, min(bounds)", "method and dapo"),
    ],
    ("loss_triton", "grpo_loss"): [
        ("clipped tokens keep a gradient", "objective != 1) & beyond", "objective > 2) & beyond", "bnpo"),
        ("k1 of the wrong sign", "(estimator == 0, -d", "(estimator == 0, d", "every_method and k1"),
        ("k3's slope without d", "-(k3 + d)", "-k3", "small_differences"),
        ("population deviation", "tl.maximum(count - 1.0, 1.0)", "tl.maximum(count, 1.0)", "groups and missing"),
        ("NaN rewards counted", "_is_finite(x), 1.0", "start + lanes < group_size, 1.0", "groups and missing"),
        ("ids beyond the rewards counted", 'own = float("nan")', "own = 0.0", "beyond_the_rewards"),
        ("NaN advantages counted", "counted = advantage == advantage", "counted = length == length", "own_advantages"),
        ("gate's slope without sigmoid(-z)", "gate / (1 + tl.exp(tau * (ratio - 1)))", "gate", "every_method and sapo"),
        ("KL weighed without the ratio's gradient", "d_kl + d_weight * kl", "d_kl", "every_method and unbiased"),
        ("geometric mean for the product", "behavior_level == 2, count", "behavior_level > 0, count", "product"),
        ("drift by the old log-probs", "tl.sum(sampled - new", "tl.sum(old - new", "drift"),
        ("masked weights cut", "behavior_mode != 0) & (bounded", "behavior_mode > 1) & (bounded", "masked"),
        ("off-policy completions kept", "drift > inputs.off_policy_threshold", "drift > 1e9", "every_method and off"),
        ("off-policy also of good completions", "(advantage < 0) & (drift", "(drift", "ignored_targets and off"),
        ("NaN advantages of tokens counted in lengths", "valid & (each == each)", "valid", "own_advantages and True"),
        ("losses of tokens unweighted", "+ 2 * n + rows, loss,", "+ 2 * n + rows, loss / weight,", "own_advantages"),
        ("sequence mean over ignored targets", "(valid.to(", "((tokens < end).to(", "ignored_targets"),
        ("sequence mean without its division", "1.0, 1.0 / length", "1.0, 1.0", "own_advantages"),
        ("ignored targets counted", "other=-100) == -100", "other=-100) == -101", "ignored"),
        ("entropy bonus of the wrong sign", "bonus = -entropy", "bonus = entropy", "ignored_targets"),
        ("last completion found a token late", "(ends <= last)", "(ends < last)", "own_advantages"),
        ("ends beyond the first thousand lost", "start + tl.arange(0, LANES)", "tl.arange(0, LANES)", "many_comp"),
        ("1/denominator left out of d_logprobs", "slope / denominator", "slope", "own_advantages"),
        ("one block's means its sums", "tl.sum(tl.where(metric == 1, sums, 0.0), 0)", "1.0", "ignored and gspo"),
        ("1/denominator left out of the loss", "total / _denominator(inputs)", "total", "own_advantages"),
        ("1/denominator left out of d_logits", "d_logprob /= denominator", "d_logprob /= 1.0", "rows_are_as_accurate"),
        ("upstream gradient left out", "mask=inside) * factor", "mask=inside)", "rows_are_as_accurate"),
    ],
    ("loss_torch", "grpo_loss"): [
        ("tokens of low entropy learned from", "masked_fill(entropies < lowest, 0)", "clone()", "logits and forking"),
    ],
    ("attention", "attention_triton"): [
        ("running maximum starts at 0", '(BLOCK_M,), float("-inf")', "(BLOCK_M,), 0.0", "far_below"),
        ("sum not rescaled when the maximum rises", "row_sum * rescale +", "row_sum +", "as_accurate and families"),
        ("prefix has a key too many", "prefix_stop - 1, rows)[:, None]\n                scores",
         "prefix_stop, rows)[:, None]\n                scores", "every_head_dim"),
        ("prefix's tail of one key unseen", "(shared_key <", "(shared_key + 1 <", "as_accurate and families"),
        ("own key hidden in d_k and d_v", "[None, :] >= (keys", "[None, :] > (keys", "every_head_dim"),
        ("d_q without its mask", "p = tl.where(visible, p, 0.0)", "p = p", "every_head_dim"),
        ("d_k without scale", "dk *= scale", "dk *= 1.0", "every_head_dim"),
        ("d_v is 0", "(dv_ptr + offset, dv,", "(dv_ptr + offset, 0 * dv,", "every_head_dim"),
        ("d_k of another head's queries", "kv_head * group_size, query", "kv_head, query", "every_ratio and 4-2"),
        ("last piece of a family left out", "range(num_pieces)", "range(num_pieces - 1)", "split_families"),
        ("NaN in rows of no segment", "tl.where(own_start < 0, 1.0, row_sum)", "row_sum", "next_to_nothing"),
        ("heads of q a row apart", "head.to(tl.int64) * q_head, out", "head.to(tl.int64) * HEAD_DIM, out",
         "in_place and 16"),
        ("heads of k a row apart", "k_row + kv_head.to(tl.int64) * k_head", "k_row + kv_head.to(tl.int64) * HEAD_DIM",
         "in_place and 16"),
        ("views of strided rows read as they are", "x.stride(2) == 1", "x.stride(2) >= 1", "are_copied"),
    ],
    ("attention_plan", "attention_plan"): [
        ("keys of few heads in one piece", "torch.where(room > 0, ", "torch.where(room > 10**6, ", "processor_busy"),
        ("completions' tokens count as the prompt's", "3 * length + span", "4 * span", "no_pack_wants"),
        ("tiles' own pieces forgotten", "(2 * num_kv_heads * block_n) - tiles", "(2 * num_kv_heads * block_n)",
         "no_pack_wants"),
        ("pieces overlap", "torch.minimum(begin + piece, end), end)", "end, end)", "cover_every_query"),
        ("strangers between siblings", "family[1:] == family[:-1]", "family[1:] <= family[:-1]", "asserted"),
        ("offsets beyond the tensor", "(0, 1), value=total_tokens)", "(0, 1), value=10**6)", "asserted"),
        ("tiles that are whole summed", "(first, torch.where(slots > 0, stop, 0)", "(first, stop", "cover_every_query"),
    ],
    ("attention_flash", "attention_flash"): [
        ("a prompt's keys left out", "num_keys = shared + own", "num_keys = own", "equals_the_twin and families"),
        ("rows in no segment asked for", "q[: keys.num_queries]", "q", "equals_the_twin and families"),
        ("torch's varlen_attn not causal", '"window_size": (-1, 0)', '"window_size": (-1, -1)', "every_family"),
        ("flash-attn 3 at head_dim 256", "{9: 192})", "{9: 256})", "older_family"),
        ("the oldest family first", "in _FAMILIES.items()", "in reversed(_FAMILIES.items())", "newest_family"),
    ],
    ("decode_attention", "decode_attention"): [
        ("running maximum starts at 0", '(ROWS,), float("-inf")', "(ROWS,), 0.0", "far_below and -1"),
        ("sum not rescaled when the maximum rises", "row_sum * rescale + tl.sum", "row_sum + tl.sum",
         "as_accurate and 256-dtype2"),
        ("keys behind a prompt or a row counted", "[None, :] < num_keys", "[None, :] <= num_keys",
         "as_accurate and 256-dtype2"),
        ("the new key left out", "row_sum * rescale + p\n", "row_sum * rescale\n", "as_accurate and 256-dtype2"),
        ("appended one place early", "end = key + num_keys * stride", "end = key + (num_keys - 1) * stride",
         "appended and views"),
        ("values appended are keys", "own_v_ptr + end + columns, v,", "own_v_ptr + end + columns, k,",
         "appended and views"),
        ("a sibling's queries", "row = first_row + query // HEADS", "row = first_row + query * 0",
         "as_accurate and 256-dtype2"),
        ("queries of another head", "kv_head * HEADS + query % HEADS", "kv_head * HEADS", "every_ratio and 14-2"),
        ("a tile of queries left out", "program % tiles * BLOCK_M", "0 * tiles", "more_queries"),
        ("a prompt's later splits begin at its start", "tl.load(prompt_start + group) + split * SPLIT",
         "tl.load(prompt_start + group) + 0 * split", "as_accurate and 32-dtype2"),
        ("place of own keys ignored", "tl.load(place + own_row)", "own_row", "as_accurate and 256-dtype2"),
        ("the last split of own keys left out", "// SPLIT + 1", "// SPLIT", "as_accurate and 32-dtype2"),
        ("the last split of a prompt left out", "tl.cdiv(tl.load(prompt_length + tl.load(group + row)), SPLIT)",
         "(tl.load(prompt_length + tl.load(group + row)) // SPLIT)", "as_accurate and 32-dtype2"),
        ("splits added without their weights", "weight[:, None] * split_acc", "split_acc", "as_accurate and 32-dtype2"),
        ("splits not rescaled", "acc * rescale[:, None] + weight", "acc + weight", "as_accurate and 32-dtype2"),
        ("a split without weight is NaN", 'tl.where(new_peak == float("-inf"), 0.0, new_peak)', "new_peak",
         "minus_infinite"),
    ],
    ("elementwise", "elementwise"): [
        ("norm of the residual alone", "value += tl.load(residual", "value = tl.load(residual", "every_width and 48"),
        ("residual stream lost", "(summed + row, rounded,", "(summed + row, 0 * rounded,", "every_width and 48"),
        ("residual's gradient left out", "gradient += tl.load(d_summed", "gradient += 0 * tl.load(d_summed",
         "every_width and 48"),
        ("d_weight of a program's last row alone", "d_weight += upstream", "d_weight = upstream", "weight_gradients"),
        ("last partial sums left out", "range(0, num_partials, ROWS)", "range(0, num_partials - ROWS + 1, ROWS)",
         "weight_gradients"),
        ("gradient along x kept", "(scaled - unit *", "(scaled - 0 * unit *", "every_width and 48"),
        ("rotated the other way", "low * c - high * s, mask", "low * c + high * s, mask", "rope_in_every"),
        ("gradient rotated forward", "turned_high * c - turned_low * s", "turned_high * c + turned_low * s",
         "rope_in_every"),
        ("keys normed as queries", "q_low[None, :], k_low[None, :]", "q_low[None, :], q_low[None, :]", "rope_in_every"),
        ("values' gradient rotated", "tl.where(is_v[:, None], v_high, high)", "high", "rope_in_every"),
        ("d_k_weight of the queries", "is_q if KIND == 0 else is_k", "is_q", "rope_in_every"),
        ("silu's slope of a sigmoid", "(1 + gate * (1 - sigmoid))", "(1 - sigmoid)", "swiglu and 1000"),
        ("gate and up swapped", "d_product + place, silu * up", "d_product + place, sigmoid * up", "swiglu and 1000"),
        ("no eps under QK norm", "(low * low + high * high, 1) / (2 * HALF) + eps",
         "(low * low + high * high, 1) / (2 * HALF)", "next_to_nothing"),
        ("no eps in QK norm's gradient", "x_high * x_high, 1) / (2 * HALF) + eps", "x_high * x_high, 1) / (2 * HALF)",
         "next_to_nothing"),
        ("a second gradient from spent memory", "torch.autograd.graph.increment_version(qkv)", "pass", "nobody_needs"),
        ("product overwritten under QK norm", "overwrite and not needed and", "overwrite and", "nobody_needs"),
    ],
    ("grpo_loss", "linear_grpo_triton"): [
        ("1/denominator left out of fp16's gradients", "grad_outputs[0] / ctx.denominator", "grad_outputs[0]",
         "low_precision and 64.0"),
        ("main_grad without the upstream gradient", "scale.reshape(1), out=ctx.main_grad",
         "torch.ones_like(scale), out=ctx.main_grad", "upstream"),
    ],
    ("linear_grpo", "linear_grpo_triton"): [
        ("d_weight of the last chunk alone", "if self.is_begun:", "if False:", "low_precision and bnpo-48"),
        ("d_weight summed in bf16", "dtype = accumulation_dtype(dtype)", "pass", "low_precision and bnpo-48"),
        ("d_weight of no rows unwritten", "gradients.d_weight.zero_()", "pass", "no_targets"),
        ("d_hidden rounded twice", "self.weight.dtype != torch.float16", "False", "low_precision and 37.0"),
        ("fp16 divided before its products", "self.weight.dtype != torch.float16", "True", "tiny_denominator"),
        ("sequence level not divided", "loss_of_logprobs(logprobs, entropies, divided)",
         "loss_of_logprobs(logprobs, entropies, inputs.undivided())", "low_precision and gspo"),
        ("chunks longer than there is room for", "-(-num_rows // most))", "num_rows // most)", "default_chunks"),
        ("compacted rows of another chunk", "start + live", "live", "compaction and 2.0"),
        ("d_hidden with its columns in a row", "head.hidden.new_zeros(head.hidden.shape)",
         "torch.zeros_like(head.hidden)", "upstream"),
    ],
    ("loss_triton", "linear_grpo_triton"): [
        ("rows of the entropy bonus alone left out", " | (d_entropy != 0)", "", "compaction and 2.0"),
        ("first live row moved to all", "behind.clamp", "(0 * behind).clamp", "compaction and 2.0"),
        ("one row of a program's scaled", "row += num_programs.to(tl.int64) * row_stride", "row += 0", "upstream"),
    ],
}  # fmt: skip


class Run(NamedTuple):
    exit_code: int
    output: str
    seconds: float


def run_pytest(folder: Path, arguments: list[str]) -> None:
    """In a process of its own, forked from one that has imported what takes seconds, but nothing of the project."""
    output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder / "copy")
    sys.path.insert(0, str(folder))
    sys.exit(pytest.main(arguments))


def run_tests(test: str, expression: str, module="", old="", new="") -> Run:
    """Tests of test_`test`.py on a copy of the repository with `new` for `old` in `module`."""
    start = time.perf_counter()
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        for name in names.split("\0")[:-1]:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
        (Path(folder) / "flashgrpo").symlink_to(copy)
        if module:
            source = copy / "kernels" / f"{module}.py"
            source.write_text(source.read_text().replace(old, new))
        arguments = [*PYTEST, f"tests/kernels/test_{test}.py", "-k", expression]
        process = FORKS.Process(target=run_pytest, args=(Path(folder), arguments))
        process.start()
        process.join()
        output = (Path(folder) / "output").read_text()
    return Run(process.exitcode or 0, output, time.perf_counter() - start)


def main() -> None:
    os.environ |= ENVIRONMENT
    FORKS.set_forkserver_preload(["__main__", "torch._dynamo", "triton", "numpy"])
    faults = [(*modules, *fault) for modules, several in FAULTS.items() for fault in several]
    for module, _, name, old, *_ in faults:
        if (times := (ROOT / "kernels" / f"{module}.py").read_text().count(old)) != 1:
            sys.exit(f"{name}: {old!r} is {times} times in kernels/{module}.py; wanted once")
    tests = {test: " or ".join({f"({fault[-1]})" for fault in faults if fault[1] == test}) for _, test in FAULTS}
    table, caught = Table("fault", "file", "caught by", "s"), 0
    with ThreadPoolExecutor(2) as pool:
        for run in track(pool.map(run_tests, tests, tests.values()), "Without a fault", len(tests)):
            if run.exit_code:
                sys.exit(f"{run.output}\nfails without a fault")
        runs = pool.map(lambda fault: run_tests(fault[1], fault[-1], fault[0], *fault[3:5]), faults)
        for (module, _, name, *_), run in zip(faults, track(runs, "With each", len(faults)), strict=True):
            failed = re.search(r"^FAILED \S+?::(.+?) - (AssertionError|assert)\b", run.output, re.MULTILINE)
            caught += failed is not None
            verdict = escape(failed[1]) if failed else "no assertion fails" if run.exit_code else "survives"
            table.add_row(name, f"{module}.py", verdict, f"{run.seconds:.1f}", style="" if failed else "red")
    Console().print(table, f"{caught} of {len(faults)} caught")
    sys.exit(caught != len(faults))


if __name__ == "__main__":
    main()
