"""The recipes, how one is read from TOML and options and checked by pydantic, and the keys that it may have."""

import copy
import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import tomli_w
from pydantic import BeforeValidator, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import ErrorDetails, InitErrorDetails

from flashgrpo.grpo.errors import NEAR, RecipeError, nearest
from flashgrpo.grpo.recipe import schema
from flashgrpo.grpo.recipe.schema import CHECKED, first_step, weights_of
from flashgrpo.kernels.loss_config import LossConfig
from flashgrpo.model.files import parse_toml

_UNKNOWN = "unexpected_keyword_argument"  # pydantic's name for a key that is not there
_REPLACED = {"rollout.overlap": "rollout.max_staleness = 1"}  # keys of older recipes


def _from_preset(found: Any) -> Any:
    """The LossConfig of `loss.preset` with the section's other keys on top."""
    if not isinstance(found, dict):
        return found
    keys = dict(found)
    preset = str(keys.pop("preset", "grpo"))
    # Only the names are left to pydantic: of a plain dataclass it takes "5" and true for numbers.
    for key in keys:
        if key not in LossConfig.__dataclass_fields__:
            unknown = InitErrorDetails(type=_UNKNOWN, loc=(key,), input=keys[key])
            raise ValidationError.from_exception_data("loss", [unknown])
    config = LossConfig.preset(preset, **keys)
    whole = {name: float(value) for name, value in vars(config).items() if type(value) is int}
    return dataclasses.replace(config, **whole)


@dataclass(frozen=True, config=CHECKED)
class Recipe:
    """GRPO: `flashgrpo train`."""

    model: schema.ModelSection
    data: schema.DataSection
    run: schema.RunSection
    sources: dict[str, schema.MixedSection] = dataclasses.field(default_factory=dict)
    rewards: schema.RewardsSection = schema.RewardsSection()
    reward_models: dict[str, schema.PreferenceSection] = dataclasses.field(default_factory=dict)
    teacher: schema.TeacherSection = schema.TeacherSection()
    rollout: schema.RolloutSection = schema.RolloutSection()
    loss: Annotated[LossConfig, BeforeValidator(_from_preset)] = LossConfig.preset("grpo")
    train: schema.TrainSection = schema.TrainSection()
    eval: schema.EvalSection = schema.EvalSection()
    vllm: schema.VllmSection = schema.VllmSection()

    def __post_init__(self) -> None:
        # What sections want of each other; what a section wants of itself is checked by now.
        _check_generator(self.rollout, self.vllm)
        self._check_rewards()
        staleness, generator = self.rollout.max_staleness, self.rollout.generator
        if staleness and generator != "vllm_server":
            raise ValueError(f"rollout.max_staleness = {staleness} needs generator = vllm_server, found {generator}")
        if self.rollout.prompts_per_step % self.train.mini_batches:
            raise ValueError(
                f"rollout.prompts_per_step = {self.rollout.prompts_per_step} is not a multiple of "
                f"train.mini_batches = {self.train.mini_batches}"
            )
        if self.eval.every and not self.data.held_out:
            raise ValueError(f"eval.every = {self.eval.every}, but data.held_out = 0 leaves no problem to evaluate on")
        shares = sum(source.share for source in self.sources.values())
        if shares >= 1:
            raise ValueError(
                f"the shares of [sources] come to {shares:g}, wanted less than 1: the rest is that of [data]"
            )
        if "data" in self.sources:
            raise ValueError("sources.data: found the name that [data] has; choose another")
        if self.teacher.path and self.rollout.refill_limit:
            raise ValueError(
                f"rollout.refill_limit = {self.rollout.refill_limit} replaces groups of equal rewards, and with a "
                "[teacher] these teach as much as others; wanted 0"
            )

    def check_kept_sets(self) -> None:
        """For a sampler that does not tell what top_p and top_k kept. Raises RecipeError where tokens are weighed by
        its log-probs.
        """
        rollout, loss = self.rollout, self.loss
        bounds = {"loss.behavior_cap": loss.behavior_cap, "loss.off_policy_threshold": loss.off_policy_threshold}
        used = [f"{name} = {bound:g}" for name, bound in bounds.items() if bound is not None]
        if rollout.max_staleness:
            used.insert(0, f"rollout.max_staleness = {rollout.max_staleness}")
        if rollout.is_truncated and used:
            raise RecipeError(
                f"{used[0]} weighs tokens by the sampler's log-probs, and with rollout.top_p = {rollout.top_p:g} and "
                f"rollout.top_k = {rollout.top_k} those of vLLM's CPU build are of the tokens that were kept alone, "
                "the trainer's of all: every ratio would be too small, by what was left out; wanted top_p = 1 and "
                "top_k = 0, or rollout.generator = native"
            )

    def _check_rewards(self) -> None:
        known = set(self.rewards.functions)
        for source in self.sources.values():
            known.update(source.rewards)
        unused = sorted({*self.rewards.start, *self.reward_models} - known)
        if unused:
            raise ValueError(f"{unused[0]!r} is in rewards.start or [reward_models], and no list of rewards has it")
        # Completions without any reward are nothing to learn from, and would end the run; a teacher needs none.
        steps = self.train.steps
        for source, weights in self.reward_weights.items() if not self.teacher.path else ():
            first = first_step(self.sources[source].start if source in self.sources else 0.0, steps)
            counted = [name for name, weight in weights.items() if weight]
            if not counted:
                raise ValueError(
                    f"rewards: the completions of {source} have no function whose weight is not 0, and there is no "
                    f"[teacher] to learn from; found {', '.join(weights) or 'no functions'}"
                )
            if all(first_step(self.rewards.start.get(name, 0.0), steps) > first for name in counted):
                raise ValueError(
                    f"rewards.start: in step {first} the completions of {source} have no reward yet, as all of theirs "
                    f"start later ({', '.join(counted)}); give them one from the start"
                )

    @property
    def reward_weights(self) -> dict[str, dict[str, float]]:
        """By source, [data]'s named "data": the weights of its reward functions."""
        found = {"data": weights_of(self.rewards.functions, self.rewards.weights)}
        for name, source in self.sources.items():
            found[name] = weights_of(source.rewards, source.weights) or found["data"]
        return found


