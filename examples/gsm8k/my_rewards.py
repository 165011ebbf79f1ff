"""A reward of one's own, `my_rewards:shows_work` in a recipe."""


def shows_work(
    prompts: list[str], completions: list[str], calculations: list[list[str]], **columns: list
) -> list[float | None]:
    """The share of the solution's calculations that a completion has; None for a row without any, which is not scored.

    `calculations` is a column of the data, by its name: an entry a completion, as every argument has. `columns` are
    the others, and `completion_ids`.
    """
    scores: list[float | None] = []
    for completion, wanted in zip(completions, calculations, strict=True):
        text = completion.replace(" ", "")
        scores.append(sum(each in text for each in wanted) / len(wanted) if wanted else None)
    return scores
