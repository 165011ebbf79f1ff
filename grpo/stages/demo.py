"""`make demo`, which is `flashgrpo demo`: from nothing to a policy that GRPO has taught to add, on two CPU cores.

A tokenizer and a small Qwen3-shaped model are made from nothing; a cold start by SFT on worked examples of a small
share of the problems teaches the form and some of the arithmetic (recipes/sft.toml); then GRPO learns from rewards
(recipes/demo.toml).
The held-out score is accuracy, with no credit for form.
"""

import json
import random
import shutil
import time
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config

from flashgrpo.grpo.data.problems import load_problems
from flashgrpo.grpo.data.prompts import render_text
from flashgrpo.grpo.errors import RunInputError
from flashgrpo.grpo.recipe.load import Recipe, SftRecipe, load_recipe
from flashgrpo.grpo.run.folder import read_rows
from flashgrpo.grpo.run.progress import console
from flashgrpo.grpo.stages.plots import print_summary, write_report
from flashgrpo.grpo.stages.sft import sft
from flashgrpo.grpo.train import train
from flashgrpo.grpo.types import Problem
from flashgrpo.model.checkpoint import init_decoder, save_checkpoint
from flashgrpo.model.config import ModelConfig

_MARK = ".flashgrpo-demo"
_END = "<|endoftext|>"
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_COLD_START_EXAMPLES = 3_000
_CAREFUL = 0.45
_VOCAB_SIZE = 512


def demo(recipe_file: str, output: Path, seed: int) -> None:
    """Make the model, cold-start it, train it, show what came of it. An `output` of an earlier demo is removed first.

    Raises RunInputError for an `output` that no demo has made, and whatever SFT and training do.
    """
    start = time.perf_counter()
    if output.exists():
        if any(output.iterdir()) and not (output / _MARK).exists():
            raise RunInputError(f"{output} is not a folder that the demo made; choose another --output")
        shutil.rmtree(output)
    output.mkdir(parents=True)
    (output / _MARK).touch()
    overrides = [
        f"--model.path={output / 'cold_start' / 'model'}",
        f"--run.output={output / 'grpo'}",
        f"--run.seed={seed}",
    ]
    recipe = load_recipe(Recipe, recipe_file, overrides)
    problems, held_out = load_problems(recipe.data, seed)
    console.print(f"{len(problems):,} problems to train on, {len(held_out):,} held out; seed {seed}")
    base = make_model(output / "base", [render_text(p.prompt, recipe.data.template) for p in problems[:500]], seed)
    examples = write_cold_start(output / "cold_start.jsonl", problems[:_COLD_START_EXAMPLES], seed)
    overrides = [
        f"--model.path={base}",
        f"--data.path={examples}",
        f"--data.template={recipe.data.template}",
        f"--run.output={output / 'cold_start'}",
        f"--run.seed={seed}",
        f"--run.device={recipe.run.device}",
    ]
    sft(load_recipe(SftRecipe, "recipes/sft.toml", overrides))
    train(recipe)
    picture = write_report(recipe.run.output)
    print_summary(recipe.run.output)
    scores = [row["eval/pass@1"] for row in read_rows(output / "grpo" / "metrics.jsonl") if "eval/pass@1" in row]
    seconds = time.perf_counter() - start
    print(f"held-out pass@1: {scores[0]:.1%} after the cold start, {scores[-1]:.1%} after GRPO; {seconds:.0f} s in all")
    print(f"picture: {picture}\nmodel:   {output / 'grpo' / 'model'}")


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


def write_cold_start(path: Path, problems: list[Problem], seed: int) -> Path:
    """Worked examples as JSONL, written by a teacher who is careful at times and hasty at others."""
    rng = random.Random(seed)
    rows = [
        {"prompt": p.prompt, "completion": worked_answer(p.columns["metadata"]["expression"], rng.random() < _CAREFUL)}
        for p in problems
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def worked_answer(expression: str, careful: bool) -> str:
    """`2 + 9 - 4` as <think>2+9=11 11-4=7</think><answer>7</answer>; in haste the work ends after the first sum."""
    total, *rest = expression.split()
    steps = []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        result = str(int(total) + int(sign + term))
        steps.append(f"{total}{sign}{term}={result}")
        total = result
        if not careful:
            break
    return f"<think>{' '.join(steps)}</think><answer>{total}</answer>"
