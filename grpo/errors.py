"""What can go wrong, by whose doing; the command line exits with an error's `exit_code`."""

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

NEAR = 0.7  # as difflib measures; at 0.5 it takes a "solution" for a "question"


class FlashgrpoError(Exception):
    """Every error of grpo/, its message a line for the user; what is found before the first step exits with 2."""

    exit_code = 1


class RecipeError(FlashgrpoError, ValueError):
    """A recipe that cannot be used; the message is one line that names the key."""

    exit_code = 2


class DataError(FlashgrpoError, ValueError):
    """Data that cannot be read or used; the message names the place, what was found and what was wanted."""

    exit_code = 2


class RewardError(FlashgrpoError, ValueError):
    """Reward functions or weights that cannot be used, found before the first step."""

    exit_code = 2


class RewardFailure(FlashgrpoError, RuntimeError):
    """A reward function that broke its contract, or gave no number for too long."""


class PackingError(FlashgrpoError, ValueError):
    """Sequences that do not fit the token budget, or an empty prompt or completion."""


class RunError(FlashgrpoError, RuntimeError):
    """A run that cannot start, continue or be saved; the message says what to do."""


class RunInputError(RunError):
    """Found before the first step: an output that is taken, a folder that is no run, a broken checkpoint."""

    exit_code = 2


class GeneratorFailure(RunError):
    """What samples the completions is gone, or has not taken the weights; the run ends after a checkpoint."""


class SyncError(GeneratorFailure):
    """Weights that did not reach a sampler; the message says whose fault it is, at which step, and the last tensor."""


def nearest(name: str, known: Iterable[str], prefix: str = "", *, with_all: bool = False) -> str:
    """The tail of an error message: a name so near that it was meant, or else (`with_all`: too) all that are known."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=NEAR)
    guess = f"; did you mean {prefix}{near[0]}?" if near else ";"
    return guess if near and not with_all else f"{guess} known: {', '.join(prefix + each for each in known)}"


def resolve_function(name: str, what: str, error_type: type[FlashgrpoError]) -> Callable[..., Any]:
    """A person's `package.module:function`, also of the working folder; errors begin with `what` it is named by."""
    module_name, _, attribute = name.partition(":")
    # Workers are started with the trainer's path, so that they find the module, too.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # it may raise anything while it is imported
        why = f"{type(error).__name__}: {error}"
        raise error_type(f"{what} {name!r}: cannot import {module_name!r}: {why}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        public = [key for key, value in vars(module).items() if callable(value)]
        hint = nearest(attribute, public)
        raise error_type(f"{what} {name!r}: {module_name} has no function {attribute!r}{hint}")
    return function
