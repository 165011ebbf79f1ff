"""What attention's kernels must pass before `bench attention` times them: random packs, an oracle, repetitions."""

import random
from collections.abc import Callable
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from flashgrpo.bench.cases import Case, Inputs, Results, as_float64, attention_mask

_KV_HEADS, _RATIOS = 2, (1, 2, 6, 8)  # query heads a kv head
_RMS_ROOM, _LARGEST_ROOM, _FLOOR = 1.1, 1.5, 1e-6
_SIZE_ROOM = 5e-4  # a gradient that is 0.1% too large hides in the rounding of bf16, but not as a whole
_CASE = Case("attention", torch.bfloat16, {})  # any attention, for what plain torch makes of it
Attend = Callable[[Inputs], Tensor]


def random_pack(seed: int, longest: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Prompts with completions, of 0, 1 and up to `longest` tokens, and behind them rows in no segment. These hold NaN,
    and so do three segments.
    """
    rng, normal = random.Random(seed), torch.Generator(device).manual_seed(seed)
    lengths, prefix = [], []
    for num_completions in (0, 3, 1, 5):
        prefix += [-1] + [len(lengths)] * num_completions
        lengths += [rng.choice((0, 1, 128, *rng.choices(range(2, longest), k=5))) for _ in range(1 + num_completions)]
    offsets = [0, *accumulate(lengths)]
    total, num_heads = offsets[-1] + rng.randrange(1, 150), _KV_HEADS * _RATIOS[seed % len(_RATIOS)]
    inputs: Inputs = {"max_seqlen": max(lengths)}
    for name, index in (("cu_seqlens", offsets), ("prefix", prefix)):
        inputs[name] = torch.tensor(index, dtype=torch.int32, device=device)
    spoilt = [*rng.sample([*pairwise(offsets)], 3), (offsets[-1], total)]
    for name, heads in {"q": num_heads, "k": _KV_HEADS, "v": _KV_HEADS, "d_out": num_heads}.items():
        inputs[name] = torch.randn(total, heads, head_dim, generator=normal, device=device, dtype=dtype)
        for start, stop in spoilt:
            inputs[name][start:stop] = torch.nan
        inputs[name].requires_grad_(name != "d_out")
    return inputs


def run(attend: Attend, inputs: Inputs) -> Results:
    """out, d_q, d_k and d_v."""
    return _CASE.gradients({"out": attend(inputs)}, inputs)


def find_fault(attend: Attend, inputs: Inputs) -> str:
    """What is wrong with a pack's output and gradients, if anything. Rows that see a NaN may hold what they will."""
    covered, clean = int(inputs["cu_seqlens"][-1]), dict(inputs)
    for name in ("q", "k", "v", "d_out"):
        clean[name] = inputs[name].detach()[:covered].nan_to_num(0.0).requires_grad_(inputs[name].requires_grad)
    ours, torchs, exact = run(attend, inputs), _CASE.plain(clean), _CASE.plain(as_float64(clean))
    sees = attention_mask(clean)
    queries = ~(sees & inputs["q"][:covered].isnan().any(2).any(1)).any(1)  # those that see no NaN
    keys = ~(sees & ~queries[:, None]).any(0)  # those that no others see
    for name, rows in {"out": queries, "d_q": queries, "d_k": keys, "d_v": keys}.items():
        if ours[name][covered:].any():
            return f"{name} is not 0 in rows of no segment"
        found, plains, true = (x[name][:covered][rows].double() for x in (ours, torchs, exact))
        for kind, room, order in (("RMS", _RMS_ROOM, 2), ("largest", _LARGEST_ROOM, torch.inf)):
            error, allowed, scale = (torch.linalg.vector_norm(x, order) for x in (found - true, plains - true, true))
            if not error <= room * allowed + _FLOOR * scale:
                return f"{name}: {kind} error {error / allowed:.3g} times torch's, wanted at most {room}"
        size = (found * true).sum() / true.square().sum()
        if not abs(size - 1) <= _SIZE_ROOM:
            return f"{name} is {size:.5f} times what it should be"
    return ""


def find_change(attend: Attend, inputs: Inputs, repetitions: int) -> str:
    """The first of the repetitions, if any, that is not bit for bit the run before them."""
    first = run(attend, inputs)
    changed = torch.zeros(repetitions, dtype=torch.bool, device=inputs["q"].device)
    for i in range(repetitions):
        for name, again in run(attend, inputs).items():
            changed[i] |= (again.view(torch.int16) != first[name].view(torch.int16)).any()
    found = changed.nonzero()  # here alone the host waits
    return f"repetition {int(found[0])} of {repetitions} is another than the run before" if len(found) else ""
