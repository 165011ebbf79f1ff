"""A model of a few thousand parameters that samples digits, and recipes that train it in a second or two."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flashgrpo.grpo.recipe.load import Recipe, build_recipe
from flashgrpo.model.checkpoint import init_decoder, save_checkpoint
from flashgrpo.model.config import ModelConfig

torch.set_num_threads(1)
_CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]


@pytest.fixture(scope="session")
def model_path(tmp_path_factory) -> Path:
    """Hugging Face folder of a random Qwen3."""
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def make_model(tmp_path_factory):
    """make_model(**changes) -> Hugging Face folder of another random model."""
    return lambda **changes: save_model(tmp_path_factory.mktemp("model"), **changes)


def save_model(folder: Path, **changes) -> Path:
    """Hugging Face folder of a random model with a character tokenizer, below `folder`."""
    vocabulary = {token: i for i, token in enumerate(["<eos>", "<unk>", *_CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
    config = {
        "model_type": "qwen3",
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
        "eos_token_id": 0,
        **changes,
    }
    save_checkpoint(init_decoder(ModelConfig.from_dict(config), seed=0), folder / "model", tokenizer_files_from=folder)
    return folder / "model"


@pytest.fixture
def data_path(tmp_path) -> Path:
    path = tmp_path / "sums.jsonl"
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(8) for b in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def recipe_values(model_path, data_path, tmp_path) -> dict:
    """A recipe as nested dictionaries, for tests to change; its dense reward gives a random model gradients."""
    return {
        "model": {"path": str(model_path)},
        "data": {"path": str(data_path), "template": "none", "held_out": 8},
        "rewards": {"functions": ["custom_rewards:count_digits"], "workers": 1},
        "rollout": {"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 8},
        "loss": {"preset": "dapo"},
        "train": {"steps": 4, "lr": 1e-3, "token_budget": 256, "checkpoint_every": 2},
        "run": {"output": str(tmp_path / "run"), "seed": 3, "device": "cpu"},
    }


@pytest.fixture
def custom_rewards(tmp_path, monkeypatch) -> Path:
    """A user's module of reward functions, on the path of this process and its workers."""
    folder = tmp_path / "user_code"
    folder.mkdir()
    (folder / "custom_rewards.py").write_text(
        "def count_digits(prompts, completions, **columns):\n"
        "    return [sum(c.isdigit() for c in text) / 8 for text in completions]\n"
        "def never(prompts, completions, **columns):\n"
        "    return [None] * len(completions)\n"
        "def far_apart(prompts, completions, **columns):\n"
        "    return [1e39 if i % 2 else 1e8 for i in range(len(completions))]\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.fixture
def recipe(recipe_values, custom_rewards) -> Recipe:
    return build_recipe(Recipe, recipe_values)
