r"""Rule-based rewards of DeepSeek-R1 (arXiv 2501.12948) and their kin, by name, in TRL's signature.

    fn(prompts, completions, **columns) -> list[float | None]

Every argument is a list with one entry per completion: the text the model continued (`prompts`),
what it wrote (`completions`), the columns of the data set, and from the pool `questions` (the
prompt before its template), `completion_ids`, `finish_reasons`; `max_new_tokens` is one number.
None means that no score could be computed.

Workers import this module, so it costs nothing: heavy libraries are imported by the function that
needs them.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flashgrpo.grpo.data.answers import REASONING_GYM, expected_answer
from flashgrpo.grpo.errors import RecipeError, RewardError, nearest, resolve_function
from flashgrpo.grpo.rewards.response import Response

if TYPE_CHECKING:
    from flashgrpo.grpo.recipe.load import Recipe

RewardFunction = Callable[..., Sequence[float | None]]

_CORRECT = 1 - 1e-6
_OVERLONG_CACHE = 0.2  # L_cache as a share of L_max
_NGRAM = 8  # tokens; shorter phrases recur in sound reasoning


def is_correct(scores: Any) -> Any:
    """Whether a score counts as solved in an evaluation, for a number or an array: partial credit and NaN do not."""
    return scores >= _CORRECT


def accuracy(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[Any], **columns: Any
) -> list[float | None]:
    """1 where the final answer equals the expected one, else 0.

    Rows of reasoning-gym are scored by their task, which may give a part of 1. An `answer` may be LaTeX, a
    number, plain words, or a GSM8K solution that ends with `#### 42`.
    """
    from flashgrpo.grpo.rewards.matching import answers_match

    tasks = columns.get("task") or [None] * len(completions)
    scores: list[float | None] = []
    for i, (prompt, completion, task) in enumerate(zip(prompts, completions, tasks, strict=True)):
        response = Response(completion, prompt)
        if isinstance(task, str) and task.startswith(REASONING_GYM):
            row = {"answer": answer[i], "metadata": columns["metadata"][i]}
            options = columns["task_options"][i] if "task_options" in columns else {}
            # A task without one right answer, or with one of several lines, reads more than the last line.
            found = response.answer(whole=row["answer"] is None or "\n" in row["answer"])
            scores.append(_task_score(task, options, found, row))
        else:
            found = response.answer()
            scores.append(float(found is not None and answers_match(found, expected_answer(answer[i]))))
    return scores


def exact_match(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[Any], **columns: Any
) -> list[float | None]:
    """1 where the final answer is the expected one, character by character but for white space at its ends."""
    rows = zip(prompts, completions, answer, strict=True)
    return [float(Response(c, p).answer() == expected_answer(gold)) for p, c, gold in rows]


def format_tags(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float | None]:
    """1 where the completion is `<think>..</think><answer>..</answer>` and nothing else.

    Each tag stands exactly once, and neither block is empty. The opening `<think>` may be the end
    of the prompt instead.
    """
    return [float(_is_formatted(Response(c, p))) for p, c in zip(prompts, completions, strict=True)]


def _is_formatted(response: Response) -> bool:
    tags, texts = response.parts()
    if tags != ["<think>", "</think>", "<answer>", "</answer>"]:
        return False
    before, reasoning, between, answer, after = texts
    return bool(reasoning and answer) and not (before or between or after)


def overlong(
    completions: Sequence[str], completion_ids: Sequence[Sequence[int]], max_new_tokens: int, **columns: Any
) -> list[float | None]:
    """Soft overlong punishment, arXiv 2503.14476 eq. 13: 0, then linearly down to -1 over the last fifth of tokens."""
    cache = _OVERLONG_CACHE * max_new_tokens
    return [min(0.0, max(-1.0, (max_new_tokens - cache - len(ids)) / cache)) for ids in completion_ids]


def repetition(
    completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **columns: Any
) -> list[float | None]:
    """Minus the share of 8-token sequences that occurred before in the completion: -1 to 0 (cf. arXiv 2502.03373)."""
    scores: list[float | None] = []
    for ids in completion_ids:
        ngrams = [tuple(ids[i : i + _NGRAM]) for i in range(len(ids) - _NGRAM + 1)]
        scores.append(len(set(ngrams)) / len(ngrams) - 1 if ngrams else 0.0)
    return scores


def language_consistency(
    prompts: Sequence[str], completions: Sequence[str], questions: Sequence[str], **columns: Any
) -> list[float | None]:
    """Share of the reasoning's words in the target language (arXiv 2501.12948, section 2.3.2).

    The target is the column `language` (a name or an ISO 639-1 code), else the language of the
    question; below eight words in Latin script English, for so few do not show theirs. A word in
    another script is foreign; words in the right script are judged by lingua, eight or more
    together. Formulas, code and single letters are no words. Reasoning without words scores 1, and
    none at all 0.

    Raises:
        ValueError: a `language` that lingua does not know.
    """
    from flashgrpo.grpo.rewards.language import share_in_language, target_language

    targets = columns.get("language") or [None] * len(completions)
    rows = zip(prompts, completions, questions, targets, strict=True)
    return [share_in_language(Response(c, p).reasoning, target_language(t, q)) for p, c, q, t in rows]


def code(
    prompts: Sequence[str], completions: Sequence[str], tests: Sequence[Any], programs: Any = None, **columns: Any
) -> list[float | None]:
    """1 where the completion's Python program passes all `tests`, run within the limits of `programs`, else 0."""
    from flashgrpo.grpo.rewards import programs as code_reward

    limits = programs or code_reward.ProgramsSection()
    return code_reward.score_programs(prompts, completions, tests, limits, columns.get("metadata"))


