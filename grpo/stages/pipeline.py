"""Stages in a row, each from what earlier ones have made; `flashgrpo pipeline FILE`, or by torchrun as every run.

The file is TOML: [run] has the folder of the whole and the seed of all stages, and each [stages.NAME] a `kind` (a
command: train, sft, reward-model, collect, eval; or function), and the sections of that command's recipe.

    [stages.cold_start]
    kind = "sft"
    model.path = "models/base"
    data.path = "stage:examples"        # what the stage `examples` makes; "stage:NAME/FILE" is a file of its folder

`like = "NAME"` begins with the sections of an earlier stage. An eval has `models = { label = "stage:NAME" }`. Of a
function, `function = "package.module:name"` is called as name(folder, seed, **options) and fills the folder.

A stage that is finished is not run again, and one that was interrupted goes on. `stages.json` is the ledger: the values
that each was made from, and what its inputs held. Where they have changed since, the pipeline stops and says what.
"""

import contextlib
import copy
import gc
import inspect
import json
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table

from flashgrpo.grpo.data.benchmarks import load_benchmark
from flashgrpo.grpo.data.problems import check_columns
from flashgrpo.grpo.errors import RecipeError, RewardError, RunInputError, nearest
from flashgrpo.grpo.recipe.load import FunctionRecipe, PipelineRecipe, Recipe, build_recipe, read_toml, section_keys
from flashgrpo.grpo.recipe.schema import SourceSection
from flashgrpo.grpo.rewards.rules import check_names, resolve_reward
from flashgrpo.grpo.run.folder import hold_output
from flashgrpo.grpo.run.ledger import changed, differing, identify, input_paths, model_paths, read_sections
from flashgrpo.grpo.run.progress import console
from flashgrpo.grpo.run.trackers import check_trackers
from flashgrpo.grpo.run.world import open_world
from flashgrpo.grpo.stages.kinds import KINDS, run_recipe
from flashgrpo.grpo.stages.plots import draw_pipeline, write_report
from flashgrpo.grpo.stages.scores import markdown_of, table_of
from flashgrpo.model.config import CheckpointError
from flashgrpo.model.files import parse_json, whole_folder, write_text
from flashgrpo.model.hub import local_folder

_LEDGER, _REFERENCE = "stages.json", "stage:"
_PLAIN_WIDTH = 140  # of tables that go to a file
_OWN_KEYS = {"kind", "like"}  # of a stage, and of no recipe
_NOT_INHERITED = {*_OWN_KEYS, "models", "function", "options"}
_UNUSED_COLUMNS = {  # of a reward model's data, by its objective
    "pairwise": ("completion_column", "label_column"),
    "pointwise": ("chosen_column", "rejected_column"),
}
# Where and how fast a stage runs, not what it makes.
_NO_MATTER = {"run", "vllm", "rollout.generator", "train.token_budget"}

Values = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """A recipe with a name, whose run.output is the folder of that name."""

    name: str
    kind: str
    recipe: Any
    inputs: dict[str, "Stage | None"]  # local paths it reads, and the stage that makes each

    @property
    def folder(self) -> Path:
        return Path(self.recipe.run.output)

    @property
    def made(self) -> Path:
        """What a reference to it stands for."""
        return self.folder / KINDS[self.kind].makes

    @property
    def made_from(self) -> Values:
        """What decides what comes of it."""
        # Keys at their default are left out, so that a key that a later version adds changes no stage.
        dumped = TypeAdapter(type(self.recipe)).dump_python(self.recipe, mode="json", exclude_defaults=True)
        return {**_what_matters(dumped), "seed": self.recipe.run.seed}


def _what_matters(values: Values) -> Values:
    """The values of a recipe, or of one that an older version has noted, but those of _NO_MATTER."""
    kept = {key: value for key, value in values.items() if key not in _NO_MATTER}
    for section, keys in kept.items():
        if isinstance(keys, dict):
            kept[section] = {key: value for key, value in keys.items() if f"{section}.{key}" not in _NO_MATTER}
    return kept


