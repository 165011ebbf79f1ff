"""Keys and values of the tokens that the native generator has run: prompts once a group, completions a row.

`KernelCache` is for CUDA. `TorchCache` is what a CPU takes, what a head_dim without a kernel or
attention_backend = "torch" falls back to, and what the other is tested against. A row is a
completion, and the rows of a group stand side by side. All rows begin together, so that each has as
many keys of its own.
"""

import functools
import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flashgrpo.kernels.attention import HEAD_DIMS
from flashgrpo.kernels.common import by_triton
from flashgrpo.kernels.decode_attention import DecodeRows, decode_attention
from flashgrpo.model.config import ModelConfig
from flashgrpo.model.decoder import Decoder

IDLE_SHARE = 1 / 8
_ROOM = 64
_KERNEL_ROOM = 128  # its room is a multiple of it, so that few shapes occur

# (layer, k and v [tokens, num_kv_heads, head_dim]) of a pass over prompts
Store = Callable[[int, Tensor, Tensor], None]


class KVCache(Protocol):
    """What a decoding batch asks of its cache."""

    def store(self, first: int, lengths: list[int]) -> Store:
        """What keeps a pass over the prompts of the groups from `first` on, of these lengths, packed."""
        ...

    def prepare(self) -> Tensor:
        """Make room for a token more in each row; returns the positions of these tokens, [rows]."""
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keep each row's new k and v, [rows, num_kv_heads, head_dim]; q's attention, [rows, num_heads, head_dim]."""
        ...

    def advance(self) -> None:
        """All layers have kept the tokens that `prepare` was for."""
        ...

    def keep(self, kept: np.ndarray) -> None:
        """Only these rows go on, of those that there are; ascending."""
        ...


def open_cache(model: Decoder, prompt_lengths: list[int], group_of_row: np.ndarray, max_new_tokens: int) -> KVCache:
    """An empty cache for a model's dtype and device; rows of a group stand side by side, groups ascend."""
    weight = model.lm_head_weight
    has_kernel = by_triton(weight) and model.config.head_dim in HEAD_DIMS
    kind = KernelCache if has_kernel and model.attention_backend != "torch" else TorchCache
    return kind(model.config, weight.dtype, weight.device, prompt_lengths, group_of_row, max_new_tokens)


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """A copy that nothing waits for."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class KernelCache:
    """Read by `decode_attention`, tokens before heads, without padding between prompts.

    A row that has left stays where it is until the next time that room is made; no step copies.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        prompt_lengths: list[int],
        group_of_row: np.ndarray,
        max_new_tokens: int,
    ):
        self.device, self.max_new_tokens = device, max_new_tokens
        self.prompt_lengths = np.array(prompt_lengths)
        self.prompt_starts = np.cumsum(self.prompt_lengths) - self.prompt_lengths
        self.heads = config.num_kv_heads, config.head_dim
        self.new = functools.partial(torch.empty, dtype=dtype, device=device)
        total, layers = int(self.prompt_lengths.sum()), range(config.num_layers)
        self.prompts = [(self.new(total, *self.heads), self.new(total, *self.heads)) for _ in layers]
        self.own = [(self.new(0, 0, *self.heads), self.new(0, 0, *self.heads)) for _ in layers]
        self.room = self.length = 0  # tokens that a row may have, and has
        self.group = group_of_row  # of the live rows
        self.place = np.arange(len(group_of_row))  # theirs in `own`
        self._place_rows()

    def store(self, first: int, lengths: list[int]) -> Store:
        start = self.prompt_starts[first]
        tokens = slice(start, start + sum(lengths))

        def keep(layer: int, k: Tensor, v: Tensor) -> None:
            for cache, x in zip(self.prompts[layer], (k, v), strict=True):
                cache[tokens] = x[: sum(lengths)]

        return keep

    def prepare(self) -> Tensor:
        if self.length == self.room:
            # Twice as much each time: copies stay a constant share of the work, and nothing is held for lengths that
            # no completion reaches.
            most = math.ceil(self.max_new_tokens / _KERNEL_ROOM) * _KERNEL_ROOM
            self.room = min(max(2 * self.room, _KERNEL_ROOM), most)
            for layer, (keys, values) in enumerate(self.own):  # so that no more than one is there twice
                self.own[layer] = self._with_room(keys), self._with_room(values)
            self.place = np.arange(len(self.place))
            self._place_rows()
        return self.positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return decode_attention(q, k, v, self.prompts[layer], self.own[layer], self.rows)

    def advance(self) -> None:
        self.length += 1
        self.rows.length.add_(1)
        self.positions.add_(1)

    def keep(self, kept: np.ndarray) -> None:
        self.group, self.place = self.group[kept], self.place[kept]
        self._place_rows()

    def _with_room(self, cache: Tensor) -> Tensor:
        """The live rows of a layer's own keys or values, one behind the other."""
        grown = self.new(len(self.place), self.room, *self.heads)
        if self.length:
            torch.index_select(cache, 0, self.rows.place, out=grown[:, : self.length])
        return grown

    def _place_rows(self) -> None:
        """Tell the kernel where the rows are; groups without one are not read any more."""
        groups, sizes = np.unique(self.group, return_counts=True)
        lengths = self.prompt_lengths[groups]
        columns = {
            "first_row": np.append(0, np.cumsum(sizes)),
            "prompt_start": self.prompt_starts[groups],
            "prompt_length": lengths,
            "group": np.repeat(np.arange(len(groups)), sizes),
            "place": self.place,
            "length": np.full(len(self.place), self.length),
        }
        moved = {name: to_device(column.astype(np.int32), self.device) for name, column in columns.items()}
        self.rows = DecodeRows(**moved, widest=int(sizes.max(initial=0)), longest_prompt=int(lengths.max(initial=0)))
        self.positions = to_device(self.prompt_lengths[self.group] + self.length, self.device)


