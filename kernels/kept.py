# pyright: reportGeneralTypeIssues=false
"""Logits limited to the tokens that a truncated sampler could have drawn: the sampling mask of its top-p and top-k.

The set of row i is ids[offsets[i] : offsets[i + 1]], in any order; without ids it is the whole vocabulary. Outside of
its set a row becomes -inf before anything is made of it, so that all that follows is of the smaller vocabulary:

    p_j = exp z_j / sum of exp z_k over the set     and 0 outside, as is the gradient, exactly

Log-probs over the set that was sampled from are what the sampler's are, at equal weights (DeepSeek-V3.2, arXiv
2512.02556, "Keep Sampling Mask").

A row is written once: 2 n vocab bytes in bf16, 0.24 ms at n = 4096, vocab = 128,256 and 4.3 TB/s, to the 16.4 ms of
the head's three products: 1.5%, not measured. Row kernels that read the set alone would save that and a read, 3% in
all, since d_logits is written whole for the products; they would be a second set of the hottest kernels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flashgrpo.kernels.common import by_triton, check_index, launch, tl, triton

Kept = tuple[Tensor, Tensor]  # ids [num_kept], offsets [n + 1]
BLOCK = 8192
NUM_WARPS = 4 if torch.version.hip else 8
_STEP = tl.constexpr(16)  # logits written 16 bytes at a time, but for the vocab % 16 at a row's end
_IDS = tl.constexpr(256)  # read at a time; most sets are smaller


@triton.jit(do_not_specialize=["first_row"])
def _keep_kernel(logits, targets, chosen, ids, offsets, values, first_row, vocab, row_stride, BLOCK: tl.constexpr):
    """A program takes a row: its kept logits go to `values`, and come back behind the -inf."""
    n = tl.program_id(0).to(tl.int64)
    source = first_row + n
    if chosen is not None:
        source = tl.load(chosen + n)
    begin, end = tl.load(offsets + source), tl.load(offsets + source + 1)
    row = logits + n * row_stride
    places, columns = tl.arange(0, _IDS), tl.arange(0, BLOCK)
    if begin < end:
        target, times_kept = tl.load(targets + source), tl.zeros([_IDS], tl.int32)
        for start in range(begin, end, _IDS):
            token = tl.load(ids + start + places, mask=start + places < end, other=-1)
            inside = (token >= 0) & (token < vocab)
            tl.store(values + start + places, tl.load(row + token, mask=inside), mask=inside)
            times_kept += (token == target).to(tl.int32)
        tl.debug_barrier()  # a row's logits are read by other threads than those that overwrite them
        whole = vocab // _STEP * _STEP
        rest = whole + tl.arange(0, _STEP)
        for start in range(0, whole, BLOCK):
            tl.store(row + start + columns, float("-inf"), mask=start + columns < whole)
        tl.store(row + rest, float("-inf"), mask=rest < vocab)
        tl.debug_barrier()
        for start in range(begin, end, _IDS):
            token = tl.load(ids + start + places, mask=start + places < end, other=-1)
            inside = (token >= 0) & (token < vocab)
            tl.store(row + token, tl.load(values + start + places, mask=inside), mask=inside)
        is_lost = (tl.sum(times_kept, 0) == 0) & (target >= 0) & (target < vocab)
        tl.store(row + target, float("nan"), mask=is_lost)


def check_kept(kept: Kept, targets: Tensor, vocab: int) -> None:
    """Raises TypeError and ValueError unless `kept` has sets for `targets`; what it holds is read on the CPU only."""
    pair = kept if isinstance(kept, tuple | list) else [kept]
    if len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair):
        found = ", ".join(type(part).__name__ for part in pair)
        raise TypeError(f"kept is ({found}); wanted None, or a pair of tensors (ids, offsets)")
    ids, offsets = kept
    check_index("kept ids", ids, targets.device, ids.numel())
    check_index("kept offsets", offsets, targets.device, targets.numel() + 1)
    if not ids.is_cpu or torch.compiler.is_compiling():
        return
    if offsets[0] != 0 or offsets[-1] != len(ids) or bool((offsets.diff() < 0).any()):
        raise ValueError(
            f"kept offsets go from {offsets[0]} to {offsets[-1]}; wanted them to rise from 0 to {len(ids)}"
        )
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
        raise ValueError(
            f"kept ids go from {ids.min()} to {ids.max()}; wanted ids of this vocabulary, 0 to {vocab - 1}"
        )


def keep_only(
    logits: Tensor,  # [rows, vocab], contiguous along rows
    targets: Tensor,  # [n]
    kept: Sequence[Tensor],  # ids [num_kept], offsets [n + 1]
    rows: slice | Tensor,  # those of n that the logits are of
) -> None:
    """Limits logits to their sets, in place. The target of a row with a set that lacks it becomes NaN."""
    (num_rows, vocab), (ids, offsets) = logits.shape, kept
    if not by_triton(logits):
        _keep_only_torch(logits, targets, ids, offsets, rows)
        return
    first_row, chosen = (rows.start or 0, None) if isinstance(rows, slice) else (0, rows)
    values = logits.new_empty(ids.shape)
    launch(
        _keep_kernel, (num_rows,), logits, targets, chosen, ids.contiguous(), offsets.contiguous(), values, first_row,
        vocab, logits.stride(0), BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip


def _keep_only_torch(logits: Tensor, targets: Tensor, ids: Tensor, offsets: Tensor, rows: slice | Tensor) -> None:
    begins, counts, targets = offsets[:-1][rows].long(), offsets.diff()[rows].long(), targets[rows].long()
    row = torch.arange(len(counts), device=logits.device).repeat_interleave(counts)
    within = torch.arange(len(row), device=logits.device) - (counts.cumsum(0) - counts)[row]
    outside = (counts > 0).unsqueeze(1).repeat(1, logits.shape[1])
    outside[row, ids[begins[row] + within].long()] = False
    logits.masked_fill_(outside, -torch.inf)
    in_range = (targets >= 0) & (targets < logits.shape[1])
    places = torch.where(in_range, targets, 0).unsqueeze(1)
    lost = outside.gather(1, places) & in_range.unsqueeze(1)
    logits.scatter_(1, places, torch.where(lost, torch.nan, logits.gather(1, places)))


@torch.library.custom_op("flashgrpo::only_kept", mutates_args=())
def only_kept(logits: Tensor, targets: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    """A copy of logits [..., vocab] limited to the sets; the gradient by it is that by the logits."""
    limited = logits.clone(memory_format=torch.contiguous_format)
    keep_only(limited.view(-1, logits.shape[-1]), targets.reshape(-1), (ids, offsets), slice(None))
    return limited


@only_kept.register_fake
def _(logits, targets, ids, offsets):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


only_kept.register_autograd(lambda ctx, gradient: (gradient, None, None, None))