@dataclass(frozen=True, config=CHECKED)
class SftRecipe:
    """Supervised fine-tuning: `flashgrpo sft`."""

    model: schema.ModelSection
    data: schema.SftDataSection
    run: schema.RunSection
    train: schema.SftTrainSection = schema.SftTrainSection()


@dataclass(frozen=True, config=CHECKED)
class RewardModelRecipe:
    """A reward model, by pairs or labels: `flashgrpo reward-model`."""

    model: schema.ModelSection
    data: schema.PairDataSection
    run: schema.RunSection
    train: schema.PreferenceTrainSection = schema.PreferenceTrainSection()


@dataclass(frozen=True, config=CHECKED)
class CollectRecipe:
    """Samples of a model, filtered into examples for SFT: `flashgrpo collect`."""

    model: schema.ModelSection
    run: schema.RunSection
    data: schema.CollectDataSection = schema.CollectDataSection()
    rollout: schema.CollectSection = schema.CollectSection()
    filters: schema.FilterSection = schema.FilterSection()
    given: dict[str, schema.GivenSection] = dataclasses.field(default_factory=dict)
    write: schema.WriteSection = schema.WriteSection()
    rewards: schema.RewardsSection = schema.RewardsSection()
    vllm: schema.VllmSection = schema.VllmSection()

    def __post_init__(self) -> None:
        _check_generator(self.rollout, self.vllm)
        if self.rewards.start:
            raise ValueError("rewards.start is for training runs; a function counts for every sample, or is not listed")
        if not (self.data.has_problems or self.given):
            raise ValueError("nothing to collect: wanted data.path or data.task to sample, or a [given.NAME]")
        if "samples" in self.given:
            raise ValueError("given.samples: found the name that the samples have; choose another")
        for name, section in self.given.items():
            if section.ratio and not self.data.has_problems:
                raise ValueError(f"given.{name}.ratio is per sample, and without [data] nothing is sampled; wanted 0")


@dataclass(frozen=True, config=CHECKED)
class EvalRecipe(Recipe):
    """A stage of a pipeline: what `flashgrpo eval` does, of models by their labels."""

    models: schema.Models = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, config=CHECKED)
class FunctionRecipe:
    """A stage of a pipeline: function(folder, seed, **options), which fills the folder."""

    function: str
    run: schema.RunSection
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, config=CHECKED)
class PipelineRecipe:
    """What all stages of a pipeline share: `flashgrpo pipeline`."""

    run: schema.RunSection


SamplingRecipe = Recipe | CollectRecipe
AnyRecipe = Recipe | SftRecipe | RewardModelRecipe | CollectRecipe | FunctionRecipe | PipelineRecipe
_R = TypeVar("_R", bound=AnyRecipe)


