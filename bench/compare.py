"""Two results files of one benchmark beside each other: `flashgrpo bench compare A.jsonl B.jsonl`, or two .json files.

Of each case that both have: both numbers, how many times as fast B is, and whether that is more than the two spreads
together; then what only one of them has, and how their machines, versions and commits differ.
"""

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from flashgrpo.bench.timing import Row, markdown, option_parser, show
from flashgrpo.grpo.errors import RunInputError
from flashgrpo.grpo.run.ledger import differing

_NAMES = "case", "model", "provider", "side", "name", "prompt_len", "prompt_tokens", "checkpointing"  # of a row
_RATE = "tokens/s"


class Measure(NamedTuple):
    value: float
    unit: str
    spread: float


def read(path: Path) -> tuple[Row, dict[str, Measure]]:
    """The header of a results file, and its measures by name. Raises RunInputError for any other file."""
    try:
        text = path.read_text(encoding="utf-8")
        header, *rows = map(json.loads, text.splitlines()) if path.suffix == ".jsonl" else [json.loads(text)]
        is_whole = isinstance(header, dict) and isinstance(header.get("machine"), dict)
        found = dict(_measures(header, rows)) if is_whole else {}
        if not found:
            raise ValueError("it has no machine and times")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        why = getattr(error, "strerror", None) or error
        raise RunInputError(f"{path}: not a results file of kernels, step, generate, sync or cpu-step: {why}") from None
    return header, found


def _measures(header: Row, rows: list[Row]) -> Iterator[tuple[str, Measure]]:
    for row in [*rows, *header.get("summary", [])]:
        name = " · ".join(str(row[key]) for key in _NAMES if key in row)
        if row.get("p50_ms") is not None:
            yield name, Measure(row["p50_ms"], "ms", row["spread"])
        elif "median_step_s" in row:
            medians = []  # of the rounds
            for run in header["runs"]:
                if (run["name"], run["prompt_len"]) == (row["name"], row["prompt_len"]):
                    medians.append(statistics.median(run["step_s"]))
            yield name, Measure(row["median_step_s"], "s", max(medians) / min(medians) - 1)
    for key, unit in (("tokens_per_s", _RATE), ("seconds", "s")):
        for side, value in header.get(key, {}).items():
            yield side, Measure(value, unit, header["spread"][side])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what two files have in common, and how they differ otherwise. Raises RunInputError where that is all."""
    parser = option_parser("compare", __doc__)
    parser.add_argument("files", nargs=2, type=Path, metavar="FILE")
    paths = parser.parse_args(arguments).files
    (old_header, old), (new_header, new) = map(read, paths)
    cells = []
    for name in [name for name in old if name in new]:
        a, b = old[name], new[name]
        times = b.value / a.value if a.unit == _RATE else a.value / b.value
        is_beyond = max(times, 1 / times) - 1 > a.spread + b.spread
        verdict = ("faster" if times > 1 else "slower") if is_beyond else "within the spread"
        spreads = f"{a.spread:.1%}, {b.spread:.1%}"
        cells.append([name, f"{a.value:.4g}", f"{b.value:.4g} {a.unit}", f"{times:.3f}", spreads, verdict])
    if not cells:
        raise RunInputError(f"{paths[0]} and {paths[1]} have no case in common; wanted two files of one benchmark")
    notes = []
    for path, own, other in ((paths[0], old, new), (paths[1], new, old)):
        notes += [f"only in {path}: {name}" for name in own if name not in other]
    for key, (a, b) in differing(old_header["machine"], new_header["machine"]).items():
        notes.append(f"{key}: A {a}, B {b}")
    show(markdown(["", "A:", "B:", "B is x as fast:", "spreads", ""], cells), *notes)
    return 0
