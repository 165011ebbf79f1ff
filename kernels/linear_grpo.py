"""Log-probabilities, or the policy loss and its gradients, from hidden states; at most a chunk of logits at a time.

For n rows, hidden size H and vocabulary V, chunk by chunk:

    logits   = hidden_chunk @ weight^T          2 n V H FLOPs
    logprob, entropy, d_logits                  logprob.py and grpo_loss.py, made where the logits were
    d_hidden = d_logits @ weight                2 n V H
    d_weight += d_logits^T @ hidden_chunk       2 n V H, in fp32

`linear_grpo_loss` makes the gradients in its forward pass, so logits are computed once: 6 n V H FLOPs against 8 n V H
for what recomputes them. A sequence-level ratio needs all log-probs before any gradient, so it costs 8 n V H. Beyond
its inputs it holds d_hidden [n, H], d_weight [V, H] in fp32 and one chunk of logits, which the kernels turn into their
gradient in place (in torch three chunks, in fp32). Gradients pass through the logits' dtype before the denominator: in
fp16 an advantage times a ratio above 65,504 overflows.

Every chunk reads the weight and reads and writes d_weight, 10 V H bytes against 6 V H FLOPs a row: with r rows a chunk
that is 306 / r of the GEMMs' time on an H200 (4.3 TB/s, 790 TFLOP/s), so 5% at 6,144. So on CUDA r is 6,144 rows of
16-bit or 3,072 of fp32 logits, which also is what 5% of full fp32 logits hold for 64k targets; on a CPU it is as many
as have their fp32 logits in 2 MiB of cache, and at least 256.

Both functions make log-probs by the same GEMM and `logprob.row_logprob`, so with equal chunks they agree bit for bit,
and autocast changes neither.
Not done here: vocabulary-parallel heads, a bias, logit soft-capping. Sources: Wijmans et al., Cut Your Losses, arXiv
2411.09009; Hsu et al., Liger Kernel, arXiv 2410.10989.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flashgrpo.kernels.common import accumulation_dtype, backward_once, by_triton, check_index, check_temperature
from flashgrpo.kernels.grpo_loss import or_nothing, with_gradients
from flashgrpo.kernels.logprob import TritonRows
from flashgrpo.kernels.logprob_torch import RowLogprobs, row_logprobs
from flashgrpo.kernels.loss_config import LossConfig, LossInputs
from flashgrpo.kernels.loss_torch import Stats, TokenInputs, TokenLoss, per_token_stats, summed, token_losses
from flashgrpo.kernels.loss_triton import (
    KernelInputs,
    RowLoss,
    empty_sums,
    launch_loss,
    launch_sums,
    move_live_rows,
    named_metrics,
)

_CPU_CACHE = 2 << 20  # bytes
_MIN_CPU_CHUNK = 256
_CUDA_CHUNK_BYTES = 12_288  # of one column of logits
_COMPACT_BELOW = 0.9
# A chunk's logits, whose memory it may use up, and their rows -> their gradient, None where nobody needs it; and which
# of the chunk's rows it has, None for all.
Step = Callable[[Tensor, slice | Tensor], tuple[Tensor | None, Tensor | None]]


class Head(NamedTuple):
    """How the head is computed: the settings that all its chunks share."""

    temperature: float
    chunk_tokens: int
    logits_dtype: torch.dtype


def linear_logprobs(
    hidden: Tensor,  # [n, hidden_size]
    lm_head_weight: Tensor,  # [vocab, hidden_size]
    targets: Tensor,  # [n] int32 or int64
    *,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    logits_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # [n], [n]
    """Log-probabilities of `targets` and entropies of softmax(hidden @ lm_head_weight^T / temperature), in nats.

    Both are fp32 (float64 for float64) and differentiable once; the backward pass computes the logits again. Targets
    as in `gather_logprobs`. `logits_dtype` is hidden's dtype (None) or torch.float32, `chunk_tokens` the number of
    rows whose logits exist at once.

    Raises ValueError for shapes that do not fit together, a temperature that is not above 0, fewer than one token a
    chunk and another logits_dtype; TypeError for wrong dtypes.
    """
    head = _make_head(hidden, lm_head_weight, targets, temperature, chunk_tokens, logits_dtype)
    return _linear_logprobs_op(hidden, lm_head_weight, targets.contiguous(), *head)


def linear_grpo_loss(
    hidden: Tensor,  # [num_targets, hidden_size]
    lm_head_weight: Tensor,  # [vocab, hidden_size]
    targets: Tensor,  # [num_targets] int32 or int64
    target_cu_seqlens: Tensor,  # [num_completions + 1] int32 or int64
    config: LossConfig,
    *,
    denominator: float | Tensor,
    rewards: Tensor | None = None,  # [num_groups, group_size]
    sequence_ids: Tensor | None = None,  # [num_completions], entries of rewards.flatten()
    advantages: Tensor | None = None,  # [num_completions]
    old_logprobs: Tensor | None = None,  # [num_targets]
    ref_logprobs: Tensor | None = None,  # [num_targets]
    behavior_logprobs: Tensor | None = None,  # [num_targets]
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    logits_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Stats]:
    """`logits_grpo_loss` of hidden @ lm_head_weight^T, with the gradients made in the forward pass.

    The gradients are made only for those of hidden and lm_head_weight that require them, and wait for the backward
    pass, which multiplies them by the upstream scalar over the denominator and cannot be differentiated again. Rows
    whose gradient is exactly 0 leave the gradient GEMMs where fewer than 90% of a chunk are live. To count them the
    host waits for the device once a chunk, so under torch.compile all rows stay.

    Loss, metrics and arguments are those of `logits_grpo_loss`, the rest as in `linear_logprobs`; raises what they
    raise.
    """
    head = _make_head(hidden, lm_head_weight, targets, temperature, chunk_tokens, logits_dtype)
    targets = targets.contiguous()
    inputs = LossInputs(
        config, target_cu_seqlens, denominator, rewards, sequence_ids, advantages, old_logprobs, ref_logprobs,
        behavior_logprobs, targets,
    ).checked(_per_target(hidden, targets))  # fmt: skip
    needed = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, lm_head_weight)]
    compact = not torch.compiler.is_compiling()
    with torch.no_grad():
        if by_triton(hidden):
            arguments = KernelInputs.of(inputs)
            loss, metrics, logprobs, entropies, d_hidden, d_weight = _linear_loss_op(
                hidden, lm_head_weight, arguments.tensors, arguments.numbers, *head, compact, needed
            )
            stats = named_metrics(metrics, inputs, with_entropy=True) | per_token_stats(logprobs, entropies)
            gradients = d_hidden if needed[0] else None, d_weight if needed[1] else None
        else:
            made = Gradients.zeros(hidden, lm_head_weight, *needed)
            loss, stats = _torch_loss(hidden, lm_head_weight, head, inputs, made, compact)
            gradients = made.d_hidden, made.d_weight
    return with_gradients(loss, (hidden, lm_head_weight), gradients, inputs.denominator), stats


def default_chunk_tokens(vocab_size: int, itemsize: int, on_cuda: bool) -> int:
    """Rows whose logits, of `itemsize` bytes each, exist at once."""
    return _CUDA_CHUNK_BYTES // itemsize if on_cuda else max(_MIN_CPU_CHUNK, _CPU_CACHE // (4 * vocab_size))


def _make_head(
    hidden: Tensor,  # [n, hidden_size]
    weight: Tensor,  # [vocab, hidden_size]
    targets: Tensor,  # [n]
    temperature: float,
    chunk_tokens: int | None,
    logits_dtype: torch.dtype | None,
) -> Head:
    """Checks the arguments that both functions have, and fills in the defaults. Raises as `linear_logprobs` says."""
    if hidden.dim() != 2:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}; wanted [n, hidden_size]")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or not weight.shape[0]:
        raise ValueError(f"lm_head_weight has shape {tuple(weight.shape)}; wanted [vocab, {hidden.shape[1]}]")
    if not hidden.is_floating_point() or weight.dtype != hidden.dtype:
        raise TypeError(f"hidden is {hidden.dtype} and lm_head_weight {weight.dtype}; wanted one floating dtype")
    if weight.device != hidden.device:
        raise ValueError(f"hidden is on {hidden.device} and lm_head_weight on {weight.device}; wanted one device")
    check_index("targets", targets, hidden.device, hidden.shape[0])
    check_temperature(temperature)
    logits_dtype = logits_dtype or hidden.dtype
    allowed = {hidden.dtype, accumulation_dtype(hidden.dtype)}
    if logits_dtype not in allowed:
        raise ValueError(f"logits_dtype is {logits_dtype}; wanted one of {', '.join(map(str, allowed))}")
    if chunk_tokens is None:
        chunk_tokens = default_chunk_tokens(weight.shape[0], logits_dtype.itemsize, hidden.is_cuda)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; wanted 1 or above")
    return Head(temperature, chunk_tokens, logits_dtype)


@dataclass(frozen=True)
class Gradients:
    """Gradients before the denominator, None where nobody needs them."""

    d_hidden: Tensor | None  # [n, hidden_size], hidden's dtype
    d_weight: Tensor | None  # [vocab, hidden_size], fp32 or float64

    @classmethod
    def zeros(cls, hidden: Tensor, weight: Tensor, need_d_hidden: bool, need_d_weight: bool) -> "Gradients":
        return cls(
            d_hidden=torch.zeros_like(hidden) if need_d_hidden else None,
            d_weight=torch.zeros_like(weight, dtype=accumulation_dtype(weight.dtype)) if need_d_weight else None,
        )

    @property
    def needed(self) -> bool:
        return self.d_hidden is not None or self.d_weight is not None

    def add(self, d_logits: Tensor, hidden: Tensor, weight: Tensor, rows: slice | Tensor) -> None:
        """Adds what the rows `rows` contribute, by their d_logits and hidden states."""
        if d_logits.is_cuda:  # 16-bit products also of fp32 logits' gradients
            d_logits = d_logits.to(weight.dtype)
        if self.d_hidden is not None and isinstance(rows, slice):
            torch.mm(d_logits.to(weight.dtype), weight, out=self.d_hidden[rows])
        elif self.d_hidden is not None:
            self.d_hidden[rows] = d_logits.to(weight.dtype) @ weight
        if self.d_weight is None:
            return
        if d_logits.is_cuda and d_logits.dtype == hidden.dtype != self.d_weight.dtype:
            torch.addmm(self.d_weight, d_logits.T, hidden, out_dtype=self.d_weight.dtype, out=self.d_weight)
        else:
            self.d_weight.addmm_(d_logits.T.to(self.d_weight.dtype), hidden.to(self.d_weight.dtype))


def sweep(
    hidden: Tensor,  # [n, hidden_size]
    weight: Tensor,  # [vocab, hidden_size]
    head: Head,
    step: Step,
    gradients: Gradients | None = None,
    rows: Tensor | None = None,  # [num_rows], those to visit; None: all
) -> None:
    """Gives `step` the logits, chunk by chunk, and adds what it makes of them to `gradients`."""
    num_rows = hidden.shape[0] if rows is None else rows.shape[0]
    logits_weight = weight if weight.is_cuda else weight.to(head.logits_dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, num_rows, head.chunk_tokens):
            chunk = slice(start, start + head.chunk_tokens)
            chosen = chunk if rows is None else rows[chunk]
            inputs = hidden[chosen]
            d_logits, live = step(_logits(inputs, logits_weight, head, hidden.shape[0]), chosen)
            if d_logits is not None and gradients is not None:
                if live is not None:  # of all rows, so that a chunk's begin at `start`
                    inputs, chosen = inputs[live], start + live
                gradients.add(d_logits, inputs, weight, chosen)
            del d_logits  # before the next chunk's are made


def _logits(hidden: Tensor, weight: Tensor, head: Head, num_tokens: int) -> Tensor:
    rows = hidden.shape[0]
    # The library chooses a product's order of summation by its shape, so the last of several chunks is as long as all.
    if by_triton(hidden) and num_tokens > head.chunk_tokens > rows:
        hidden = torch.nn.functional.pad(hidden, (0, 0, 0, head.chunk_tokens - rows))
    if weight.dtype != head.logits_dtype:  # on CUDA: 16-bit products are summed in fp32 anyway
        return torch.mm(hidden, weight.T, out_dtype=head.logits_dtype)[:rows]
    return (hidden.to(weight.dtype) @ weight.T)[:rows]


def _softmax(logits: Tensor, targets: Tensor, temperature: float) -> RowLogprobs | TritonRows:
    if by_triton(logits):
        return TritonRows.of(logits, targets, temperature)
    return row_logprobs(logits, targets, temperature, overwrite=True)


def score(hidden: Tensor, weight: Tensor, targets: Tensor, head: Head) -> tuple[Tensor, Tensor]:  # [n], [n]
    """Log-probs and entropies."""
    logprobs, entropies = _per_target(hidden, targets), _per_target(hidden, targets)

    def step(logits: Tensor, rows: slice | Tensor) -> tuple[None, None]:
        found = _softmax(logits, targets[rows], head.temperature)
        logprobs[rows], entropies[rows] = found.logprobs, found.entropy
        return None, None

    sweep(hidden, weight, head, step)
    return logprobs, entropies


def recompute(
    gradients: Gradients,
    hidden: Tensor,  # [n, hidden_size]
    weight: Tensor,  # [vocab, hidden_size]
    targets: Tensor,  # [n]
    head: Head,
    d_logprobs: Tensor,  # [n]
    d_entropies: Tensor | None,  # [n]
    compact: bool,
) -> None:
    """The logits once more, when the gradients by log-prob and entropy are known; dead rows leave all three GEMMs."""

    def step(logits: Tensor, rows: slice | Tensor) -> tuple[Tensor, None]:
        found = _softmax(logits, targets[rows], head.temperature)
        upstream = d_logprobs[rows], None if d_entropies is None else d_entropies[rows]
        return found.gradients(targets[rows], *upstream, head.temperature), None

    live = _live_rows(d_logprobs, d_entropies) if compact else None
    sweep(hidden, weight, head, step, gradients, live)


def _live_rows(d_logprobs: Tensor, d_entropies: Tensor | None) -> Tensor | None:
    """Indices of the rows whose gradient is not exactly 0, or None where these are nearly all. Waits for the device."""
    live = d_logprobs != 0 if d_entropies is None else (d_logprobs != 0) | (d_entropies != 0)
    rows = live.nonzero().squeeze(1)
    return rows if rows.shape[0] < _COMPACT_BELOW * live.shape[0] else None


def _torch_loss(
    hidden: Tensor, weight: Tensor, head: Head, inputs: LossInputs, gradients: Gradients, compact: bool
) -> tuple[Tensor, Stats]:
    """What `_linear_loss_op` does, by the torch twins."""
    targets = inputs.targets
    assert targets is not None
    tokens = TokenInputs.of(inputs, _per_target(hidden, targets))
    d_entropies = tokens.d_entropies
    if inputs.config.ratio_level == "sequence":
        logprobs, entropies = score(hidden, weight, targets, head)
        terms = token_losses(logprobs, tokens)
        if gradients.needed:
            recompute(gradients, hidden, weight, targets, head, terms.d_logprob, d_entropies, compact)
        return summed(terms, logprobs, entropies, tokens, inputs.denominator)
    logprobs, entropies = _per_target(hidden, targets), _per_target(hidden, targets)
    parts: list[TokenLoss] = []

    def step(logits: Tensor, rows: slice | Tensor) -> tuple[Tensor | None, Tensor | None]:
        assert isinstance(rows, slice)
        wanted = targets[rows]
        found = row_logprobs(logits, wanted, head.temperature, overwrite=True)
        logprobs[rows], entropies[rows] = found.logprobs, found.entropy
        parts.append(token_losses(found.logprobs, tokens.rows(rows)))
        if not gradients.needed:
            return None, None
        d_logprob, d_entropy = parts[-1].d_logprob, None if d_entropies is None else d_entropies[rows]
        live = _live_rows(d_logprob, d_entropy) if compact else None
        if live is not None:
            found, wanted, d_logprob = found.select(live), wanted[live], d_logprob[live]
            d_entropy = None if d_entropy is None else d_entropy[live]
        return found.gradients(wanted, d_logprob, d_entropy, head.temperature), live

    sweep(hidden, weight, head, step, gradients)
    if not parts:  # no tokens
        return summed(token_losses(logprobs, tokens), logprobs, entropies, tokens, inputs.denominator)
    columns = zip(*parts, strict=True)
    terms = TokenLoss._make(None if column[0] is None else torch.cat(column) for column in columns)
    return summed(terms, logprobs, entropies, tokens, inputs.denominator)


@torch.library.custom_op("flashgrpo::linear_grpo_loss", mutates_args=())
def _linear_loss_op(
    hidden: Tensor, weight: Tensor, tensors: Sequence[Tensor | None], numbers: Sequence[float],
    temperature: float, chunk_tokens: int, logits_dtype: torch.dtype, compact: bool, needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, metrics, logprobs, entropies, d_hidden, d_weight), the gradients before the denominator."""
    inputs = KernelInputs._make((*tensors, *numbers))
    head, gradients = Head(temperature, chunk_tokens, logits_dtype), Gradients.zeros(hidden, weight, *needed)
    targets = inputs.targets
    assert targets is not None
    if inputs.at_sequence_level:
        logprobs, entropies = score(hidden, weight, targets, head)
        d_logprobs, d_entropies, partials = launch_loss(logprobs, entropies, inputs)
        if gradients.needed:
            recompute(gradients, hidden, weight, targets, head, d_logprobs, d_entropies, compact)
    else:
        # The denominator comes after the GEMMs: 1e-6 of it would be 0 in fp16.
        loss = RowLoss(hidden, inputs._replace(denominator_tensor=None, denominator=1.0), temperature)

        def step(logits: Tensor, rows: slice | Tensor) -> tuple[Tensor | None, Tensor | None]:
            assert isinstance(rows, slice)
            loss.take(logits, logits if gradients.needed else None, rows.start)
            if not gradients.needed:
                return None, None
            live = loss.live[rows]
            # The host waits here, once in 19 TFLOP at 6,144 x 4,096 x 128k. To hide the wait behind the next chunk's
            # logits would take a second chunk of memory.
            num_live = int(live.sum()) if compact else live.shape[0]
            if num_live >= _COMPACT_BELOW * live.shape[0]:
                return logits, None
            sources = move_live_rows(logits, live, num_live)
            return logits[:num_live], sources

        sweep(hidden, weight, head, step, gradients)
        logprobs, entropies, partials = loss.logprobs, loss.entropies, loss.partials
    made = or_nothing(gradients.d_hidden, hidden), or_nothing(gradients.d_weight, hidden)
    return *launch_sums(partials, inputs), logprobs, entropies, *made