def _check_generator(rollout: schema.SamplingSection, vllm: schema.VllmSection) -> None:
    if rollout.generator == "vllm_server" and bool(vllm.servers) == bool(vllm.devices):
        raise ValueError("rollout.generator = vllm_server wants either vllm.servers or vllm.devices")


def load_recipe(kind: type[_R], path: str | Path, overrides: Sequence[str] = ()) -> _R:
    """Read a TOML recipe, lay `--section.key=value` overrides over it, check it.

    Raises RecipeError with one line: the file or option, the key, what was found and what was wanted.
    """
    return build_recipe(kind, read_toml(path), str(path), overrides)


def read_toml(path: str | Path) -> dict[str, Any]:
    """What a person wrote. Raises RecipeError."""
    try:
        # Editors on Windows write a mark before the text.
        return parse_toml(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except ValueError as error:
        raise RecipeError(f"{path}: not TOML: {error}") from error


def build_recipe(kind: type[_R], values: dict[str, Any], source: str = "recipe", overrides: Sequence[str] = ()) -> _R:
    """A recipe from nested dictionaries, named `source` in errors, with `overrides` laid over them.

    Raises RecipeError as `load_recipe`.
    """
    values = copy.deepcopy(values)  # a pipeline builds several from the same
    for override in overrides:
        _lay_over(kind, values, override, source)
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        # A misspelt key before the key that is missing for it.
        first = min(error.errors(), key=lambda fault: fault["type"] != _UNKNOWN)
        raise RecipeError(_in_one_line(first, kind, source, overrides)) from None


def recipe_to_toml(recipe: AnyRecipe) -> str:
    """The resolved recipe, every default written out; keys without a value are left out."""
    return tomli_w.dumps(TypeAdapter(type(recipe)).dump_python(recipe, exclude_none=True))


def section_keys(kind: type[AnyRecipe]) -> dict[str, list[str] | None]:
    """The keys of every section; None of those whose keys a person names."""
    found: dict[str, list[str] | None] = {}
    for name, hint in get_type_hints(kind).items():
        found[name] = _keys(hint) if dataclasses.is_dataclass(hint) else None
    return found


def parse_value(text: str) -> Any:
    """An option's text as the TOML value that it is, or else as text."""
    try:
        return parse_toml(f"value = {text}")["value"]
    except ValueError:
        return text


def _lay_over(kind: type, values: dict[str, Any], override: str, source: str) -> None:
    """Set in `values` the key of `--section.key=value`."""
    path, equals, text = override.removeprefix("--").partition("=")
    *sections, key = path.split(".")
    if not (override.startswith("--") and equals and sections):
        hint = "" if sections or key in get_type_hints(kind) else _hint([key], kind)
        raise RecipeError(f"{override}: wanted --section.key=value{hint}")
    table = values
    for depth, name in enumerate(sections, start=1):
        section = ".".join(sections[:depth])
        if _is_value(_type_at(sections[:depth], kind)):
            raise RecipeError(f"{override}: {section} is a value, not a section")
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise RecipeError(f"{source}: {section}: found {table!r}, wanted a section [{section}] for {override}")
    # A key of text takes it as it is: a folder that is called 5 is not the number 5.
    wanted = _type_at([*sections, key], kind)
    is_text = wanted in (str, str | None) or get_origin(wanted) is Literal
    table[key] = text if is_text else parse_value(text)


def _in_one_line(fault: ErrorDetails, kind: type, source: str, overrides: Sequence[str]) -> str:
    """The file or the options, the key, what was found and what was wanted."""
    path, found, message = [str(part) for part in fault["loc"]], fault["input"], fault["msg"]
    key = ".".join(path)
    setters = [o for o in overrides if _is_part(key, o.removeprefix("--").partition("=")[0])]
    where = " ".join(setters) or source
    match fault["type"]:
        case "missing":
            where, message = source, "missing, and it has no default"
        case "unexpected_keyword_argument":
            hint = f"; it is {_REPLACED[key]} now" if key in _REPLACED else _hint(path, kind)
            message = f"unknown {'key' if path[1:] else 'section'}{hint}"
        case "dataclass_type" | "dict_type":
            message = f"found {found!r}, wanted a section [{key}]"
        case "list_type" | "tuple_type":
            # What was meant, as it may be typed: a shell takes away bare quotes.
            items = [parse_value(item.strip()) for item in str(found).strip("[]").split(",")]
            quote = "'" if setters else ""
            message += f", as {quote}{json.dumps(items, default=str)}{quote}, found {found!r:.200}"
        # A dict is a whole section, of which the message names what it found.
        case _ if not isinstance(found, dict):
            message += f", found {found!r:.200}"
    return ": ".join(filter(None, (where, key, message.removeprefix("Value error, "))))


def _is_part(key: str, other: str) -> bool:
    """Whether one of two dotted keys is the other or lies below it."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _hint(path: Sequence[str], kind: type) -> str:
    """The tail of an error message: where else a key has this name, or the nearest name of its section."""
    *sections, name = path
    places = [key.name for key in recipe_keys(kind) if key.name.endswith(f".{name}")]
    if places:
        return f"; did you mean {' or '.join(places)}?"
    known = _keys(_type_at(sections, kind))
    return nearest(name, known, ".".join([*sections, ""]))


def _type_at(path: Iterable[str], kind: Any) -> Any:
    """The type of the section or key at a path, None where a recipe has nothing there."""
    for name in path:
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
        else:
            kind = get_type_hints(kind).get(name) if dataclasses.is_dataclass(kind) else None
    return kind


def _is_value(hint: Any) -> bool:
    """Whether a type that `_type_at` has found has no keys of its own."""
    return not (hint in (None, Any) or get_origin(hint) is dict or dataclasses.is_dataclass(hint))


def _keys(section: Any) -> list[str]:
    names = [field.name for field in dataclasses.fields(section)]
    return ["preset", *names] if section is LossConfig else names


class Key(NamedTuple):
    """A key as a person reads of it."""

    name: str  # section.key
    type: str
    default: str
    meaning: str


def recipe_keys(kind: Any, section: str = "") -> Iterator[Key]:
    """The keys of a recipe, or of a section, in the order of the schema."""
    for name, hint in get_type_hints(kind).items():
        path = f"{section}.{name}" if section else name
        if get_origin(hint) is dict and dataclasses.is_dataclass(get_args(hint)[1]):
            yield from recipe_keys(get_args(hint)[1], f"{path}.NAME")  # which a person gives
        elif hint is LossConfig:
            yield from _loss_keys()
        elif dataclasses.is_dataclass(hint):
            yield from recipe_keys(hint, path)
        else:
            field = kind.__pydantic_fields__[name]
            default = field.get_default(call_default_factory=True)
            default = "required" if field.is_required() else _shown(default)
            yield Key(path, _type_name(hint), default, _meaning(kind, name))


def find_keys(text: str, keys: Sequence[Key]) -> list[Key]:
    """The keys with `text` in their names or, at the beginning of a word, in their help; or else of nearly that name.
    Raises RecipeError where nothing is like it.
    """
    word = re.compile(rf"\b{re.escape(text.replace('_', ' '))}", re.IGNORECASE)
    found = [key for key in keys if text.lower() in key.name or word.search(key.meaning)]
    if not found:
        names = {key.name.rpartition(".")[2] for key in keys}
        near = difflib.get_close_matches(text.rpartition(".")[2], names, cutoff=NEAR)
        found = [key for key in keys if key.name.rpartition(".")[2] in near]
    if not found:
        raise RecipeError(f"no key is like {text!r}; --help has all of them")
    return found


def _loss_keys() -> Iterator[Key]:
    presets = LossConfig.presets()
    yield Key("loss.preset", " | ".join(presets), "grpo", "Published method that the other keys start from.")
    for name, hint in get_type_hints(LossConfig, include_extras=True).items():
        kind, meaning = get_args(hint)  # of Annotated
        values = {getattr(LossConfig.preset(preset), name) for preset in presets}
        default = "of the preset" if len(values) > 1 else _shown(values.pop())
        yield Key(f"loss.{name}", _type_name(kind), default, meaning)


def _meaning(section: type, name: str) -> str:
    # pydantic reads the text under a key where the key is declared, and not for the sections that inherit it.
    for owner in section.__mro__:
        field = getattr(owner, "__pydantic_fields__", {}).get(name)
        if field and field.description:
            return field.description
    return ""


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " | ".join(get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        # None is a default to read of, and no value that TOML has.
        return " | ".join(_type_name(part) for part in get_args(hint) if part is not NoneType)
    name = hint.__name__ if type(hint) is type else str(hint)
    return name.replace("typing.", "")


def _shown(value: Any) -> str:
    return "none" if value is None else json.dumps(value)
