"""A run's folder: recipe.toml, metrics.jsonl, samples.jsonl, tensorboard/, checkpoints/step_N/. Whole or not at all.

A checkpoint is written beside its place and renamed. `checkpoints/step_N/state` has the fp32 weights, the optimizer and
the reference, each rank's shards written by itself and read by any number of ranks (torch DCP); `state.json` the step
and the data position; `model` is a Hugging Face folder in the compute type. After a resume the logs are cut back to
the checkpoint, so that every step stands once. Of several ranks the first one writes all but the shards.
"""

import contextlib
import json
import math
import shutil
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.utils.tensorboard.writer import SummaryWriter

from flashgrpo.grpo.progress import console
from flashgrpo.grpo.world import RunError, RunInputError, World, misses_a_rank
from flashgrpo.model.files import whole_folder, write_text


class RunFolder:
    """The folder `output` of a new run, or of one to continue: `checkpoint` is its newest, or None, `state` its state.

    Nothing is written before `start`, so that a faulty recipe leaves nothing behind.
    """

    def __init__(self, output: str | Path, recipe_toml: str, resume: bool, world: World):
        self.path, self._recipe_toml, self._world = Path(output), recipe_toml, world
        self.checkpoint, self.state, self._changes = world.on_main(lambda: self._open(resume))
        self._stack = contextlib.ExitStack()

    def _open(self, resume: bool) -> tuple[Path | None, dict[str, Any], list[str]]:
        check_output(self.path, resume)
        checkpoint = newest_checkpoint(self.path)
        if checkpoint is None:
            return None, {}, []
        return checkpoint, _read_state(checkpoint), changed_keys(self.path / "recipe.toml", self._recipe_toml)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self) -> None:
        """Write recipe.toml, say what changed in it, cut the logs back to the checkpoint and open them."""
        self._world.on_main(self._start)
        self._world.everywhere(self._check_shared)

    def _start(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        for leftover in self.path.glob("checkpoints/.*.partial"):
            shutil.rmtree(leftover)
        write_text(self.path / "recipe.toml", self._recipe_toml)
        if self._changes:
            console.print("changed on resume:", ", ".join(self._changes), style="yellow", markup=False, soft_wrap=True)
        last_step = self.state.get("step", -1)
        for name in ("metrics.jsonl", "samples.jsonl"):
            rows = [row for row in read_rows(self.path / name) if row["step"] <= last_step]
            _write_rows(self.path / name, rows)
        writer = SummaryWriter(str(self.path / "tensorboard"), purge_step=last_step + 1)
        self._tensorboard = self._stack.enter_context(writer)

    def _check_shared(self) -> None:
        if not (self.path / "recipe.toml").exists():
            raise RunInputError(
                f"{self.path}, which rank 0 has begun to write, is not there on rank {self._world.rank}; "
                "run.output wants a place on storage that all ranks share, by a path that is the same on all"
            )

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Append a row; NaN and infinity are written as null."""
        if self._world.is_main:
            _append(self.path / "metrics.jsonl", [self._row(step, metrics)])

    def has_logged(self, step: int, name: str) -> bool:
        """Whether the last row is that of `step` and has `name`."""
        last = self._world.on_main(lambda: [{}, *read_rows(self.path / "metrics.jsonl")][-1])
        return last.get("step") == step and name in last

    def log_more(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Add to the last row, where it is that of `step`, or append one."""
        if not self._world.is_main:
            return
        rows = read_rows(self.path / "metrics.jsonl")
        before = rows.pop() if rows and rows[-1]["step"] == step else {}
        _write_rows(self.path / "metrics.jsonl", [*rows, before | self._row(step, metrics)])

    def _row(self, step: int, metrics: Mapping[str, float | None]) -> dict[str, Any]:
        finite = {key: value if value is not None and math.isfinite(value) else None for key, value in metrics.items()}
        for key, value in finite.items():
            self._tensorboard.add_scalar(key, math.nan if value is None else value, step)
        return {"step": step} | finite

    def log_samples(self, step: int, samples: Iterable[dict[str, Any]]) -> None:
        """Append sampled completions."""
        if not self._world.is_main:
            return
        _append(self.path / "samples.jsonl", ({"step": step} | sample for sample in samples))

    def save(self, step: int, write_model, tensors: dict[str, Tensor], state: dict[str, Any], keep: int) -> None:
        """Write checkpoints/step_N and remove all but the newest `keep`. `write_model(path)` makes the model's folder.

        On any failure the unfinished folder is removed, the last good checkpoint stays, and RunError is raised.
        """
        final = self.path / "checkpoints" / f"step_{step}"
        on_main = self._world.on_main
        try:
            with contextlib.ExitStack() as stack:
                partial = on_main(lambda: stack.enter_context(whole_folder(final)))
                state_dict_saver.save(tensors, checkpoint_id=partial / "state")
                self._world.everywhere(lambda: write_model(partial / "model"))
                on_main(lambda: write_text(partial / "state.json", json.dumps({"step": step, **state})))
                on_main(stack.close)
        except (OSError, RuntimeError, CheckpointException) as error:
            causes = _causes(error)
            if any(map(misses_a_rank, causes)):
                raise
            kept, advice = newest_checkpoint(self.path), "continue with --resume"
            if any(map(_is_of_the_disk, causes)):
                advice = f"free some space and {advice}"
            raise RunError(
                f"checkpoint of step {step} could not be written to {final.parent}: {causes[0]}; "
                + (f"{kept.name} is kept: {advice}" if kept else "none was kept")
            ) from error
        self.checkpoint, self.state = final, {"step": step, **state}
        on_main(lambda: [shutil.rmtree(old) for old in _checkpoints(self.path)[:-keep]])

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Fill `tensors` in place from the open checkpoint, on any number of ranks."""
        try:
            state_dict_loader.load(tensors, checkpoint_id=f"{self.checkpoint}/state")
        except (OSError, RuntimeError, KeyError, ValueError, CheckpointException) as error:
            if any(map(misses_a_rank, _causes(error))):
                raise
            raise RunInputError(
                f"{self.checkpoint}: broken checkpoint, or one of another model or recipe ({error}); remove it to "
                "continue from the one before"
            ) from error


def check_output(path: Path, resume: bool) -> None:
    """Raises RunInputError for an output that is a file, or that is there and is not to be continued."""
    if path.exists() and not path.is_dir():
        raise RunInputError(f"{path} is a file; run.output wants a folder")
    if not resume and path.exists() and any(path.iterdir()):
        raise RunInputError(f"{path} exists: continue it with --resume, or choose another run.output")


def newest_checkpoint(run: str | Path) -> Path | None:
    """The newest whole checkpoint of a run's folder, if there is one."""
    return next(reversed(_checkpoints(Path(run))), None)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL log; a last line that was cut by a crash is left out."""
    rows = []
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError), path.open(encoding="utf-8") as lines:
        for line in lines:
            rows.append(json.loads(line))
    return rows


def _checkpoints(run: Path) -> list[Path]:
    found = [p for p in run.glob("checkpoints/step_*") if p.name.removeprefix("step_").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def _causes(error: BaseException) -> list[BaseException]:
    """What DCP has found on any rank, or `error` itself."""
    return [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]


def _is_of_the_disk(error: BaseException) -> bool:
    """torch's zip writer tells of a write that failed by where it stands, and hides the OSError."""
    return isinstance(error, OSError) or "inline_container" in str(error)


def _read_state(checkpoint: Path) -> dict[str, Any]:
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        return {"step": int(state["step"]), **state}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunInputError(
            f"{checkpoint}: broken state.json ({error!r}); remove the folder to continue from before"
        ) from error


def _makes_another_run(section: str, key: str) -> bool:
    """Another model, data set or seed would be another run under this one's name."""
    return section in ("data", "sources") or (section, key) in (("model", "path"), ("run", "seed"))


def changed_keys(
    stored: Path, recipe_toml: str, is_fixed: Callable[[str, str], bool] = _makes_another_run
) -> list[str]:
    """What is new in a recipe. Raises RunInputError for a section and key that may not change."""
    texts = stored.read_text(encoding="utf-8"), recipe_toml
    before, now = ({(s, k): v for s, keys in tomllib.loads(t).items() for k, v in keys.items()} for t in texts)
    changes = []
    for section, key in before | now:
        old, new = before.get((section, key)), now.get((section, key))
        if old != new and is_fixed(section, key) and (old is not None or new):  # a key may be newer than the run
            raise RunInputError(
                f"{section}.{key} is {new!r}, and the run in {stored.parent} began with {old!r}; "
                "keep it, or choose another run.output"
            )
        changes += [f"{section}.{key} {old!r} -> {new!r}"] if old != new else []
    return changes


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
