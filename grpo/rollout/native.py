"""The embedded generator: the trainer's own weights, one KV cache, the whole batch at once.

A prompt's keys and values are computed once and read by all of its completions; each completion
keeps only its own (kv_cache.py). One decoding step of `rows` live completions reads the weights
once, so its cost on a CPU is 2 N FLOPs a row and on a GPU the N weights' bytes. Finished rows leave
the batch once an eighth of it is idle, and so do the prompts of finished groups. A step waits for
the device once, when its tokens are copied to the host. `auto` takes this generator where vLLM is
not installed, and it is the reference that vLLM is tested against.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flashgrpo.grpo.rollout.graph import GraphedRun
from flashgrpo.grpo.rollout.kv_cache import IDLE_SHARE, KernelCache, open_cache, to_device
from flashgrpo.grpo.rollout.sync import DecoderSource
from flashgrpo.grpo.types import Request, Rollout, Sampling
from flashgrpo.kernels.attention import planned_attention
from flashgrpo.model.cpu import PackedWeights, product
from flashgrpo.model.decoder import Decoder, huggingface_views

_DRAWN_AHEAD = 64  # positions whose random numbers go to the device at once
PREFILL_TOKENS = 16_384  # of prompts in one pass, where no recipe says otherwise
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class NativeGenerator:
    """Samples from `model` as it stands when `generate` is called; `weight_version` is stamped on the rollouts.

    Prompts are run in passes of at most `prefill_tokens`, a longer one alone: what a pass holds is no more than that
    of a training micro-batch, however many prompts there are. `cuda_graphs` is rollout.cuda_graphs.
    """

    def __init__(
        self,
        model: Decoder,
        stop_token_ids: list[int],
        device: torch.device | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
        cuda_graphs: bool = False,
    ):
        self.model = model
        self.stop_token_ids = stop_token_ids
        self.device = device or model.lm_head_weight.device
        self.prefill_tokens = prefill_tokens
        self.cuda_graphs = cuda_graphs
        self.weight_version = 0

    def load_weights(self, source: DecoderSource, version: int) -> None:
        """Copy every weight into a model of the generator's own."""
        self.model.to_empty(device=self.device)
        parameters = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        weights = huggingface_views(parameters, self.model.config)
        for name, tensor in source:
            if name in weights:  # a tied head is sent twice
                weights[name].copy_(tensor)
        self.weight_version = version

    def free_weights(self) -> None:
        """Give the memory of the weights back until the next `load_weights`."""
        self.model.to("meta")
        self.weight_version = -1

    def close(self) -> None:
        """Nothing runs for it."""

    def generate(self, requests: list[Request], sampling: Sampling) -> Iterator[list[Rollout]]:
        """Yield each request's rollouts, in the order of its seeds, as soon as the last of them is done."""
        if not requests:
            return
        with torch.inference_mode():
            batch = _DecodingBatch(self, requests, sampling)
        while len(batch.rows):
            # Not around the `yield`: what the caller does with a group is no inference.
            with torch.inference_mode():
                finished = batch.step()
            for index in finished:
                yield batch.rollouts_of(index, self.weight_version)