@_linear_loss_op.register_fake
def _(hidden, weight, tensors, numbers, temperature, chunk_tokens, logits_dtype, compact, needed):
    logprobs = _per_target(hidden, tensors[0])
    d_hidden = torch.empty_like(hidden) if needed[0] else hidden.new_empty(0)
    d_weight = torch.empty_like(weight, dtype=torch.float32) if needed[1] else hidden.new_empty(0)
    return *empty_sums(hidden), logprobs, torch.empty_like(logprobs), d_hidden, d_weight


@torch.library.custom_op("flashgrpo::linear_logprobs", mutates_args=())
def _linear_logprobs_op(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk_tokens: int, logits_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return score(hidden, weight, targets, Head(temperature, chunk_tokens, logits_dtype))


@_linear_logprobs_op.register_fake
def _(hidden, weight, targets, *_head):
    return _per_target(hidden, targets), _per_target(hidden, targets)


@torch.library.custom_op("flashgrpo::linear_logprobs_bwd", mutates_args=())
def _linear_logprobs_bwd(
    hidden: Tensor, weight: Tensor, targets: Tensor, d_logprobs: Tensor, d_entropies: Tensor | None,
    temperature: float, chunk_tokens: int, logits_dtype: torch.dtype, needed: Sequence[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    gradients = Gradients.zeros(hidden, weight, *needed)
    head = Head(temperature, chunk_tokens, logits_dtype)
    # To count live rows would wait for the device.
    recompute(gradients, hidden, weight, targets, head, d_logprobs, d_entropies, compact=not hidden.is_cuda)
    d_weight = None if gradients.d_weight is None else gradients.d_weight.to(weight.dtype)
    return or_nothing(gradients.d_hidden, hidden), or_nothing(d_weight, hidden)


@_linear_logprobs_bwd.register_fake
def _(hidden, weight, targets, d_logprobs, d_entropies, temperature, chunk_tokens, logits_dtype, needed):
    return tuple(
        torch.empty_like(x) if need else hidden.new_empty(0) for x, need in zip((hidden, weight), needed, strict=True)
    )


def _per_target(hidden: Tensor, targets: Tensor) -> Tensor:
    return hidden.new_empty(targets.shape, dtype=accumulation_dtype(hidden.dtype))


def _keep_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.head = inputs[3:]
    ctx.set_materialize_grads(False)


@backward_once
def _linear_logprobs_backward(ctx, *grad_outputs):
    d_logprobs, d_entropies = grad_outputs
    hidden, weight, targets = ctx.saved_tensors
    if d_logprobs is None:
        d_logprobs = _per_target(hidden, targets).zero_()
    needed = list(ctx.needs_input_grad[:2])
    gradients = _linear_logprobs_bwd(hidden, weight, targets, d_logprobs, d_entropies, *ctx.head, needed)
    return *(x if need else None for x, need in zip(gradients, needed, strict=True)), None, None, None, None


_linear_logprobs_op.register_autograd(_linear_logprobs_backward, setup_context=_keep_inputs)
