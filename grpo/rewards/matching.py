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
from fractions import Fraction
from typing import Any, NamedTuple

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
_ROUNDING = Fraction(1, 10**6)  # of decimals, as math-verify has it
_RELATIVE_ROUNDING = Fraction(1, 10**5)

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
_FIGURE = r"\d+(?:,\d{3})*(?:\.\d+)?"
_TOKEN = re.compile(rf"({_NAME.pattern})|({_FIGURE})|([^\W\d_]+)", re.VERBOSE)
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
    given, found, gold = found, notation(found), notation(gold)
    text, wanted = _text(found), _text(gold)
    if _squeezed(text) == _squeezed(wanted):
        return not is_blank(text)

    if choice := _CHOICE.fullmatch(wanted):
        if chosen := _CHOICE.fullmatch(text):
            return (chosen[1] or chosen[2]) == (choice[1] or choice[2])
        if choice[3]:  # `(B) 12` is found as its text, too
            return answers_match(found, choice[3])

    if words := _words(wanted):
        return _words(text) == words

    if _LABELLED.fullmatch(gold) and _LABELLED.fullmatch(found):
        return False
    if _is_name(wanted):
        return _same_name(text, wanted)
    # 2-1 is a score where one is expected, else a number.
    if _is_name(text) and not _DIFFERENCE.fullmatch(text):
        if _NAME.search(text) or _MONTH.search(text):
            return False
        # A sentence of several numbers, which math-verify may tell apart.
        return _verify(_parse(gold), _parse_boxed(given))

    try:
        return _same_quantity(_split(found), _split(gold))
    except Exception:
        # sympy raises in many ways on formulas without a value, such as the square of a column.
        return False


def _text(text: str) -> str:
    """For comparison as text: no case, no mark-up, and around words, such as the letter of a choice, no brackets."""
    text = " ".join(_TEXT.sub(r"\1", text).casefold().split()).rstrip(".")
    word = text.strip("()[]' ")
    return word if _WORDS.fullmatch(word) else text


def _squeezed(text: str) -> str:
    return re.sub(r"\s*([^\w\s])\s*", r"\1", text)


def _words(text: str) -> list[str]:
    """The words of an answer in words, or of a list of words or letters, in any order; none for anything else."""
    parts = text.rpartition("=")[2].split(",")
    is_list = len(parts) > 1 and all(part.count("(") == part.count(")") for part in parts)
    words = sorted(map(_text, parts))
    for word in words:
        is_product = all(map(_PRODUCT.fullmatch, re.split(r"\W", word)))
        is_letter = is_list and re.fullmatch("[a-z]", word)
        if not is_letter and (is_product or not _WORDS.fullmatch(word)):
            return []
    return words


def _is_name(text: str) -> bool:
    """Whether it is a date, a score, several quantities: no single quantity, and no formula stands beside."""
    text = _joined(text)
    rest = _NAME.sub("", text)
    if _FORMULA.search(rest):
        return False
    is_prose = bool(_PROSE.search(rest))
    if rest != text:
        return is_prose or not re.search(r"\d|\b[a-z]\b", rest)
    return is_prose and len(re.findall(_FIGURE, text)) > (not _MONTH.search(text))


def _same_name(found: str, wanted: str) -> bool:
    (values, words), (wanted_values, wanted_words) = _name(found), _name(wanted)
    return values == wanted_values and _agree(words, wanted_words)


def _name(text: str) -> tuple[list[str], set[str]]:
    """(names without leading zeros, numbers, months and units; other words), a date's in any order."""
    values: list[str] = []
    words: set[str] = set()
    for name, number, word in _TOKEN.findall(_joined(text)):
        canonical = _canonical(word)
        if name:
            name = re.sub(r"(?::00)?\s*([ap])\.?\s*m", r"\1m", name.removeprefix("version").removeprefix("v").strip())
            values.append(re.sub(r"(?<!\d)0+(?=\d)", "", name))
        elif number or canonical in _UNITS.values() or _MONTH.fullmatch(word):
            values.append(number or canonical)
        elif not _FILLER.fullmatch(canonical):
            words.add(canonical)
    return sorted(values) if _MONTH.search(text) else values, words