class _DecodingBatch:
    """State of one call. A row is a completion; live rows sit in the first `len(self.rows)` places of the caches."""

    def __init__(self, generator: NativeGenerator, requests: list[Request], sampling: Sampling):
        model = generator.model
        self.model, self.requests, self.sampling = model, requests, sampling
        self.keeps_sets = sampling.is_truncated and sampling.kept_limit > 0
        self.device = model.lm_head_weight.device
        counts = [len(request.seeds) for request in requests]
        num_rows = sum(counts)
        self.seeds = np.concatenate([request.seeds for request in requests]).astype(np.uint64)
        self.stop_token_ids = np.array(generator.stop_token_ids, dtype=np.int64)
        self.tokens = np.zeros((num_rows, sampling.max_new_tokens), dtype=np.int64)
        self.logprobs = np.zeros((num_rows, sampling.max_new_tokens), dtype=np.float32)
        # Of each row and position the size of its kept set, and where in `kept_ids` of the position that ends.
        self.kept_counts, self.kept_ends = np.zeros((2, num_rows, sampling.max_new_tokens), dtype=np.int32)
        self.kept_ids: list[np.ndarray] = []
        self.lengths = np.zeros(num_rows, dtype=np.int64)
        self.stopped = np.zeros(num_rows, dtype=bool)

        self.rows = np.arange(num_rows)  # live rows, in cache order
        self.done = np.zeros(num_rows, dtype=bool)  # by cache place
        self.group_of_row = np.repeat(np.arange(len(requests)), counts)
        prompts = [request.prompt_ids for request in requests]
        self.cache = open_cache(model, [*map(len, prompts)], self.group_of_row, sampling.max_new_tokens)
        self.graphed = None
        if generator.cuda_graphs and isinstance(self.cache, KernelCache):
            self.graphed = GraphedRun(model, self.cache)
        self.position = 0  # tokens that the live rows have been given beyond their prompts
        # They do not change during a call, so that they are brought into the CPU's layout once, not at every step.
        self.weights = PackedWeights(model, num_rows)
        hidden = self._prefill(prompts, generator.prefill_tokens)
        self.hidden = hidden.index_select(0, to_device(self.group_of_row, self.device))

    def rollouts_of(self, index: int, weight_version: int) -> list[Rollout]:
        """Every completion of request `index`."""
        request, rollouts = self.requests[index], []
        for row in np.flatnonzero(self.group_of_row == index):
            length = self.lengths[row]
            rollout = Rollout(
                request.prompt_ids,
                self.tokens[row, :length].copy(),
                self.logprobs[row, :length].copy(),
                "stop" if self.stopped[row] else "length",
                request.group,
                weight_versions=((weight_version, int(length)),),
            )
            rollouts.append(self._with_sets(rollout, row) if self.keeps_sets else rollout)
        return rollouts

    def _with_sets(self, rollout: Rollout, row: int) -> Rollout:
        counts = self.kept_counts[row, : len(rollout.completion_ids)].copy()
        sets = []
        for ids, end, count in zip(self.kept_ids, self.kept_ends[row], counts, strict=False):
            sets.append(ids[end - count : end])
        return dataclasses.replace(rollout, kept_counts=counts, kept_ids=np.concatenate(sets))

    def step(self) -> list[int]:
        """Sample one token for every live row, run the decoder on them; returns the requests that are now complete."""
        with self.weights:
            logits = product(self.hidden, self.model.lm_head_weight)
        if self.position % _DRAWN_AHEAD == 0:
            self.uniforms = self._draw_uniforms()
        uniforms = self.uniforms[:, self.position % _DRAWN_AHEAD]
        tokens, logprobs, counts, kept_ids = sample_tokens(logits, uniforms, self.sampling)
        # One copy to the host a step, which waits for the device.
        columns = torch.stack([tokens.int(), logprobs.view(torch.int32), counts.int()], 1)
        sampled = torch.cat([columns, kept_ids.int()], 1).cpu().numpy()
        token_ids, counts = sampled[:, 0], sampled[:, 2]
        live = ~self.done
        place = self.rows[live], self.position
        self.tokens[place] = token_ids[live]
        self.logprobs[place] = sampled[live, 1].view(np.float32)
        if self.keeps_sets:
            self.kept_counts[place], self.kept_ends[place] = counts[live], counts.cumsum()[live]
            self.kept_ids.append(sampled[:, 3:][np.arange(kept_ids.shape[1]) < counts[:, None]])
        self.position += 1

        stops = (token_ids[:, None] == self.stop_token_ids).any(1)
        newly_done = live & (stops | (self.position == self.sampling.max_new_tokens))
        complete = []
        if newly_done.any():
            ended = self.rows[newly_done]
            self.lengths[ended] = self.position
            self.stopped[ended] = stops[newly_done]
            self.done |= newly_done
            live_groups = self.group_of_row[self.rows[~self.done]]
            complete = np.setdiff1d(self.group_of_row[ended], live_groups).tolist()
            if self.done.all():
                self.rows = self.rows[:0]
                return complete
            tokens = self._drop_idle_rows(tokens)
        positions = self.cache.prepare()
        with self.weights:
            if self.graphed:
                self.hidden = self.graphed(tokens, positions)
            else:
                self.hidden = self.model.run(tokens, positions, self.cache.attend)
        self.cache.advance()
        return complete

    def _draw_uniforms(self) -> Tensor:
        """Numbers in [0, 1) for the next positions, each from its row's seed and its position: [rows, 64] float64."""
        positions = np.arange(self.position, self.position + _DRAWN_AHEAD, dtype=np.uint64)
        bits = splitmix64(self.seeds[self.rows, None] ^ splitmix64(positions))
        return to_device((bits >> np.uint64(11)) * 2.0**-53, self.device)

    def _drop_idle_rows(self, tokens: Tensor) -> Tensor:
        # In steps: on a CPU every number of rows that a product meets costs memory for good (see model/cpu.py).
        step = max(1, len(self.seeds) // 16)
        spare = self.done & (np.cumsum(self.done) > -np.count_nonzero(~self.done) % step)
        if spare.sum() < max(1, IDLE_SHARE * len(self.rows)):
            return tokens
        keep = np.flatnonzero(~spare)
        self.rows, self.done = self.rows[keep], self.done[keep]
        self.cache.keep(keep)
        keep = to_device(keep, self.device)
        self.uniforms = self.uniforms.index_select(0, keep)
        return tokens.index_select(0, keep)

    def _prefill(self, prompts: list[list[int]], prefill_tokens: int) -> Tensor:
        """Run every prompt once, keep its keys and values; returns its last hidden state, [requests, hidden_size]."""
        first, hidden = 0, []
        for chunk in whole_chunks(prompts, prefill_tokens):
            hidden.append(self._prefill_chunk(first, chunk))
            first += len(chunk)
        return torch.cat(hidden)

    def _prefill_chunk(self, first: int, prompts: list[list[int]]) -> Tensor:
        """`_prefill` of the requests from `first` on, in one pass."""
        lengths = [len(prompt) for prompt in prompts]
        cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=self.device)
        # Tokens of no segment, for the same reason as in `_drop_idle_rows`.
        padding = [0] * (self.model.padded_tokens(sum(lengths)) - sum(lengths))
        input_ids = torch.tensor([*chain.from_iterable(prompts), *padding], device=self.device)
        positions = torch.tensor([*chain.from_iterable(map(range, lengths)), *padding], device=self.device)
        store = self.cache.store(first, lengths)
        plan = self.model.plan_attention(cu_seqlens, None, len(input_ids), max(lengths))

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            store(layer, k, v)
            return planned_attention(q, k, v, plan)

        hidden = self.model.run(input_ids, positions, attend)
        return hidden.index_select(0, cu_seqlens[1:].long() - 1)