def run_pipeline(path: str | Path, overrides: Sequence[str] = (), until: str | None = None) -> Path:
    """Run the stages of a file that are not finished, up to `until`; returns the pipeline's folder.

    `overrides` are `--run.key=value` and `--stages.NAME.section.key=value`, of that stage alone.
    Raises RecipeError for any faulty stage before the first one runs, RunInputError for an input
    that is missing or has changed, and what the stages raise.
    """
    settings, stages = load_pipeline(path, overrides)
    names = [stage.name for stage in stages]
    if until is not None and until not in names:
        raise RecipeError(f"{path}: no stage {until!r}{nearest(until, names)}")
    output = Path(settings.run.output)
    last = len(names) if until is None else names.index(until) + 1
    for stage in stages[:last]:
        _check_given(stage)
    with contextlib.ExitStack() as stack:
        with open_world(settings) as world:
            world.on_main(lambda: stack.enter_context(hold_output(output, resume=True)))
        for number, stage in enumerate(stages[:last], start=1):
            _run_stage(stage, f"{number}/{len(stages)}", settings)
    if os.environ.get("RANK", "0") == "0":
        _summarize(stages[:last], output)
    return output


def _run_stage(stage: Stage, number: str, settings: PipelineRecipe) -> None:
    """Run it, unless it is finished. A world is open only between stages: each of them opens its own."""
    output = Path(settings.run.output)
    with open_world(settings) as world:
        is_due = world.on_main(lambda: _open(stage, output))
    # Outside of the world, on every rank: only the first one's console prints.
    console.rule(f"{number} {stage.name} ({stage.kind}){'' if is_due else ': finished before'}")
    if not is_due:
        return
    start = time.perf_counter()
    run_recipe(stage.kind, stage.recipe, resume=True)
    if KINDS[stage.kind].makes == "model" and os.environ.get("RANK", "0") == "0":
        write_report(stage.folder)
    # The next stage needs the memory that this one's model and optimizer have left.
    gc.collect()
    torch.cuda.empty_cache()
    seconds = time.perf_counter() - start
    with open_world(settings) as world:
        world.on_main(lambda: _close(stage, output, seconds))


def load_pipeline(path: str | Path, overrides: Sequence[str] = ()) -> tuple[PipelineRecipe, list[Stage]]:
    """The pipeline in a TOML file, every stage's recipe checked. Raises RecipeError."""
    values = read_toml(path)
    found = values.pop("stages", None)
    if not found or not isinstance(found, dict):
        raise RecipeError(f"{path}: no [stages.NAME]; wanted one or more")
    own = _own_overrides(overrides, found, str(path))
    shared = [override for override in overrides if not override.startswith("--stages.")]
    settings = build_recipe(PipelineRecipe, values, str(path), shared)
    stages: dict[str, Stage] = {}
    raw: dict[str, Values] = {}
    for name, stage_values in found.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise RecipeError(f"{path}: stages.{name}: wanted a folder's name of letters, digits, _ and -")
        source = f"{path}: stages.{name}"
        # Likeness is of what the file says: a later stage does not inherit this one's overrides.
        raw[name] = _with_likeness(stage_values, raw, source)
        stages[name] = _stage(name, _resolved(raw[name], stages, source), stages, settings, source, own[name])
    return settings, [*stages.values()]


def _own_overrides(overrides: Sequence[str], names: Iterable[str], source: str) -> dict[str, list[str]]:
    """Those of stages, as options of each one's own recipe."""
    own: dict[str, list[str]] = {name: [] for name in names}
    for override in overrides:
        if not override.startswith("--stages."):
            continue
        name, _, option = override.removeprefix("--stages.").partition(".")
        if name not in own:
            raise RecipeError(f"{override}: no such stage{nearest(name, own)}")
        if f"={_REFERENCE}" in option:
            fault = "an override cannot name a stage; give the path of what it makes"
            raise RecipeError(f"{source}: stages.{name}: --{option}: {fault}")
        own[name].append(f"--{option}")
    return own


def _with_likeness(values: Any, earlier: dict[str, Values], source: str) -> Values:
    """A stage's values laid over those of the stage it is like; of another kind's, over the keys that both have."""
    if not isinstance(values, dict) or values.get("kind") not in KINDS:
        found = values.get("kind") if isinstance(values, dict) else values
        raise RecipeError(f"{source}: kind = {found!r}{nearest(str(found), KINDS)}")
    model = values.get("like")
    if model is None:
        return values
    if model not in earlier:
        raise RecipeError(f"{source}: like = {model!r}, wanted an earlier stage{nearest(str(model), earlier)}")
    inherited = {key: value for key, value in earlier[model].items() if key not in _NOT_INHERITED}
    if earlier[model]["kind"] != values["kind"]:
        inherited = _shared_keys(inherited, section_keys(KINDS[values["kind"]].recipe))
    return _laid_over(inherited, values)


