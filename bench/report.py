"""Write the tables of README.md and docs/ from the results files: `flashgrpo bench report`; `--check` compares only.

A table stands between `<!-- results: NAME -->` and `<!-- end -->`.
"""

import difflib
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flashgrpo.bench.shapes import SHAPES
from flashgrpo.bench.timing import ROOT, option_parser
from flashgrpo.grpo.errors import RecipeError
from flashgrpo.grpo.recipe.load import Recipe, build_recipe
from flashgrpo.grpo.run.machines import MACHINES
from flashgrpo.grpo.stages.plan import Lengths, plan
from flashgrpo.grpo.stages.scores import markdown_of
from flashgrpo.model.config import ModelConfig
from flashgrpo.model.files import write_text

RESULTS = ROOT / "bench" / "results"


def _read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def headline_table() -> list[str]:
    """The measured numbers that matter most."""
    steps = [row for row in _read("cpu_step.json")["summary"] if row["prompt_len"] == 256 and "TRL" in row["name"]]
    trl = min(steps, key=lambda row: row["step_ratio"])
    rows = [
        "| measured on two CPU cores | |",
        "| --- | --- |",
        f"| a GRPO step, prompts of 256 tokens, against TRL at its fastest | {trl['step_ratio']:.1f} times as fast "
        f"in {trl['peak_ratio']:.1f} times less memory |",
    ]
    lines = (RESULTS / "step_amd_epyc.jsonl").read_text().splitlines()
    timed = {row["side"]: row["p50_ms"] for row in map(json.loads, lines[1:]) if "p50_ms" in row}
    peer = next(side for side in timed if "transformers" in side)
    repeated = timed["flashgrpo, repeated prompts"] / timed["flashgrpo, shared prompts"]
    rows.append(
        f"| a training step, prompts shared | {repeated:.1f} times as fast as with repeated ones, "
        f"{timed[peer] / timed['flashgrpo, shared prompts']:.1f} times as {peer} |"
    )
    rates = _read("generate_amd_epyc.json")["tokens_per_s"]
    rows.append(
        f"| sampling, 8 completions a prompt | {rates['native'] / rates['transformers']:.1f} times as fast as "
        "`transformers.generate`, "
        f"{rates['native'] / rates['bare']:.1f} times as vLLM's CPU build |"
    )
    scores = {row["model"]: row["pass@1"] for row in _read("r1_tiny.json")}
    base, final, student = (scores[name] for name in ("base", "final RL", "distilled student"))
    rows.append(
        f"| held-out score of the toy R1 | base {base:.0%}, last stage {final:.0%}, distilled student {student:.0%} |"
    )
    return rows


