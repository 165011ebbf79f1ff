"""A run's folder: recipe.toml, metrics.jsonl, samples.jsonl, tensorboard/, checkpoints/step_N/. Whole or not at all.

A checkpoint is written beside its place and renamed. `checkpoints/step_N/model` is a Hugging Face folder with the fp32
weights; `state` has the optimizer and the reference (torch DCP), `state.json` the step and the data position. After a
resume the logs are cut back to the checkpoint, so that every step stands once.
"""

import contextlib
import json
import math
import random
import shutil
import tomllib
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.utils.tensorboard.writer import SummaryWriter

from flashgrpo.grpo.progress import console
from flashgrpo.model.files import whole_folder, write_text

# DCP without a process group is meant
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class RunError(RuntimeError):
    """A run that cannot start, continue or be saved; the message says what to do."""


class RunInputError(RunError):
    """Found before the first step: an output that is taken, a folder that is no run, a broken checkpoint."""


class RunFolder:
    """The folder `output` of a new run, or of one to continue: `checkpoint` is its newest, or None, `state` its state.

    Nothing is written before `start`, so that a faulty recipe leaves nothing behind.
    """

    def __init__(self, output: str | Path, recipe_toml: str, resume: bool):
        self.path, self._recipe_toml = Path(output), recipe_toml
        if self.path.exists() and not self.path.is_dir():
            raise RunInputError(f"{self.path} is a file; run.output wants a folder")
        if not resume and self.path.exists() and any(self.path.iterdir()):
            raise RunInputError(f"{self.path} exists: continue it with --resume, or choose another run.output")
        self.checkpoint = newest_checkpoint(self.path)
        self.state = _read_state(self.checkpoint) if self.checkpoint else {}
        self._changes = _changed_keys(self.path / "recipe.toml", recipe_toml) if self.checkpoint else []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self) -> None:
        """Write recipe.toml, say what changed in it, cut the logs back to the checkpoint and open them."""
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

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Append a row; NaN and infinity are written as null."""
        finite = {key: value if value is not None and math.isfinite(value) else None for key, value in metrics.items()}
        _append(self.path / "metrics.jsonl", [{"step": step} | finite])
        for key, value in finite.items():
            self._tensorboard.add_scalar(key, math.nan if value is None else value, step)

    def take_row(self, step: int) -> dict[str, Any]:
        """Remove the last row, where it is that of `step`, and return its values, for logging it again with more."""
        *before, last = [{}, *read_rows(self.path / "metrics.jsonl")]
        if last.pop("step", None) != step:
            return {}
        _write_rows(self.path / "metrics.jsonl", before[1:])
        return last

    def log_samples(self, step: int, samples: Iterable[dict[str, Any]]) -> None:
        """Append sampled completions."""
        _append(self.path / "samples.jsonl", ({"step": step} | sample for sample in samples))

    def save(self, step: int, write_model, tensors: dict[str, Tensor], state: dict[str, Any], keep: int) -> None:
        """Write checkpoints/step_N and remove all but the newest `keep`. `write_model(path)` makes the model's folder.

        On any failure the unfinished folder is removed, the last good checkpoint stays, and RunError is raised.
        """
        final = self.path / "checkpoints" / f"step_{step}"
        try:
            with whole_folder(final) as partial:
                write_model(partial / "model")
                if tensors:
                    state_dict_saver.save(tensors, checkpoint_id=partial / "state", no_dist=True)
                write_text(partial / "state.json", json.dumps({"step": step, **state, "rng": _rng_state()}))
        except (OSError, RuntimeError, CheckpointException) as error:
            kept = newest_checkpoint(self.path)
            raise RunError(
                f"checkpoint of step {step} could not be written to {final.parent}: {error}; "
                + (f"{kept.name} is kept: free some space and continue with --resume" if kept else "none was kept")
            ) from error
        self.checkpoint, self.state = final, {"step": step, **state}
        for old in _checkpoints(self.path)[:-keep]:
            shutil.rmtree(old)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Fill `tensors` in place from the open checkpoint, and set every random generator as it was."""
        try:
            state_dict_loader.load(tensors, checkpoint_id=f"{self.checkpoint}/state", no_dist=True)
            _set_rng_state(self.state["rng"])
        except (OSError, RuntimeError, KeyError, ValueError, CheckpointException) as error:
            raise RunInputError(
                f"{self.checkpoint}: broken checkpoint, or one of another recipe ({error}); remove it to continue from "
                "the one before"
            ) from error


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


def _read_state(checkpoint: Path) -> dict[str, Any]:
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        return {"step": int(state["step"]), **state}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunInputError(
            f"{checkpoint}: broken state.json ({error!r}); remove the folder to continue from before"
        ) from error


def _changed_keys(stored: Path, recipe_toml: str) -> list[str]:
    """What is new in a recipe. Another model, data set or seed would be another run under this one's name: refused."""
    texts = stored.read_text(encoding="utf-8"), recipe_toml
    before, now = ({(s, k): v for s, keys in tomllib.loads(t).items() for k, v in keys.items()} for t in texts)
    changes = []
    for section, key in before | now:
        old, new = before.get((section, key)), now.get((section, key))
        if old != new and (section == "data" or (section, key) in (("model", "path"), ("run", "seed"))):
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


def _rng_state() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    _, keys, *position = np.random.get_state()  # noqa: NPY002  # the global generator is what a library may draw from
    return {
        "python": [version, list(words), gauss],
        "numpy": [np.asarray(keys).tolist(), *position],
        "torch": torch.get_rng_state().tolist(),
        "cuda": [state.tolist() for state in torch.cuda.get_rng_state_all()],
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(("MT19937", np.array(state["numpy"][0], dtype=np.uint32), *state["numpy"][1:]))  # noqa: NPY002
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([torch.tensor(s, dtype=torch.uint8) for s in state["cuda"]])
