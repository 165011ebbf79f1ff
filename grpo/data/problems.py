"""Problems and their prompts: reasoning-gym tasks, JSONL, Parquet and Hugging Face data sets.

Everything ends as a list of `Problem`. Training and held-out problems never share a question, and
the split depends on the seed alone. A fault in the data is a `DataError` that says where it is.
"""

import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from flashgrpo.grpo.data.answers import REASONING_GYM, fault_of_answer
from flashgrpo.grpo.errors import DataError, nearest
from flashgrpo.grpo.recipe.schema import DataSection, SourceSection
from flashgrpo.grpo.types import Problem
from flashgrpo.model.files import is_local, parse_json
from flashgrpo.model.waits import word_for

Row = tuple[str, Mapping[str, Any]]  # where it stands, for errors, and its columns


@word_for("reading the problems")
def load_problems(data: DataSection, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Training problems in the order of the data, and `data.held_out` other ones drawn by `seed`.

    Problems with the same prompt fall on the same side; the held-out ones differ from each other. A
    reasoning-gym task is made with `seed` and has each question once, so there may be fewer than
    `data.size`.

    Raises:
        DataError: unreadable data, missing column, empty prompt, a curriculum by what is no number, or nothing left to
            train on.
    """
    if data.task is not None:
        problems = _task_problems(data.task, data.options, data.size, seed)
    else:
        rows = list(read_rows(str(data.path), data.subset, data.split))
        # Rewards may need no answer, so that only a column that is named must be there.
        has_answer = bool(rows) and "answer" in rows[0][1]
        answer_column = data.answer_column or ("answer" if has_answer else None)
        problems = [to_problem(where, row, data.prompt_column, answer_column) for where, row in rows]
    if not problems:
        raise DataError(f"no problems in {data.task or data.path}")
    if data.curriculum:
        for problem in problems:
            level_of(problem, data.curriculum)
    return split_problems(problems, data.held_out, seed)


def load_completions(
    source: SourceSection, completion_column: str, answer_column: str | None = None
) -> list[tuple[Problem, str]]:
    """(problem, completion) of every row.

    Raises:
        DataError: unreadable data, no rows, missing column, or a row without a prompt or a completion.
    """
    found = []
    for where, row in read_rows(str(source.path), source.subset, source.split):
        problem = to_problem(where, row, source.prompt_column, answer_column)
        text = completion_in(where, row, completion_column)
        if not text.strip():
            raise DataError(f"{where}: column {completion_column!r} is empty, wanted the text of a completion")
        found.append((problem, text))
    if not found:
        raise DataError(f"no rows in {source.path}")
    return found


def split_problems(problems: list[Problem], held_out: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """(training, held-out) with no prompt in common.

    Raises:
        DataError: `held_out` is as large as the number of different prompts.
    """
    # Chat messages cannot be keys themselves.
    keys = [json.dumps(problem.prompt) for problem in problems]
    first_of: dict[str, Problem] = {}
    for key, problem in zip(keys, problems, strict=True):
        first_of.setdefault(key, problem)
    if held_out >= len(first_of):
        raise DataError(
            f"held_out is {held_out}, and there are {len(first_of)} different prompts; it must be 0 to "
            f"{len(first_of) - 1}, so that one is left to train on"
        )
    drawn = random.Random(seed).sample([*first_of], held_out)
    taken = set(drawn)
    training = [problem for problem, key in zip(problems, keys, strict=True) if key not in taken]
    return training, [first_of[key] for key in drawn]


def to_problem(where: str, row: Mapping[str, Any], prompt_column: str, answer_column: str | None) -> Problem:
    """The problem in a row. Raises DataError for a missing column, no prompt, or an answer that nothing can equal."""
    prompt = value_in(where, row, prompt_column)
    columns = {name: value for name, value in row.items() if name != prompt_column}
    if answer_column:
        columns["answer"] = value_in(where, row, answer_column)
        if fault := fault_of_answer(columns["answer"]):
            raise DataError(f"{where}: column {answer_column!r} {fault}")
    if isinstance(prompt, list) and all(
        isinstance(each, dict) and {"role", "content"} <= each.keys() for each in prompt
    ):
        prompt = [_message(m, f"{where}: message {i} of column {prompt_column!r}") for i, m in enumerate(prompt, 1)]
    elif not isinstance(prompt, str):
        raise DataError(
            f"{where}: column {prompt_column!r} holds {type(prompt).__name__}, wanted text or a list of chat messages"
        )
    problem = Problem(prompt, columns, where)
    if not problem.question.strip():
        raise DataError(f"{where}: the prompt in column {prompt_column!r} is empty")
    return problem


def level_of(problem: Problem, column: str) -> float:
    """The number in a column that orders problems. Raises DataError for anything else."""
    level = value_in(problem.where, problem.columns, column)
    if isinstance(level, bool) or not isinstance(level, int | float) or not -math.inf < level < math.inf:
        raise DataError(f"{problem.where}: column {column!r} holds {level!r:.60}, wanted a number (data.curriculum)")
    return level


def value_in(where: str, row: Mapping[str, Any], column: str) -> Any:
    """What a row has in a column. Raises DataError where it has none."""
    if column not in row:
        raise DataError(f"{where}: no column {column!r}{nearest(column, row, with_all=True)}")
    return row[column]


def completion_in(where: str, row: Mapping[str, Any], column: str) -> str:
    """The completion in a column, which may be empty text. Raises DataError for anything else."""
    text = value_in(where, row, column)
    if not isinstance(text, str):
        fault = "is empty" if text is None else f"holds {type(text).__name__}"
        raise DataError(f"{where}: column {column!r} {fault}, wanted the text of a completion")
    return text


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    """A chat message whose content is text, without its nulls, which Parquet fills in."""
    content = _text(message["content"])
    if content is None:
        raise DataError(
            f"{where} has the content {str(message['content'])[:60]!r}, wanted text, or parts of the type text"
        )
    if not isinstance(message["role"], str):
        raise DataError(f"{where} has the role {message['role']!r}, wanted text, such as user")
    return {key: value for key, value in message.items() if value is not None} | {"content": content}


def _text(content: Any) -> str | None:
    """A message's content where it is text, or a list of parts of text, joined."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    texts = []
    for part in content:
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case _:
                return None
    return "".join(texts)


def _task_problems(task: str, options: Mapping[str, Any], size: int, seed: int) -> list[Problem]:
    from reasoning_gym.factory import DATASETS, create_dataset

    name = task.removeprefix(REASONING_GYM)
    if not task.startswith(REASONING_GYM) or name not in DATASETS:
        raise DataError(f"unknown task {task!r}{nearest(name, sorted(DATASETS), REASONING_GYM)}")
    valid = sorted({field.name for field in fields(DATASETS[name][1])} - {"seed", "size"})
    for option in options:
        if option not in valid:
            raise DataError(f"{task} has no option {option!r}{nearest(option, valid)}")
    # Not the seed itself, by which item i of seed s would be item i - 1 of seed s + 1.
    first_item = random.Random(seed).getrandbits(31)
    try:
        dataset = create_dataset(name, seed=first_item, size=size, **options)
    except (AssertionError, TypeError, ValueError) as error:
        raise DataError(f"{task} refuses size = {size} and options {dict(options)}: {error}") from error
    shared = {"task": task, "task_options": dict(options)}
    problems: dict[str, Problem] = {}  # the first of each question
    for item in dataset:
        columns = {**shared, "answer": item["answer"], "metadata": item["metadata"]}
        problems.setdefault(item["question"], Problem(item["question"], columns, task))
    return [*problems.values()]


def read_rows(path: str, subset: str | None = None, split: str = "train") -> Iterable[Row]:
    """Rows of a JSONL or Parquet file, or of a Hugging Face data set. Raises DataError."""
    file = Path(path)
    if is_local(path) and not file.exists():
        raise DataError(f"{path}: no such file or folder")
    if file.is_file():
        if file.suffix == ".jsonl":
            return _read_jsonl(file)
        if file.suffix == ".parquet":
            return _read_parquet(file)
        raise DataError(f"{path}: files must be .jsonl or .parquet, found {file.suffix or 'no suffix'}")
    return _read_dataset(file if file.exists() else path, subset, split)


def check_columns(path: str, wanted: Iterable[str]) -> None:
    """Raises DataError where a local file has no rows, or its first not all `wanted` columns."""
    if Path(path).is_file():
        first = next(iter(read_rows(path)), None)
        if first is None:
            raise DataError(f"no rows in {path}")
        for column in wanted:
            value_in(*first, column)


def _read_jsonl(file: Path) -> Iterator[Row]:
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{file}:{number}"
                    # Without its end, behind which an error would be in a second line.
                    yield where, _parse_line(where, line.rstrip(b"\n"))
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error


def _parse_line(where: str, line: bytes) -> dict[str, Any]:
    try:
        row = parse_json(line)
        if b"\\u" in line:  # what JSON writes in escapes need not be text that any file can hold
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise DataError(f"{where}: {half!r} is half of a character, of an emoji that was cut; remove it") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise DataError(f"{where}: unreadable line: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: unreadable line: wanted a JSON object, found {type(row).__name__}")
    return row


def _read_parquet(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            # Few at a time: rows of tests are megabytes, and a pipeline reads the first of them alone.
            for batch in parquet.iter_batches(batch_size=128):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file} row {number}", row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{file}: unreadable Parquet file: {error}") from error


def _read_dataset(source: Path | str, subset: str | None, split: str) -> Iterator[Row]:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        # save_to_disk writes one of these files, which load_dataset does not read.
        if isinstance(source, Path) and ((source / "state.json").exists() or (source / "dataset_dict.json").exists()):
            loaded: Any = datasets.load_from_disk(str(source))
        else:
            loaded = datasets.load_dataset(str(source), subset, split=split)
    except (DatasetsError, OSError, ValueError) as error:
        wanted = f"split {split!r}" + (f" of subset {subset!r}" if subset else "")
        raise DataError(
            f"{source}: cannot load {wanted} as a Hugging Face data set: {error.__cause__ or error}"
        ) from error
    # load_from_disk knows no splits.
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(f"{source}: no split {split!r}{nearest(split, map(str, loaded))}")
        loaded = loaded[split]
    for number, row in enumerate(loaded.to_list(), start=1):
        yield f"{source} row {number}", row
