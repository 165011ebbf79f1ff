"""Where a run's numbers and samples go beside its folder: TensorBoard, trackio, wandb, or a function of yours.

Each tracker works in a thread of its own. One that fails, or that a network lets wait, is told of once and gets nothing
more: a run neither ends nor stalls by it.
"""

import importlib
import json
import math
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from flashgrpo.grpo.errors import RecipeError, resolve_function
from flashgrpo.grpo.recipe.load import AnyRecipe, recipe_to_toml
from flashgrpo.grpo.recipe.schema import TRACKERS
from flashgrpo.grpo.run.progress import say
from flashgrpo.model.files import parse_toml, write_text

Values = Mapping[str, Any]  # numbers of a step, None where they are not finite; under SAMPLES a list of completions
Take = Callable[[int, Values], None]
Seen = Mapping[int, Collection[str]]  # keys by step

SAMPLES = "samples"
_MODULES = {"tensorboard": "torch.utils.tensorboard.writer"}  # what is imported of a tracker that is called otherwise
_COMPARED = "eval/pass@1", "reward/mean", "loss"  # of runs with different recipes, in TensorBoard
_MOST_WAITING = 1000  # rows, before a tracker counts as one that hangs
_QUIET_S, _CLOSE_S = 3.0, 30.0  # how long a run's end waits for its trackers, without a word and in all


def check_trackers(recipe: AnyRecipe) -> None:
    """Import what run.loggers names. Raises RecipeError with the package that is missing, or the function."""
    for name in recipe.run.loggers:
        if name not in TRACKERS:
            resolve_function(name, "run.loggers", RecipeError)
            continue
        try:
            client: Any = importlib.import_module(_MODULES.get(name, name))
        except Exception as error:  # a broken installation may raise anything
            why = f"{type(error).__name__}: {error}"
            raise RecipeError(f"run.loggers: {name} cannot be imported ({why}); pip install {name}") from error
        if name == "wandb" and os.environ.get("WANDB_MODE", "online") == "online":
            # In its thread it would ask for a key in the middle of the run.
            try:
                client.login(verify=False)
            except Exception as error:
                raise RecipeError(f"run.loggers: wandb: {error}; or set WANDB_MODE=offline") from error


class Trackers(AbstractContextManager["Trackers"]):
    """Those of run.loggers, opened for the steps after `last_step`.

    `seen` has the keys that were logged before and come again, after a stop beyond the checkpoint: TensorBoard draws
    them anew, the others get what is new.
    """

    def __init__(self, recipe: AnyRecipe, last_step: int, seen: Seen):
        folder, self._seen = Path(recipe.run.output), seen
        config = dict(_flat(parse_toml(recipe_to_toml(recipe))))
        self._trackers = []
        for name in recipe.run.loggers:
            if name == "tensorboard":
                opened = _tensorboard(folder / name, config, last_step + 1)
            elif name in TRACKERS:
                opened = _client(name, folder, _tracker_id(folder), config)
            else:
                opened = _function(name)
            self._trackers.append(_Tracker(name, opened))

    def log(self, step: int, values: Values) -> None:
        """Hand numbers, or samples, to every tracker; returns at once."""
        seen = self._seen.get(step, {})
        new = {key: value for key, value in values.items() if key not in seen}
        for tracker in self._trackers:
            if own := values if tracker.name == "tensorboard" else new:
                tracker.put((step, own))

    def __exit__(self, *_: object) -> None:
        for tracker in self._trackers:
            tracker.put(None)
        deadline = time.monotonic() + _CLOSE_S
        for tracker in self._trackers:
            tracker.join(deadline)


class _Tracker:
    """A thread that opens a tracker, and hands it what is `put`, until that is None."""

    def __init__(self, name: str, opened: AbstractContextManager[Take]):
        self.name, self._opened, self._is_off = name, opened, False
        self._waiting: queue.Queue[tuple[int, Values] | None] = queue.Queue(_MOST_WAITING)
        # No process waits for a daemon: what hangs is left behind.
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def put(self, item: tuple[int, Values] | None) -> None:
        """A step's values, or None for the end; returns at once."""
        try:
            if not self._is_off:
                self._waiting.put_nowait(item)
        except queue.Full:
            self._switch_off(f"is {_MOST_WAITING} rows behind, and gets no more")

    def join(self, deadline: float) -> None:
        self._thread.join(_QUIET_S)
        if self._thread.is_alive() and not self._is_off:
            say(f"waiting for {self.name}, {_CLOSE_S:.0f} s at most")
            self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._switch_off("has not ended in time; it may lack the last steps")

    def _work(self) -> None:
        try:
            with self._opened as take:
                while (item := self._waiting.get()) is not None:
                    take(*item)
        except BaseException as error:  # a person's function may raise anything
            self._switch_off(f"failed, and gets no more: {type(error).__name__}: {error}")

    def _switch_off(self, why: str) -> None:
        if not self._is_off:
            self._is_off = True
            say(" ".join(f"run.loggers: {self.name} {why}".split()), style="yellow")


@contextmanager
def _tensorboard(folder: Path, config: Values, first_step: int) -> Iterator[Take]:
    from torch.utils.tensorboard.summary import hparams
    from torch.utils.tensorboard.writer import SummaryWriter

    with SummaryWriter(str(folder), purge_step=first_step) as writer:
        for summary in hparams(dict(config), dict.fromkeys(_COMPARED, 0)):
            writer._get_file_writer().add_summary(summary)  # add_hparams would make a run of its own

        def take(step: int, values: Values) -> None:
            for key, value in values.items():
                if key == SAMPLES:
                    writer.add_text(key, "\n\n---\n\n".join(map(_markdown, value)), step)
                else:
                    writer.add_scalar(key, math.nan if value is None else value, step)

        yield take


def _tracker_id(folder: Path) -> str:
    """By which trackio and wandb know a run that is resumed."""
    file = folder / "tracker_id"
    if not file.exists():
        write_text(file, uuid.uuid4().hex[:8])
    return file.read_text()


@contextmanager
def _client(name: str, folder: Path, tracker_id: str, config: Values) -> Iterator[Take]:
    """trackio's or wandb's: their interfaces are alike."""
    client: Any = importlib.import_module(name)
    options = {"project": os.environ.get(f"{name.upper()}_PROJECT", "flashgrpo"), "name": f"{folder.name}-{tracker_id}"}
    if name == "wandb":  # trackio knows a run by its name
        options |= {"id": tracker_id, "dir": str(folder), "allow_val_change": True}
    run = client.init(config=dict(config), resume="allow", **options)

    def take(step: int, values: Values) -> None:
        row = {key: value for key, value in values.items() if value is not None}
        if SAMPLES in row:
            cells = [[_scalar(cell) for cell in sample.values()] for sample in row[SAMPLES]]
            row[SAMPLES] = client.Table(columns=[*row[SAMPLES][0]], data=cells)
        run.log(row, step=step)

    try:
        yield take
    finally:
        run.finish()


@contextmanager
def _function(name: str) -> Iterator[Take]:
    function = resolve_function(name, "run.loggers", RecipeError)

    def take(step: int, values: Values) -> None:
        if SAMPLES not in values:
            function({"step": step, **values})

    yield take


def _markdown(sample: Values) -> str:
    """As a block of code, which leaves texts as they are."""
    text = "\n\n".join(f"{key}: {_scalar(value)}" for key, value in sample.items())
    return "    " + text.replace("\n", "\n    ")


def _flat(values: Values, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Of a recipe, section.key and value."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, _scalar(value)


def _scalar(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value
