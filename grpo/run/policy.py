"""Opening a model: device, type, tokenizer, stop tokens."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flashgrpo.grpo.errors import RecipeError
from flashgrpo.grpo.recipe.schema import ModelSection, TeacherSection
from flashgrpo.grpo.run.machines import resolve_dtype
from flashgrpo.grpo.run.progress import say
from flashgrpo.kernels.attention import plan_attention
from flashgrpo.model.checkpoint import (
    CONFIG,
    GENERATION_CONFIG,
    CheckpointError,
    empty_decoder,
    load_checkpoint,
    load_weights,
    read_config,
    read_json,
)
from flashgrpo.model.config import ModelConfig
from flashgrpo.model.decoder import Decoder
from flashgrpo.model.hub import local_folder
from flashgrpo.model.sharding import shard

_TAGS = "</think>", "</answer>"
_PROBE = "<think>Déjà vu — 数学</think>\n\tdef f(x): return x ** 2  # 12,345"


@dataclass(frozen=True)
class Policy:
    """A decoder and what turns its tokens into text and back."""

    path: Path
    model: Decoder
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: list[int]

    def decode(self, token_ids: Sequence[int] | np.ndarray) -> str:
        """Text of a prompt or completion as it was read or sampled, tags that are special tokens too, but without the
        token that begins a text and the one that ends it.
        """
        ids = np.asarray(token_ids).tolist()
        ids = ids[ids[:1] == [self.tokenizer.bos_token_id] :]
        if ids and ids[-1] in self._silent_ends:
            ids.pop()
        text: Any = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text  # a list for a batch, which this is not

    @functools.cached_property
    def _silent_ends(self) -> set[int]:
        """Stop tokens that are no text: not a tag at which a model is told to stop."""
        added = self.tokenizer.added_tokens_decoder
        return {token for token in self.stop_token_ids if token in added and added[token].content not in _TAGS}


def open_policy(section: ModelSection, device: torch.device, model: Decoder | None = None) -> Policy:
    """The model at section.path, loaded for sampling unless it is given, and its tokenizer. Raises CheckpointError, and
    RecipeError for an attention_backend that is not for it.
    """
    if model is None:
        backend = _attention_backend(section, read_config(section.path), device)
        model = load_checkpoint(section.path, dtype=resolve_dtype(section.dtype, device), device=device)
        model.attention_backend = backend
    tokenizer = open_tokenizer(section.path)
    stops = stop_token_ids(section.path, tokenizer)
    check_vocabulary(section.path, tokenizer, model.config.vocab_size, stops)
    return Policy(local_folder(section.path), model, tokenizer, stops)


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
    """The model at section.path, sharded over `mesh`: it computes in section.dtype and keeps its
    shards in `stored`. No rank ever holds more than its shard and the rows being read. With
    `new_score` it becomes a reward model (`load_weights`). Raises as `open_policy`.
    """
    config = read_config(section.path)
    model = empty_decoder(config.as_reward_model() if new_score else config, stored, device)
    model.activation_checkpointing = section.activation_checkpointing
    model.attention_backend = _attention_backend(section, config, device)
    if section.compile:
        model.compile_blocks()
    shard(model, mesh, resolve_dtype(section.dtype, device), reshard_after_forward)
    model.to_empty(device=device)
    if read_weights:
        load_weights(model, section.path, new_score=new_score)
    return model


def _attention_backend(section: ModelSection, config: ModelConfig, device: torch.device) -> str:
    """The section's. Raises RecipeError for one that lacks the device, the dtype or the head_dim."""
    offsets, dtype = torch.tensor([0, 1], dtype=torch.int32, device=device), resolve_dtype(section.dtype, device)
    heads = config.num_heads, config.num_kv_heads, config.head_dim
    try:
        plan_attention(offsets, None, 1, heads, dtype, max_seqlen=1, backend=section.attention_backend)
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"model.attention_backend: {error}") from error
    return section.attention_backend


def open_teacher(section: TeacherSection, policy: ModelSection, device: torch.device, mesh: DeviceMesh) -> Decoder:
    """The frozen model at section.path, which computes as the policy does: on the policy's `device` sharded over
    `mesh`, or whole on its own. Raises CheckpointError.
    """
    say(f"loading {section.path}")
    is_beside = section.device == "trainer"
    place = device if is_beside else torch.device(section.device)
    dtype = resolve_dtype(policy.dtype, place)
    if is_beside:
        model = open_sharded_model(dataclasses.replace(policy, path=section.path), place, mesh, stored=dtype)
    else:
        model = load_checkpoint(section.path, dtype=dtype, device=place)
    return model.requires_grad_(False)


