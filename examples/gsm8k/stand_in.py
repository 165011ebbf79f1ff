"""What this example needs and a machine without a network does not have: raw files as GSM8K's, and a small model.

With the real files (`train.jsonl` and `test.jsonl` of openai/grade-school-math) and a real model this stage goes:
pipeline.toml says which lines.
"""

import json
import random
from pathlib import Path

from flashgrpo.grpo.data.prompts import render_text
from flashgrpo.grpo.stages.toy import make_model

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn")
THINGS = ("apples", "books", "cards", "pens", "shells")


def make(folder: Path, seed: int, problems: int, tests: int) -> None:
    """Fill `folder` with train.jsonl, test.jsonl and an untrained model of a million parameters, `base`."""
    rng = random.Random(seed)
    rows: dict[str, dict[str, str]] = {}  # by question, so that none of the tests is trained on
    while len(rows) < problems + tests:
        row = word_problem(rng)
        rows[row["question"]] = row
    drawn = [*rows.values()]
    for name, some in {"train": drawn[tests:], "test": drawn[:tests]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    # The tokenizer learns from prompts as they will be read, so that what all of them repeat becomes one token.
    texts = [render_text(row["question"], "r1") + row["answer"] for row in drawn[tests:][:1500]]
    make_model(folder / "base", texts, seed)


def word_problem(rng: random.Random) -> dict[str, str]:
    """One row in GSM8K's form: calculations in <<>>, and the answer behind ####."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    total = rng.randint(4, 9)
    question, lines = f"{name} has {total} {thing}.", []
    for verb, sign in rng.sample([("finds", "+"), ("buys", "+"), ("loses", "-"), ("sells", "-")], 2):
        change = rng.randint(1, 5) if sign == "+" else rng.randint(1, total // 2)
        after = total + change if sign == "+" else total - change
        question += f" Then {name} {verb} {change}."
        calculation = f"{total}{sign}{change}={after}"
        lines.append(f"{total}{sign}{change}=<<{calculation}>>{after}")
        total = after
    question += f" How many {thing} does {name} have now?"
    return {"question": question, "answer": "\n".join([*lines, f"#### {total}"])}