def whole_chunks(prompts: Sequence[list[int]], most_tokens: int) -> Iterator[list[list[int]]]:
    """Runs of prompts, in order, of at most `most_tokens` tokens each; a longer prompt is a chunk of its own."""
    chunk, num_tokens = [], 0
    for prompt in prompts:
        if chunk and num_tokens + len(prompt) > most_tokens:
            yield chunk
            chunk, num_tokens = [], 0
        chunk.append(prompt)
        num_tokens += len(prompt)
    if chunk:
        yield chunk


def splitmix64(state: np.ndarray) -> np.ndarray:
    """One output of splitmix64 (Steele et al. 2014) for each uint64 state."""
    with np.errstate(over="ignore"):
        z = state + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def sample_tokens(
    logits: Tensor,  # [rows, vocab]
    uniforms: Tensor,  # [rows] float64 in [0, 1)
    sampling: Sampling,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw one token a row by inverting the distribution function; returns tokens [rows], their fp32
    log-probs [rows] and the sets drawn from, which top-k and top-p kept: sizes [rows] and ids
    [rows, width], of which a row's first are its set. The log-prob is that over the set; where the
    set is larger than `kept_limit`, and without truncation, it is over the whole vocabulary and the
    size is 0.

    At temperature 0 the log-prob is the model's own.
    """
    logits = logits.float()
    if sampling.temperature == 0:
        logprobs, tokens = torch.log_softmax(logits, dim=-1).max(dim=-1)
        return tokens, logprobs, torch.zeros_like(tokens), tokens[:, None][:, :0]
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    whole, order = torch.softmax(logits, dim=-1), None
    probs = whole
    if sampling.is_truncated:
        whole, order = whole.sort(dim=-1, descending=True, stable=True)
        probs = _truncate(whole, sampling)
    # In fp32 the sum over a vocabulary is too coarse for tokens of small probability.
    cdf = probs.cumsum(dim=-1, dtype=torch.float64)
    drawn = torch.searchsorted(cdf, (uniforms * cdf[:, -1])[:, None], right=True)
    places = drawn.clamp_max(logits.shape[-1] - 1)  # a product may round up to the last sum
    if order is None:
        tokens = places.squeeze(-1)
        return tokens, probs.gather(-1, places).squeeze(-1).log(), torch.zeros_like(tokens), places[:, :0]
    kept = (probs > 0).sum(-1)
    is_told = kept <= sampling.kept_limit
    logprobs = torch.where(is_told[:, None], probs.gather(-1, places), whole.gather(-1, places)).squeeze(-1).log()
    most = min(sampling.kept_limit, sampling.top_k or sampling.kept_limit)
    return order.gather(-1, places).squeeze(-1), logprobs, torch.where(is_told, kept, 0), order[:, :most]


def _truncate(sorted_probs: Tensor, sampling: Sampling) -> Tensor:
    """Keep the k likeliest, then the smallest set that holds top_p of what is left; renormalise. 0 elsewhere."""
    if sampling.top_k:
        left_out = max(0, sorted_probs.shape[1] - sampling.top_k)
        sorted_probs = F.pad(sorted_probs[:, : sampling.top_k], (0, left_out))
        sorted_probs = sorted_probs / sorted_probs.sum(dim=-1, keepdim=True)
    if sampling.top_p < 1:
        before = sorted_probs.cumsum(dim=-1) - sorted_probs
        # By their number: a GPU sums in parallel, where `before` may fall, and what is kept are the first of a row.
        kept = (before < sampling.top_p).sum(dim=-1, keepdim=True)
        sorted_probs = sorted_probs.masked_fill(torch.arange(before.shape[1], device=before.device) >= kept, 0)
        sorted_probs = sorted_probs / sorted_probs.sum(dim=-1, keepdim=True)
    return sorted_probs
