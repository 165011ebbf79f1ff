"""Small models and text for them, made from nothing: for the demo, and for `recipes/r1_tiny.toml` to begin with.

The text of the recipe is of sums and of small requests, and as mixed as text from the web: its
author works a sum out at times and gives up after the first step at others, slips and at times
notices, changes language in mid-sentence, forgets tags, is curt or kind or rude. Pretrained on it,
a model can do all of that, and the stages of R1 bring out what is wanted.
"""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config

from flashgrpo.grpo.data.problems import load_problems
from flashgrpo.grpo.data.prompts import render_text
from flashgrpo.grpo.recipe.schema import DataSection
from flashgrpo.grpo.types import Problem
from flashgrpo.model.checkpoint import init_decoder, save_checkpoint
from flashgrpo.model.config import ModelConfig

_END = "<|endoftext|>"
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_VOCAB_SIZE = 512
_NAMES = (
    *("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana"),
    *("Ida", "Jon", "Kim", "Lea", "Max", "Nia", "Oto"),
)
_REQUESTS = {  # a kind answer, a curt one and a rude one
    "Greet {}.": ("Hello {}, how nice to see you!", "{}.", "Go away, {}!"),
    "Thank {}.": ("Thank you so much, {}!", "Thanks.", "I owe you nothing, {}!"),
    "Wish {} a good day.": ("Have a lovely day, {}!", "Bye.", "I hope it rains, {}!"),
    "Cheer {} up.": ("You are doing so well, {}!", "Well.", "You are hopeless, {}!"),
}


@dataclass(frozen=True)
class Author:
    """Who works sums out, and how often he does what."""

    careful: float  # works on to the end; else the work ends after the first step
    then: tuple[str, ...] = (" ",)  # between two steps, in each of his languages
    wait: tuple[str, ...] = ("",)  # where he notices a slip
    switch: float = 0.0  # changes his language
    slip: float = 0.0
    noticed: float = 0.0  # of the slips
    untagged: float = 0.0

    def work_out(self, problem: Problem, rng: random.Random) -> str:
        """The sum `2 + 9 - 4` as <think>2+9=11 11-4=7</think><answer>7</answer>, more or less."""
        total, *rest = problem.columns["metadata"]["expression"].split()
        is_careful, text = rng.random() < self.careful, ""
        language = rng.randrange(len(self.then)) if len(self.then) > 1 else 0
        for number, (sign, term) in enumerate(zip(rest[::2], rest[1::2], strict=True)):
            language ^= _happens(self.switch, rng)
            if number:
                text += self.then[language]
            step, result = f"{total}{sign}{term}=", int(total) + int(sign + term)
            if _happens(self.slip, rng):
                wrong = result + rng.choice((-1, 1))
                text += f"{step}{wrong}"
                if not _happens(self.noticed, rng):
                    total = str(wrong)
                    continue
                text += self.wait[language]
            text += f"{step}{result}"
            total = str(result)
            if not is_careful:
                break
        if _happens(self.untagged, rng):
            return f"{text} therefore {total}"
        return f"<think>{text}</think><answer>{total}</answer>"


_OF_THE_WEB = Author(
    careful=0.4,
    then=("; then ", "; 然后 "),
    wait=("; wait, ", "; 等等 "),
    switch=0.2,
    slip=0.08,
    noticed=0.5,
    untagged=0.25,
)


def make(folder: Path, seed: int, data: dict[str, Any], sums: int = 4000, requests: int = 1000) -> None:
    """Write the models `base` and `student`, and as JSONL `corpus`, `general`, `pairs` and `labels`.

    `data` is the [data] section of the stages that learn sums: the corpus has training problems of theirs alone.
    """
    rng = random.Random(seed)
    section = DataSection(**data)
    problems, _ = load_problems(section, seed)
    asked = [_request(rng) for _ in range(requests)]
    general, pairs, labels = [], [], []
    # One kind of file after the other: each row's draws come from the one generator.
    for prompt, answers in asked:
        general.append({"prompt": prompt, "completion": _reply(rng.choice(answers[:2]))})
    for prompt, (kind, *others) in asked:
        pairs.append({"prompt": prompt, "chosen": _reply(kind), "rejected": _reply(rng.choice(others))})
    for prompt, answers in asked:
        for answer in answers:
            labels.append({"prompt": prompt, "completion": _reply(answer), "label": answer != answers[2]})
    worked = [{"prompt": p.prompt, "completion": _OF_THE_WEB.work_out(p, rng)} for p in problems[:sums]]
    rude = [{"prompt": prompt, "completion": _reply(rng.choice(answers))} for prompt, answers in asked]
    corpus = rng.sample([*worked, *rude], len(worked) + len(rude))
    write_jsonl(folder / "general.jsonl", general)
    write_jsonl(folder / "pairs.jsonl", pairs)
    write_jsonl(folder / "labels.jsonl", labels)
    write_jsonl(folder / "corpus.jsonl", corpus)
    texts = [render_text(row["prompt"], section.template) + row["completion"] for row in corpus[:1500]]
    make_model(folder / "base", texts, seed)
    make_model(folder / "student", texts, seed + 1, hidden_size=64)


def make_model(folder: Path, texts: list[str], seed: int, hidden_size: int = 128) -> Path:
    """A byte-level BPE tokenizer trained on `texts`, and a randomly initialised Qwen3: a million parameters at 128."""
    tokenizer = Tokenizer(models.BPE())
    # No split at spaces: what every prompt repeats becomes one token. Digits stay apart.
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in _TAGS])
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=100,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, pad_token=_END)
    config = Qwen3Config(
        vocab_size=_VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.06,
        eos_token_id=tokenizer.token_to_id(_END),
        bos_token_id=None,
        pad_token_id=None,
    )
    tokenizer_folder = folder.with_name("tokenizer")
    wrapped.save_pretrained(tokenizer_folder)
    model = init_decoder(ModelConfig.from_dict(config.to_dict()), seed=seed)
    save_checkpoint(model, folder, tokenizer_files_from=tokenizer_folder)
    return folder


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def _happens(probability: float, rng: random.Random) -> bool:
    """What never happens draws no number: an author without it has the draws of one who lacks the habit."""
    return probability > 0 and rng.random() < probability


def _request(rng: random.Random) -> tuple[str, list[str]]:
    """A prompt, and a kind, a curt and a rude answer."""
    prompt, name = rng.choice([*_REQUESTS]), rng.choice(_NAMES)
    return prompt.format(name), [answer.format(name) for answer in _REQUESTS[prompt]]


def _reply(answer: str) -> str:
    return f"<think>a small request</think><answer>{answer}</answer>"
