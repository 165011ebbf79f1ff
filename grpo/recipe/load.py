"""A recipe: TOML (and `--section.key=value`) checked into frozen dataclasses."""

import copy
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tomli_w
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from flashgrpo.grpo.errors import RecipeError, nearest
from flashgrpo.grpo.recipe.schema import (
    CHECKED,
    CollectDataSection,
    CollectSection,
    DataSection,
    EvalSection,
    FilterSection,
    GivenSection,
    MixedSection,
    ModelSection,
    PairDataSection,
    PreferenceSection,
    PreferenceTrainSection,
    RewardsSection,
    RolloutSection,
    RunSection,
    SamplingSection,
    SftDataSection,
    SftTrainSection,
    TrainSection,
    VllmSection,
    WriteSection,
    first_step,
)
from flashgrpo.kernels.grpo_loss import LossConfig
from flashgrpo.model.files import parse_toml


@dataclass(frozen=True, config=CHECKED)
class Recipe:
    """GRPO: `flashgrpo train`."""

    model: ModelSection
    data: DataSection
    run: RunSection
    sources: dict[str, MixedSection] = dataclasses.field(default_factory=dict)
    rewards: RewardsSection = RewardsSection()
    reward_models: dict[str, PreferenceSection] = dataclasses.field(default_factory=dict)
    rollout: RolloutSection = RolloutSection()
    loss: LossConfig = dataclasses.field(default_factory=lambda: LossConfig.preset("grpo"))
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()
    vllm: VllmSection = VllmSection()

    def __post_init__(self) -> None:
        _check_generator(self.rollout, self.vllm)
        if self.rollout.overlap and self.rollout.generator != "vllm_server":
            raise ValueError(f"rollout.overlap needs generator = vllm_server, found {self.rollout.generator}")
        if self.rollout.is_truncated and (self.rollout.overlap or self.loss.behavior_cap is not None):
            key = "rollout.overlap" if self.rollout.overlap else f"loss.behavior_cap = {self.loss.behavior_cap:g}"
            raise ValueError(
                f"{key} weighs tokens by the sampler's log-probs, and with rollout.top_p = {self.rollout.top_p:g} and "
                f"rollout.top_k = {self.rollout.top_k} those are of the tokens that were kept alone, the trainer's of "
                "all: every ratio would be too small, by what was left out; wanted top_p = 1 and top_k = 0"
            )
        if self.rollout.prompts_per_step % self.train.mini_batches:
            raise ValueError(
                f"rollout.prompts_per_step = {self.rollout.prompts_per_step} is not a multiple of "
                f"train.mini_batches = {self.train.mini_batches}"
            )
        if self.eval.every and not self.data.held_out:
            raise ValueError(f"eval.every = {self.eval.every}, but data.held_out = 0 leaves no problem to evaluate on")
        if (shares := sum(source.share for source in self.sources.values())) >= 1:
            raise ValueError(
                f"the shares of [sources] come to {shares:g}, wanted less than 1: the rest is that of [data]"
            )
        if "data" in self.sources:
            raise ValueError("sources.data: found the name that [data] has; choose another")
        known = {*self.rewards.functions, *(name for source in self.sources.values() for name in source.rewards)}
        if unused := sorted({*self.rewards.start, *self.reward_models} - known):
            raise ValueError(f"{unused[0]!r} is in rewards.start or [reward_models], and no list of rewards has it")
        steps = self.train.steps
        for source, weights in self.reward_weights.items():
            first = first_step(self.sources[source].start if source in self.sources else 0.0, steps)
            counted = [name for name, weight in weights.items() if weight]
            if all(first_step(self.rewards.start.get(name, 0.0), steps) > first for name in counted):
                raise ValueError(
                    f"rewards.start: in step {first} the completions of {source} have no reward yet, as all of theirs "
                    f"start later ({', '.join(counted)}); give them one from the start"
                )

    @property
    def reward_weights(self) -> dict[str, dict[str, float]]:
        """By source, [data]'s named "data": the weights of its reward functions."""
        sets = {"data": (self.rewards.functions, self.rewards.weights)}
        for name, source in self.sources.items():
            sets[name] = (source.rewards, source.weights) if source.rewards else sets["data"]
        return {n: dict(zip(names, weights or [1.0] * len(names), strict=True)) for n, (names, weights) in sets.items()}


