"""A run's folder: recipe.toml, metrics.jsonl, samples.jsonl, checkpoints/step_N/. Whole or not at all.

A checkpoint is written beside its place and renamed. `checkpoints/step_N/state` has the fp32
weights, the optimizer and the reference, each rank's shards written by itself and read by any
number of ranks (torch DCP); `state.json` the step and the data position; `model` is a Hugging Face
folder in the compute type. After a resume the logs are cut back to the checkpoint, so that every
step stands once. Of several ranks the first one writes all but the shards.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from flashgrpo.grpo.errors import RunError, RunInputError
from flashgrpo.grpo.recipe.load import AnyRecipe
from flashgrpo.grpo.run.checkpoints import (
    STATE,
    cause_of,
    check_sums,
    is_of_the_disk,
    list_checkpoints,
    load_tensors,
    newest_checkpoint,
    write_sums,
)
from flashgrpo.grpo.run.ledger import (
    Inputs,
    changed_keys,
    compare_inputs,
    model_paths,
    tell_of_reading,
    write_made_from,
)
from flashgrpo.grpo.run.progress import say
from flashgrpo.grpo.run.trackers import SAMPLES, Trackers, check_trackers
from flashgrpo.grpo.run.world import World
from flashgrpo.model.files import LOCK, locked, parse_json, whole_folder, write_text
from flashgrpo.model.hub import local_folder

T = TypeVar("T")


class RunFolder:
    """The folder of a new run, or of one to continue: `checkpoint` is its newest, or None, `state` its state; `recipe`
    is what `start` writes.

    It is held against other processes. Nothing is left before `start`, so that a faulty recipe leaves nothing behind.
    """

    def __init__(self, recipe: AnyRecipe, resume: bool, world: World):
        self.path, self.recipe, self._world = Path(recipe.run.output), recipe, world
        self._stack = contextlib.ExitStack()
        self.state: dict[str, Any] = {}
        try:
            self.checkpoint = world.on_main(lambda: self._open(resume))
            for path in model_paths(recipe):  # by all: each machine has its own cache of the hub
                world.everywhere(partial(local_folder, path, with_weights=True))
            if self.checkpoint:
                tell_of_reading(self.checkpoint, "to see that it is whole")
                check_sums(self.checkpoint, world)
            self.state, self._changes, self._made_from = world.on_main(self._compare)
        except BaseException:  # nobody has it yet to close it
            self._stack.close()
            raise

    def _open(self, resume: bool) -> Path | None:
        check_trackers(self.recipe)  # before gigabytes are downloaded and read
        self._stack.enter_context(hold_output(self.path, resume))
        return newest_checkpoint(self.path)

    def _compare(self) -> tuple[dict[str, Any], list[str], Inputs]:
        """The state of the checkpoint, what has changed since, and what the run is made from now."""
        made_from, changed = compare_inputs(self.recipe)
        if self.checkpoint is None:
            return {}, [], made_from
        state = _read_state(self.checkpoint)
        changes = changed_keys(self.path / "recipe.toml", self.recipe)
        told = [*changed.values()]
        if told and not self.recipe.run.accept_changes:
            raise RunInputError(
                f"{told[0]}; restore it, choose another run.output, or go on with it by --run.accept_changes=true"
            )
        return state, changes + told, made_from

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self) -> None:
        """Write recipe.toml, say what changed in it, cut the logs back to the checkpoint and open them."""
        self._world.on_main(self._start)
        self._world.everywhere(self._check_shared)

    def _start(self) -> None:
        last_step = self.state.get("step", -1)
        logs = {self.path / name: read_rows(self.path / name) for name in ("metrics.jsonl", "samples.jsonl")}
        for leftover in self.path.glob("checkpoints/.*.partial"):
            shutil.rmtree(leftover)
        write_made_from(self.recipe, self._made_from)
        if self._changes:
            say(f"changed on resume: {', '.join(self._changes)}", style="yellow")
        for path, rows in logs.items():
            _write_rows(path, [row for row in rows if row["step"] <= last_step])
        seen = {row["step"]: {*row, SAMPLES} for row in logs[self.path / "metrics.jsonl"] if row["step"] > last_step}
        self._trackers = self._stack.enter_context(Trackers(self.recipe, last_step, seen))

    def _check_shared(self) -> None:
        if not (self.path / "recipe.toml").exists():
            raise RunInputError(
                f"{self.path}, which rank 0 has begun to write, is not there on rank {self._world.rank}; "
                "run.output wants a place on storage that all ranks share, by a path that is the same on all"
            )

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Append a row; NaN and infinity are written as null."""
        if self._world.is_main:
            _append(self.path / "metrics.jsonl", [{"step": step} | self._track(step, metrics)])

    def has_logged(self, step: int, name: str) -> bool:
        """Whether the last row is that of `step` and has `name`."""
        last = self._world.on_main(lambda: [{}, *read_rows(self.path / "metrics.jsonl")][-1])
        return last.get("step") == step and name in last

    def log_more(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Add to the last row, where it is that of `step`, or append one."""
        if not self._world.is_main:
            return
        rows = read_rows(self.path / "metrics.jsonl")
        before = rows.pop() if rows and rows[-1]["step"] == step else {"step": step}
        _write_rows(self.path / "metrics.jsonl", [*rows, before | self._track(step, metrics, before.keys())])

    def _track(
        self, step: int, metrics: Mapping[str, float | None], shown: Collection[str] = ()
    ) -> dict[str, float | None]:
        """The values as JSON has them, without NaN, when the trackers have got what they were not `shown` before."""
        values: dict[str, float | None] = {}
        for key, value in metrics.items():
            values[key] = value if value is not None and math.isfinite(value) else None
        self._trackers.log(step, {key: value for key, value in values.items() if key not in shown})
        return values

    def log_samples(self, step: int, samples: Iterable[dict[str, Any]]) -> None:
        """Append sampled completions."""
        if not self._world.is_main:
            return
        found = [*samples]
        _append(self.path / "samples.jsonl", ({"step": step} | sample for sample in found))
        self._trackers.log(step, {SAMPLES: found} if found else {})

    def save(self, step: int, write_model, tensors: dict[str, Tensor], state: dict[str, Any], keep: int) -> None:
        """Write checkpoints/step_N and remove all but the newest `keep`. `write_model(path)` makes the model's folder.

        On any failure the unfinished folder is removed, the last good checkpoint stays, and RunError is raised.
        """
        final = self.path / "checkpoints" / f"step_{step}"
        on_main = self._world.on_main
        try:
            with contextlib.ExitStack() as stack:
                # Only the first rank's stack has something in it: the rename, when all is written.
                partial = on_main(lambda: stack.enter_context(whole_folder(final)))
                state_dict_saver.save(tensors, checkpoint_id=partial / STATE)  # the shards of all ranks
                self._world.everywhere(lambda: write_model(partial / "model"))
                on_main(lambda: write_text(partial / "state.json", json.dumps({"step": step, **state})))
                write_sums(partial, self._world)
                on_main(stack.close)
        except (OSError, RuntimeError, CheckpointException) as error:
            cause, kept = cause_of(error), newest_checkpoint(self.path)
            space = "free some space and " if is_of_the_disk(cause) else ""
            raise RunError(
                f"checkpoint of step {step} could not be written to {final.parent}: {cause}; "
                + (f"{kept.name} is kept: {space}continue with --resume" if kept else "none was kept")
            ) from error
        self.checkpoint, self.state = final, {"step": step, **state}
        on_main(lambda: [shutil.rmtree(old) for old in list_checkpoints(self.path)[:-keep]])

    def stored(self, name: str, kind: type[T], at_start: T) -> T:
        """A value of `extra_state`, as it was in the open checkpoint. Raises RunInputError."""
        if self.checkpoint is None:
            return at_start
        try:
            return TypeAdapter(kind).validate_python(self.state.get(name))
        except ValidationError as error:
            where, what = ".".join(map(str, (name, *error.errors()[0]["loc"]))), error.errors()[0]["msg"]
            raise RunInputError(f"{self.checkpoint}: broken state.json ({where}: {what})") from None

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Fill `tensors` in place from the open checkpoint, on any number of ranks."""
        assert self.checkpoint is not None
        load_tensors(tensors, self.checkpoint)


@contextlib.contextmanager
def hold_output(path: Path, resume: bool) -> Iterator[None]:
    """Make the folder and hold it against other processes. Raises RunInputError for one that cannot be written or is in
    use, and for one that is there and is not to be continued.
    """
    with contextlib.ExitStack() as stack:
        try:
            _check_output(path, resume)
            stack.enter_context(locked(path))
            _check_output(path, resume)  # another process may have been quicker
        except BlockingIOError as error:
            raise RunInputError(f"{error}; wait for it, or choose another run.output") from None
        except (OSError, ValueError) as error:
            raise RunInputError(
                f"run.output = {path} cannot be written: {getattr(error, 'strerror', None) or error}"
            ) from None
        yield


def _check_output(path: Path, resume: bool) -> None:
    if path.exists() and not path.is_dir():
        raise RunInputError(f"{path} is a file; run.output wants a folder")
    if not resume and path.exists() and any(each.name != LOCK for each in path.iterdir()):
        raise RunInputError(f"{path} exists: continue it with --resume, or choose another run.output")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL log; a last line that was cut by a crash is left out. Raises RunInputError for any other that is
    not a run's.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunInputError(f"{path}: cannot be read: {error.strerror}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line)
            if not (isinstance(row, dict) and type(row.get("step")) is int):
                raise ValueError("it has no step")
        except ValueError as error:
            if not line.endswith(b"\n"):
                break
            raise RunInputError(f"{path}: line {number} is no row of a run ({error}); remove or restore it") from None
        rows.append(row)
    return rows


def _read_state(checkpoint: Path) -> dict[str, Any]:
    try:
        state = parse_json((checkpoint / "state.json").read_bytes())
        if checkpoint.name != f"step_{state['step']}":
            raise ValueError(f"it is of step {state['step']}")
        return state
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunInputError(
            f"{checkpoint}: broken state.json ({error!r:.200}); remove the folder to continue from before"
        ) from error


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
