"""Final answers: what a row expects, where it stands in a text, and the one notation in which answers are compared."""

import math
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

REASONING_GYM = "reasoning_gym:"  # a row whose `task` starts so is scored by that task's own scorer

_SYMBOLS = str.maketrans(
    {
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-"),
        **dict.fromkeys("\u2018\u2019", "'"),
        **dict.fromkeys("\u201c\u201d", '"'),
        **dict.fromkeys("\u00b7\u22c5", r"\cdot "),
        **dict.fromkeys("\u00f7\u2044", "/"),
        "\u200b": None,
        "\u00d7": r"\times ",
        "\u00b1": r"\pm ",
        "\u03c0": r"\pi ",
        "\u221e": r"\infty ",
        "\u2264": r"\le ",
        "\u2265": r"\ge ",
        "\u2260": r"\ne ",
        "\u2208": r"\in ",
        "\u222a": r"\cup ",
        "\u2229": r"\cap ",
        "\u2205": r"\emptyset ",
        "\u00b0": r"^\circ ",
        "\u221a": r"\sqrt ",
    }
)
_MATRIX = r"(?:array|(?:small)?matrix|[pbB]matrix)"
_FONTS = r"bf|it|rm|text(?:bf|it|rm|sf|tt|sc|up|normal)?|mbox|emph|underline|math(?:bf|it|rm|sf|tt|cal)|boldsymbol|bm"
_SCALES = dict(hundred=100, thousand=1000, million=10**6, billion=10**9, trillion=10**12, dozen=12)
_NOTATION = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\sqrt (\d+)", r"\\sqrt{\1}"),
        (r"(?<![\w)*])(\*{1,3}|__?|`)(?=\S)(.+?)(?<=\S)\1(?![\w(*])", r"\2"),  # Markdown
        (
            r"\\(?:displaystyle|textstyle|[lL]arge|LARGE|[hH]uge|limits|hfill|[bB]igg?[lrm]?|left|right)(?![A-Za-z])\.?",
            "",
        ),
        (r"\\[hv]?(?:phantom|space)\*?\s*\{[^{}]*\}", ""),
        (r"\\(?:[dtcs]|nice)(?=frac|binom)", r"\\"),
        (r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}", r"\\binom{\1}{\2}"),
        (r"\\binom\s*(\d)\s*(\d)", r"\\binom{\1}{\2}"),
        (r"\\cr(?![A-Za-z])", r"\\\\"),
        (r"\\dot\s*\{?(\d)\}?", r"\\overline{\1}"),
        (r"(?<=\d) ?[xX] ?(?=10\^)", r" \\times "),
        (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
        (r"\{\\(?:bf|it|rm|tt|sf)\s+([^{}]*)\}", r"\\text{\1}"),
        (rf"\\(?:{_FONTS})\s*\{{([^{{}}]*)\}}", r"\\text{\1}"),
        (rf"\\(?:{_FONTS})\s*(?=\{{[^{{}}]*\{{)", ""),
        (r"\\text\{(\w|[-\d.,]+)\}", r"\1"),
        (r"(?<=[\w)}])\*\*(?=[\w({])", "^"),
        (r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<=\d)(?:\{,\}|,\\!|\\[,;:! ]|\\thinspace|~)\s*(?=\d{3}(?!\d))", ""),  # thousands
        (r"\{([,:])\}", r"\1"),
        (r"(?<!\\)\\!", ""),
        (r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~", " "),
        # Thousands again, unless brackets make them a list.
        (
            r"(?<![\d.,])(?:\d{1,3}(?:,\d{3})+|\d\d?(?: \d{3})+)(?!\d|[ ,]\d)(?!.*(?:[)\]]|\\\}))",
            lambda match: re.sub("[ ,]", "", match[0]),
        ),
        (
            rf"(?<![\w.])(\d+(?:\.\d+)?)\s*(\\text\s*\{{)?\s*({'|'.join(_SCALES)})s?(?!\w)",
            lambda match: f"{float(match[1]) * _SCALES[match[3].lower()]:.15g} {match[2] or ''}",
        ),
        (r",?\s*(?:\\text\{\s*,?\s*(?:and|or)\s*\}|(?<![\w\\])(?:and|or)(?!\w))", ","),
        (r"\\\$", "$"),
        # Without the space math-verify takes it for a variable.
        (r"(?<=\d)\s*(?:\\cdot|\*)?\s*i(?![A-Za-z])", " i"),
        # Which brackets a matrix has is a matter of taste, and so is the space between its rows.
        (rf"(?:\\?[(\[]\s*)?\\begin\{{{_MATRIX}\}}(?:\s*\{{[lcr| ]*\}})?", r"\\begin{pmatrix}"),
        (rf"(?:\s*\\\\)*\s*\\end\{{{_MATRIX}\}}(?:\s*\\?[)\]])?", r"\\end{pmatrix}"),
        (r"\\\\(?:\\\\)?(?:\s*\[\s*[\d.]+\s*[a-z]{2}\s*\])?", r"\\\\ "),
        (r"\s+", " "),
        # A number as JSON writes it.
        (r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([-+]?\d{1,4})(?!\w)", r"\1 \\times 10^{\2}"),
        (r"(?<![\d.])(\d+) (\d+)/(\d+)(?!\d)", r"\1\\frac{\2}{\3}"),
    )
]
_WRAPPED = re.compile(
    r"\$\$([^$]*)\$\$|\$([^$]*)\$|\\\(((?:(?!\\[()]).)*)\\\)|\\\[((?:(?!\\[\[\]]).)*)\\\]|\"([^\"]*)\""
    r"|\\text\{([^{}]*)\}|\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"
)
_PREAMBLE = re.compile(
    r"^(?:(?:.*\b)?(?:answer|option|choice)(?: is:?|:)|(?!.*\bis\b.*\bis\b)[^$\\]*\bis:?(?= ?[-+$\\(]*\d))\s*",
    re.IGNORECASE,
)


def fault_of_answer(answer: Any) -> str | None:
    """Why no completion can equal an expected answer, or None."""
    if answer is None:
        return "is null"
    if isinstance(answer, float) and not math.isfinite(answer):
        return "is NaN" if math.isnan(answer) else "is infinite"
    if isinstance(answer, Mapping | list | tuple | bytes):
        inside = f" of {', '.join(map(str, answer))}" if isinstance(answer, Mapping) else ""
        return f"holds {type(answer).__name__}{inside}, wanted text or a number"
    return "is empty" if is_blank(expected_answer(answer)) else None


def expected_answer(answer: Any) -> str:
    """The final answer in a row's: what follows `####` (GSM8K) or is in its last box, if it has either."""
    text = str(answer)
    if "####" in text:
        text = text.rsplit("####", 1)[1].replace(",", "")
    return (last_boxed(text) or text).strip()


def last_boxed(text: str) -> str | None:
    r"""Content of the last complete `\boxed{...}`, its braces balanced."""
    open_braces: list[tuple[bool, int]] = []
    last_start, content = -1, None
    for brace in re.finditer(r"\\[{}]|\\f?boxed\s*\{|\{|\}", text):
        if brace.group() == "}" and open_braces:
            is_box, start = open_braces.pop()
            if is_box and start > last_start:
                last_start, content = start, text[start : brace.start()]
        elif brace.group().endswith("{") and brace.group() != r"\{":
            open_braces.append((brace.group() != "{", brace.end()))
    return content


def is_blank(text: str) -> bool:
    """Whether a text has nothing but decoration, so that no answer equals it."""
    return not re.sub(r"\\boxed|[\s${}*.,;_`\"]", "", notation(text))


def notation(text: str) -> str:
    """The text in one notation, without what decorates it."""
    text = re.sub("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]+", r"^{\g<0>}", text)
    text = re.sub("[\u00bc-\u00be\u2150-\u215e]", r" \g<0>", text)
    text = unicodedata.normalize("NFKC", text).translate(_SYMBOLS)
    for pattern, replacement in _NOTATION:
        text = pattern.sub(replacement, text)
    # Decoration may be wrapped in decoration: dollars around a box, a preamble within quotes.
    while True:
        stripped = _PREAMBLE.sub("", text.strip(" ").rstrip(".;,"), count=1)
        if match := _WRAPPED.fullmatch(stripped):
            stripped = next(part for part in match.groups() if part is not None)
        if stripped == text:
            return text
        text = stripped
