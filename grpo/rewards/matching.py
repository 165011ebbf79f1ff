r"""Whether two final answers are equal: as text, as names, as numbers, and only then as formulas.

    answers_match("32348", r"\$32{,}348")  # True
    answers_match("3-2", "2-1")            # False: scores, which mathematics takes for differences

math-verify decides the equality of formulas. What it does not know stands here: which texts name
something (a date, a time, a score, an address, a version) and measure nothing, and what it would
never finish.

To import this takes a second, for the sake of sympy: `accuracy` does, when a worker warms up.
"""

import functools
import itertools
import logging
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import math_verify
import sympy

from flashgrpo.grpo.data.answers import is_blank, notation

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off

_MAX_CHARS = 1000  # an answer longer than this is no final answer
_MAX_FORMULA_CHARS = 400
_MAX_DEPTH = 12  # of brackets; the parser's time grows steeply with it
_MAX_EXPONENT = 10_000  # beyond it a power or factorial may take for ever to evaluate
_DIGITS = 30  # to which formulas are evaluated
_ENDLESS = re.compile(r"\\binom\s*\{?\s*\d{5}|(?:\^\w){5}")  # what the parser would evaluate
# Of decimals: absolute, as math-verify has it, and relative.
_ROUNDING = Fraction(1, 10**6), Fraction(1, 10**5)

