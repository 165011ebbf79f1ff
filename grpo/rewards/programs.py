"""The reward `code`: whether the program in a completion passes test cases, run in a sandbox (grpo/rewards/sandbox.py).

Only inputs enter the sandbox. What comes out is compared here, so that a program can forge nothing but right answers.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from flashgrpo.grpo.recipe.schema import ProgramsSection
from flashgrpo.grpo.rewards.sandbox import NoVerdict, Program

_FENCE = re.compile(r"[ \t]*```[ \t]*(\w*)")
_INTEGER = re.compile(r"[+-]?\d+")
_TOLERANCE = 1e-6  # relative
_TINY = 1e-9  # absolute, beside an expected 0
_OUTPUT_KB = 64  # that a program may write beyond twice the expected output


class Tests(NamedTuple):
    """Test cases of one problem; without a `function`, programs read `inputs` and write `outputs` as text."""

    function: str
    inputs: list[Any]  # [num_cases] text, or lists of arguments
    outputs: list[Any]  # [num_cases] text, or JSON values


def score_programs(
    prompts: Sequence[str],
    completions: Sequence[str],
    tests: Sequence[Any],
    limits: ProgramsSection,
    metadata: Sequence[Any] | None = None,
) -> list[float | None]:
    """1 where a completion's program passes all tests, else 0; None for a row without tests, NaN for no verdict.

    `metadata` are the rows' own, in which LiveCodeBench has the name of the function.

    Raises:
        ValueError: tests that are not in one of the formats of `parse_tests`.
    """
    about = metadata or [None] * len(tests)
    parsed = {id(row): parse_tests(row, own) for row, own in zip(tests, about, strict=True)}  # a group shares its row
    scores: list[float | None] = []
    for prompt, completion, row in zip(prompts, completions, tests, strict=True):
        if (cases := parsed[id(row)]) is None:
            scores.append(None)
        else:
            program = extract_program(completion, prompt)
            scores.append(0.0 if program is None else _score(program, cases, limits))
    return scores


def extract_program(completion: str, prompt: str = "") -> str | None:
    """The last block of code marked as Python, else the last one, after the reasoning; None if there is none."""
    _, closed, answer = completion.rpartition("</think>")
    if not closed and ("<think>" in completion or prompt.rstrip().endswith("<think>")):
        return None
    blocks: list[tuple[str, str]] = []
    language, code = None, []
    for line in answer.split("\n"):
        fence = _FENCE.match(line)
        if not fence:
            code.append(line)
        elif language is None:
            language, code = fence[1], []
        else:
            blocks.append((language, "".join(f"{each}\n" for each in code)))
            language = None
    marked = [code for language, code in blocks if language.lower() in ("python", "python3", "py")]
    return (marked or [code for _, code in blocks] or [None])[-1]


def parse_tests(tests: Any, metadata: Any = None) -> Tests | None:
    """Tests from an object or JSON text, or None where there are none.

    The formats are those of APPS, TACO and LiveCodeBench: {"inputs": [..], "outputs": [..], "fn_name": optional}, or
    [{"input": .., "output": .., "fn_name": optional}, ..]. The name of a function may also be the `func_name` in the
    `metadata` of the tests, of the first of them or of the row, unless its `testtype` is "stdin". For a function an
    input is a list of arguments, or text with one JSON value a line. Raises ValueError for anything else, and for tests
    of a function that has no name.
    """
    if isinstance(tests, str):
        tests = json.loads(tests) if tests.strip() else None
    if tests is None or len(tests) == 0:
        return None
    try:
        if isinstance(tests, dict):
            first, inputs, outputs = tests, tests["inputs"], tests["outputs"]
        else:
            first = tests[0]
            inputs, outputs = ([case[key] for case in tests] for key in ("input", "output"))
        function = _function_name(first, metadata)
        if len(inputs) != len(outputs):
            raise ValueError(f"found {len(inputs)} inputs and {len(outputs)} outputs")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        wanted = '{"inputs": [..], "outputs": [..]} or [{"input": .., "output": ..}, ..]'
        raise ValueError(f"tests: {type(error).__name__}: {error}; wanted {wanted}, all of one length") from error
    if not inputs:
        return None
    if not function:
        return Tests("", [_text(value) for value in inputs], [_text(value) for value in outputs])
    arguments = [[json.loads(line) for line in i.strip().split("\n")] if isinstance(i, str) else i for i in inputs]
    return Tests(function, arguments, [json.loads(value) if isinstance(value, str) else value for value in outputs])


def _function_name(first: dict[str, Any], metadata: Any) -> str:
    """The function that the tests call, "" where they are of a program's input and output."""
    if first.get("testtype") == "stdin":
        return ""
    for place in (first, first.get("metadata"), metadata):
        about = json.loads(place) if isinstance(place, str) and place.startswith("{") else place
        if isinstance(about, dict) and (name := about.get("fn_name") or about.get("func_name")):
            return name
    if first.get("testtype") == "functional":
        raise ValueError("testtype is functional, and no fn_name or metadata with a func_name says of which function")
    return ""


