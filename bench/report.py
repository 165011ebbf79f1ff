"""Write what is generated of README and docs/: `flashgrpo bench report`, or with `--check` compare only.

Those are the tables of the results files, and the page of the public functions. Each stands between
`<!-- results: NAME -->` and `<!-- end -->`. What a table says, the benchmark knows that has
measured it: its `table`, and the line of the headline that it is good for.
"""

import difflib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flashgrpo.bench import api, cpu_step, demo_seeds, generate, kernels, static, step, sync
from flashgrpo.bench.timing import ROOT, markdown, option_parser
from flashgrpo.grpo.stages.scores import markdown_of
from flashgrpo.model.files import write_text

RESULTS = ROOT / "bench" / "results"


def _read(name: str) -> Any:
    text = (RESULTS / name).read_text()
    return [*map(json.loads, text.splitlines())] if name.endswith(".jsonl") else json.loads(text)


def by_machine(benchmark: str, table: Callable[[Any], list[str]]) -> list[str]:
    """A table for each machine that has results of a benchmark."""
    lines = []
    for file in sorted(RESULTS.glob(f"{benchmark}_*.json*")):
        found = _read(file.name)
        where = (found[0] if isinstance(found, list) else found)["machine"]
        lines += [f"{where['device']}, {where['cores']} cores, torch {where['torch']}:", "", *table(found), ""]
    # The last line is the empty one between two machines' tables.
    return lines[:-1] or ["Not measured yet."]


def headline_table() -> list[str]:
    """The measured numbers that matter most."""
    scores = {row["model"]: f"{row['pass@1']:.0%}" for row in _read("r1_tiny.json")}
    students = "distilled student", "student, on-policy distillation", "student, RL alone"
    base, last, sft, on_policy, rl = (scores[name] for name in ("base", "final RL", *students))
    r1 = f"base {base}, last stage {last}; a student a third its size, by samples {sft}, on-policy {on_policy}, RL {rl}"
    rows = [
        cpu_step.headline(_read("cpu_step.json")),
        step.headline(_read("step_amd_epyc.jsonl")),
        generate.headline(_read("generate_amd_epyc.json")),
        ("held-out score of the toy R1", r1),
    ]
    return markdown(["measured on two CPU cores", ""], rows)


def kernels_table() -> list[str]:
    """Of GPUs, and what a kernel compiles to for one of them."""
    compiled = [x for x in _read("static.json")["rows"] if x["target"] == "sm_90" and x["head_dim"] in (None, 128)]
    return [*by_machine("kernels_nvidia", kernels.table), "", "Compiled, not run:", "", *static.table(compiled)]


def vllm_table() -> list[str]:
    """Generation, syncs, and what the demo comes to with each generator."""
    measured = [*by_machine("generate", generate.table), "", *by_machine("sync", sync.table)]
    return [*measured, "", *generate.scores_table(_read("demo_runs.json"))]


def r1_table() -> list[str]:
    """Scores of every stage, and below them what the stages took."""
    stages = _read("r1_tiny_stages.json")
    seconds = sum(stage["seconds"] for stage in stages.values())
    scores = markdown_of(_read("r1_tiny.json")).splitlines()
    return [*scores, "", f"{len(stages)} stages in {seconds / 60:.1f} minutes."]


TABLES: dict[str, Callable[[], list[str]]] = {
    "headline": headline_table,
    "kernels": kernels_table,
    "step": lambda: by_machine("step", step.table),
    "r1_tiny": r1_table,
    "demo": lambda: demo_seeds.table(_read("demo.json")),
    "cpu_step": lambda: cpu_step.table(_read("cpu_step.json")),
    "vllm": vllm_table,
    "api": api.page,
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
