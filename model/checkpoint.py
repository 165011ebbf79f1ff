"""Hugging Face checkpoints: a folder with config.json, safetensors (one file, or shards and their index), a tokenizer.

Whatever is written here loads in transformers and vLLM, and whatever is read is checked name by name and shape by
shape. A folder appears under its name only when every byte of it is on the disk.
"""

import difflib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flashgrpo.model.config import CheckpointError, ModelConfig
from flashgrpo.model.decoder import Decoder, huggingface_views
from flashgrpo.model.files import recover, whole_folder

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)


def init_decoder(
    config: ModelConfig, *, seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Decoder:
    """A decoder with random weights: matrices normal(0, initializer_range), norms 1, biases 0.

    Equal seeds give equal weights on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    decoder = _empty_decoder(config).to(dtype).to_empty(device=device)
    for name, weight in _weights(decoder).items():
        if weight.dim() == 2:
            weight.copy_(torch.empty(weight.shape).normal_(0.0, config.initializer_range, generator=generator))
        else:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
    return decoder


def read_config(path: str | os.PathLike) -> ModelConfig:
    """The model that `path`/config.json describes; raises CheckpointError."""
    folder = Path(path)
    recover(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; a Hugging Face checkpoint is wanted")
    raw = _read_json(folder / CONFIG)
    try:
        return ModelConfig.from_dict(raw)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None


def load_checkpoint(
    path: str | os.PathLike, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Decoder:
    """The decoder in folder `path`, its weights cast to `dtype` (None: that of the first one stored), on `device`.

    Tensors are read one by one, so no more than one is held twice. Raises CheckpointError, naming the file or the
    tensor, for a folder or file that is missing or broken, a tensor that is missing, unexpected or of the wrong shape,
    and a model that is not supported (`ModelConfig.from_dict`).
    """
    folder = Path(path)
    decoder = _empty_decoder(read_config(folder))
    missing = _weights(decoder)
    unexpected: list[str] = []
    tied_head = None
    for number, (name, tensor) in enumerate(_stored_tensors(folder)):
        if number == 0:
            missing = _weights(decoder.to(dtype or tensor.dtype).to_empty(device=device))
        if name in missing:
            weight = missing.pop(name)
            if tensor.shape != weight.shape:
                raise CheckpointError(f"{folder}: {name} has shape {[*tensor.shape]}; {CONFIG} wants {[*weight.shape]}")
            weight.copy_(tensor)
        elif name == "lm_head.weight" and decoder.lm_head is None:
            tied_head = tensor
        elif not name.endswith("rotary_emb.inv_freq"):  # a buffer that older checkpoints carry
            unexpected.append(name)
    _check_names(folder, list(missing), unexpected)
    if tied_head is not None and not torch.equal(tied_head.to(decoder.lm_head_weight), decoder.lm_head_weight):
        raise CheckpointError(
            f"{folder}: {CONFIG} ties lm_head.weight to model.embed_tokens.weight, but they differ in the file; "
            "set tie_word_embeddings to false"
        )
    return decoder


def save_checkpoint(
    decoder: Decoder,
    path: str | os.PathLike,
    *,
    tokenizer_files_from: str | os.PathLike | None = None,
    weights: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes folder `path`: config.json with every key of the original, the weights in `dtype` (None: as they are), and
    the tokenizer and generation_config.json of the folder `tokenizer_files_from`. `weights` take the place of the
    decoder's own, as an optimizer's fp32 masters do.

    A folder that was there stays whole until the new one is (`whole_folder`). Raises OSError when the disk fails or is
    full, with the old folder untouched.
    """
    folder = Path(path)
    tokenizer_files: list[Path] = []
    if tokenizer_files_from is not None:
        source = Path(tokenizer_files_from)
        tokenizer_files = [file for pattern in TOKENIZER_FILES for file in source.glob(pattern) if file.is_file()]
        if not tokenizer_files:
            raise CheckpointError(f"{source}: holds no tokenizer files")
        tokenizer_files += source.glob(GENERATION_CONFIG)
    with whole_folder(folder) as partial:
        weights = huggingface_views(
            {k: v.detach() for k, v in (weights or decoder.state_dict()).items()}, decoder.config
        )
        stored = dtype or next(iter(weights.values())).dtype
        _write_json(partial / CONFIG, decoder.config.to_dict(str(stored).removeprefix("torch.")))
        _write_weights(partial, weights, dtype, max_shard_bytes)
        for file in tokenizer_files:
            shutil.copyfile(file, partial / file.name)


def _empty_decoder(config: ModelConfig) -> Decoder:
    with torch.device("meta"):
        return Decoder(config)


def _weights(decoder: Decoder) -> dict[str, Tensor]:
    return huggingface_views({name: p.detach() for name, p in decoder.named_parameters()}, decoder.config)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds a JSON {type(content).__name__}; an object is wanted")
    return content


def _stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint, one at a time; with an index, those it lists, from the shards it names."""
    shards: dict[str, list[str]] = {}  # no names: all that the file holds
    if (folder / WEIGHTS).is_file():
        shards[WEIGHTS] = []
    elif (folder / INDEX).is_file():
        weight_map = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{folder / INDEX}: has no object 'weight_map'")
        for name, shard in weight_map.items():
            shards.setdefault(str(shard), []).append(name)
    else:
        raise CheckpointError(f"{folder}: holds neither {WEIGHTS} nor {INDEX}; only safetensors weights are read")
    for shard, names in shards.items():
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder / shard}: no such file, though {INDEX} names it")
        try:
            with safe_open(folder / shard, framework="pt") as stored:
                for name in names or stored.keys():
                    yield name, stored.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{folder / shard}: broken or incomplete: {error}") from None
        except OSError as error:
            raise CheckpointError(f"{folder / shard}: cannot be read: {error}") from None


def _check_names(folder: Path, missing: list[str], unexpected: list[str]) -> None:
    if missing:
        near = difflib.get_close_matches(missing[0], unexpected, n=1)
        hint = f"; the nearest unused one is {near[0]}" if near else ""
        raise CheckpointError(f"{folder}: {missing[0]} is missing, one of {len(missing)} missing tensors{hint}")
    if unexpected:
        raise CheckpointError(
            f"{folder}: {unexpected[0]} is unexpected, one of {len(unexpected)} tensors that have no place in the "
            f"model of {CONFIG}"
        )


def _write_weights(folder: Path, weights: dict[str, Tensor], dtype: torch.dtype | None, max_shard_bytes: int) -> None:
    """Shards hold at most `max_shard_bytes`, or one tensor; only one shard at a time is held in `dtype`."""
    sizes = {name: torch.empty_like(weight, dtype=dtype, device="meta") for name, weight in weights.items()}
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_bytes)
    for file, names in split.filename_to_tensors.items():
        tensors = {name: weights[name].to("cpu", dtype).contiguous() for name in names}
        try:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder / file}: {error}") from None
    if split.is_sharded:
        _write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
