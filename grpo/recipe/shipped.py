"""The recipes that come with the package, to look at and to copy."""

import shutil
from pathlib import Path

from flashgrpo.grpo.errors import RecipeError, RunInputError, nearest
from flashgrpo.model.files import parse_toml

FOLDER = Path(__file__).parents[2] / "recipes"


def shipped_recipes() -> dict[str, str]:
    """What each is for, its first line, by name."""
    return {file.stem: file.read_text().partition("\n")[0].strip("# ") for file in sorted(FOLDER.glob("*.toml"))}


def copy_recipe(name: str) -> Path:
    """Copy a recipe, by its name or how that begins, to the working folder. Raises RecipeError for an unknown name,
    RunInputError where a file of that name is there.
    """
    names = [*shipped_recipes()]
    meant = [name] if name in names else [each for each in names if each.startswith(name)]
    if len(meant) != 1:
        raise RecipeError(f"no recipe {name!r}{nearest(name, meant or names)}")
    copy = Path(f"{meant[0]}.toml")
    if copy.exists():
        raise RunInputError(f"{copy} is here already; move it away, or begin from it")
    shutil.copyfile(FOLDER / copy, copy)
    return copy


def command_for(file: Path) -> str:
    """The command that runs a shipped recipe."""
    values = parse_toml(file.read_text())
    if "stages" in values:
        return "pipeline"
    return "sft" if "completion_column" in values["data"] else "train"