def static_table() -> list[str]:
    """What the kernels compile to for an H200."""
    rows = ["Compiled for sm_90 in bf16, not run:", ""]
    rows += ["| kernel | head dim | registers | spills | shared KB |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in _read("static.json")["rows"]:
        if row["target"] == "sm_90" and row["head_dim"] in (None, 128):
            rows.append(
                f"| `{row['kernel'].strip('_')}` | {row['head_dim'] or ''} | {row['registers']} "
                f"| {row['hot_loop_spills']} | {row['shared_bytes'] / 1024:.0f} |"
            )
    return rows


def demo_table() -> list[str]:
    runs = _read("demo.json")["runs"]
    rows = ["| seed | after the cold start | after GRPO | seconds in all |", "| --- | --- | --- | --- |"]
    for run in runs:
        first, *_, last = run["pass@1"].values()
        rows.append(f"| {run['seed']} | {first:.1%} | {last:.1%} | {run['seconds']:.0f} |")
    return rows


def cpu_step_table(found: dict[str, Any]) -> list[str]:
    """Of the file of `flashgrpo bench cpu-step`."""
    rows = ["| prompt tokens | | seconds a step | x ours | peak MB | x ours |", "| --- | --- | --- | --- | --- | --- |"]
    for row in found["summary"]:
        rows.append(
            f"| {row['prompt_len']} | {row['name']} | {row['median_step_s']:.2f} | {row['step_ratio']:.2f} "
            f"| {row['peak_mb']:.0f} | {row['peak_ratio']:.2f} |"
        )
    return rows


def kernels_table(found: list[dict[str, Any]]) -> list[str]:
    """Of a file of `flashgrpo bench kernels`: the first shape of each operation, and the fastest peer at it."""
    rows = [
        "| operation | ms | of the limit | fastest peer | its ms | x ours |",
        "| --- | ---: | ---: | --- | ---: | ---: |",
    ]
    timed = [row for row in found[1:] if row["status"] == "ok" and "p50_ms" in row]
    first = {(row["op"], row["variant"]): row["case"] for row in reversed(timed)}
    for case in dict.fromkeys(row["case"] for row in timed if first[row["op"], row["variant"]] == row["case"]):
        same = {row["provider"]: row for row in timed if row["case"] == case}
        peers = [row for name, row in same.items() if not name.startswith("flashgrpo") and "error" in row]
        if ours := same.get("flashgrpo"):
            peer = min(peers, key=lambda row: row["p50_ms"], default=None)
            theirs = f" {peer['provider']} | {peer['p50_ms']:.3g} | {peer['ratio']:.2f} |" if peer else " | | |"
            rows.append(f"| `{case}` | {ours['p50_ms']:.3g} | {ours['share_of_limit']:.0%} |{theirs}")
    return rows


def step_table(found: list[dict[str, Any]]) -> list[str]:
    """Of a file of `flashgrpo bench step`."""
    parts = "attention, linear, loss, optimizer, other"
    rows = [f"| model | | seconds | tokens/s | of completions | useful MFU | peak GiB | {parts} |"]
    rows.append("| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |")
    for row in found[1:]:
        if "error" in row:
            rows.append(f"| {row['model']} | {row['side']} | {row['error']} | | | | | |")
            continue
        shares = ", ".join(f"{share:.0%}" for share in row["shares"].values())
        kept = "" if row["checkpointing"] == "none" else f", {row['checkpointing']} activation checkpointing"
        rates = f"{row['tokens_per_s']:,.0f} | {row['trained_tokens_per_s']:,.0f} | {row['useful_mfu']:.0%}"
        seconds, size = f"{row['p50_ms'] / 1e3:.2f}", f"{row['peak_mib'] / 1024:.2f}"
        rows.append(f"| {row['model']} | {row['side']}{kept} | {seconds} | {rates} | {size} | {shares} |")
    return rows


GENERATOR_TITLES = {
    "transformers": "`transformers.generate`",
    "native": "`native`, the trainer's decoder",
    "bare": "vLLM's `LLM.generate` alone",
    "wrapped": "the same engine, our groups and log-probs",
    "vllm": "`vllm`, a process of its own",
    "vllm_server": "`vllm_server`, HTTP",
}


def generate_table(found: dict[str, Any]) -> list[str]:
    """Of a file of `flashgrpo bench generate`."""
    rates = found["tokens_per_s"]
    rows = ["| | tokens/s | of `LLM.generate` | spread |", "| --- | ---: | ---: | ---: |"]
    for name, rate in rates.items():
        share = f"{rate / rates['bare']:.2f}" if "bare" in rates else ""
        rows.append(f"| {GENERATOR_TITLES[name]} | {rate:,.0f} | {share} | {found['spread'][name]:.0%} |")
    return rows


def sync_table(found: dict[str, Any]) -> list[str]:
    """Of a file of `flashgrpo bench sync`."""
    rows = ["| a weight sync | GB | seconds | GB/s | spread |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, seconds in found["seconds"].items():
        rate, spread = found["gb"] / seconds, found["spread"][name]
        rows.append(f"| `{name}` | {found['gb']:.2f} | {seconds:.2f} | {rate:.2f} | {spread:.0%} |")
    return rows


def demo_runs_table(found: dict[str, Any]) -> list[str]:
    """Of the file of `flashgrpo bench generate --runs`."""
    rows = ["| the demo, 50 steps | held-out before | after | largest mismatch, nats | staleness |"]
    rows.append("| --- | --- | --- | --- | --- |")
    for name, run in found.items():
        mismatch, staleness = f"{run['mismatch']:.1e}", f"{run['staleness']:.0f}"
        rows.append(f"| `{name}` | {run['first']:.1%} | {run['last']:.1%} | {mismatch} | {staleness} |")
    return rows


def by_machine(benchmark: str, table: Callable[[Any], list[str]]) -> list[str]:
    """A table for each machine that has results of a benchmark."""
    rows = []
    for file in sorted(RESULTS.glob(f"{benchmark}_*.json*")):
        found = (
            [json.loads(line) for line in file.read_text().splitlines()]
            if file.suffix == ".jsonl"
            else _read(file.name)
        )
        where = (found[0] if isinstance(found, list) else found)["machine"]
        rows += [f"{where['device']}, {where['cores']} cores, torch {where['torch']}:", "", *table(found), ""]
    return rows[:-1] or ["Not measured yet."]


def vllm_table() -> list[str]:
    """Generation, syncs, and what the demo comes to with each generator."""
    tables = (
        by_machine("generate", generate_table),
        by_machine("sync", sync_table),
        demo_runs_table(_read("demo_runs.json")),
    )
    return [*tables[0], "", *tables[1], "", *tables[2]]


PLANNED_MODELS = "Qwen2.5-1.5B", "Qwen2.5-7B", "Qwen2.5-32B"
PLANNED_RUN = {
    "model": {"path": "", "activation_checkpointing": "full"},
    "data": {"path": ""},
    "run": {"output": ""},
    "rollout": {"prompts_per_step": 128, "group_size": 16, "max_new_tokens": 8192},
    "loss": {"preset": "dapo"},
    "train": {"token_budget": 32_768, "mini_batches": 4},
}


def plan_table() -> list[str]:
    """A prediction: `grpo.plan` on H200s, completions a quarter of the limit on average."""
    recipe, lengths = build_recipe(Recipe, PLANNED_RUN), Lengths(256, 2048, 8192)
    rows = [
        "| | GPUs | peak GB each | largest token budget | seconds: generate, score, train, sync | tokens/s/GPU | MFU |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in PLANNED_MODELS:
        for num_gpus in (8, 64):
            try:
                config = ModelConfig.from_dict(SHAPES[name])
                found = plan(recipe, config, MACHINES["h200"], num_gpus, lengths)
            except RecipeError as error:
                rows.append(f"| {name} | {num_gpus} | does not fit: {str(error).split(', ')[0]} | | | | |")
                continue
            seconds = ", ".join(f"{s:.1f}" for s in found.seconds.values())
            rows.append(
                f"| {name} | {num_gpus} | {max(found.totals.values()) / 1e9:.0f} | {found.largest_token_budget:,} "
                f"| {seconds} | {found.tokens_per_s_per_gpu:,.0f} | {found.mfu:.0%} |"
            )
    return rows


def r1_table() -> list[str]:
    """Scores of every stage, and below them what the stages took."""
    rows = _read("r1_tiny.json")
    stages = _read("r1_tiny_stages.json")
    seconds = sum(stage["seconds"] for stage in stages.values())
    return [*markdown_of(rows).splitlines(), "", f"{len(stages)} stages in {seconds / 60:.1f} minutes."]


TABLES = {
    "headline": headline_table,
    "kernels": lambda: [*by_machine("kernels_nvidia", kernels_table), "", *static_table()],
    "step": lambda: by_machine("step", step_table),
    "r1_tiny": r1_table,
    "demo": demo_table,
    "cpu_step": lambda: cpu_step_table(_read("cpu_step.json")),
    "vllm": vllm_table,
}


def pages() -> list[Path]:
    """The README and the pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def render(page: str) -> str:
    """A page with every marked table made anew. Raises KeyError for a name without a table."""

    def fill(match: re.Match) -> str:
        return "\n".join([match[1], *TABLES[match[2]](), match[3]])

    return re.sub(r"(<!-- results: (\w+) -->)\n.*?(<!-- end -->)", fill, page, flags=re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = option_parser("report", __doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if a page is not what the results say")
    is_check = parser.parse_args(arguments).check
    is_stale = False
    for page in pages():
        text = page.read_text()
        rendered = render(text)
        if not is_check:
            write_text(page, rendered)
        elif rendered != text:
            is_stale = True
            name = str(page.relative_to(ROOT))
            print("\n".join(difflib.unified_diff(text.splitlines(), rendered.splitlines(), name, "results", n=0)))
    return int(is_stale)


if __name__ == "__main__":
    sys.exit(main())
