r"""Answers as MATH, GSM8K and AIME and policies write them: what is equal scores, what only looks so does not."""

from pathlib import Path
from typing import Any

import pytest

from flashgrpo.grpo.rewards import accuracy

LINES = (Path(__file__).parent / "answers.txt").read_text().splitlines()
TABLE = [line.partition(" == ") for line in LINES if line and not line.startswith("#")]
MATRIX = "\\begin{pmatrix}\n0.5 & -2 \\\\\n3 & 4 \\\\\n\\end{pmatrix}"
OF_JSON = [
    (0.00001, ["0.00001", "1e-5", "10^{-5}", r"1 \times 10^{-5}", r"\frac{1}{100000}"], ["0.000011", "1e-4", "0"]),
    (1e20, ["10^{20}", "1" + "0" * 20, r"1\times10^{20}", "1e20", r"1\cdot 10^{20}"], ["1e21", "10^{2}", "120"]),
    (2.5, [r"\frac{5}{2}", "5/2", "2.50", "2 1/2", r"2\tfrac12"], ["2.6", "25"]),
    (0.1 + 0.2, ["0.3", r"\frac{3}{10}"], ["0.31"]),
    (42, ["42", "42.0", "forty-two apples, that is 42"], ["43", "421"]),
    (1234567890123456789, ["1234567890123456789", "1,234,567,890,123,456,789"], ["1234567890123456788"]),
    (True, ["True", "true", r"\text{True}"], ["False", "1"]),
]
SOLUTIONS = [
    ("She sold 48/2 = <<48/2=24>>24 clips.\n#### 72", ["72", r"\$72", "72.00"], ["24", "48", "7"]),
    ("10 + ... \n#### 1,042", ["1042", "$1,042"], ["1", "42"]),
    (r"Hence the answer is $\boxed{\frac{1}{2}}$.", ["0.5", r"\tfrac12"], ["2"]),
    (r"\begin{pmatrix} 1/2 & -2 \\ 3 & 4 \end{pmatrix}", [MATRIX], [MATRIX.replace("0.5", "5")]),
]


def score(completion: str, gold: Any) -> float | None:
    return accuracy([""], [completion], [gold])[0]


def check(gold: Any, right: list[str], wrong: list[str]) -> None:
    missed = [text for text in right if score(f"\\boxed{{{text}}}", gold) != 1]
    taken = [text for text in wrong if score(f"\\boxed{{{text}}}", gold) != 0]
    assert (missed, taken) == ([], [])


@pytest.mark.parametrize(("gold", "answers"), [(gold, answers) for gold, _, answers in TABLE])
def test_what_is_equal_scores_and_what_only_looks_so_does_not(gold, answers):
    right, wrong = (part.split(" || ") for part in answers.split(" != "))
    check(gold, right, wrong)


@pytest.mark.parametrize(("gold", "right", "wrong"), OF_JSON + SOLUTIONS)
def test_numbers_of_json_and_whole_solutions_are_expected_answers(gold, right, wrong):
    check(gold, right, wrong)
