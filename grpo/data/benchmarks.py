"""Local benchmark files by the column names in which AIME, MATH-500, GPQA, GSM8K, MMLU and their like are published."""

import re
from collections.abc import Container, Iterable, Mapping
from itertools import chain
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from flashgrpo.grpo.data.problems import read_rows, to_problem
from flashgrpo.grpo.errors import DataError
from flashgrpo.grpo.types import Problem

_PROMPTS = "problem", "question", "Question", "Problem", "prompt", "question_stem"
# The shortest form first.
_ANSWERS = "answer", "Answer", "expected_answer", "Correct Answer", "solution"
_PROGRAMS = "tests"  # what is asked for is a program that passes them
_GPQA = "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"
_CHOICES = "choices", "options"
_RIGHT_CHOICES = "answer", "answerKey", "answer_idx", "answer_index", "correct", "label"
_PASSAGES = "article", "context", "passage"  # which a question is about
_LIKE_CHOICES = re.compile(r"(choice|option|distractor|ending|incorrect|mc\d)|(op)?[a-d]$", re.IGNORECASE)
_LABEL = re.compile(r"\s*\(?([A-Z])[).:]\s*")  # which some files write before the text of a choice


def load_benchmark(path: str | Path, seed: int) -> list[Problem]:
    """The problems of a JSONL or Parquet file, with `columns["answer"]` or `columns["tests"]`.

    Rows with GPQA's incorrect answers become multiple-choice questions, in an order that (seed,
    row) draws; rows with `choices` or `options` (MMLU, MMLU-Pro, ARC, AQuA, MedQA) keep theirs. The
    answer is then a letter. A passage (`article`) precedes its question. Raises DataError for
    columns that are not known, choices that would not reach the prompt, and as `to_problem`.
    """
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file; a benchmark is a local JSONL or Parquet file")
    rows = [*read_rows(str(path))]
    if not rows:
        raise DataError(f"{path}: no rows, wanted one a problem")
    columns = [*dict.fromkeys(chain.from_iterable(row for _, row in rows))]
    if _GPQA[1] in columns:
        return [_shuffled_choices(*row, np.random.default_rng([seed, number])) for number, row in enumerate(rows)]
    prompt, answer, choices = (_first(names, columns) for names in (_PROMPTS, _ANSWERS, _CHOICES))
    unread = [name for name in columns if _LIKE_CHOICES.match(name) and name != choices]
    if unread and not choices:
        raise DataError(
            f"{path}: the columns {', '.join(unread)} look like choices, which would not reach the prompt; wanted "
            f"{' or '.join(_CHOICES)}: a list of texts, or an object by letters"
        )
    if prompt is None or (answer is None and choices is None and _PROGRAMS not in columns):
        raise DataError(
            f"{path}: found the columns {', '.join(columns)}; wanted a prompt ({', '.join(_PROMPTS)}) and an answer "
            f"({', '.join(_ANSWERS)}) or {_PROGRAMS}"
        )
    return [_problem(where, row, prompt, answer, choices) for where, row in rows]


def _first(names: Iterable[str], columns: Container[str]) -> str | None:
    return next((name for name in names if name in columns), None)


def _problem(where: str, row: Mapping[str, Any], prompt: str, answer: str | None, choices: str | None) -> Problem:
    row = _with_passage(where, row, prompt)
    # Each row says what it is: open questions may stand among those with choices, and programs among them.
    if choices and row.get(choices):
        return _given_choices(where, row, prompt, choices)
    if row.get(_PROGRAMS):
        return to_problem(where, row, prompt, None)
    if answer is None:
        raise DataError(f"{where}: no answer ({', '.join(_ANSWERS)}), and {_PROGRAMS} is empty")
    return to_problem(where, row, prompt, answer)


def _with_passage(where: str, row: Mapping[str, Any], prompt: str) -> Mapping[str, Any]:
    texts = []
    for name in _PASSAGES:
        if not (text := row.get(name)):
            continue
        if not isinstance(text, str) or not isinstance(row.get(prompt), str):
            raise DataError(f"{where}: column {name!r} would not reach the prompt; wanted text, and {prompt!r} as text")
        texts.append(text)
    return {**row, prompt: "\n\n".join([*texts, row[prompt]])} if texts else row


