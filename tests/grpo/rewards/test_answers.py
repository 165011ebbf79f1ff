r"""Answers as MATH, GSM8K and AIME and policies write them: what is equal scores, what only looks so does not."""

from pathlib import Path
from typing import Any

import pytest

from flashgrpo.grpo.rewards.rules import accuracy

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


ENDLESS = {
    "power of a sum": "(x+1)^{9999}",
    "product of powers": "(x+1)^{100}(y+2)^{100}(z+3)^{100}",
    "long polynomial": "+".join(f"x^{{{i}}}" for i in range(70)),
    "many factors": "".join(f"(x+{i})" for i in range(30)),
    "tower": "10^{10^{10^{10}}}",
    "tower without braces": "^".join("9" * 50),
    "factorial": "100000000!",
    "binomial": r"\binom{100000000}{50000000}",
    "parentheses": "(" * 300 + "1" + ")" * 300,
    "continued fraction": r"1+\cfrac{1}{" * 30 + "2" + "}" * 30,
    "sines": r"\sin(" * 12 + "x" + ")" * 12,
    "sum of sines": "+".join(rf"\sin({i}x)\cos({i}y)" for i in range(1, 12)),
    "sum": r"\sum_{i=1}^{1000000000} \frac{1}{i}",
    "product": r"\prod_{i=1}^{100000000} i",
    "product of fractions": r"\prod_{n=1}^{999}(1+\frac{1}{n^2})",
    "sum of binomials": r"\sum_{k=0}^{900}\binom{900}{k}",
    "factorials": "5!!!!",
    "square of a column": r"\begin{pmatrix}1\\2\end{pmatrix}^2",
    "floor": r"\left\lfloor \pi^{500}\right\rfloor",
    "integral": r"\int_0^1 e^{x^x} \sin(x^{x}) dx",
    "matrix": r"\begin{pmatrix}" + r"\\".join(["&".join(["(x+1)^{99}"] * 3)] * 3) + r"\end{pmatrix}",
    "list": ",".join(map(str, range(200))),
    "digits": "9" * 2000 + "+1",
    "asterisks": "*" * 900,
    "dollars": "$" * 900,
    "boxes": r"\boxed{" * 100 + "3" + "}" * 100,
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("text", ENDLESS.values(), ids=list(ENDLESS))
def test_what_no_verifier_would_finish_is_wrong_at_once(text):
    """One such answer of a policy that loops would take its group's time."""
    assert [score(f"\\boxed{{{text}}}", gold) for gold in ("(x+1)^{2}", "x > 3", "12")] == [0.0] * 3


@pytest.mark.timeout(60)
def test_large_formulas_are_compared_without_multiplying_them_out():
    check("(x+1)^{9999}", ["(1+x)^{9999}", "$(x + 1)^{9999}$"], ["(x+1)^{9998}", "(x-1)^{9999}"])
    check(r"\binom{2024}{1012}", [r"\frac{2024!}{1012! \cdot 1012!}"], [r"\binom{2024}{1011}"])
    check("2^{2021}", [r"2 \cdot 2^{2020}"], ["2^{2020}"])