def _text(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _score(program: str, tests: Tests, limits: ProgramsSection) -> float:
    runs: Iterable[tuple[str, Any, str]]  # input, what is expected, and as text
    if tests.function:
        runs, is_same = [(json.dumps(tests.inputs), tests.outputs, json.dumps(tests.outputs))], _same_results
    else:
        runs, is_same = zip(tests.inputs, tests.outputs, tests.outputs, strict=True), _same_text
    try:
        with Program(program, limits, tests.function) as runner:
            for given, wanted, text in runs:
                output = runner.run(given, max_bytes=(_OUTPUT_KB << 10) + 2 * len(text))
                if output is None or not is_same(output, wanted):
                    return 0.0
    except NoVerdict:
        return math.nan
    return 1.0


def _same_results(output: bytes, wanted: list[Any]) -> bool:
    """Some data sets wrap what a function returns in a list."""
    try:
        found = json.loads(output)
        return len(found) == len(wanted) and all(
            _same_value(f, w) or (isinstance(w, list) and len(w) == 1 and _same_value(f, w[0]))
            for f, w in zip(found, wanted, strict=True)
        )
    except (ValueError, TypeError, OverflowError, RecursionError):  # JSON that is none, no list, too long or too deep
        return False


def _same_value(found: Any, wanted: Any) -> bool:
    if isinstance(found, list) and isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(_same_value, found, wanted))
    if isinstance(found, dict) and isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(_same_value(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, float) and type(found) in (float, int):
        return math.isclose(found, wanted, rel_tol=_TOLERANCE, abs_tol=_TINY)  # pyright: ignore[reportArgumentType]
    return found == wanted


def _same_text(output: bytes, wanted: Any) -> bool:
    """Whether lines have the same words but for white space, empty lines and the last digits of fractions."""
    texts = output.decode(errors="replace"), wanted
    lines = [[line.split() for line in text.split("\n") if line.strip()] for text in texts]
    return [len(line) for line in lines[0]] == [len(line) for line in lines[1]] and all(
        _same_word(f, w) for pair in zip(*lines, strict=True) for f, w in zip(*pair, strict=True)
    )


def _same_word(found: str, wanted: str) -> bool:
    """An integer is one exactly, of any length; it may be written as 5.0, as for the judges of these data sets."""
    if found == wanted or (_INTEGER.fullmatch(found) and _INTEGER.fullmatch(wanted)):
        return found == wanted
    try:
        if "_" in found:  # which Python's numbers may have
            return False
        if _INTEGER.fullmatch(wanted):
            return Decimal(found) == Decimal(wanted)
        return math.isclose(float(found), float(wanted), rel_tol=_TOLERANCE, abs_tol=_TINY)
    except (ValueError, ArithmeticError):
        return False