@dataclass(frozen=True, config=CHECKED)
class SftRecipe:
    """Supervised fine-tuning: `flashgrpo sft`."""

    model: ModelSection
    data: SftDataSection
    run: RunSection
    train: SftTrainSection = SftTrainSection()


@dataclass(frozen=True, config=CHECKED)
class RewardModelRecipe:
    """A reward model, by pairs or labels: `flashgrpo reward-model`."""

    model: ModelSection
    data: PairDataSection
    run: RunSection
    train: PreferenceTrainSection = PreferenceTrainSection()


@dataclass(frozen=True, config=CHECKED)
class CollectRecipe:
    """Samples of a model, filtered into examples for SFT: `flashgrpo collect`."""

    model: ModelSection
    run: RunSection
    data: CollectDataSection = CollectDataSection()
    rollout: CollectSection = CollectSection()
    filters: FilterSection = FilterSection()
    given: dict[str, GivenSection] = dataclasses.field(default_factory=dict)
    write: WriteSection = WriteSection()
    rewards: RewardsSection = RewardsSection()
    vllm: VllmSection = VllmSection()

    def __post_init__(self) -> None:
        _check_generator(self.rollout, self.vllm)
        if self.rewards.start:
            raise ValueError("rewards.start is for training runs; a function counts for every sample, or is not listed")
        if not (self.data.has_problems or self.given):
            raise ValueError("nothing to collect: wanted data.path or data.task to sample, or a [given.NAME]")
        for name, section in self.given.items():
            if section.ratio and not self.data.has_problems:
                raise ValueError(f"given.{name}.ratio is per sample, and without [data] nothing is sampled; wanted 0")
            if name == "samples":
                raise ValueError("given.samples: found the name that the samples have; choose another")


@dataclass(frozen=True, config=CHECKED)
class PipelineRecipe:
    """What all stages of a pipeline share: `flashgrpo pipeline`."""

    run: RunSection


SamplingRecipe = Recipe | CollectRecipe
AnyRecipe = Recipe | SftRecipe | RewardModelRecipe | CollectRecipe | PipelineRecipe
KINDS: dict[str, type] = {  # by the command that runs it
    "train": Recipe,
    "sft": SftRecipe,
    "reward-model": RewardModelRecipe,
    "collect": CollectRecipe,
}


def _check_generator(rollout: SamplingSection, vllm: VllmSection) -> None:
    if rollout.generator == "vllm_server" and bool(vllm.servers) == bool(vllm.devices):
        raise ValueError("rollout.generator = vllm_server wants either vllm.servers or vllm.devices")


_R = TypeVar("_R", Recipe, SftRecipe, RewardModelRecipe, CollectRecipe, PipelineRecipe)


def load_recipe(kind: type[_R], path: str | Path, overrides: Sequence[str] = ()) -> _R:
    """Read a TOML recipe, lay `--section.key=value` overrides over it, check it.

    Raises RecipeError with one line: the file or option, the key, what was found and what was wanted.
    """
    path = Path(path)
    try:
        values = parse_toml(path.read_text(encoding="utf-8-sig"))  # editors on Windows write a mark before it
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except ValueError as error:
        raise RecipeError(f"{path}: not TOML: {error}") from error
    return build_recipe(kind, values, str(path), overrides)


def build_recipe(kind: type[_R], values: dict[str, Any], source: str = "recipe", overrides: Sequence[str] = ()) -> _R:
    """A recipe from nested dictionaries, named `source` in errors, with `overrides` laid over them.

    Raises RecipeError as `load_recipe`.
    """
    _refuse_unknown_keys(kind, values, source)
    values = copy.deepcopy(values)
    for override in overrides:
        _apply_override(kind, values, override)
    if "loss" in values:
        values = values | {"loss": _loss_config(values["loss"], _origin("loss", source, overrides))}
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "missing":
            raise RecipeError(f"{source}: {key}: missing, and it has no default") from None
        found = "" if isinstance(first["input"], dict) else f", found {first['input']!r:.200}"
        where = _origin(key, source, overrides)
        if first["type"] in ("list_type", "tuple_type"):
            items = [parse_value(item.strip()) for item in str(first["input"]).strip("[]").split(",")]
            quote = "'" if where != source else ""  # for the shell
            message += f", as {quote}{json.dumps(items, default=str)}{quote}"
        raise RecipeError(f"{where}: {key + ': ' if key else ''}{message}{found}") from None


