"""Hugging Face checkpoints: a folder with config.json, safetensors (one file, or shards and their index), a tokenizer.

Whatever is written here loads in transformers and vLLM, and whatever is read is checked name by name and shape by
shape. A folder appears under its name only when every byte of it is on the disk.
"""

import difflib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from flashgrpo.model import cpu
from flashgrpo.model.config import CheckpointError, ModelConfig
from flashgrpo.model.decoder import Decoder, huggingface_rows, huggingface_views
from flashgrpo.model.files import TOKENIZER_FILES, parse_json, recover, whole_folder
from flashgrpo.model.sharding import full_tensors, is_finite, local_rows

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def init_decoder(
    config: ModelConfig, *, seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Decoder:
    """A decoder with random weights: matrices normal(0, initializer_range), norms 1, biases 0.

    Equal seeds give equal weights on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    decoder = empty_decoder(config, dtype, device).to_empty(device=device)
    for name, weight in huggingface_views({n: p.detach() for n, p in decoder.named_parameters()}, config).items():
        if weight.dim() == 2:
            weight.copy_(torch.empty(weight.shape).normal_(0.0, config.initializer_range, generator=generator))
        else:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
    return decoder


def read_config(path: str | os.PathLike, *, reward_model: bool = False) -> ModelConfig:
    """The model that `path`/config.json describes: a causal one, or a reward model. Raises CheckpointError."""
    folder = Path(path)
    recover(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; a Hugging Face checkpoint is wanted")
    raw = read_json(folder / CONFIG)
    try:
        config = ModelConfig.from_dict(raw)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None
    if config.is_reward_model and not reward_model:
        raise CheckpointError(f"{folder} holds a reward model; a causal language model is wanted")
    if reward_model and not config.is_reward_model:
        raise CheckpointError(
            f"{folder} holds a causal language model; a reward model is wanted, which `flashgrpo reward-model` makes"
        )
    return config


def load_checkpoint(
    path: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    reward_model: bool = False,
) -> Decoder:
    """The decoder in folder `path`, its weights cast to `dtype` (None: that of the first one stored), on `device`.

    Tensors are read one by one, so no more than one is held twice. Raises CheckpointError, naming the file or the
    tensor, for a folder or file that is missing or broken, a tensor that is missing, unexpected or of the wrong shape,
    and a model that is not supported (`ModelConfig.from_dict`).
    """
    config = read_config(path, reward_model=reward_model)
    decoder = empty_decoder(config, dtype or _stored_dtype(Path(path)), device).to_empty(device=device)
    load_weights(decoder, path)
    return decoder


@torch.no_grad()
def load_weights(decoder: Decoder, path: str | os.PathLike, *, new_score: bool = False) -> None:
    """Fill a decoder, sharded or not, from folder `path`; a rank reads no more than its own rows. Errors as
    `load_checkpoint`. With `new_score` the decoder becomes a reward model from a causal model's folder: its head starts
    at 0, so that no random preference has to be unlearned and the loss begins at log 2.
    """
    folder = Path(path)
    missing = {
        part: (parameter, rows)
        for name, parameter in decoder.named_parameters()
        for part, rows in huggingface_rows(name, len(parameter), decoder.config).items()
    }
    if new_score:
        local_rows(missing.pop("score.weight")[0])[0].zero_()
    is_tied = decoder.config.tie_embeddings and (decoder.score is None or new_score)
    embedding = missing[_EMBEDDING]
    unexpected: list[str] = []
    tied_head = None
    for name, stored in _stored_tensors(folder):
        if name in missing:
            _fill(folder, name, *_own_part(folder, name, stored, *missing.pop(name)))
        elif name == _HEAD and is_tied:
            tied_head = _own_part(folder, name, stored, *embedding)
        elif name == _HEAD and new_score:
            continue
        elif not name.endswith("rotary_emb.inv_freq"):  # a buffer that older checkpoints carry
            unexpected.append(name)
    if tied_head and missing.pop(_EMBEDDING, None):  # safetensors keeps one of two names, and not always this one
        _fill(folder, _HEAD, *tied_head)
    _check_names(folder, list(missing), unexpected)
    if tied_head and not torch.equal(tied_head[0], tied_head[1].to(tied_head[0])):
        raise CheckpointError(
            f"{folder}: {CONFIG} ties {_HEAD} to {_EMBEDDING}, but they differ in the file; "
            "set tie_word_embeddings to false"
        )


def weights_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of the weights in folder `path`, by name, type, shape and bytes, whatever files they are spread over.

    Tensors are read one by one. Raises CheckpointError for a file that is missing or broken.
    """
    lines = []
    for name, stored in _stored_tensors(Path(path)):
        tensor = stored[:].contiguous()
        content = hashlib.sha256(tensor.view(-1).view(torch.uint8).numpy()).hexdigest()
        lines.append(f"{name} {tensor.dtype} {list(tensor.shape)} {content}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def save_checkpoint(
    decoder: Decoder,
    path: str | os.PathLike,
    *,
    tokenizer_files_from: str | os.PathLike | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    json_files: Mapping[str, dict[str, Any]] | None = None,
) -> None:
    """Writes folder `path`: config.json with every key of the original, the weights in `dtype` (None: as they are), the
    tokenizer and generation_config.json of the folder `tokenizer_files_from`, and `json_files` by name.

    Of a sharded decoder, every rank must call this; the first one writes, holding one file's tensors at a time.
    A folder that was there stays whole until the new one is (`whole_folder`). Raises OSError when the disk fails or is
    full, with the old folder untouched; on the other ranks nothing is raised.
    """
    parameters, config = dict(decoder.named_parameters()), decoder.config
    stored = dtype or next(iter(parameters.values())).dtype
    tensors = full_tensors(parameters, config, dtype)
    try:
        if not isinstance(decoder, FSDPModule) or dist.get_rank() == 0:
            with whole_folder(Path(path)) as partial:
                jsons = {CONFIG: config.to_dict(str(stored).removeprefix("torch.")), **(json_files or {})}
                for name, content in jsons.items():
                    _write_json(partial / name, content)
                if tokenizer_files_from is not None:
                    _copy_tokenizer_files(Path(tokenizer_files_from), partial)
                shapes = {n: torch.empty(p.shape, dtype=stored, device="meta") for n, p in parameters.items()}
                sizes = {n: torch.empty_like(view) for n, view in huggingface_views(shapes, config).items()}
                _write_weights(partial, tensors, sizes, max_shard_bytes)
    finally:
        for _ in tensors:  # every rank gathers to the end
            pass


def empty_decoder(config: ModelConfig, dtype: torch.dtype, device: torch.device | str | None = None) -> Decoder:
    """A decoder on the meta device, for `to_empty`: it takes no memory. It computes on `device`."""
    with torch.device("meta"):
        decoder = Decoder(config).to(dtype)
    if device is not None and torch.device(device).type == "cpu":
        cpu.adapt(decoder)
    return decoder


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; raises CheckpointError."""
    try:
        content = parse_json(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds a JSON {type(content).__name__}; an object is wanted")
    return content


def _stored_tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """Every tensor of the checkpoint as a slice that reads no more than the rows it is asked for; with an index, those
    it lists, from the shards it names. A file is mapped anew for each, so that what was read does not stay in memory.
    """
    shards: dict[str, list[str]] = {}  # no names: all that the file holds
    if (folder / WEIGHTS).is_file():
        shards[WEIGHTS] = []
    elif (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
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
            if not names:
                with safe_open(folder / shard, framework="pt") as stored:
                    names = [*stored.keys()]
            for name in names:
                with safe_open(folder / shard, framework="pt") as stored:
                    yield name, stored.get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(f"{folder / shard}: broken or incomplete: {error}") from None
        except OSError as error:
            raise CheckpointError(f"{folder / shard}: cannot be read: {error}") from None


def _own_part(folder: Path, name: str, stored: Any, parameter: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """This rank's part of some rows of a parameter, to write in, and what is stored for it."""
    wanted = [rows.stop - rows.start, *parameter.shape[1:]]
    if stored.get_shape() != wanted:
        raise CheckpointError(f"{folder}: {name} has shape {stored.get_shape()}; {CONFIG} wants {wanted}")
    local, first = local_rows(parameter)
    start, stop = max(rows.start, first), min(rows.stop, first + len(local))
    if start >= stop:
        return local[:0], local[:0]
    return local[start - first : stop - first], stored[start - rows.start : stop - rows.start]


def _fill(folder: Path, name: str, weight: Tensor, stored: Tensor) -> None:
    weight.copy_(stored)
    if not is_finite(weight):
        raise CheckpointError(
            f"{folder}: {name} holds NaN or infinity, and nothing that it computes would be a number; restore the "
            "file, or take an earlier checkpoint"
        )


def _stored_dtype(folder: Path) -> torch.dtype:
    for _, stored in _stored_tensors(folder):
        return stored[:0].dtype
    raise CheckpointError(f"{folder}: holds no tensors")


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


def _copy_tokenizer_files(source: Path, target: Path) -> None:
    files = [file for pattern in TOKENIZER_FILES for file in source.glob(pattern) if file.is_file()]
    if not files:
        raise CheckpointError(f"{source}: holds no tokenizer files")
    for file in (*files, *source.glob(GENERATION_CONFIG)):
        shutil.copyfile(file, target / file.name)


def _write_weights(
    folder: Path, tensors: Iterator[tuple[str, Tensor]], sizes: dict[str, Tensor], max_shard_bytes: int
) -> None:
    """Files hold at most `max_shard_bytes`, or one tensor; each is written once its last tensor has come."""
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_bytes)
    file_of = {name: file for file, names in split.filename_to_tensors.items() for name in names}
    waiting: dict[str, dict[str, Tensor]] = {file: {} for file in split.filename_to_tensors}
    for name, tensor in tensors:
        file = file_of[name]
        waiting[file][name] = tensor.to("cpu").contiguous()
        if len(waiting[file]) < len(split.filename_to_tensors[file]):
            continue
        try:
            save_file(waiting.pop(file), folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder / file}: {error}") from None
    if split.is_sharded:
        _write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
