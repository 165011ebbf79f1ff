"""The trainer's weights on their way to a sampler: what is sent, and whether it arrived.

`DecoderSource` has the two channels that vLLM's weight transfer asks of its `WeightSource`: what will come, and the
tensors themselves, one gathered at a time on the default stream, in the sampler's type. All ranks iterate in lockstep.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from flashgrpo.grpo.errors import SyncError
from flashgrpo.model.config import ModelConfig
from flashgrpo.model.decoder import Decoder, huggingface_views
from flashgrpo.model.sharding import full_tensors

BUCKET_BYTES = 256 << 20  # what is sent at a time
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_DIGEST_CHUNK = 1 << 24

T = TypeVar("T")


class TensorMeta(NamedTuple):
    """Name in Hugging Face checkpoints, type and shape as sent."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class DecoderSource:
    """Every weight of a decoder, sharded or not, under its Hugging Face name.

    `lm_head.weight` is always sent, also where it is tied: samplers that repack their weights would keep the old one.
    """

    def __init__(self, parameters: Mapping[str, Tensor], config: ModelConfig, dtype: torch.dtype):
        self.parameters, self.config, self.dtype = parameters, config, dtype
        self.digests: dict[str, int] | None = None  # of the tensors of the pass so far, where they are asked for
        self._last = ""
        self._tensors: Iterator[tuple[str, Tensor]] | None = None

    def metadata(self) -> list[TensorMeta]:
        """What a pass will yield, in its order; gathers nothing."""
        found = []
        for name, parameter in self.parameters.items():
            whole = torch.empty(parameter.shape, dtype=self.dtype, device="meta")
            for part, view in huggingface_views({name: whole}, self.config).items():
                found += [TensorMeta(sent, self.dtype, tuple(view.shape)) for sent in self._names(part)]
        return found

    @property
    def num_bytes(self) -> int:
        """Of one pass."""
        return sum(meta.num_bytes for meta in self.metadata())

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self._tensors = self._gathered()
        return self._tensors

    @contextlib.contextmanager
    def shared_pass(self, version: int, side: str, with_digests: bool) -> Iterator[None]:
        """A pass that all ranks make, of which some send what they iterate to `side`. An error on this rank waits for
        the end of the pass, since the others gather every tensor, and wait for this one. Raises SyncError.
        """
        self._tensors, self._last = None, "none"
        self.digests = {} if with_digests else None
        try:
            yield
            self._finish()
        except Exception as error:  # vLLM's, a server's or torch's: to a run they are one failure
            last = self._last
            self._finish()
            raise SyncError(
                f"version {version} of the weights did not reach {side}; the last tensor that the trainer gave is "
                f"{last}: {error}"
            ) from error

    def _finish(self) -> None:
        for _ in self if self._tensors is None else self._tensors:
            pass

    def _gathered(self) -> Iterator[tuple[str, Tensor]]:
        tensors = full_tensors(self.parameters, self.config, self.dtype)
        while (found := _next_on_default_stream(tensors)) is not None:
            name, whole = found
            for sent in self._names(name):
                self._last = sent
                if self.digests is not None:
                    self.digests[sent] = digest(whole)
                yield sent, whole

    def _names(self, name: str) -> tuple[str, ...]:
        return (name, _HEAD) if name == _EMBEDDING and self.config.tie_embeddings else (name,)


def _next_on_default_stream(tensors: Iterator[tuple[str, Tensor]]) -> tuple[str, Tensor] | None:
    """Whatever the stream of the one who asks: ranks that gather on different streams would wait for each other for
    ever. Ready when it returns, and kept until that one has read it.
    """
    if not torch.cuda.is_initialized():
        return next(tensors, None)
    with torch.cuda.stream(torch.cuda.default_stream()):
        found = next(tensors, None)
        torch.cuda.current_stream().synchronize()
    if found is not None and found[1].is_cuda:
        found[1].record_stream(torch.cuda.current_stream())
    return found


def digest(tensor: Tensor) -> int:
    """A 64-bit checksum of a tensor's bytes and their places: equal on every device."""
    flat = tensor.detach().contiguous().view(-1)
    flat = flat.view(torch.uint8 if flat.nbytes % 4 else torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    # As many numbers as stay in the cache of a CPU; on a GPU enough to fill it.
    chunk = _DIGEST_CHUNK if tensor.is_cuda else _DIGEST_CHUNK // 16
    for first in range(0, flat.numel(), chunk):
        part = flat[first : first + chunk].long()
        places = torch.arange(first, first + part.numel(), device=tensor.device)
        total += ((part + 1) * (places * 0x9E3779B1 + 0x85EBCA77)).sum()  # modulo 2^64
    return int(total)


def shared_memory_parts(source: DecoderSource) -> Iterator[dict[str, Any]]:
    """Where a worker of vLLM's finds the weights: bucket by bucket in a file of memory, which is there until the next
    one is asked for.
    """
    for bucket in map(dict, in_buckets(source, lambda named: named[1].nbytes)):
        # A file without a name: no killed process leaves it behind, and a container's small /dev/shm is no limit.
        with open(os.memfd_create("flashgrpo_weights"), "wb") as file:
            for tensor in bucket.values():
                file.write(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            file.flush()
            yield {
                "file": f"/proc/{os.getpid()}/fd/{file.fileno()}",
                "dtype": str(source.dtype).removeprefix("torch."),
                "names": [*bucket],
                "shapes": [list(tensor.shape) for tensor in bucket.values()],
            }


def changes(source: DecoderSource, sent: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, tuple[int, ...]]]:
    """What of each tensor is not as it was sent before, which `sent` has, and is told: its name, the places in it, flat
    and int32, the values there, and its shape. At first that is all of it.
    """
    for name, tensor in source:
        flat = tensor.reshape(-1)
        if name not in sent:
            sent[name] = torch.full(flat.shape, math.nan, dtype=flat.dtype)
        last = sent[name]
        places = (flat != last.to(flat.device)).nonzero().view(-1)
        if len(places):
            values = flat[places]
            last[places.cpu()] = values.cpu()
            yield name, places.int(), values, tuple(tensor.shape)


def in_buckets(items: Iterable[T], num_bytes: Callable[[T], int]) -> Iterator[list[T]]:
    """Lists of them that come to BUCKET_BYTES, or a little more."""
    bucket, filled = [], 0
    for item in items:
        bucket.append(item)
        filled += num_bytes(item)
        if filled >= BUCKET_BYTES:
            yield bucket
            bucket, filled = [], 0
    if bucket:
        yield bucket


def check_digests(sent: Mapping[str, int], received: Mapping[str, int]) -> None:
    """Raises SyncError where a tensor is not what was sent."""
    wrong = [name for name in sent if received.get(name) != sent[name]]
    if wrong:
        raise SyncError(
            f"vLLM has not received what was sent: the checksum of {len(wrong)} of {len(sent)} tensors differs, of "
            f"{wrong[0]} first"
        )


def weight_shapes(config: ModelConfig) -> dict[str, list[int]]:
    """Of every tensor in a checkpoint of `config`, by name."""
    with torch.device("meta"):
        parameters = dict(Decoder(config).named_parameters())
    return {name: list(view.shape) for name, view in huggingface_views(parameters, config).items()}
