"""The trainer's weights on their way to a sampler: what is sent, and whether it arrived.

`DecoderSource` has the two channels that vLLM's weight transfer asks of its `WeightSource`: what will come, and the
tensors themselves, one gathered at a time on the default stream, in the sampler's type. All ranks iterate in lockstep.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from flashgrpo.grpo.errors import SyncError
from flashgrpo.model.checkpoint import empty_decoder
from flashgrpo.model.config import ModelConfig
from flashgrpo.model.decoder import huggingface_views
from flashgrpo.model.sharding import full_tensors

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_DIGEST_CHUNK = 1 << 24


class TensorMeta(NamedTuple):
    """Name in Hugging Face checkpoints, type and shape as sent."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class DecoderSource:
    """Every weight of a decoder, sharded or not, under its Hugging Face name.

    `lm_head.weight` is always sent, also where it is tied: samplers that repack their weights would keep the old one.
    """

    def __init__(self, parameters: Mapping[str, Tensor], config: ModelConfig, dtype: torch.dtype):
        self.parameters, self.config, self.dtype = parameters, config, dtype
        self.last = self.failed_at = "none"  # the newest tensor, and that at the first failure, for messages
        self.digests: dict[str, int] | None = None  # filled by the next pass where it is not None
        self._running: Iterator[tuple[str, Tensor]] | None = None

    def metadata(self) -> list[TensorMeta]:
        """What a pass will yield, in its order; gathers nothing."""
        shapes = {n: torch.empty(p.shape, dtype=self.dtype, device="meta") for n, p in self.parameters.items()}
        found = []
        for name, parameter in shapes.items():
            for part, view in huggingface_views({name: parameter}, self.config).items():
                found += [TensorMeta(sent, self.dtype, tuple(view.shape)) for sent in self._names(part)]
        return found

    @property
    def num_bytes(self) -> int:
        """Of one pass."""
        return sum(torch.Size(meta.shape).numel() * meta.dtype.itemsize for meta in self.metadata())

    @property
    def largest_bytes(self) -> int:
        """Of the largest tensor."""
        return max(torch.Size(meta.shape).numel() * meta.dtype.itemsize for meta in self.metadata())

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self._running = self._tensors()
        return self._running

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """Within it one pass is made, and to the end, also where the block fails: ranks that gather must all do so."""
        self._running, self.last, self.failed_at = None, "none", ""
        try:
            yield
        except Exception:
            self.note_failure()
            raise
        finally:
            for _ in self if self._running is None else self._running:
                pass

    def note_failure(self) -> None:
        """Remember where the pass is, unless it has failed before."""
        self.failed_at = self.failed_at or self.last

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        tensors = full_tensors(self.parameters, self.config, self.dtype)
        while (found := _next_on_default_stream(tensors)) is not None:
            name, whole = found
            for sent in self._names(name):
                self.last = sent
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
    chunk = _DIGEST_CHUNK if tensor.is_cuda else _DIGEST_CHUNK // 16
    for first in range(0, flat.numel(), chunk):
        part = flat[first : first + chunk].long()
        places = torch.arange(first, first + part.numel(), device=tensor.device)
        total += ((part + 1) * (places * 0x9E3779B1 + 0x85EBCA77)).sum()  # modulo 2^64
    return int(total)


def check_digests(sent: Mapping[str, int], received: Mapping[str, int]) -> None:
    """Raises SyncError where a tensor is not what was sent."""
    wrong = [name for name in sent if received.get(name) != sent[name]]
    if wrong or not sent:
        raise SyncError(
            f"vLLM has not received what was sent: the checksum of {len(wrong)} of {len(sent)} tensors differs, of "
            f"{wrong[0] if wrong else 'all'} first"
        )


def wanted_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of every tensor that a model of `config` takes, by name."""
    decoder = empty_decoder(config, torch.float32)
    wanted = {n: tuple(v.shape) for n, v in huggingface_views(dict(decoder.named_parameters()), config).items()}
    return {_HEAD: wanted[_EMBEDDING], **wanted}


def check_shapes(sent: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError for a tensor that the sampler's model has no place for, by name."""
    for name, shape in sent.items():
        if name not in wanted:
            raise ValueError(f"{name} has no place in the sampler's model")
        if shape != wanted[name]:
            found, place = list(shape), list(wanted[name])
            raise ValueError(f"{name} was sent with shape {found}; the sampler's model wants {place}")
