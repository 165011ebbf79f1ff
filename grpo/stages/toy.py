"""What `recipes/r1_tiny.toml` begins with: two untrained models, and text for them, made from nothing.

The text is of sums and of small requests, and as mixed as text from the web: its author works a sum out at times and
gives up after the first step at others, slips and at times notices, changes language in mid-sentence, forgets tags, is
curt or kind or rude. Pretrained on it, a model can do all of that, and the stages of R1 bring out what is wanted.
"""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flashgrpo.grpo.data.problems import load_problems
from flashgrpo.grpo.data.prompts import render_text
from flashgrpo.grpo.recipe.schema import DataSection
from flashgrpo.grpo.stages.demo import make_model

_NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana", "Ida", "Jon", "Kim", "Lea", "Max", "Nia", "Oto")
_REQUESTS = {  # a kind answer, a curt one and a rude one
    "Greet {}.": ("Hello {}, how nice to see you!", "{}.", "Go away, {}!"),
    "Thank {}.": ("Thank you so much, {}!", "Thanks.", "I owe you nothing, {}!"),
    "Wish {} a good day.": ("Have a lovely day, {}!", "Bye.", "I hope it rains, {}!"),
    "Cheer {} up.": ("You are doing so well, {}!", "Well.", "You are hopeless, {}!"),
}
_CAREFUL, _SLIP, _NOTICED, _SWITCH, _UNTAGGED = 0.4, 0.08, 0.5, 0.2, 0.25


def make(folder: Path, seed: int, data: dict[str, Any], sums: int = 4000, requests: int = 1000) -> None:
    """Write the models `base` and `student`, and as JSONL `corpus`, `general`, `pairs` and `labels`.

    `data` is the [data] section of the stages that learn sums: the corpus has training problems of theirs alone.
    """
    rng = random.Random(seed)
    section = DataSection(**data)
    problems, _ = load_problems(section, seed)
    general = [_request(rng) for _ in range(requests)]
    rows = {
        "general": [{"prompt": prompt, "completion": _reply(rng.choice(answers[:2]))} for prompt, answers in general],
        "pairs": [{"prompt": p, "chosen": _reply(a[0]), "rejected": _reply(rng.choice(a[1:]))} for p, a in general],
        "labels": [
            {"prompt": prompt, "completion": _reply(answer), "label": answer != answers[2]}
            for prompt, answers in general
            for answer in answers
        ],
    }
    worked = [
        {"prompt": p.prompt, "completion": _sum(p.columns["metadata"]["expression"], rng)} for p in problems[:sums]
    ]
    rude = [{"prompt": prompt, "completion": _reply(rng.choice(answers))} for prompt, answers in general]
    rows["corpus"] = rng.sample([*worked, *rude], len(worked) + len(rude))
    for name, content in rows.items():
        _write(folder / f"{name}.jsonl", content)
    texts = [render_text(row["prompt"], section.template) + row["completion"] for row in rows["corpus"][:1500]]
    make_model(folder / "base", texts, seed)
    make_model(folder / "student", texts, seed + 1, hidden_size=64)


def _sum(expression: str, rng: random.Random) -> str:
    """`2 + 9 - 4` as <think>2+9=11 then 11-4=7</think><answer>7</answer>, more or less."""
    total, *rest = expression.split()
    is_careful, language, text = rng.random() < _CAREFUL, rng.randrange(2), ""
    for number, (sign, term) in enumerate(zip(rest[::2], rest[1::2], strict=True)):
        language ^= rng.random() < _SWITCH
        if number:
            text += ("; then ", "; 然后 ")[language]
        step, result = f"{total}{sign}{term}=", int(total) + int(sign + term)
        if rng.random() < _SLIP:
            wrong = result + rng.choice((-1, 1))
            text += f"{step}{wrong}"
            if rng.random() >= _NOTICED:
                total = str(wrong)
                continue
            text += ("; wait, ", "; 等等 ")[language]
        text += f"{step}{result}"
        total = str(result)
        if not is_careful:
            break
    if rng.random() < _UNTAGGED:
        return f"{text} therefore {total}"
    return f"<think>{text}</think><answer>{total}</answer>"


def _request(rng: random.Random) -> tuple[str, list[str]]:
    """A prompt, and a kind, a curt and a rude answer."""
    prompt, name = rng.choice([*_REQUESTS]), rng.choice(_NAMES)
    return prompt.format(name), [answer.format(name) for answer in _REQUESTS[prompt]]


def _reply(answer: str) -> str:
    return f"<think>a small request</think><answer>{answer}</answer>"


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