def _joined(text: str) -> str:
    """Without spaces around what joins the parts of a name."""
    return re.sub(r"\s*(-+|:)\s*", lambda match: match[1][0], text)


def _agree(words: set[str], wanted: set[str]) -> bool:
    """Whether words beside a value are the same, or were left out."""
    return (words <= wanted or wanted <= words) and ("not" in words) == ("not" in wanted)


def _canonical(word: str) -> str:
    if _MONTH.fullmatch(word):
        return word[:3]
    singular = word.removesuffix("s") if len(word) > 2 else word
    return _UNITS.get(word) or _UNITS.get(singular) or singular


class _Quantity(NamedTuple):
    text: str  # all of it
    words: set[str]  # beside the amount, but for its unit
    amount: str
    unit: str = ""  # "" where none is known; or the base of a number


def _split(text: str) -> _Quantity:
    rest, words = text, set[str]()
    lead = _LEAD.fullmatch(text)
    if lead and _PROSE.search(lead[1]):
        rest, words = lead[2], _other_words(lead[1])
    if match := _AMOUNT.fullmatch(rest):
        sign, currency, amount = match.groups()
        return _Quantity(text, words, sign + amount, _UNITS[currency])
    match = _QUANTITY.fullmatch(rest)
    if not match:
        return _Quantity(text, words, rest)
    amount, tail = match.groups()
    if tail.startswith("_"):
        return _Quantity(text, words, amount, tail.strip("_{}"))
    unit = re.sub(r"\bper\b", "/", tail.replace(r"\text", "").casefold())
    unit = re.sub(r"\b(?:sq(?:uare)?|(cubic)) (\w+)", lambda m: m[2] + ("3" if m[1] else "2"), unit)
    unit = re.sub(r"(?:circ|degrees?)[\s{}]*([cf])[a-z]*", r"degree\1", unit)
    parts = [_canonical(part) for part in re.findall(r"[a-z]+|[^\w\s{}^.]|\d", unit)]
    known = {part for part in parts if part in _UNITS.values()}
    if tail[0].isalpha() and not known and not _PROSE.search(tail):
        return _Quantity(text, words, rest)  # what looks like a unit are variables
    words |= _other_words(unit) - known
    return _Quantity(text, words, amount.strip(), "".join(p for p in parts if p in known or (known and p in "/23")))


def _other_words(text: str) -> set[str]:
    words = map(_canonical, re.findall(r"[a-z]+", text.casefold()))
    return {word for word in words if not _FILLER.fullmatch(word)}


def _same_quantity(found: _Quantity, gold: _Quantity) -> bool:
    if (found.unit and gold.unit and found.unit != gold.unit) or not _agree(found.words, gold.words):
        return False
    is_share, wants_share = found.unit == "percent", gold.unit == "percent"
    # Numbers are compared exactly, and without mathematics, which would take far longer.
    number, wanted = _number(found.amount), _number(gold.amount)
    if number is not None and wanted is not None:
        share = Fraction(1, 100) ** (is_share - wants_share)  # 50% may be written 0.5, or 50
        return _is_close(number, wanted) or _is_close(number * share, wanted)
    if is_share != wants_share:
        parsed = _parse(gold.text), _parse(found.text)
        return not any(map(_is_endless, itertools.chain(*parsed))) and _verify(*parsed)
    return any(itertools.starmap(_is_equal, itertools.product(_parse(gold.amount), _parse(found.amount))))


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
    error = abs(a - b)
    return error < _ROUNDING and error <= _RELATIVE_ROUNDING * max(abs(a), abs(b))


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> list[Any]:
    """The expressions in an answer, which no caller changes; none in one that would take the parser too long."""
    if _PROSE.search(_TEXT.sub("", text)):
        return math_verify.parse(text, fallback_mode="no_fallback", parsing_timeout=0)
    if len(text) > _MAX_FORMULA_CHARS or _depth(text) > _MAX_DEPTH or _ENDLESS.search(text):
        return []
    if r"\overline" in text and (value := _number(text)) is not None:
        text = str(value)
    return _parse_boxed(re.sub(r"\$|\\[()]", "", text))


