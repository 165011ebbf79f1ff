"""A data source of one's own: rows of GSM8K's raw files in the form that a recipe reads, with a column more.

Whatever can write such lines is a source: a database, an archive, a generator of problems. A row has a prompt, an
answer if there is one, and the columns that rewards want; those of a row for SFT are a prompt and a completion.
"""

import json
import re
from pathlib import Path

CALCULATION = re.compile(r"<<(.*?)>>")


def read(folder: Path, seed: int, raw: str) -> None:
    """Fill `folder` with problems.jsonl for rewards and worked.jsonl for SFT, made of the rows of a raw file."""
    problems, worked = [], []
    for line in Path(raw).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        reasoning, _, answer = row["answer"].rpartition("\n#### ")
        calculations = CALCULATION.findall(reasoning)
        problems.append({"prompt": row["question"], "answer": answer, "calculations": calculations})
        thinking = CALCULATION.sub("", reasoning)
        worked.append({"prompt": row["question"], "completion": f"<think>{thinking}</think><answer>{answer}</answer>"})
    write(folder / "problems.jsonl", problems)
    write(folder / "worked.jsonl", worked)


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