def check_teacher(section: TeacherSection, policy: str) -> None:
    """Whether a teacher can score the tokens of the model at `policy`; reads configurations and tokenizers alone.

    Raises CheckpointError where they mean something else to it, RecipeError for a device that is not there.
    """
    path, wanted = section.path, read_config(policy).vocab_size
    found = read_config(path).vocab_size
    theirs, ours = open_tokenizer(path), open_tokenizer(policy)
    if not same_tokens(theirs, ours):
        raise CheckpointError(
            f"teacher.path: {path}: its tokenizer, of {len(theirs)} tokens, is not that of {policy}, of {len(ours)}; "
            "a teacher scores the policy's own tokens: take one of its family"
        )
    # Above the tokenizer's a vocabulary is padding, which models of one family have more or less of.
    if found < wanted:
        raise CheckpointError(
            f"teacher.path: {path}: its vocabulary has {found} rows, and that of {policy} has {wanted}, which may all "
            "be sampled; add rows to its embedding (resize_token_embeddings)"
        )
    ends, own_ends = stop_token_ids(path, theirs), stop_token_ids(policy, ours)
    if not {*ends} & {*own_ends}:
        raise CheckpointError(
            f"teacher.path: {path}: it ends a text with token {ends}, and {policy} with {own_ends}, which it would "
            "never have written; make eos_token_id the same in their generation_config.json"
        )
    kind, _, index = section.device.partition(":")
    if kind == "cuda" and int(index) >= torch.cuda.device_count():
        raise RecipeError(
            f"teacher.device = {section.device}, and torch finds {torch.cuda.device_count()} CUDA devices"
        )


def same_tokens(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers make the same of a text: a vocabulary does not show how one is split and normalised."""
    return one.get_vocab() == other.get_vocab() and one(_PROBE)["input_ids"] == other(_PROBE)["input_ids"]


def open_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder, or name on the hub. Raises CheckpointError."""
    try:
        return AutoTokenizer.from_pretrained(str(local_folder(path)))
    except Exception as error:  # tokenizers raises bare ones, and broken files whatever comes first
        raise CheckpointError(f"{path}: no usable tokenizer: {error or type(error).__name__}") from error


def check_vocabulary(path: str | Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int, stops: list[int]) -> None:
    """Raises CheckpointError where a model has no embedding for a token of its tokenizer, or one to stop at."""
    token, last = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if last >= vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has tokens up to {last} ({token!r}), and vocab_size = {vocab_size} in config.json; "
            "add rows to the model's embedding (resize_token_embeddings), or take the tokens out"
        )
    if stops[-1] >= vocab_size:
        raise CheckpointError(
            f"{path}: eos_token_id = {stops[-1]} in config.json or generation_config.json is beyond vocab_size = "
            f"{vocab_size}; name the token that ends a completion"
        )


def warn_beyond_context(policy: Policy, longest: int) -> None:
    """Say so where a run's `longest` sequence of tokens is longer than any that the model was made for."""
    if longest > (context := policy.model.config.context):
        say(
            f"{policy.path}: sequences may come to {longest:,} tokens, and the model was made for {context:,} "
            "(max_position_embeddings in config.json): what it writes beyond may be nonsense",
            style="yellow",
        )


def stop_token_ids(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a completion: those of the tokenizer, config.json and generation_config.json together."""
    found: list[Any] = [tokenizer.eos_token_id]
    folder = local_folder(path)
    for file in (folder / CONFIG, folder / GENERATION_CONFIG):
        if file.exists():
            ids = read_json(file).get("eos_token_id")
            found += ids if isinstance(ids, list) else [ids]
    ids = [token for token in found if token is not None]
    if faulty := [token for token in ids if type(token) is not int]:
        raise CheckpointError(f"{path}: eos_token_id has {faulty[0]!r}, wanted a token's number, or a list of those")
    if not ids:
        raise CheckpointError(
            f"{path}: no end-of-sequence token in its tokenizer, config.json or generation_config.json"
        )
    return sorted({*ids})


def end_token_id(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that closes a text: the tokenizer's end of sequence, or the first that ends a completion."""
    end: Any = tokenizer.eos_token_id
    return stop_token_ids(path, tokenizer)[0] if end is None else end
