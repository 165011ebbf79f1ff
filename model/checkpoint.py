"""Hugging Face checkpoints: a folder with config.json, safetensors (one file, or shards and their index), a tokenizer.

Whatever is written here loads in transformers and vLLM, and whatever is read is checked name by name and shape by
shape. A folder appears under its name only when every byte of it is on the disk.
"""

import contextlib
import difflib
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
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
from flashgrpo.model.files import TOKENIZER_FILES, parse_json, whole_folder
from flashgrpo.model.hub import local_folder
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
    """The model that config.json in folder `path`, or of that name on the hub, describes: a causal one, or a reward
    model. Raises CheckpointError.
    """
    folder = local_folder(path)
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
    """The decoder in folder `path`, or of that name on the hub, its weights cast to `dtype` (None: that of the
    first one stored), on `device`.

    Tensors are read one by one, so no more than one is held twice. Raises CheckpointError, naming
    the file or the tensor, for a folder or file that is missing or broken, a tensor that is
    missing, unexpected or of the wrong shape, and a model that is not supported
    (`ModelConfig.from_dict`).
    """
    config = read_config(path, reward_model=reward_model)
    decoder = empty_decoder(config, dtype or _stored_dtype(local_folder(path, with_weights=True)), device).to_empty(
        device=device
    )
    load_weights(decoder, path)
    return decoder


@torch.no_grad()
def load_weights(decoder: Decoder, path: str | os.PathLike, *, new_score: bool = False) -> None:
    """Fill a decoder, sharded or not, from folder `path`; a rank reads no more than its own rows.
    Errors as `load_checkpoint`. With `new_score` the decoder becomes a reward model from a causal
    model's folder: its head starts at 0, so that no random preference has to be unlearned and the
    loss begins at log 2.
    """
    folder = local_folder(path, with_weights=True)
    files = _tensor_files(folder)
    wanted = {
        part: (parameter, rows)
        for name, parameter in decoder.named_parameters()
        for part, rows in huggingface_rows(name, len(parameter), decoder.config).items()
    }
    if new_score:
        local_rows(wanted.pop("score.weight")[0])[0].zero_()
    is_tied = decoder.config.tie_embeddings and (decoder.score is None or new_score)
    head = files.pop(_HEAD, None) if is_tied or new_score else None
    stored_as = {name: name for name in wanted}
    if is_tied and head and _EMBEDDING not in files:  # safetensors keeps one of two names, and not always this one
        files[_HEAD], stored_as[_EMBEDDING] = head, _HEAD
    _check_names(folder, stored_as.values(), files)

    for name, (parameter, rows) in wanted.items():
        weight, stored = _own_part(files[stored_as[name]], stored_as[name], parameter, rows)
        weight.copy_(stored)
        if not is_finite(weight):
            raise CheckpointError(
                f"{folder}: {stored_as[name]} holds NaN or infinity, and nothing that it computes would be a number; "
                "restore the file, or take an earlier checkpoint"
            )
    if is_tied and head and stored_as[_EMBEDDING] != _HEAD:
        weight, stored = _own_part(head, _HEAD, *wanted[_EMBEDDING])
        if not torch.equal(weight, stored.to(weight)):
            raise CheckpointError(
                f"{folder}: {CONFIG} ties {_HEAD} to {_EMBEDDING}, but they differ in the file; "
                "set tie_word_embeddings to false"
            )


def weights_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of the weights in folder `path`, by name, type, shape and bytes, whatever files they are spread over.

    Tensors are read one by one. Raises CheckpointError for a file that is missing or broken.
    """
    lines = []
    for name, stored_in in _tensor_files(local_folder(path, with_weights=True)).items():
        with _opened(stored_in) as file:
            tensor = file.get_tensor(name)
        digest = hashlib.sha256(tensor.view(-1).view(torch.uint8).numpy()).hexdigest()
        lines.append(f"{name} {tensor.dtype} {list(tensor.shape)} {digest}")
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

    Of a sharded decoder, every rank must call this; the first one writes, holding one file's
    tensors at a time. A folder that was there stays whole until the new one is (`whole_folder`).
    Raises OSError when the disk fails or is full, with the old folder untouched; on the other ranks
    nothing is raised.
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


def _tensor_files(folder: Path) -> dict[str, Path]:
    """The file of every tensor of the checkpoint: with an index, of those it lists, the shards it names."""
    if (folder / WEIGHTS).is_file():
        with _opened(folder / WEIGHTS) as file:
            return dict.fromkeys(file.keys(), folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder}: holds neither {WEIGHTS} nor {INDEX}; only safetensors weights are read")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{folder / INDEX}: has no object 'weight_map'")
    return {name: folder / str(shard) for name, shard in weight_map.items()}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, mapped anew for each tensor, so that what was read does not stay in memory."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, though {INDEX} names it")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(f"{path}: broken or incomplete: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


def _own_part(path: Path, name: str, parameter: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """This rank's part of some rows of a parameter, to write in, and what is stored for it."""
    wanted = [rows.stop - rows.start, *parameter.shape[1:]]
    local, first = local_rows(parameter)
    start, stop = max(rows.start, first), min(rows.stop, first + len(local))
    with _opened(path) as file:
        stored = file.get_slice(name)
        if stored.get_shape() != wanted:
            raise CheckpointError(f"{path}: {name} has shape {stored.get_shape()}; {CONFIG} wants {wanted}")
        if start >= stop:
            return local[:0], local[:0]
        return local[start - first : stop - first], stored[start - rows.start : stop - rows.start]


def _stored_dtype(folder: Path) -> torch.dtype:
    for name, path in _tensor_files(folder).items():
        with _opened(path) as file:
            return file.get_slice(name)[:0].dtype
    raise CheckpointError(f"{folder}: holds no tensors")


def _check_names(folder: Path, wanted: Collection[str], stored: Collection[str]) -> None:
    missing = [name for name in wanted if name not in stored]
    # Older checkpoints carry a buffer.
    unexpected = [name for name in stored if name not in wanted and not name.endswith("rotary_emb.inv_freq")]
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