def recipe_to_toml(recipe: Any) -> str:
    """The resolved recipe, every default written out; keys without a value are left out."""
    return tomli_w.dumps(_without_none(dataclasses.asdict(recipe)))


def _loss_config(values: dict[str, Any], source: str) -> LossConfig:
    hints = get_type_hints(LossConfig)
    fields = {k: float(v) if type(v) is int and not _is_text(hints.get(k)) else v for k, v in values.items()}
    try:
        return LossConfig.preset(str(fields.pop("preset", "grpo")), **fields)
    except ValueError as error:
        raise RecipeError(f"{source}: loss: {error}") from None


def _origin(key: str, source: str, overrides: Sequence[str]) -> str:
    """The options that set `key` or what is below it, or else `source`."""
    return " ".join(o for o in overrides if o.removeprefix("--").startswith((f"{key}=", f"{key}."))) or source


def _refuse_unknown_keys(kind: type, values: dict[str, Any], source: str) -> None:
    sections = get_type_hints(kind)
    for name, section_values in values.items():
        if name not in sections:
            raise RecipeError(f"{source}: {name}: unknown section{nearest(name, sections)}")
        tables = {name: section_values}
        if item := named_section(sections[name]):
            _check_table(source, name, section_values)
            tables = {f"{name}.{key}": table for key, table in section_values.items()}
        for path, table in tables.items():
            _check_table(source, path, table)
            keys = _keys(item or sections[name])
            for key in table:
                if key not in keys:
                    hint = _elsewhere(kind, key) or nearest(key, keys, f"{path}.")
                    raise RecipeError(f"{source}: {path}.{key}: unknown key{hint}")


def _check_table(source: str, path: str, found: Any) -> None:
    if not isinstance(found, dict):
        raise RecipeError(f"{source}: {path}: found {found!r}, wanted a section [{path}]")


def named_section(hint: Any) -> type | None:
    """The type of the sections that a person names, as those of [sources.NAME], or None for a single section."""
    return get_args(hint)[1] if get_origin(hint) is dict else None


def section_keys(kind: type[AnyRecipe]) -> dict[str, list[str] | None]:
    """The keys of every section; None of those that a person names."""
    return {n: None if named_section(hint) else _keys(hint) for n, hint in get_type_hints(kind).items()}


def _elsewhere(kind: type, key: str) -> str:
    """The tail of an error message: which sections have the key, if any."""
    found = []
    for name, hint in get_type_hints(kind).items():
        item = named_section(hint)
        found += [f"{name}.NAME.{key}" if item else f"{name}.{key}"] if key in _keys(item or hint) else []
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _apply_override(kind: type, values: dict[str, Any], override: str) -> None:
    key, equals, text = override.removeprefix("--").partition("=")
    section, *rest = key.split(".")
    if not (override.startswith("--") and equals and rest):
        raise RecipeError(f"{override}: wanted --section.key=value{_elsewhere(kind, key)}")
    hint, target = get_type_hints(kind).get(section), values.setdefault(section, {})
    if item := named_section(hint):
        name, *rest = rest
        if not rest:
            raise RecipeError(f"{override}: wanted --{section}.NAME.key=value")
        _refuse_unknown_keys(kind, {section: {name: {rest[0]: text}}}, override)
        section, hint, target = f"{section}.{name}", item, target.setdefault(name, {})
    else:
        _refuse_unknown_keys(kind, {section: {rest[0]: text}}, override)
    name, *option = rest
    hint = get_type_hints(hint).get(name, str)  # loss.preset is not a field
    if option:
        target = target.setdefault(name, {})
        if not (get_origin(hint) is dict or dataclasses.is_dataclass(hint)) or not isinstance(target, dict):
            raise RecipeError(f"{override}: {section}.{name} is not a table; wanted --{section}.{name}=value")
        name = ".".join(option)
    target[name] = text if _is_text(hint) else parse_value(text)


def parse_value(text: str) -> Any:
    """An option's text as the TOML value that it is, or else as text."""
    try:
        return parse_toml(f"value = {text}")["value"]
    except ValueError:
        return text


def _keys(section: type) -> list[str]:
    return [f.name for f in dataclasses.fields(section)] + (["preset"] if section is LossConfig else [])


def _is_text(hint: Any) -> bool:
    return hint is str or (isinstance(hint, UnionType) and str in get_args(hint)) or get_origin(hint) is Literal


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return list(value) if isinstance(value, tuple) else value
