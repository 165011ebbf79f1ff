"""Local benchmark files by the column names in which AIME, MATH-500, GPQA, GSM8K and their like are published."""

from pathlib import Path

import numpy as np

from flashgrpo.grpo.data import DataError, Problem, Row, read_rows, to_problem

_PROMPTS = "problem", "question", "Question", "Problem", "prompt"
_ANSWERS = "answer", "Answer", "expected_answer", "Correct Answer", "solution"  # the shortest form first
_PROGRAMS = "tests"  # what is asked for is a program that passes them
_CHOICES = "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"
_LETTERS = "ABCD"


def load_benchmark(path: str | Path, seed: int) -> list[Problem]:
    """The problems of a JSONL or Parquet file, with `columns["answer"]` or `columns["tests"]`.

    Rows with GPQA's incorrect answers become multiple-choice questions, in an order that (seed, row) draws; the answer
    is then a letter. Raises DataError for columns that are not known, and as `to_problem`.
    """
    if not Path(path).expanduser().is_file():
        raise DataError(f"{path}: no such file; a benchmark is a local JSONL or Parquet file")
    rows = list(read_rows(str(path)))
    if not rows:
        raise DataError(f"{path}: no rows, wanted one a problem")
    columns = rows[0][1]
    if _CHOICES[1] in columns:
        return [_multiple_choice(row, seed, number) for number, row in enumerate(rows)]
    prompt = next((name for name in _PROMPTS if name in columns), None)
    answer = next((name for name in _ANSWERS if name in columns), None)
    if prompt is None or (answer is None and _PROGRAMS not in columns):
        raise DataError(
            f"{path}: found the columns {', '.join(columns)}; wanted a prompt ({', '.join(_PROMPTS)}) and an answer "
            f"({', '.join(_ANSWERS)}) or {_PROGRAMS}"
        )
    for where, row in rows:
        if answer is None and not row.get(_PROGRAMS):
            raise DataError(f"{where}: no answer ({', '.join(_ANSWERS)}), and {_PROGRAMS} is empty")
    return [to_problem(where, row, prompt, None if row.get(_PROGRAMS) else answer) for where, row in rows]


def _multiple_choice(place: Row, seed: int, number: int) -> Problem:
    where, row = place
    question = to_problem(where, row, "Question", _CHOICES[0]).question.strip()
    if missing := [name for name in _CHOICES if row.get(name) is None]:
        raise DataError(f"{where}: column {missing[0]!r} is missing or null")
    order = np.random.default_rng([seed, number]).permutation(len(_CHOICES))
    choices = "\n".join(f"{letter}. {str(row[_CHOICES[i]]).strip()}" for letter, i in zip(_LETTERS, order, strict=True))
    wanted = "Answer with the letter of the right choice alone: A, B, C or D."
    return Problem(f"{question}\n\n{choices}\n\n{wanted}", {"answer": _LETTERS[order.tolist().index(0)]})
