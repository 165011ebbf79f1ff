"""What the samples of an evaluation come to, and its table: pass@1 as the mean over k samples, pass@k, and cons@k by
majority vote over extracted answers, with 95% intervals.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from rich.markup import escape
from rich.table import Table

_Z = NormalDist().inv_cdf(0.975)
_TEXT_COLUMNS = ("benchmark", "model")


def solved_by(columns: Mapping[str, Any]) -> str:
    """The reward function that says whether a problem with these columns is solved (`is_correct` of its score)."""
    return "code" if columns.get("tests") else "accuracy"


class Graded(NamedTuple):
    """What an evaluation knows of a completion."""

    is_correct: bool
    answer: str | None
    length: int  # in tokens
    is_truncated: bool
    reflections: int
    quality: dict[str, float]  # by the names of _QUALITY where it was asked for; NaN where missing
    is_missing: bool = False  # it could not be scored, and counts as wrong


Samples = Mapping[int, Sequence[Graded]]  # k of each problem, by its number


def scores_of(parts: Iterable[Samples]) -> dict[str, float]:
    """pass@1 and cons@k with the ends of their 95% intervals, pass@k, k, num_problems; the mean
    length in tokens, the truncated share, reflective phrases per 1,000 tokens; where asked for and
    known, format and language; the share of missing scores where there are any, and nothing else
    where there are no others. Of `parts`, each has other problems.
    """
    samples = dict(chain.from_iterable(part.items() for part in parts))
    # In the order of problems, in which sums do not depend on how ranks have shared them.
    rows = [samples[number] for number in sorted(samples)]

    def column(name: str) -> np.ndarray:  # [num_problems, k]
        return np.array([getattr(sample, name) for sample in chain.from_iterable(rows)]).reshape(len(rows), -1)

    # Where nothing was scored, "pass@1 0%" would be no score of the model.
    missing = float(column("is_missing").mean())
    if missing == 1:
        return {"missing": missing}
    correct, tokens = column("is_correct"), int(column("length").sum())
    num_problems, k = correct.shape
    consensus = float(np.mean([_majority(row) for row in rows]))
    low, high = clustered_interval(correct)
    cons_low, cons_high = wilson_interval(consensus, num_problems)
    scores: dict[str, float] = {
        "pass@1": float(correct.mean()),
        "pass@1/low": low,
        "pass@1/high": high,
        "pass@k": float(correct.any(axis=1).mean()),
        "cons@k": consensus,
        "cons@k/low": cons_low,
        "cons@k/high": cons_high,
        "k": k,
        "num_problems": num_problems,
        "length": tokens / correct.size,
        "truncated": float(column("is_truncated").mean()),
    }
    if missing:
        scores["missing"] = missing
    # A rate over all tokens: the mean of rates would be that of short completions.
    scores["reflection"] = 1000 * int(column("reflections").sum()) / max(tokens, 1)
    qualities = column("quality").ravel()
    for name in qualities[0]:
        values = np.array([quality[name] for quality in qualities])
        if not np.isnan(values).all():
            scores[name] = float(np.nanmean(values))
    return scores


def clustered_interval(
    correct: np.ndarray,  # [num_problems, k] bool
) -> tuple[float, float]:
    """95% interval of pass@1 on problems like these: Wilson's, with as many independent samples as would give the
    variance of the problems' means (clustered standard error, cf. arXiv 2411.00640).

    Samples of a problem agree wholly, or not at all: so there are num_problems to num_problems * k. Where all problems
    have the same mean, as at 0 and 1, the variance says nothing, and it is num_problems.
    """
    num_problems = len(correct)
    mean = float(correct.mean())
    solved = correct.sum(axis=1)  # whole numbers: equal means would differ in their last bits
    variance = float(solved.var(ddof=1)) / correct.shape[1] ** 2 / num_problems if np.ptp(solved) else 0.0
    num_effective = mean * (1 - mean) / variance if variance else 0.0
    return wilson_interval(mean, min(max(num_effective, num_problems), correct.size))


def wilson_interval(share: float, num: float) -> tuple[float, float]:
    """95% interval of a probability of which `share` was seen in `num` independent trials (Wilson 1927)."""
    shrunk = 1 / (1 + _Z**2 / num)
    center = shrunk * (share + _Z**2 / (2 * num))
    half = shrunk * _Z * math.sqrt(share * (1 - share) / num + (_Z / (2 * num)) ** 2)
    return max(center - half, 0.0), min(center + half, 1.0)


def table_of(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows of `evaluate_models` for a terminal, by benchmark."""
    table = Table(title="95% intervals", title_justify="left")
    header, *lines = _cells(rows)
    for name in header:
        table.add_column(name, justify="left" if name in _TEXT_COLUMNS else "right")
    for line in lines:
        table.add_row(*map(escape, line))
    return table


def markdown_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same table as Markdown."""
    header, *lines = _cells(rows)
    rule = ["---" if name in _TEXT_COLUMNS else "---:" for name in header]
    text = ""
    for line in (header, rule, *lines):
        text += f"| {' | '.join(line)} |\n"
    return text


def _majority(row: Sequence[Graded]) -> bool:
    """Whether the commonest answer is right; of equally common ones the first sampled; no answer is no vote."""
    votes = Counter(sample.answer for sample in row if sample.answer is not None)
    if not votes:
        return False
    winner = votes.most_common(1)[0][0]
    return next(sample.is_correct for sample in row if sample.answer == winner)


def _cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Header and lines of a table; the benchmark is a column where there are several."""
    ks, benchmarks, names = set(), set(), set()
    for row in rows:
        ks.add(row["k"])
        benchmarks.add(row["benchmark"])
        names |= row.keys()
    k = ks.pop() if len(ks) == 1 else "k"
    shares = {f"cons@{k}": "cons@k", f"pass@{k}": "pass@k"}
    marks = ["truncated", "format", "language", *(["missing"] if "missing" in names else [])]
    header = ["model", "pass@1", *shares, "length", *marks]
    lines = []
    for row in rows:
        interval = f"{_share(row, 'pass@1/low')} to {_share(row, 'pass@1/high')}"
        line = [row["model"], f"{_share(row, 'pass@1')} ({interval})"]
        line += [_share(row, name) for name in shares.values()]
        line += [f"{row['length']:,.0f}"]
        line += [_share(row, name) for name in marks]
        lines.append(line)
    if len(benchmarks) > 1:
        header = ["benchmark", *header]
        for row, line in zip(rows, lines, strict=True):
            line.insert(0, Path(row["benchmark"]).stem)
    return [header, *lines]


def _share(row: Mapping[str, Any], name: str) -> str:
    return f"{row[name]:.1%}" if name in row else ""
