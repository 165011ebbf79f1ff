"""A decoding step as a CUDA graph: its kernels are queued by one call in place of a few hundred. No GPU has run it yet.

A graph is of fixed shapes and addresses. They last until the cache grows, every 128 steps or more,
or rows leave, an eighth at a time; the cache then tells the kernels anew where its rows are. What
changes from step to step (tokens, positions, lengths, keys) changes in place, on the device. Before
a capture torch waits for the device and gives its unused memory back.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from flashgrpo.grpo.rollout.kv_cache import KernelCache
from flashgrpo.kernels.decode_attention import DecodeRows
from flashgrpo.model.decoder import Decoder


class GraphedRun:
    """`Decoder.run` of one token a row. The first step of a layout runs as it is and compiles what is missing, the
    second is captured, and all from there on are replays.
    """

    def __init__(self, model: Decoder, cache: KernelCache):
        self.model, self.cache = model, cache
        self.layout: DecodeRows | None = None
        self.replay: Callable[[], None] | None = None

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Hidden states, [rows, hidden_size]; the next call overwrites them."""
        if self.layout is not self.cache.rows:
            self.layout, self.replay = self.cache.rows, None  # the graph's memory is free before the next is captured
            return self.model.run(tokens, positions, self.cache.attend)
        if self.replay is None:
            self.tokens = tokens.clone()
            self.replay, self.hidden = capture(lambda: self.model.run(self.tokens, positions, self.cache.attend))
        self.tokens.copy_(tokens)
        self.replay()
        return self.hidden


def capture(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """What does the kernels of `work` again, and where its result then lies. Capturing does not run them."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph.replay, result
