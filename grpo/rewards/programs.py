"""The reward `code`: whether the program in a completion passes test cases, run in a sandbox.

Only inputs enter the sandbox. What comes out is compared here, so that a program can forge nothing
but right answers.
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from flashgrpo.grpo.recipe.schema import ProgramsSection
from flashgrpo.grpo.rewards.response import Response
from flashgrpo.grpo.rewards.sandbox import NoVerdict, sandboxed

_FENCE = re.compile(r"[ \t]*```[ \t]*(\w*)")
_INTEGER = re.compile(r"[+-]?\d+")
_PYTHON = "python", "python3", "py"
_TOLERANCE = 1e-6  # relative
_TINY = 1e-9  # absolute, beside an expected 0
_OUTPUT_KB = 64  # that a program may write beyond twice the expected output


class Tests(NamedTuple):
    """Test cases of one problem.

    Of a `function` all are one run, so that its module is imported once: JSON lists of arguments
    and of results.
    """

    function: str  # "" where programs read and write text
    cases: list[tuple[str, str]]  # what a run is given, and what it should write


def score_programs(
    prompts: Sequence[str],
    completions: Sequence[str],
    tests: Sequence[Any],
    limits: ProgramsSection,
    metadata: Sequence[Any] | None = None,
) -> list[float | None]:
    """1 where a completion's program passes all tests, else 0; None without tests, NaN if unknown.

    `metadata` are the rows' own, in which LiveCodeBench has the name of the function.

    Raises:
        ValueError: tests that are not in one of the formats of `parse_tests`.
    """
    about = metadata or [None] * len(tests)
    # By identity: a group shares its row, whose tests may be megabytes of JSON.
    parsed: dict[int, Tests | None] = {}
    scores: list[float | None] = []
    for prompt, completion, row, own in zip(prompts, completions, tests, about, strict=True):
        if id(row) not in parsed:
            parsed[id(row)] = parse_tests(row, own)
        cases = parsed[id(row)]
        if cases is None:
            scores.append(None)
        else:
            program = extract_program(completion, prompt)
            scores.append(0.0 if program is None else _score(program, cases, limits))
    return scores


def extract_program(completion: str, prompt: str = "") -> str | None:
    """The last block of code marked as Python, else the last one, after the reasoning; None if there is none."""
    response = Response(completion, prompt)
    if response.is_open:
        return None
    program, marked, language = None, None, None
    lines: list[str] = []
    # By lines rather than one regular expression, whose time would grow with the square of what is never closed.
    for line in response.conclusion.split("\n"):
        fence = _FENCE.match(line)
        if not fence:
            lines.append(f"{line}\n")
        elif language is None:
            language, lines = fence[1].lower(), []
        else:
            program = "".join(lines)
            if language in _PYTHON:
                marked = program
            language = None
    return program if marked is None else marked


def parse_tests(tests: Any, metadata: Any = None) -> Tests | None:
    """Tests from an object or JSON text, or None where there are none.

    The formats are those of APPS, TACO and LiveCodeBench: {"inputs": [..], "outputs": [..],
    "fn_name": optional}, or [{"input": .., "output": .., "fn_name": optional}, ..]. The name of a
    function may also be the `func_name` in the `metadata` of the tests, of the first of them or of
    the row, unless its `testtype` is "stdin". For a function an input is a list of arguments, or
    text with one JSON value a line. Raises ValueError for anything else, and for tests of a
    function that has no name.
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
            inputs, outputs = [case["input"] for case in tests], [case["output"] for case in tests]
        function = _function_name(first, metadata)
        if len(inputs) != len(outputs):
            raise ValueError(f"found {len(inputs)} inputs and {len(outputs)} outputs")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        wanted = '{"inputs": [..], "outputs": [..]} or [{"input": .., "output": ..}, ..]'
        raise ValueError(f"tests: {type(error).__name__}: {error}; wanted {wanted}, all of one length") from error
    if not inputs:
        return None
    if not function:
        return Tests("", list(zip(map(_text, inputs), map(_text, outputs), strict=True)))
    return Tests(function, [(json.dumps([*map(_arguments, inputs)]), json.dumps([*map(_result, outputs)]))])


def _arguments(value: Any) -> Any:
    return [json.loads(line) for line in value.strip().split("\n")] if isinstance(value, str) else value


def _result(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _text(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


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


def _score(program: str, tests: Tests, limits: ProgramsSection) -> float:
    is_right = same_results if tests.function else same_text
    try:
        with sandboxed(program, limits, tests.function) as runner:
            for given, wanted in tests.cases:
                output = runner.run(given, max_bytes=(_OUTPUT_KB << 10) + 2 * len(wanted))
                if output is None or not is_right(output.decode(errors="replace"), wanted):
                    return 0.0
            return 1.0
    except NoVerdict:
        return math.nan


def same_results(found: str, wanted: str) -> bool:
    """Whether two JSON lists have the same values, but for the last digits of fractions."""
    results = json.loads(wanted)
    try:
        values = json.loads(found)
        return len(values) == len(results) and all(map(_same_result, values, results))
    except (ValueError, TypeError, OverflowError, RecursionError):
        # JSON that is none, no list, too long or too deep.
        return False


def _same_result(found: Any, wanted: Any) -> bool:
    # Some data sets wrap what a function returns in a list.
    is_wrapped = isinstance(wanted, list) and len(wanted) == 1
    return _same(found, wanted, _same_value) or (is_wrapped and _same(found, wanted[0], _same_value))


def same_text(found: str, wanted: str) -> bool:
    """Whether lines have the same words, but for white space, empty lines and the last digits of fractions."""
    return _same(_lines(found), _lines(wanted), _same_word)


def _lines(text: str) -> list[list[str]]:
    """The words of each line that has any."""
    return [words for words in map(str.split, text.split("\n")) if words]


def _same(found: Any, wanted: Any, same_leaf: Callable[[Any, Any], bool]) -> bool:
    """Whether two nested lists or objects have the same leaves."""
    if isinstance(found, list) and isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(_same, found, wanted, itertools.repeat(same_leaf)))
    if isinstance(found, dict) and isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(_same(found[key], wanted[key], same_leaf) for key in wanted)
    return same_leaf(found, wanted)


def _same_value(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, float) and isinstance(found, int | float) and not isinstance(found, bool):
        return math.isclose(found, wanted, rel_tol=_TOLERANCE, abs_tol=_TINY)
    return found == wanted


def _same_word(found: str, wanted: str) -> bool:
    """An integer is one exactly, of any length; it may be written as 5.0, as for the judges of these data sets."""
    if found == wanted or (_INTEGER.fullmatch(found) and _INTEGER.fullmatch(wanted)):
        return found == wanted
    try:
        if "_" in found:  # which Python's own numbers may have
            return False
        if _INTEGER.fullmatch(wanted):
            return Decimal(found) == Decimal(wanted)
        return math.isclose(float(found), float(wanted), rel_tol=_TOLERANCE, abs_tol=_TINY)
    except (ValueError, ArithmeticError):
        return False
