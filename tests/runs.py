"""What tests of whole runs share: recipes with changes, and what a run leaves that another can be compared by."""

import dataclasses
from pathlib import Path
from typing import Any

from flashgrpo.grpo.run.folder import newest_checkpoint, read_rows

_TIMING = ("time/", "tokens_per_s", "tflops", "idle", "memory/", "sync/")


def changed(recipe: Any, section: str, **values: Any) -> Any:
    """The recipe with some keys of a section replaced."""
    return dataclasses.replace(recipe, **{section: dataclasses.replace(getattr(recipe, section), **values)})


def rows_of(output: str | Path) -> list[dict[str, Any]]:
    """The log without times, rates and memory."""
    rows = read_rows(Path(output) / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(_TIMING)} for row in rows]


def checkpoint_of(output: str | Path) -> Path:
    """The newest checkpoint of a run."""
    newest = newest_checkpoint(output)
    assert newest is not None
    return newest


def assert_same_run(found: str | Path, wanted: str | Path) -> None:
    """Weights, numbers and samples of two runs are equal to the last bit."""
    assert rows_of(found) == rows_of(wanted)
    for name in ("model/model.safetensors", "samples.jsonl"):
        assert (Path(found) / name).read_bytes() == (Path(wanted) / name).read_bytes()