BUILTINS: Mapping[str, RewardFunction] = {
    "accuracy": accuracy,
    "code": code,
    "exact_match": exact_match,
    "format": format_tags,
    "language_consistency": language_consistency,
    "overlong": overlong,
    "repetition": repetition,
}


def check_names(recipe: "Recipe") -> None:
    """Raises RecipeError for a reward that has no colon and is neither built in nor a reward model
    of the recipe's, and for a reward model that hides what is built in. A function of the user's is
    imported when the pool opens.
    """
    models = recipe.reward_models
    if same := sorted(models.keys() & {*BUILTINS, "mean", "std", "missing", "group_std"}):
        raise RecipeError(f"reward_models.{same[0]}: found the name of a built-in reward or metric; choose another")
    used = {"rewards": recipe.rewards.functions} | {f"sources.{n}": s.rewards for n, s in recipe.sources.items()}
    for key, names in used.items():
        for name in names:
            if ":" in name or name in models:
                continue
            try:
                resolve_reward(name)
            except RewardError as error:
                also = f"; [reward_models] has {', '.join(models)}" if models else ""
                raise RecipeError(f"{key}: {error}{also}") from None


def resolve_reward(name: str) -> RewardFunction:
    """The function of a name: a built-in, or `package.module:function`, also of this folder.

    Raises:
        RewardError: no such built-in, module or function.
    """
    if name in BUILTINS:
        return BUILTINS[name]
    if ":" not in name:
        raise RewardError(f"unknown reward {name!r}, no package.module:function either{nearest(name, BUILTINS)}")
    return resolve_function(name, "reward", RewardError)


def _task_score(task: str, options: dict[str, Any], found: str | None, row: dict[str, Any]) -> float:
    if found is None:
        return 0.0
    score = _task_scorer(task.removeprefix(REASONING_GYM), json.dumps(options))
    try:
        return float(score(found, row))
    except Exception:
        # Many scorers raise, in ways of their own, on an answer that they cannot read.
        score(row["answer"], row)  # raises again where the row is at fault, not the answer
        return 0.0


@functools.lru_cache(maxsize=64)
def _task_scorer(task: str, options: str) -> Callable[[str, dict[str, Any]], float]:
    import reasoning_gym

    return reasoning_gym.create_dataset(task, seed=0, **json.loads(options)).score_answer