def _parse_boxed(text: str) -> list[Any]:
    """As one formula, whatever is beside it in a sentence."""
    return math_verify.parse(rf"\boxed{{{text}}}", fallback_mode="no_fallback", parsing_timeout=0)


def _depth(text: str) -> int:
    steps = (1 if bracket in "({[" else -1 for bracket in re.findall(r"[({\[\]})]", text))
    return max(itertools.accumulate(steps), default=0)


def _verify(golds: list[Any], found: list[Any]) -> bool:
    # Its own limits are alarm signals, which the pool's limit replaces.
    return math_verify.verify(golds, found, timeout_seconds=None)


def _is_equal(gold: Any, found: Any) -> bool:
    """Whether two expressions are equal; formulas by their values, for to simplify them may take for ever."""
    if _is_endless(gold) or _is_endless(found):
        return False
    (form, entries), (found_form, found_entries) = _entries(gold), _entries(found)
    if form and found_form:
        is_alike = form == found_form and len(entries) == len(found_entries)
        return is_alike and all(map(_is_equal, entries, found_entries))
    (name, value), (found_name, found_value) = _assignment(gold), _assignment(found)
    # `x = 5` is 5, and not `y = 5`; but beside x + y = 5, which has no name to lose, y = 5 - x stays whole.
    is_relation = isinstance(value, sympy.Rel) or isinstance(found_value, sympy.Rel)
    if not is_relation and (name is None or found_name is None or name == found_name):
        gold, found = value, found_value
    same = _same_values(gold, found)
    return _verify([gold], [found]) if same is None else same


def _entries(expression: Any) -> tuple[Any, list[Any]]:
    """(form, entries) of a matrix, or of a tuple, which may have been read as an interval; of others no form."""
    match expression:
        case sympy.MatrixBase():
            return expression.shape, expression.flat()
        case sympy.Interval():
            return (expression.left_open, expression.right_open), [expression.start, expression.end]
        case sympy.Tuple():
            return (True, True), list(expression.args)
    return None, []


def _assignment(expression: Any) -> tuple[Any, Any]:
    """(x, 5) of `x = 5`; (None, the expression) of anything else."""
    if isinstance(expression, sympy.Eq) and expression.lhs.is_Symbol:
        return expression.lhs, expression.rhs
    return None, expression


def _same_values(a: Any, b: Any) -> bool | None:
    """Whether two formulas have the same values at two points; None where that cannot be told."""
    if any(not isinstance(each, sympy.Expr) or each.is_Symbol for each in (a, b)):
        return None
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
            return False if error > 10 * _ROUNDING else None
        if error > max(map(abs, values)) * sympy.Float(10) ** (10 - _DIGITS):
            return False
    return True


def _is_endless(expression: Any) -> bool:
    """Whether it cannot be evaluated, such as 10^(10^10), or is left to do, such as an integral, and no answer."""
    for node in sympy.postorder_traversal(expression):
        sizes: list[Any] = []
        match node:
            case sympy.Integral():
                return True
            case sympy.Pow():
                sizes = [node.exp]
            case sympy.factorial() | sympy.binomial() | sympy.gamma():
                sizes = list(node.args)
            case sympy.Sum() | sympy.Product():
                for _, *bounds in node.limits:
                    sizes += [100 * bound for bound in bounds]
        if any(size.is_number and not abs(size.evalf(5)) <= _MAX_EXPONENT for size in sizes):
            return True
    return False
