"""Every key of a recipe with its meaning, type and default, read from the sections; `flashgrpo train --help`."""

import dataclasses
import json
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flashgrpo.kernels.grpo_loss import LossConfig


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
            default = "required" if field.is_required() else _shown(field.get_default(call_default_factory=True))
            yield Key(path, _type_name(hint), default, _meaning(kind, name))


def print_recipe_keys(kind: type) -> None:
    """The keys of a recipe, to standard output."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    section = None
    for key in recipe_keys(kind):
        if section != (section := key.name.rpartition(".")[0]):
            table.add_row()
            table.add_row(Text(f"[{section}]", "bold"))
        facts = f"{key.type}, required" if key.default == "required" else f"{key.type}, default {key.default}"
        table.add_row(f"  {key.name}", Text.assemble(key.meaning, " ", (f"({facts})", "dim")))
    Console(highlight=False, markup=False).print(table)


def _loss_keys() -> Iterator[Key]:
    presets = LossConfig.presets()
    yield Key("loss.preset", " | ".join(presets), "grpo", "Published method that the other keys start from.")
    for name, hint in get_type_hints(LossConfig, include_extras=True).items():
        kind, meaning = get_args(hint)  # of Annotated
        values = {getattr(LossConfig.preset(preset), name) for preset in presets}
        yield Key(f"loss.{name}", _type_name(kind), "of the preset" if len(values) > 1 else _shown(*values), meaning)


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
    if isinstance(hint, UnionType):  # none is a default to read of, and no value that TOML has
        return " | ".join(_type_name(part) for part in get_args(hint) if part is not NoneType)
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")


def _shown(value: Any) -> str:
    return "none" if value is None else json.dumps(value)