def _shared_keys(values: Values, keys: Mapping[str, list[str] | None]) -> Values:
    """What of `values` another kind of recipe has too; its `keys` by section, None for sections that a person names."""
    shared = {}
    for section in values.keys() & keys.keys():
        found, known = values[section], keys[section]
        shared[section] = {key: found[key] for key in found if known is None or key in known}
    return shared


def _laid_over(base: Values, values: Values) -> Values:
    """`base` with `values` in place of its own, key by key of each section."""
    merged = copy.deepcopy(base)
    for key, value in values.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = {**merged[key], **value} if both else value
    return merged


def _resolved(value: Any, stages: dict[str, Stage], source: str) -> Any:
    """Every "stage:NAME" in a value replaced by the path of what the stage makes."""
    if isinstance(value, dict):
        return {key: _resolved(item, stages, source) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolved(item, stages, source) for item in value]
    if not (isinstance(value, str) and value.startswith(_REFERENCE)):
        return value
    name, _, file = value.removeprefix(_REFERENCE).partition("/")
    if name not in stages:
        raise RecipeError(f"{source}: {value!r}: wanted an earlier stage{nearest(name, stages)}")
    return str(stages[name].folder / file if file else stages[name].made)


def _stage(
    name: str,
    values: Values,
    stages: dict[str, Stage],
    settings: PipelineRecipe,
    source: str,
    overrides: Sequence[str],
) -> Stage:
    kind, folder = values["kind"], str(Path(settings.run.output) / name)
    keys = ("seed", "device", "accept_changes", "collective_timeout_s", "loggers")
    shared = {key: getattr(settings.run, key) for key in keys}
    base: Values = {"run": {"output": folder, **shared}}
    if kind == "eval":
        models = values.get("models")
        if not isinstance(models, dict) or not models:
            raise RecipeError(f"{source}: an evaluation wants models = {{ label = 'path' }}, found {models!r}")
        base["model"] = {"path": next(iter(models.values()))}
    sections = {key: value for key, value in values.items() if key not in _OWN_KEYS}
    recipe = build_recipe(KINDS[kind].recipe, _laid_over(base, sections), source, overrides)
    _check_functions(recipe, source)
    if recipe.run.output != folder:
        raise RecipeError(
            f"{source}: run.output = {recipe.run.output}, wanted {folder}: a pipeline has one for all stages"
        )
    return Stage(name, kind, recipe, _inputs(recipe, stages))


def _check_functions(recipe: Any, source: str) -> None:
    """That the functions a recipe names are there, and take what they will be given."""
    try:
        check_trackers(recipe)
        if isinstance(recipe, Recipe):
            check_names(recipe)
        elif isinstance(recipe, FunctionRecipe):
            source += f": {recipe.function}"
            inspect.signature(resolve_reward(recipe.function)).bind(Path(), 0, **recipe.options)
    except (RecipeError, RewardError, TypeError) as error:
        raise RecipeError(f"{source}: {error}") from None


def _inputs(recipe: Any, stages: dict[str, Stage]) -> dict[str, Stage | None]:
    """The files and folders that a stage reads, and which stage makes each."""
    paths = [*getattr(recipe, "models", {}).values(), *input_paths(recipe).values()]
    paths += recipe.eval.benchmarks if isinstance(recipe, Recipe) else []
    inputs = {}
    for path in paths:
        makers = [stage for stage in stages.values() if Path(path).is_relative_to(stage.folder)]
        inputs[path] = makers[0] if makers else None
    return inputs


def _check_given(stage: Stage) -> None:
    """That files of the user's are there, with the columns that are read: the stage's turn may come in days."""
    recipe = stage.recipe
    given = [path for path, maker in stage.inputs.items() if maker is None]
    models = {*model_paths(recipe), *getattr(recipe, "models", {}).values()}
    for path in given:
        try:
            if path in models:
                local_folder(path, with_weights=True)
            elif not Path(path).exists():
                raise RunInputError(f"{path}: no such file or folder")
        except (CheckpointError, RunInputError) as error:
            raise RunInputError(f"stage {stage.name} wants {error}") from error
    for section in read_sections(recipe).values():
        if isinstance(section, SourceSection) and section.path in given:
            unused = _UNUSED_COLUMNS[recipe.train.objective] if stage.kind == "reward-model" else ()
            keys = [f.name for f in fields(section) if f.name.endswith("_column") and f.name not in unused]
            check_columns(section.path, filter(None, [getattr(section, key) for key in keys]))
    if isinstance(recipe, Recipe):
        for path in recipe.eval.benchmarks:
            if path in given:
                load_benchmark(path, recipe.run.seed)


