"""What a product was made from: its recipe, and what the files and folders that it reads held.

One ledger for runs, collections, evaluations and pipelines: a product stands as long as both are
the same. A model or a data set that was replaced in place would be another product under this one's
name. An input is known by a hash of its content, kept beside a mark of its files' sizes and times:
it is read once, and again only where those have changed.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flashgrpo.grpo.errors import RunInputError
from flashgrpo.grpo.recipe.load import AnyRecipe, recipe_to_toml
from flashgrpo.grpo.recipe.schema import SourceSection
from flashgrpo.grpo.run.progress import say
from flashgrpo.model.files import content_files, content_hash, is_local, parse_json, parse_toml, write_text
from flashgrpo.model.hub import cached_folder

_MADE_FROM = "made_from.json"
_SLOW_BYTES = 10e9  # more takes seconds to read, or minutes
_NONE = (None, {})

Inputs = dict[str, dict[str, str]]  # by the name of an input: `mark` and `sha256`, and the `revision` on a hub


def identify(paths: Mapping[str, str], known: Mapping[str, Any]) -> Inputs:
    """What stands at each path, by the names of `paths`; one that is missing is left to its reader.

    Nothing is read of what is in `known` and has the same mark. Raises RunInputError for what cannot be read.
    """
    found = {}
    for name, path in paths.items():
        try:
            folder = cached_folder(path, with_weights=True)
            mark, before = _mark(folder), known.get(name)
            # Large models are not read again at every start.
            if isinstance(before, dict) and before.get("mark") == mark:
                found[name] = before
                continue
            tell_of_reading(folder, "to notice changes")
            found[name] = {"mark": mark, "sha256": content_hash(folder)}
            if folder != Path(path):
                found[name]["revision"] = folder.name
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise RunInputError(f"{name}: {error.filename or path} cannot be read: {error.strerror}") from None
    return found


def changed(before: Mapping[str, Any], now: Inputs) -> list[str]:
    """The inputs whose content is another one; of what an older version has noted, nothing is known."""
    names = []
    for name, found in now.items():
        noted = before.get(name)
        if isinstance(noted, dict) and noted.get("sha256") != found["sha256"]:
            names.append(name)
    return names


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Where two recipes differ: both values by key, those of a section as section.key. An empty section is none."""
    found = {}
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            for name, values in differing(old, new).items():
                found[f"{key}.{name}"] = values
        elif old != new and not (old in _NONE and new in _NONE):
            found[key] = old, new
    return found


def read_sections(recipe: AnyRecipe) -> dict[str, Any]:
    """The sections of a recipe that name a model or data, by their names."""
    named = {name: getattr(recipe, name, None) for name in ("model", "data", "teacher")}
    sections: dict[str, Any] = {name: section for name, section in named.items() if section and section.path}
    for kind in ("sources", "reward_models", "given"):
        for name, section in getattr(recipe, kind, {}).items():
            sections[f"{kind}.{name}"] = section
    return sections


def input_paths(recipe: AnyRecipe) -> dict[str, str]:
    """The files and folders that a run reads, by their keys, models by name, too; a data set of the hub is known by
    its name.
    """
    paths = {}
    for name, section in read_sections(recipe).items():
        may_be_of_a_hub = isinstance(section, SourceSection)
        if section.path and (not may_be_of_a_hub or is_local(section.path)):
            paths[f"{name}.path"] = section.path
    return paths


def model_paths(recipe: AnyRecipe) -> list[str]:
    """The folders, or names on the hub, of the models that a run reads."""
    sections = read_sections(recipe).values()
    return [section.path for section in sections if section.path and not isinstance(section, SourceSection)]


def tell_of_reading(path: Path, why: str) -> None:
    """Nobody should wait for it in silence."""
    size = sum(file.stat().st_size for file in content_files(path))
    if size > _SLOW_BYTES:
        say(f"reading {path}, {size / 1e9:.0f} GB, {why}")


def compare_inputs(recipe: AnyRecipe) -> tuple[Inputs, dict[str, str]]:
    """What a run reads; by key, what to say of each that has changed since the run in run.output began."""
    file, paths = Path(recipe.run.output) / _MADE_FROM, input_paths(recipe)
    try:
        known = parse_json(file.read_bytes())
        if not isinstance(known, dict):
            raise ValueError("it is no table")
    except FileNotFoundError:
        known = {}
    except (OSError, ValueError) as error:
        raise RunInputError(f"{file}: not what a run has written ({error}); restore it, or remove it") from None
    now = identify(paths, known)
    began = f"since the run in {recipe.run.output} began"
    return now, {key: f"{key}: what {paths[key]} holds has changed {began}" for key in changed(known, now)}


def write_made_from(recipe: AnyRecipe, made_from: Inputs) -> None:
    """Write the recipe and what its inputs hold."""
    output = Path(recipe.run.output)
    write_text(output / "recipe.toml", recipe_to_toml(recipe))
    write_text(output / _MADE_FROM, json.dumps(made_from, indent=1))


def begun_with(recipe: AnyRecipe, section: str, key: str) -> Any:
    """The value of a key in the run that is in run.output, where "auto" has been settled; None before it has begun.
    What cannot be read is left to `changed_keys`.
    """
    try:
        before = parse_toml((Path(recipe.run.output) / "recipe.toml").read_text(encoding="utf-8"))
        return before[section][key]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _makes_another_run(key: str) -> bool:
    """Another model, data set or seed would be another run under this one's name."""
    return f"{key}.".startswith(("data.", "sources.", "model.path.", "run.seed."))


def changed_keys(stored: Path, recipe: AnyRecipe, is_fixed: Callable[[str], bool] = _makes_another_run) -> list[str]:
    """What is new in a recipe since `stored` was written. Raises RunInputError for a key that may not change."""
    try:
        before = parse_toml(stored.read_text(encoding="utf-8"))
        if not isinstance(before.get("model"), dict):
            raise ValueError("it has no [model]")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise RunInputError(f"{stored}: not the recipe of a run ({why}); restore it") from None
    changes = []
    for key, (old, new) in differing(before, parse_toml(recipe_to_toml(recipe))).items():
        # A key of the schema may be newer than the run; those of a data set's options are the user's.
        if is_fixed(key) and (old is not None or new or ".options." in key):
            raise RunInputError(
                f"{key} is {new!r}, and the run in {stored.parent} began with {old!r}; "
                "keep it, or choose another run.output"
            )
        changes.append(f"{key} {old!r} -> {new!r}")
    return changes


def _mark(path: Path) -> str:
    """Of the names, sizes and times of the files at a path; a file that another was moved over has another inode,
    though it may have the size and the time of the one before.
    """
    digest = hashlib.sha256()
    for file in content_files(path):
        state = file.stat()
        kept = file.relative_to(path), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino
        digest.update(f"{kept}\n".encode())
    return digest.hexdigest()