class TorchCache:
    """Read by torch's operators, heads before tokens. Prompts are padded to the longest.

    Where every prompt has one completion, that keeps the prompt's keys before its own: half the
    products.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        prompt_lengths: list[int],
        group_of_row: np.ndarray,
        max_new_tokens: int,
    ):
        self.device, self.num_kv_heads, self.max_new_tokens = device, config.num_kv_heads, max_new_tokens
        num_groups, longest = len(prompt_lengths), max(prompt_lengths)
        self.group = group_of_row  # of the live rows
        self.groups = np.arange(num_groups)  # those with a place among the prompts, ascending
        self.prompt_lengths = torch.tensor(prompt_lengths, device=device)
        self.shared = bool((np.bincount(group_of_row, minlength=num_groups) != 1).any())
        self.own_start = 0 if self.shared else longest  # where `own` has completions
        self.length = 0  # tokens of its own that each row has
        self._place_rows()

        inside = torch.arange(longest, device=device) < self.prompt_lengths[:, None]
        bias = torch.zeros_like(inside, dtype=dtype).masked_fill(~inside, float("-inf"))
        if not self.shared:
            bias = F.pad(bias, (0, max_new_tokens))
        self.prompt_bias = bias.repeat_interleave(self.num_kv_heads, dim=0)[:, None]

        # Zeros: past a prompt's end they are read with a weight of 0, which a NaN would survive.
        zeros = functools.partial(torch.zeros, dtype=dtype, device=device)
        self.prompts: list[tuple[Tensor, Tensor]] = []
        self.own: list[tuple[Tensor, Tensor]] = []
        heads, head_dim = num_groups * self.num_kv_heads, config.head_dim
        for _ in range(config.num_layers):
            if self.shared:
                self.prompts.append((zeros(heads, head_dim, longest), zeros(heads, longest, head_dim)))
                own = len(group_of_row), self.num_kv_heads, 0, head_dim
            else:
                own = num_groups, self.num_kv_heads, self._more(longest), head_dim
            self.own.append((zeros(own), zeros(own)))

    def store(self, first: int, lengths: list[int]) -> Store:
        longest = max(lengths)
        groups = slice(first, first + len(lengths))
        starts = torch.tensor(np.cumsum(lengths) - lengths, device=self.device)[:, None]
        columns = torch.arange(longest, device=self.device)
        places = (starts + columns).where(columns < self.prompt_lengths[groups, None], 0)

        def keep(layer: int, k: Tensor, v: Tensor) -> None:
            # [groups, num_kv_heads, longest, head_dim]
            keys, values = k[places].transpose(1, 2), v[places].transpose(1, 2)
            if self.shared:
                shape = -1, self.num_kv_heads
                prompt_keys, prompt_values = (x.unflatten(0, shape) for x in self.prompts[layer])
                prompt_keys[groups, ..., :longest] = keys.transpose(2, 3)
                prompt_values[groups, :, :longest] = values
            else:
                own_keys, own_values = self.own[layer]
                own_keys[groups, :, :longest] = keys
                own_values[groups, :, :longest] = values

        return keep

    def prepare(self) -> Tensor:
        return self.prompt_lengths.index_select(0, self.group_of_place) + self.length

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One query a row against its prompt's keys, shared by the group, and its own: one softmax over both."""
        rows, num_heads, head_dim = q.shape
        keys, values = self._append(layer, k, v)
        q = (q * head_dim**-0.5).view(len(keys), -1, head_dim)  # [rows * num_kv_heads, heads of one kv head, head_dim]
        if not self.shared:
            scores = torch.baddbmm(self.prompt_bias[..., : keys.shape[1]], q, keys.transpose(1, 2))
            weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
            return torch.bmm(weights, values).view(rows, num_heads, head_dim)

        prompt_keys, prompt_values = self.prompts[layer]
        longest = prompt_keys.shape[2]
        shared = torch.baddbmm(self.prompt_bias, self._by_group(q), prompt_keys)
        scores = torch.cat([self._by_row(shared, q.shape[1]), torch.bmm(q, keys.transpose(1, 2))], dim=-1)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        shared = torch.bmm(self._by_group(weights[..., :longest]), prompt_values)
        out = torch.baddbmm(self._by_row(shared, q.shape[1]), weights[..., longest:], values)
        return out.view(rows, num_heads, head_dim)

    def advance(self) -> None:
        self.length += 1

    def keep(self, kept: np.ndarray) -> None:
        keep = to_device(kept, self.device)
        written = self.own_start + self.length
        for layer, (k, v) in enumerate(self.own):
            # Layer by layer, so that no more than one is there twice.
            room = k.shape[2]
            self.own[layer] = _moved(k, written, room, keep), _moved(v, written, room, keep)
        self.group = self.group[kept]
        self._drop_finished_groups()
        self._place_rows()

    def _drop_finished_groups(self) -> None:
        kept = np.unique(self.group)
        if len(self.groups) - len(kept) < IDLE_SHARE * len(self.groups):  # all layers' prompts are copied
            return
        keep = np.searchsorted(self.groups, kept)
        rows = (keep[:, None] * self.num_kv_heads + np.arange(self.num_kv_heads)).ravel()
        heads = to_device(rows, self.device)
        self.groups = kept
        self.prompts = [(k.index_select(0, heads), v.index_select(0, heads)) for k, v in self.prompts]
        self.prompt_bias = self.prompt_bias.index_select(0, heads)
        self.prompt_lengths = self.prompt_lengths.index_select(0, to_device(keep, self.device))

    def _place_rows(self) -> None:
        """Lay the live rows of each group side by side in a grid [groups, width]: a prompt's keys are read by group."""
        groups = np.searchsorted(self.groups, self.group)  # places among the prompts
        num_groups = len(self.groups)
        counts = np.bincount(groups, minlength=num_groups)
        within = np.arange(len(groups)) - np.repeat(np.cumsum(counts) - counts, counts)
        self.grid_width = int(counts.max(initial=0))
        slots = groups * self.grid_width + within
        row_of_slot = np.zeros(num_groups * self.grid_width, dtype=np.int64)
        row_of_slot[slots] = np.arange(len(groups))
        self.group_of_place = to_device(groups, self.device)
        self.slots = to_device(slots, self.device)
        self.row_of_slot = to_device(row_of_slot, self.device)

    def _by_group(self, x: Tensor) -> Tensor:
        """[rows * num_kv_heads, n, d] -> [groups * num_kv_heads, width * n, d], whatever in the slots without a row."""
        rows, (n, d) = len(self.group), x.shape[1:]
        grid = x.reshape(rows, -1).index_select(0, self.row_of_slot)
        grid = grid.view(len(self.groups), self.grid_width, self.num_kv_heads, n, d).transpose(1, 2)
        return grid.reshape(len(self.groups) * self.num_kv_heads, self.grid_width * n, d)

    def _by_row(self, x: Tensor, n: int) -> Tensor:
        """[groups * num_kv_heads, width * n, d] -> [rows * num_kv_heads, n, d]."""
        d = x.shape[2]
        grid = x.view(len(self.groups), self.num_kv_heads, self.grid_width, n, d).transpose(1, 2)
        rows = grid.reshape(len(self.row_of_slot), -1).index_select(0, self.slots)
        return rows.view(len(self.group) * self.num_kv_heads, n, d)

    def _more(self, room: int) -> int:
        """Twice as much each time: copies stay a constant share of the work, and nothing is held for lengths that no
        completion reaches.
        """
        return min(max(2 * room, _ROOM), self.own_start + self.max_new_tokens)

    def _append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the rows' newest keys and values; returns all, [rows * num_kv_heads, cached tokens, head_dim] each."""
        (keys, values), filled = self.own[layer], self.own_start + self.length + 1
        room = keys.shape[2]
        if room < filled:
            room = self._more(room)
            keys, values = _moved(keys, filled - 1, room), _moved(values, filled - 1, room)
            self.own[layer] = keys, values
        keys.select(2, filled - 1).copy_(k)
        values.select(2, filled - 1).copy_(v)
        return keys.flatten(0, 1)[:, :filled], values.flatten(0, 1)[:, :filled]


def _moved(cache: Tensor, written: int, room: int, keep: Tensor | None = None) -> Tensor:
    """The first `written` tokens of all rows, or of those in `keep`, in a cache with room for `room` tokens."""
    rows = cache.shape[0] if keep is None else len(keep)
    moved = cache.new_empty(rows, cache.shape[1], room, cache.shape[3])
    filled = cache[:, :, :written]
    moved[:, :, :written] = filled if keep is None else filled.index_select(0, keep)
    return moved