def _open(stage: Stage, output: Path) -> bool:
    """Whether the stage is to be run; then it stands in the ledger with what it is made from."""
    for path, maker in stage.inputs.items():
        if maker and not Path(path).exists():
            raise RunInputError(
                f"stage {stage.name} wants {path}, which stage {maker.name} has made and which is gone; "
                f"remove {maker.folder} to make it anew"
            )
    ledger = _read_ledger(output)
    known = ledger.get(stage.name) if stage.folder.exists() else {}
    if known is None:
        raise RunInputError(f"{stage.folder} was not made by this pipeline; choose another run.output")
    noted = known.get("inputs", {})
    entry = {"recipe": stage.made_from, "inputs": identify({path: path for path in stage.inputs}, noted)}
    changes = []
    if "seconds" in known:  # a stage in progress knows itself which keys may change
        changes += [f"recipe: {key}" for key in differing(_what_matters(known["recipe"]), entry["recipe"])]
    if not stage.recipe.run.accept_changes:
        changes += [f"inputs: {path}" for path in changed(noted, entry["inputs"])]
    if changes:
        raise RunInputError(
            f"stage {stage.name} in {stage.folder} was made from another {', '.join(changes)}; restore it, remove "
            "that folder to make the stage anew, choose another run.output, or accept inputs with other content by "
            f"--stages.{stage.name}.run.accept_changes=true"
        )
    # What is finished and gone is made again.
    is_due = not ("seconds" in known and stage.made.exists())
    if not is_due:
        entry["seconds"] = known["seconds"]
    write_text(output / _LEDGER, json.dumps(ledger | {stage.name: entry}, indent=1))
    return is_due


def _close(stage: Stage, output: Path, seconds: float) -> None:
    ledger = _read_ledger(output)
    ledger[stage.name]["seconds"] = round(seconds, 1)
    write_text(output / _LEDGER, json.dumps(ledger, indent=1))


def call_function(recipe: FunctionRecipe, resume: bool = True) -> Path:
    """Have a function fill run.output anew; returns that."""
    output = Path(recipe.run.output)

    def call() -> None:
        with whole_folder(output) as folder:
            resolve_reward(recipe.function)(folder, recipe.run.seed, **recipe.options)

    with open_world(recipe) as world:
        world.on_main(call)
    return output


def _read_ledger(output: Path) -> dict[str, Any]:
    try:
        ledger = parse_json((output / _LEDGER).read_bytes())
        if not all({"recipe", "inputs"} <= entry.keys() for entry in ledger.values()):
            raise ValueError("a stage lacks what it is made from")
        return ledger
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        raise RunInputError(
            f"{output / _LEDGER}: not what a pipeline has written ({error}); restore it, or remove {output}"
        ) from error


def _summarize(stages: list[Stage], output: Path) -> None:
    """The scores of the last evaluation, the seconds of each stage and the picture of the whole."""
    seconds = {name: entry.get("seconds", 0.0) for name, entry in _read_ledger(output).items()}
    times = Table(title="stages", title_justify="left")
    for column in ("stage", "kind", "seconds", "made"):
        times.add_column(column, justify="right" if column == "seconds" else "left")
    for stage in stages:
        times.add_row(stage.name, stage.kind, f"{seconds[stage.name]:,.0f}", str(stage.made))
    printer = Console(width=None if console.is_terminal else _PLAIN_WIDTH)
    printer.print(times)
    rows: list[dict[str, Any]] = []
    for stage in stages:
        if stage.kind == "eval":
            written = json.loads(stage.made.read_text(encoding="utf-8"))
            # The file keeps rows of models that an edited pipeline names no more.
            rows = [row for row in written if row["model"] in stage.recipe.models]
            printer.print(table_of(rows))
            write_text(output / f"{stage.name}.md", markdown_of(rows))
    curves = {stage.name: stage.folder for stage in stages if stage.kind == "train"}
    if curves:
        printer.print(f"picture: {draw_pipeline(curves, rows, output / 'report.png')}")
