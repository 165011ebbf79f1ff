"""Write the README's tables from the results files: `python -m flashgrpo.bench.readme`, or `--check` to compare only.

A table stands between `<!-- results: NAME -->` and `<!-- end -->`.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from flashgrpo.model.files import write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def demo_table() -> list[str]:
    runs = json.loads((RESULTS / "demo.json").read_text())["runs"]
    rows = ["| seed | after the cold start | after GRPO | seconds in all |", "| --- | --- | --- | --- |"]
    for run in runs:
        first, *_, last = run["pass@1"].values()
        rows.append(f"| {run['seed']} | {first:.1%} | {last:.1%} | {run['seconds']:.0f} |")
    return rows


def cpu_step_table() -> list[str]:
    rows = ["| prompt tokens | | seconds a step | x ours | peak MB | x ours |", "| --- | --- | --- | --- | --- | --- |"]
    for row in json.loads((RESULTS / "cpu_step.json").read_text())["summary"]:
        rows.append(
            f"| {row['prompt_len']} | {row['name']} | {row['median_step_s']:.2f} | {row['step_ratio']:.2f} "
            f"| {row['peak_mb']:.0f} | {row['peak_ratio']:.2f} |"
        )
    return rows


def cpu_parts_table() -> list[str]:
    parts = json.loads((RESULTS / "cpu_step.json").read_text())["parts"]
    generate, prefix = parts["generate"], parts["prefix"]
    return [
        "| | ours | the other | ratio |",
        "| --- | --- | --- | --- |",
        f"| generation, 64 prompts x 64 tokens, against `transformers.generate` | {generate['ours']:,.0f} tokens/s "
        f"| {generate['transformers']:,.0f} tokens/s | {generate['ratio']:.2f} |",
        f"| training step, P=256, R=64, G=8, shared prompt against repeated | {prefix['shared_s']:.2f} s "
        f"| {prefix['repeated_s']:.2f} s | {prefix['ratio']:.2f} |",
    ]


TABLES = {"demo": demo_table, "cpu_step": cpu_step_table, "cpu_parts": cpu_parts_table}


def render(readme: str) -> str:
    """The README with every marked table made anew. Raises KeyError for a name without a table."""

    def fill(match: re.Match) -> str:
        return "\n".join([match[1], *TABLES[match[2]](), match[3]])

    return re.sub(r"(<!-- results: (\w+) -->)\n.*?(<!-- end -->)", fill, readme, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if the README is not what the results say")
    readme = ROOT / "README.md"
    text = readme.read_text()
    if parser.parse_args().check:
        return int(render(text) != text)
    write_text(readme, render(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
