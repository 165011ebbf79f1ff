"""Benchmark files are read as they are published, and what is not understood is said."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from flashgrpo.grpo.data.benchmarks import load_benchmark
from flashgrpo.grpo.errors import DataError
from flashgrpo.grpo.rewards.rules import accuracy

GPQA = {"Question": "Which?", "Correct Answer": "right", **{f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)}}


@pytest.fixture
def write(tmp_path):
    def write(*rows: dict) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.mark.parametrize(
    ("row", "right", "wrong"),
    [
        ({"problem": "q", "solution": r"so \boxed{3}", "answer": r"\frac{1}{2}"}, "0.5", "3"),
        ({"Problem": "q", "Answer": 33}, "33", "34"),
        ({"problem": "q", "answer": "033"}, "33", "34"),
        ({"question": "q", "answer": "work\n#### 1,042"}, "1042", "1"),
        ({"prompt": "q", "expected_answer": "7", "solution": r"\boxed{8}"}, "7", "8"),
        ({"problem": "q", "solution": r"thus \boxed{12}"}, "12", "13"),
        ({"Question": "q", "Correct Answer": "9"}, "9", "8"),
    ],
    ids=str,
)
def test_the_answers_of_published_files(write, row, right, wrong):
    (problem,) = load_benchmark(write(row), seed=0)
    assert problem.question == "q"
    answers = [f"\\boxed{{{text}}}" for text in (right, wrong)]
    assert accuracy(["q"] * 2, answers, [problem.columns["answer"]] * 2) == [1.0, 0.0]


def test_multiple_choice(write):
    """The letter is that of the right choice, in an order of the seed and the row alone."""
    path = write(*[GPQA] * 60)
    problems = load_benchmark(path, seed=1)
    for problem in problems:
        assert f"\n{problem.columns['answer']}. right\n" in problem.question
        assert sorted(line[3:] for line in problem.question.splitlines()[2:6]) == sorted(list(GPQA.values())[1:])
        assert problem.question.endswith("Answer with the letter of the right choice alone: A, B, C or D.")
    assert {problem.columns["answer"] for problem in problems} == set("ABCD")
    assert load_benchmark(path, seed=1) == problems
    assert load_benchmark(path, seed=2) != problems
    letter = problems[0].columns["answer"]
    assert accuracy(["q"], [f"\\boxed{{({letter})}}"], [letter]) == [1.0]


ABC = ["one", "two", "three"]
PUBLISHED_CHOICES = {
    "MMLU": {"question": "q", "choices": ABC, "answer": 1},
    "MMLU of numbers": {"question": "q", "choices": ["0", "two", "1"], "answer": 1},
    "MMLU-Pro": {"question": "q", "options": ABC, "answer": "B", "answer_index": 1, "category": "math"},
    "ARC": {"question": "q", "choices": {"text": ABC, "label": ["A", "B", "C"]}, "answerKey": "B"},
    "ARC by numbers": {"question": "q", "choices": {"text": ABC, "label": ["1", "2", "3"]}, "answerKey": "2"},
    "OpenBookQA": {"question_stem": "q", "choices": {"text": ABC, "label": ["A", "B", "C"]}, "answerKey": "B"},
    "MedQA": {"question": "q", "options": dict(zip("ABC", ABC, strict=True)), "answer": "two", "answer_idx": "B"},
    "AQuA": {"question": "q", "options": ["A)one", "B)two", "C)three"], "answer": "B"},
    "AQuA-RAT": {"question": "q", "options": ["A)one", "B)two", "C)three"], "rationale": "r", "correct": "B"},
    "explained": {"question": "q", "options": ABC, "answer": "It is two, since ...", "answer_idx": "B"},
}


@pytest.mark.parametrize("row", PUBLISHED_CHOICES.values(), ids=list(PUBLISHED_CHOICES))
def test_choices_reach_the_prompt_in_their_order(write, row):
    """A model that never sees them would answer at random, and "two" would never equal "B"."""
    (problem,) = load_benchmark(write(row), seed=0)
    lines = problem.question.splitlines()
    assert lines[0] == "q"
    assert lines[3] == "B. two"
    assert lines[-1] == "Answer with the letter of the right choice alone: A, B or C."
    assert problem.columns == {"answer": "B"}


@pytest.mark.parametrize("column", ["article", "context", "passage"])
def test_the_passage_that_a_question_is_about_reaches_the_prompt(write, column):
    asked, open_question = load_benchmark(
        write({**PUBLISHED_CHOICES["MMLU"], column: "Once."}, {"question": "q", column: "Twice.", "answer": "7"}),
        seed=0,
    )
    assert asked.question.startswith("Once.\n\nq\n\nA. one")
    assert open_question.question == "Twice.\n\nq"


def test_open_questions_stand_among_those_with_choices(write):
    rows = (
        {"question": "open", "answer": "7"},
        PUBLISHED_CHOICES["MMLU"],
        {"question": "q", "choices": None, "answer": 8},
    )
    problems = load_benchmark(write(*rows), seed=0)
    assert [problem.columns["answer"] for problem in problems] == ["7", "B", 8]
    assert problems[0].question == "open"


def test_programs_need_no_answer(write, tmp_path):
    path = tmp_path / "code.parquet"
    rows = [{"prompt": "write", "tests": ["assert f()"], "answer": None}, {"prompt": "q", "tests": None, "answer": "1"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    code, plain = load_benchmark(path, seed=0)
    assert code.columns["tests"] == ["assert f()"]
    assert plain.columns["answer"] == "1"


MMLU = {"question": "q", "choices": ABC, "answer": 1}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"text": "q", "label": 1}],
            r"found the columns text, label; wanted a prompt \(problem, .*\) and an answer \(",
        ),
        ([{"problem": "q"}], "found the columns problem; .* or tests"),
        ([], "no rows"),
        ([{"problem": "q", "answer": "1"}, {"problem": "q"}], r"rows\.jsonl:2: no column 'answer'"),
        ([{"problem": "q", "answer": " "}], r"rows\.jsonl:1: column 'answer' is empty"),
        ([{"problem": "q", "tests": None}], r"rows\.jsonl:1: no answer .*, and tests is empty"),
        ([GPQA, GPQA | {"Incorrect Answer 2": None}], r"rows\.jsonl:2: column 'Incorrect Answer 2' is missing or null"),
        (
            [{"question": "q", "opa": "one", "opb": "two", "cop": 1, "answer": "1"}],
            "the columns opa, opb look like choices, which would not reach the prompt; wanted choices or options",
        ),
        ([{"question": "q", "correct_answer": "a", "distractor1": "b", "answer": "a"}], "the columns distractor1 look"),
        (
            [MMLU | {"choices": {"label": None, "text": ["a", "b"]}}],
            r"rows\.jsonl:1: column 'choices' holds .*; wanted 2",
        ),
        ([MMLU | {"choices": [["a"], ["b"]]}], r"'choices' holds \[\['a'\].*wanted 2 to 26 texts"),
        ([MMLU | {"choices": ["a"]}], r"'choices' holds \['a'\]; wanted 2 to 26 texts"),
        ([MMLU | {"answer": 3}], r"'answer' holds 3; wanted a letter \(A, B, C\), the text"),
        ([MMLU | {"answer": "four"}], r"rows\.jsonl:1: column 'answer' holds 'four'; wanted"),
        ([MMLU | {"choices": ["a", "a"], "answer": "a"}], "'answer' holds 'a'; .*one of the choices alone"),
        ([MMLU | {"answer": None}], "no right choice; wanted one of the columns answer, "),
        ([MMLU | {"answer_idx": "A"}], r"rows\.jsonl:1: answer 1, answer_idx 'A' name different choices"),
        ([{"question": "q", "context": {"a": 1}, "answer": "1"}], "'context' would not reach the prompt"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_faulty_files(write, rows, message):
    with pytest.raises(DataError, match=message):
        load_benchmark(write(*rows), seed=0)


def test_a_file_that_is_not_there():
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        load_benchmark("nowhere.jsonl", seed=0)
