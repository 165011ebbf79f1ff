"""Opening a model: device, type, tokenizer, stop tokens."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flashgrpo.grpo.data import DataError, Problem, render_prompt
from flashgrpo.grpo.sections import DataSection, ModelSection
from flashgrpo.model.checkpoint import CheckpointError, empty_decoder, load_checkpoint, load_weights, read_config
from flashgrpo.model.decoder import Decoder
from flashgrpo.model.sharding import shard


@dataclass(frozen=True)
class Policy:
    """A decoder and what turns its tokens into text and back."""

    path: Path
    model: Decoder
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: list[int]

    def decode(self, token_ids) -> str:
        """Text of a prompt or completion, without end-of-sequence and other special tokens."""
        text: Any = self.tokenizer.decode(token_ids, skip_special_tokens=True)  # a list for a batch, which this is not
        return text


def open_policy(section: ModelSection, device: torch.device, model: Decoder | None = None) -> Policy:
    """The model at section.path, loaded for sampling unless it is given, and its tokenizer. Raises CheckpointError."""
    if model is None:
        model = load_checkpoint(section.path, dtype=resolve_dtype(section.dtype, device), device=device)
        model.attention_backend = section.attention_backend
    tokenizer = open_tokenizer(section.path)
    return Policy(Path(section.path), model, tokenizer, stop_token_ids(section.path, tokenizer))


def open_sharded_model(
    section: ModelSection,
    device: torch.device,
    mesh: DeviceMesh,
    *,
    stored: torch.dtype = torch.float32,
    reshard_after_forward: bool = True,
    read_weights: bool = True,
    new_score: bool = False,
) -> Decoder:
    """The model at section.path, sharded over `mesh`: it computes in section.dtype and keeps its shards in `stored`.
    No rank ever holds more than its shard and the rows being read. With `new_score` it becomes a reward model
    (`load_weights`). Raises CheckpointError.
    """
    config = read_config(section.path)
    model = empty_decoder(config.as_reward_model() if new_score else config, stored)
    model.activation_checkpointing = section.activation_checkpointing
    model.attention_backend = section.attention_backend
    if section.compile:
        model.compile_blocks()
    shard(model, mesh, resolve_dtype(section.dtype, device), reshard_after_forward)
    model.to_empty(device=device)
    if read_weights:
        load_weights(model, section.path, new_score=new_score)
    return model


@dataclass(frozen=True)
class Prompt:
    """A problem as the model sees it."""

    problem: Problem
    token_ids: list[int]
    text: str
    source: str = "data"


def render_prompts(
    problems: Sequence[Problem], policy: Policy, data: DataSection, source: str = "data"
) -> list[Prompt]:
    """Every problem through the template. Raises DataError for an empty prompt, or one over data.max_prompt_tokens."""
    prompts = []
    for problem in problems:
        token_ids = render_prompt(problem.prompt, data.template, policy.tokenizer)
        if len(token_ids) > data.max_prompt_tokens:
            raise DataError(
                f"a prompt has {len(token_ids)} tokens, data.max_prompt_tokens = {data.max_prompt_tokens}; raise it or "
                f"remove the prompt that begins {str(problem.prompt)[:60]!r}"
            )
        prompts.append(Prompt(problem, token_ids, policy.decode(token_ids), source))
    return prompts


def open_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder. Raises CheckpointError."""
    try:
        return AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: no usable tokenizer: {error}") from error


def stop_token_ids(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a completion: those of the tokenizer, config.json and generation_config.json together."""
    found: list[Any] = [tokenizer.eos_token_id]
    for name in ("config.json", "generation_config.json"):
        file = Path(path) / name
        if file.exists():
            try:
                ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
            except (ValueError, AttributeError) as error:
                raise CheckpointError(f"{file}: not a JSON object: {error}") from error
            found += ids if isinstance(ids, list) else [ids]
    ids = {int(token) for token in found if token is not None}
    if not ids:
        raise CheckpointError(
            f"{path}: no end-of-sequence token in its tokenizer, config.json or generation_config.json"
        )
    return sorted(ids)


def end_token_id(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that closes a text: the tokenizer's end of sequence, or the first that ends a completion."""
    end: Any = tokenizer.eos_token_id
    return stop_token_ids(path, tokenizer)[0] if end is None else end


def closed_ids(text: str, tokenizer: PreTrainedTokenizerBase, end: int) -> np.ndarray:
    """A completion's tokens, [num_tokens] int64; the last is `end`."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return np.array(ids if ids[-1:] == [end] else [*ids, end], dtype=np.int64)


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise CheckpointError("run.device = cuda, but torch finds no CUDA device; use run.device = cpu or auto")
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on CUDA, float32 on a CPU."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, name)
