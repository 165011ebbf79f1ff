"""`flashgrpo train --help`: every key of a recipe with its meaning, type and default, read from the dataclasses."""

import dataclasses
import json
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flashgrpo.grpo.recipe.load import AnyRecipe, named_section
from flashgrpo.kernels.grpo_loss import LossConfig


class Key(NamedTuple):
    """A key as a person reads of it."""

    name: str  # section.key
    type: str
    default: str
    meaning: str


def recipe_keys(kind: type[AnyRecipe]) -> list[Key]:
    """Every key, in the order of the dataclasses, and `loss.preset`."""
    keys = []
    for section, hint in get_type_hints(kind).items():
        item = named_section(hint)
        keys += _section_keys(f"{section}.NAME" if item else section, item or hint)
    return keys


def _section_keys(section: str, section_type: Any) -> list[Key]:
    keys, hints = [], get_type_hints(section_type)
    if section_type is LossConfig:
        presets = " | ".join(LossConfig.presets())
        keys.append(Key("loss.preset", presets, "grpo", "Published method that the other keys start from."))
    for f in dataclasses.fields(section_type):
        if dataclasses.is_dataclass(hints[f.name]):
            keys += _section_keys(f"{section}.{f.name}", hints[f.name])
            continue
        default, meaning = _default(section_type, f), _meaning(section_type, f.name)
        keys.append(Key(f"{section}.{f.name}", _type_name(hints[f.name]), default, meaning))
    return keys


def print_recipe_help(command: str, kind: type[AnyRecipe]) -> None:
    """Usage of a command that takes a recipe, and the recipe's keys, to standard output."""
    console = Console(highlight=False, markup=False)
    console.print(f"usage: flashgrpo {command} RECIPE.toml [--resume] [--section.key=value ...]\n")
    usage = Table.grid(padding=(0, 2, 0, 0))
    usage.add_row("  RECIPE.toml", "the keys below in TOML; examples are in recipes/")
    usage.add_row("  --resume", "continue the run in run.output, or start it if there is none")
    usage.add_row("  --section.key=value", "overrides a key of the recipe, as --train.lr=1e-5")
    console.print(usage)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    section = None
    for key in recipe_keys(kind):
        if section != (section := key.name.rpartition(".")[0]):
            table.add_row()
            table.add_row(Text(f"[{section}]", "bold"))
        facts = f"{key.type}, required" if key.default == "required" else f"{key.type}, default {key.default}"
        table.add_row(f"  {key.name}", Text.assemble(key.meaning, " ", (f"({facts})", "dim")))
    console.print(table)


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " | ".join(get_args(hint))
    if isinstance(hint, UnionType):  # none is a default to read of, and no value that TOML has
        return " | ".join(_type_name(part) for part in get_args(hint) if part is not NoneType)
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")


def _default(section: type, f: dataclasses.Field) -> str:
    if section is LossConfig:
        values = {getattr(LossConfig.preset(preset), f.name) for preset in LossConfig.presets()}
        return "of the preset" if len(values) > 1 else _shown(values.pop())
    if f.default is not dataclasses.MISSING:
        return _shown(f.default)
    return "required" if f.default_factory is dataclasses.MISSING else _shown(f.default_factory())


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def _meaning(section: type, name: str) -> str:
    """The text under a key of a section, or beside a field of the loss."""
    if section is LossConfig:
        return get_type_hints(LossConfig, include_extras=True)[name].__metadata__[0]
    described = (vars(owner).get("__pydantic_fields__", {}).get(name) for owner in section.__mro__)
    return next((field.description for field in described if field and field.description), "")