def _shuffled_choices(where: str, row: Mapping[str, Any], random: np.random.Generator) -> Problem:
    question = to_problem(where, row, "Question", _GPQA[0]).question  # which checks the row
    for name in _GPQA:
        if row.get(name) is None:
            raise DataError(f"{where}: column {name!r} is missing or null")
    order = random.permutation(len(_GPQA))
    return _multiple_choice(question, [str(row[_GPQA[i]]) for i in order], order.tolist().index(0))


def _given_choices(where: str, row: Mapping[str, Any], prompt: str, choices: str) -> Problem:
    question = to_problem(where, row, prompt, None).question
    labels, texts = _labelled(where, row, choices)
    given = [name for name in _RIGHT_CHOICES if row.get(name) is not None]
    if not given:
        raise DataError(f"{where}: no right choice; wanted one of the columns {', '.join(_RIGHT_CHOICES)}")
    # Files have an index beside the letter or its text; a column that tells nothing may explain the choice in words.
    known: dict[str, int] = {}
    for name in given:
        position = _position(row[name], labels, texts)
        if position is not None:
            known[name] = position
    if len(set(known.values())) > 1:
        told = ", ".join(f"{name} {row[name]!r}" for name in known)
        raise DataError(f"{where}: {told} name different choices; wanted one right choice")
    if not known:
        raise DataError(
            f"{where}: column {given[0]!r} holds {row[given[0]]!r}; wanted a letter ({', '.join(labels)}), the text of "
            f"one of the {choices} alone, or its number from 0 to {len(texts) - 1}"
        )
    return _multiple_choice(question, texts, next(iter(known.values())))


def _labelled(where: str, row: Mapping[str, Any], column: str) -> tuple[list[str], list[str]]:
    """(labels, texts) of choices: a list of texts, or an object, by letters or with lists `label` and `text`."""
    found: Any = row.get(column)
    labels, texts = list(ascii_uppercase), found
    if isinstance(found, Mapping) and {"label", "text"} <= found.keys():
        labels, texts = found["label"], found["text"]
    elif isinstance(found, Mapping):
        # Parquet fills what a row lacks.
        given = {label: text for label, text in found.items() if text is not None}
        labels, texts = list(given), list(given.values())
    is_list = isinstance(labels, list) and isinstance(texts, list)
    is_list = is_list and 2 <= len(texts) <= min(len(labels), len(ascii_uppercase))
    if not is_list or not all(isinstance(text, str) for text in texts):
        raise DataError(
            f"{where}: column {column!r} holds {found!r:.80}; wanted 2 to {len(ascii_uppercase)} texts, as a list, an "
            'object by letters, or {"label": [..], "text": [..]}'
        )
    texts = [*map(str.strip, texts)]
    # `A) one` is labelled twice once the prompt has letters of its own; but only where all are, and in their order.
    marks = [_LABEL.match(text) for text in texts]
    if "".join(mark[1] if mark else " " for mark in marks) == ascii_uppercase[: len(texts)]:
        texts = [_LABEL.sub("", text, count=1) for text in texts]
    return [*map(str, labels[: len(texts)])], texts


def _position(answer: Any, labels: list[str], texts: list[str]) -> int | None:
    """Which choice is the right one, counted from 0 where it is a number; None where that cannot be told."""
    text = str(answer).strip()
    if text in labels:
        return labels.index(text)
    if text in texts and not isinstance(answer, int):
        return texts.index(text) if texts.count(text) == 1 else None
    return int(text) if text.isdecimal() and int(text) < len(texts) else None


def _multiple_choice(question: str, texts: list[str], right: int) -> Problem:
    letters = ascii_uppercase[: len(texts)]
    choices = "\n".join(map("{}. {}".format, letters, map(str.strip, texts)))
    wanted = f"Answer with the letter of the right choice alone: {', '.join(letters[:-1])} or {letters[-1]}."
    return Problem(f"{question.strip()}\n\n{choices}\n\n{wanted}", {"answer": letters[right]})