_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[^\W\d_]+(?:[ '-][^\W\d_]+)*")
_PRODUCT = re.compile(r"[^\W\d_]|[^\W\d_eiou]{2,3}")  # of variables, which is as likely as a word
_PROSE = re.compile(
    r"(?<![\\{a-z_])(?!arc|sin|cos|sqrt|exp|log|mod|lim|min|max|det|gcd|lcm)"
    r"(?:(?![^eiou]{3}(?![a-z]))[a-z]{3,}|[a-z]{2,} [a-z]{2,})(?![a-z(])",
    re.IGNORECASE,
)
_CHOICE = re.compile(
    r"(?:(?:answer|option|choice) )?(?:\(([a-j])\)[.:]?|([a-j])(?:[).:]|$))"
    r"(?:$|(?=\d)|\s+(?![-+*/^=,(&] ))((?!.*\([a-j]\)|(?:.*(?:,|maybe|perhaps|not))? ?[a-j](?:[).:,]|$)).*)",
    re.IGNORECASE,
)
# What names and does not measure: `2-1` is no difference, `04/08/2020` no quotient, `7:30` no ratio, `1.2.3` no number.
_NAME = re.compile(
    r"""(?<![\w./:^-])(?:
      \d{1,2}(?::\d\d)?\ ?[ap]\.?\ ?m\b       # a time of day
    | \d{1,2}:[0-5]\d
    | \d+(?::\d+){2,}
    | \d+/\d+/\d+ | 0\d/\d+ | \d+/0\d         # a date
    | 0x[\da-f]+ | [\da-f]{2,4}(?::[\da-f]{0,4}){2,}
    | v(?:ersion\ )?\d+(?:\.\d+)*             # a version, an address
    | \d+(?:\.\d+){2,}(?:[:/]\d+)?
    | \d+(?:\.\d+)?(?:-\d+(?:\.\d+)?)+        # a score, a range, a date, a telephone number
    )(?![\w/:^-])""",
    re.VERBOSE,
)
_MONTH = re.compile(r"\b(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\b")
_TOKEN = re.compile(rf"({_NAME.pattern})|(\d+(?:,\d{{3}})*(?:\.\d+)?)|([^\W\d_]+)", re.VERBOSE)
_DIFFERENCE = re.compile(r"(?:0|[1-9]\d*) ?- ?(?:0|[1-9]\d*)")
_LABELLED = re.compile(r"[A-Z]\w* \d+\.\d+")  # `Python 3.10`, a number of which no zero is left out
_FORMULA = re.compile(r"[\\^=+*<>{}()\[\]]")
_DECIMAL = re.compile(
    r"([-+]?)\s*(\d+(?:,\d{3})*)?(?:\.(\d*)(?:\\overline\s*(?:\{(\d+)\}|(\d)))?)?(?:\s*(?:\\times|\\cdot|\*)\s*(10\^.*))?"
)
_POWER_OF_TEN = re.compile(r"10\^\s*(?:(\d{1,4})|\{\s*([-+]?\d{1,4})\s*\})")
_UNIT_NAMES = """
    dollar $ usd; euro \u20ac eur; pound \u00a3 lb; yen \u00a5; cent \u00a2; rupee \u20b9 rs; percent %;
    degree circ deg; celsius degreec; fahrenheit degreef; meter m metre; kilometer km kilometre;
    centimeter cm centimetre; millimeter mm millimetre; inch inche; foot ft feet; yard yd; mile mi; mile/hour mph;
    second sec s; minute min; hour hr h; day; week; month; year yr; millisecond ms; gram g; kilogram kg;
    milligram mg; ounce oz; liter l litre; milliliter ml millilitre; pascal pa; kilopascal kpa; watt;
    kilowatt kw; hertz hz; kilohertz khz; kilobyte kb; megabyte mb; gigabyte gb; kilojoule kj; mole mol; acre
"""
_UNITS: dict[str, str] = {}  # by each of its names, the first
for _names in _UNIT_NAMES.split(";"):
    _UNITS.update(dict.fromkeys(_names.split(), _names.split()[0]))
_FILLER = re.compile("an?|all|and|at|ha(?:s|ve|d)?|s?he|i[nst]|o[fnr]|so|st|nd|rd|th|the|there|they|to|wa|we")
_LEAD = re.compile(r"([^\d\\$(){}\[\]=<>^+*/-]+?)\s+(?=[-$\\(\[\d])(.+)")
_AMOUNT = re.compile(r"(-?)\s*([$\u20ac\u00a3\u00a5\u20b9])\s*(-?[\d.,]+)")
_QUANTITY = re.compile(
    r"(.*?[\d)}]|.+?(?=\\text))\s*(\^\s*\{?\\circ\s*\}?\s*[CF]?|\\?%|[$\u20ac\u00a3\u00a5\u00a2\u20b9]|(?<=\d)_\{?\d+\}?"
    r"|(?:\\text\{[^{}]*\}|(?:(?<=\s)[a-z]|[a-z]{2}|[a-z]/|[mghs]$)[a-z/. -]*)(?:\^\{?\d\}?)?)",
    re.IGNORECASE,
)


def answers_match(found: str, gold: str) -> bool:
    """Whether an answer equals the expected one.

    A choice is its letter. Expected words, and what names and does not measure, are compared as
    text alone: as mathematics "listen" would equal "silent". Units may be left out, but 3 hours are
    not 3 minutes.
    """
    if max(len(found), len(gold)) > _MAX_CHARS:
        return found.split() == gold.split()
    pair = _Answer(found), _Answer(gold)
    for compare in _COMPARISONS:
        verdict = compare(*pair)
        if verdict is not None:
            return verdict
    return False


class _Answer:
    """An answer as it was given, in one notation, and for comparison as text."""

    def __init__(self, given: str):
        self.given = given
        self.notation = notation(given)
        self.text = _text(self.notation)


# Each of the comparisons is None where the answers are not of its form; the next one is asked then.


def _as_text(found: _Answer, gold: _Answer) -> bool | None:
    return not is_blank(found.text) if _squeezed(found.text) == _squeezed(gold.text) else None


def _as_choices(found: _Answer, gold: _Answer) -> bool | None:
    choice, given = _CHOICE.fullmatch(gold.text), _CHOICE.fullmatch(found.text)
    if choice and given:
        return (choice[1] or choice[2]) == (given[1] or given[2])
    # `(B) 12` is found as its text, too.
    return answers_match(found.notation, choice[3]) if choice and choice[3] else None


def _as_words(found: _Answer, gold: _Answer) -> bool | None:
    words = _words(gold.text)
    return _words(found.text) == words if words else None


def _as_names(found: _Answer, gold: _Answer) -> bool | None:
    if _LABELLED.fullmatch(gold.notation) and _LABELLED.fullmatch(found.notation):
        return False  # they differ as text
    wanted = _name(gold.text)
    name = _name(found.text, anywhere=wanted is not None)
    if name and wanted:
        return name[0] == wanted[0] and _agree(name[1], wanted[1])
    if wanted:
        return False
    if name is None or _DIFFERENCE.fullmatch(found.text):
        return None  # 2-1 is a score where one is expected, else a number
    if _NAME.search(found.text) or _MONTH.search(found.text):
        return False
    # A sentence of several numbers, which math-verify may tell apart.
    return _is_proven(lambda: _verify(_parse_gold(gold.notation), _parse_boxed(found.given)))


def _as_quantities(found: _Answer, gold: _Answer) -> bool | None:
    return _is_proven(lambda: _same_quantity(found.notation, gold.notation))


_COMPARISONS = _as_text, _as_choices, _as_words, _as_names, _as_quantities


def _is_proven(is_equal: Callable[[], bool]) -> bool:
    try:
        return is_equal()
    except Exception:
        # sympy raises in many ways on formulas without a value, such as the square of a column.
        return False


def _text(text: str) -> str:
    """For comparison as text: no case, no mark-up, and around words, such as the letter of a choice, no brackets."""
    text = " ".join(_TEXT.sub(r"\1", text).casefold().split()).rstrip(".")
    word = text.strip("()[]' ")
    return word if _WORDS.fullmatch(word) else text


def _words(text: str) -> list[str]:
    """The words of an answer in words, or of a list of words or letters, in any order; none for anything else."""
    parts = text.rpartition("=")[2].split(",")
    words = sorted(map(_text, parts))
    is_list = len(parts) > 1 and all(part.count("(") == part.count(")") for part in parts)
    return words if all(_is_words(word) or (is_list and re.fullmatch("[a-z]", word)) for word in words) else []


def _is_words(text: str) -> bool:
    return bool(_WORDS.fullmatch(text)) and not all(map(_PRODUCT.fullmatch, re.split(r"\W", text)))


def _squeezed(text: str) -> str:
    return re.sub(r"\s*([^\w\s])\s*", r"\1", text)


def _name(text: str, anywhere: bool = False) -> tuple[list[str], set[str]] | None:
    """(names, numbers, months and units; other words) of a date, a score, of several quantities.

    Names have no leading zeros. None for one quantity, and where a formula stands beside.
    """
    text = re.sub(r"\s*(-+|:)\s*", lambda match: match[1][0], text)
    rest = _NAME.sub("", text)
    has_name, has_month, is_prose = rest != text, bool(_MONTH.search(text)), bool(_PROSE.search(rest))
    if has_name:
        is_name = is_prose or not re.search(r"\d|\b[a-z]\b", rest)
    else:
        is_name = is_prose and len(re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", text)) > (not has_month)
    if not anywhere and (not is_name or _FORMULA.search(rest)):
        return None
    values: list[str] = []
    words: set[str] = set()
    for name, number, word in _TOKEN.findall(text):
        canonical = _canonical(word)
        if name:
            name = re.sub(r"(?::00)?\s*([ap])\.?\s*m", r"\1m", name.removeprefix("version").removeprefix("v").strip())
            values.append(re.sub(r"(?<!\d)0+(?=\d)", "", name))
        elif number or canonical in _UNITS.values() or _MONTH.fullmatch(word):
            values.append(number or canonical)
        elif not _FILLER.fullmatch(canonical):
            words.add(canonical)
    return sorted(values) if has_month else values, words


def _agree(words: set[str], wanted: set[str]) -> bool:
    """Whether words beside a value are the same, or were left out."""
    return (words <= wanted or wanted <= words) and ("not" in words) == ("not" in wanted)


def _canonical(word: str) -> str:
    singular = word.removesuffix("s") if len(word) > 2 else word
    month = _MONTH.fullmatch(word)
    return word[:3] if month else _UNITS.get(word) or _UNITS.get(singular) or singular


def _same_quantity(found: str, gold: str) -> bool:
    (amount, unit, words), (wanted, wanted_unit, wanted_words) = _split_unit(found), _split_unit(gold)
    if (unit and wanted_unit and unit != wanted_unit) or not _agree(words, wanted_words):
        return False
    is_share, wants_share = unit == "percent", wanted_unit == "percent"
    # Numbers are compared exactly, and without mathematics, which would take far longer.
    number, wanted_number = _number(amount), _number(wanted)
    if number is not None and wanted_number is not None:
        share = Fraction(1, 100) ** (is_share - wants_share)  # 50% may be written 0.5, or 50
        return _is_close(number, wanted_number) or _is_close(number * share, wanted_number)
    if is_share != wants_share:
        parsed = _parse_gold(gold), _parse(found)
        return not any(map(_is_endless, itertools.chain(*parsed))) and _verify(*parsed)
    return any(_is_equal(a, b) for a, b in itertools.product(_parse_gold(wanted), _parse(amount)))


def _split_unit(text: str) -> tuple[str, str, set[str]]:
    """(the amount, its unit or the base of a number, other words) of a quantity; the unit "" where none is known."""
    lead = _LEAD.fullmatch(text)
    words: set[str] = set()
    if lead and _PROSE.search(lead[1]):
        words, text = _other_words(lead[1]), lead[2]
    if match := _AMOUNT.fullmatch(text):
        return match[1] + match[3], _UNITS[match[2]], words
    match = _QUANTITY.fullmatch(text)
    if not match:
        return text, "", words
    if match[2].startswith("_"):
        return match[1], match[2].strip("_{}"), words
    unit = re.sub(r"\bper\b", "/", match[2].replace(r"\text", "").casefold())
    unit = re.sub(r"\b(?:sq(?:uare)?|(cubic)) (\w+)", lambda m: m[2] + ("3" if m[1] else "2"), unit)
    unit = re.sub(r"(?:circ|degrees?)[\s{}]*([cf])[a-z]*", r"degree\1", unit)
    parts = [_canonical(part) for part in re.findall(r"[a-z]+|[^\w\s{}^.]|\d", unit)]
    known = [part for part in parts if part in _UNITS.values()]
    if not (known or _PROSE.search(match[2]) or not match[2][0].isalpha()):
        return text, "", words
    others = _other_words(unit) - set(known)
    is_unit = [part for part in parts if part in known or part in "/23"] if known else []
    return match[1].strip(), "".join(is_unit), words | others


def _other_words(text: str) -> set[str]:
    words = map(_canonical, re.findall(r"[a-z]+", text.casefold()))
    return {word for word in words if not _FILLER.fullmatch(word)}


def _number(text: str) -> Fraction | None:
    """The value of a decimal number, also of `3 \\times 10^8` and `0.\\overline{36}`."""
    if power := _POWER_OF_TEN.fullmatch(text):
        return Fraction(10) ** int(power[1] or power[2])
    match = _DECIMAL.fullmatch(text)
    if not match or not (match[2] or match[3] or match[4] or match[5]):
        return None
    sign, whole, decimals, *period, factor = match.groups(default="")
    value = Fraction(f"{whole.replace(',', '') or 0}.{decimals or 0}")
    if period := "".join(period):
        value += Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(decimals))
    scale = _number(factor) if factor else 1
    return None if scale is None else (-value if sign == "-" else value) * scale


def _is_close(a: Fraction, b: Fraction) -> bool:
    return a == b or (abs(a - b) < _ROUNDING[0] and abs(a - b) <= _ROUNDING[1] * max(abs(a), abs(b)))


def _parse(text: str) -> list[Any]:
    if not _PROSE.search(_TEXT.sub("", text)):
        if len(text) > _MAX_FORMULA_CHARS or _depth(text) > _MAX_DEPTH or _ENDLESS.search(text):
            return []
        if r"\overline" in text and (value := _number(text)) is not None:
            text = str(value)
        return _parse_boxed(re.sub(r"\$|\\[()]", "", text))
    return math_verify.parse(text, parsing_timeout=0)


def _parse_boxed(text: str) -> list[Any]:
    """As one formula, whatever is beside it in a sentence."""
    return math_verify.parse(rf"\boxed{{{text}}}", parsing_timeout=0)


@functools.lru_cache(maxsize=1024)
def _parse_gold(gold: str) -> tuple[Any, ...]:
    return tuple(_parse(gold))


def _depth(text: str) -> int:
    depth = deepest = 0
    for bracket in re.findall(r"[({\[\]})]", text):
        depth += 1 if bracket in "({[" else -1
        deepest = max(deepest, depth)
    return deepest


def _verify(golds: Sequence[Any], found: Sequence[Any]) -> bool:
    # Its own limits are alarm signals, which the pool's limit replaces.
    return math_verify.verify(list(golds), list(found), timeout_seconds=None)


def _is_equal(gold: Any, found: Any) -> bool:
    """Whether two expressions are equal; formulas by their values, for to simplify them may take for ever."""
    if any(map(_is_endless, (gold, found))):
        return False
    (form, entries), (found_form, found_entries) = _entries(gold), _entries(found)
    if form and found_form:
        is_alike = form == found_form and len(entries) == len(found_entries)
        return is_alike and all(map(_is_equal, entries, found_entries))
    (name, value), (found_name, found_value) = _assignment(gold), _assignment(found)
    is_other = isinstance(value, sympy.Rel) or isinstance(found_value, sympy.Rel)  # such as x > 5
    if not is_other and (name is None or found_name is None or name == found_name):
        # `x = 5` is 5, and not `y = 5`.
        gold, found = value, found_value
    same = _same_values(gold, found) if _is_formula(gold) and _is_formula(found) else None
    return _verify([gold], [found]) if same is None else same


def _assignment(expression: Any) -> tuple[Any, Any]:
    """(x, 5) of `x = 5`; (None, the expression) of anything else."""
    if isinstance(expression, sympy.Eq) and expression.lhs.is_Symbol:
        return expression.lhs, expression.rhs
    return None, expression


def _is_formula(expression: Any) -> bool:
    return isinstance(expression, sympy.Expr) and not expression.is_Symbol


def _entries(expression: Any) -> tuple[Any, list[Any]]:
    """(form, entries) of a matrix, or of a tuple, which may have been read as an interval; of others no form."""
    if isinstance(expression, sympy.MatrixBase):
        return expression.shape, expression.flat()
    if isinstance(expression, sympy.Interval):
        return f"open: {expression.left_open}, {expression.right_open}", [expression.start, expression.end]
    return ("open: True, True", list(expression.args)) if isinstance(expression, sympy.Tuple) else (None, [])


def _same_values(a: Any, b: Any) -> bool | None:
    """Whether two formulas have the same values at two points; None where that cannot be told."""
    a, b = a.doit(), b.doit()
    if a.is_Rational and b.is_Rational:
        return bool(a == b)
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    # At a negative point, too: at positive ones alone the root of x^2 would be x.
    for sign in 1, -1:
        point = {symbol: sign * sympy.Rational(13 + 4 * i, 7 + i) for i, symbol in enumerate(symbols)}
        values = [each.evalf(_DIGITS, subs=point) for each in (a, b)]
        if not all(value.is_number and value.is_finite for value in values):
            return None
        error = abs(values[0] - values[1])
        if a.has(sympy.Float) or b.has(sympy.Float):
            return False if error > 10 * _ROUNDING[0] else None
        if error > max(map(abs, values)) * sympy.Float(10) ** (10 - _DIGITS):
            return False
    return True


def _is_endless(expression: Any) -> bool:
    """Whether it cannot be evaluated, such as 10^(10^10), or is left to do, such as an integral, and no answer."""
    for node in [] if isinstance(expression, str) else sympy.postorder_traversal(expression):
        sizes: list[Any] = []
        if isinstance(node, sympy.Pow):
            sizes = [node.exp]
        elif isinstance(node, sympy.factorial | sympy.binomial | sympy.gamma):
            sizes = list(node.args)
        elif isinstance(node, sympy.Sum | sympy.Product):
            for _, *bounds in node.limits:
                sizes += [100 * bound for bound in bounds]
        if isinstance(node, sympy.Integral) or any(map(_is_huge, sizes)):
            return True
    return False


def _is_huge(size: Any) -> bool:
    return bool(size.is_number) and not abs(size.evalf(5)) <= _MAX_EXPONENT
