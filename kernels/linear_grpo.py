"""Log-probabilities, or the policy loss and its gradients, from hidden states; at most a chunk of logits at a time.

For n rows, hidden size H and vocabulary V, chunk by chunk:

    logits   = hidden_chunk @ weight^T          2 n V H FLOPs
    logprob, entropy, d_logits                  logprob.py and grpo_loss.py, made where the logits were
    d_hidden = d_logits @ weight                2 n V H
    d_weight += d_logits^T @ hidden_chunk       2 n V H, in fp32

`linear_grpo_loss` makes the gradients in its forward pass, so logits are computed once: 6 n V H
FLOPs, or 8 n V H where all log-probs come before any gradient (`LossConfig.scores_first`). Beyond
its inputs it holds d_hidden, d_weight and one chunk of logits, which the kernels turn into their
gradient in place (in torch three chunks, in fp32).

The denominator divides before d_logits is rounded, so the products alone round d_hidden and
d_weight; an upstream gradient of exactly 1 changes and costs nothing, another rounds again. fp16 is
divided after the products: 1e-6 would be 0. There an advantage times a ratio above 65,504 overflows.

In bf16 at n = 4096, H = 4096, V = 128,256, in GB, and ms by 790 TFLOP/s and 4.3 TB/s; not measured:

    logits              reads hidden, weight     1.08  writes logits        1.05  5.45
    d_logits            reads logits             1.05  writes d_logits      1.05  0.49, from memory twice 0.73
    d_hidden            reads d_logits, weight   2.10  writes d_hidden      0.03  5.45
    d_weight            reads d_logits, hidden   1.08  writes it in bf16    1.05  5.45

which is 1.03 to 1.05 times the products. With several chunks d_weight is in fp32: each but the
first reads and writes 2.10 in its product, and the backward pass reads 2.10 and writes bf16, 1.05,
in 0.73 ms: 1.07 to 1.10 times the products of two chunks.

Every chunk reads the weight and reads and writes d_weight, 10 V H bytes against 6 V H FLOPs a row:
with r rows a chunk that is 306 / r of the GEMMs' time. So on CUDA r is at most 6,144 rows of 16-bit
(5%) or 3,072 of fp32 logits; on a CPU as many as have their fp32 logits in 2 MiB of cache, or 256.
Chunks are as few as that allows and equal, to a multiple of 128 rows: 9,000 are 4,608 and 4,392.

Both functions make log-probs by the same GEMM and `logprob.row_logprob` in chunks that follow from
n, so on one pack they agree bit for bit. The library may sum a product of another shape in another
order: across packs of different n log-probs agree to rounding. Not done here: vocabulary-parallel
heads, a bias, logit soft-capping.

Sources: Wijmans et al., Cut Your Losses, arXiv 2411.09009; Hsu et al., Liger Kernel, arXiv
2410.10989, whose backward pass also leaves what is multiplied by 1; `main_grad` of Megatron-LM,
github.com/NVIDIA/Megatron-LM, megatron/core/tensor_parallel/layers.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashgrpo.kernels.common import accumulation_dtype, backward_once, by_triton, check_index, check_temperature
from flashgrpo.kernels.grpo_loss import Stats, WithGradients, empty_sums, implementation, named_stats, or_nothing
from flashgrpo.kernels.kept import Kept, check_kept, keep_only
from flashgrpo.kernels.logprob import ROW_STEP, softmax_rows
from flashgrpo.kernels.loss_config import LossConfig, LossInputs
from flashgrpo.kernels.loss_torch import is_live

_CPU_CACHE = 2 << 20  # bytes
_MIN_CPU_CHUNK = 256
_CUDA_CHUNK_BYTES = 12_288  # of one column of logits
_CHUNK_STEP = 128  # rows of a product's tile
_COMPACT_BELOW = 0.9
# A chunk's logits, whose memory it may use up, and their rows -> their gradient, None where nobody needs it; and which
# of the chunk's rows it has, None for all.
Step = Callable[[Tensor, slice | Tensor], tuple[Tensor | None, Tensor | None]]


class Head(NamedTuple):
    """Where logits come from, and how they are made."""

    hidden: Tensor  # [n, hidden_size]
    weight: Tensor  # [vocab, hidden_size]
    targets: Tensor  # [n]
    temperature: float
    chunk_tokens: int
    logits_dtype: torch.dtype
    kept: Sequence[Tensor] = ()  # ids [num_kept] and offsets [n + 1], or nothing

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        chunk_tokens: int | None,
        logits_dtype: torch.dtype | None,
        kept: Kept | None,
    ) -> "Head":
        """Checked, as autocast wants them, and with the defaults filled in. Raises as `linear_logprobs` says."""
        if hasattr(weight, "full_tensor"):
            raise TypeError(
                "lm_head_weight is a DTensor; wanted a whole tensor: call this inside the forward pass of the FSDP "
                "module that holds it, or give lm_head_weight.full_tensor()"
            )
        if torch.is_autocast_enabled(hidden.device.type):  # as torch.amp.custom_fwd casts
            dtype, cast = torch.get_autocast_dtype(hidden.device.type), (torch.float32, torch.bfloat16, torch.float16)
            hidden, weight = (x.to(dtype) if x.dtype in cast else x for x in (hidden, weight))
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
        if kept is not None:
            check_kept(kept, targets, weight.shape[0])
        logits_dtype = logits_dtype or hidden.dtype
        allowed = {hidden.dtype, accumulation_dtype(hidden.dtype)}
        if logits_dtype not in allowed:
            raise ValueError(f"logits_dtype is {logits_dtype}; wanted one of {', '.join(map(str, allowed))}")
        if chunk_tokens is None:
            most = most_chunk_tokens(weight.shape[0], logits_dtype.itemsize, hidden.is_cuda)
            chunk_tokens = default_chunk_tokens(hidden.shape[0], most)
        if chunk_tokens < 1:
            raise ValueError(f"chunk_tokens is {chunk_tokens}; wanted 1 or above")
        return cls(hidden, weight, targets.contiguous(), temperature, chunk_tokens, logits_dtype, kept or ())

    @property
    def divides(self) -> bool:
        """Whether the loss's gradient is over the denominator before its products: 1e-6 of it would be 0 in fp16."""
        return self.weight.dtype != torch.float16

    def per_target(self) -> Tensor:  # [n]
        """A new tensor of log-probs, or what else there is one of for each target."""
        return self.hidden.new_empty(self.targets.shape, dtype=accumulation_dtype(self.hidden.dtype))

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:  # [rows, vocab]
        """Those of a chunk of rows."""
        if not by_triton(hidden):
            return hidden.to(weight.dtype) @ weight.T
        # Kernels read 16 bytes at a time only where each row begins at a multiple of them, whatever the vocabulary.
        vocab = weight.shape[0]
        width = -(-vocab // ROW_STEP.value) * ROW_STEP.value
        logits = hidden.new_empty(len(hidden), width, dtype=self.logits_dtype)[:, :vocab]
        if weight.dtype != self.logits_dtype:  # on CUDA: 16-bit products are summed in fp32 anyway
            torch.mm(hidden, weight.T, out_dtype=self.logits_dtype, out=logits)
        else:
            torch.mm(hidden.to(weight.dtype), weight.T, out=logits)
        return logits


class Wanted(NamedTuple):
    """Which gradients, and how."""

    d_hidden: bool
    d_weight: bool
    compact: bool  # rows that have none may leave the products, which the host waits to learn
    narrow: bool  # d_weight may be in the weight's dtype, where one product makes it


def linear_logprobs(
    hidden: Tensor,  # [n, hidden_size]
    lm_head_weight: Tensor,  # [vocab, hidden_size]
    targets: Tensor,  # [n] int32 or int64
    *,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    logits_dtype: torch.dtype | None = None,
    entropy: bool = True,
    kept: Kept | None = None,  # ids [num_kept], offsets [n + 1], int32 or int64
) -> tuple[Tensor, Any]:  # [n], [n] or None
    """Log-probabilities of `targets` and entropies of softmax(hidden @ lm_head_weight^T / temperature), in nats.

    Both are fp32 (float64 for float64) and differentiable once; the backward pass computes the
    logits again. Targets, `entropy` and `kept` as in `gather_logprobs`. `logits_dtype` is hidden's dtype
    (None) or torch.float32, `chunk_tokens` the number of rows whose logits exist at once; by default
    it follows from n. Under autocast hidden and weight are cast to its dtype, but from float64, and
    gradients come back in theirs.

    Raises what `gather_logprobs` raises, ValueError for fewer than one token a chunk and another logits_dtype, and
    TypeError for a DTensor, which is a part of the weight.
    """
    head = Head.of(hidden, lm_head_weight, targets, temperature, chunk_tokens, logits_dtype, kept)
    logprobs, entropies = _linear_logprobs_op(*head, entropy)
    return logprobs, entropies if entropy else None


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
    token_advantages: Tensor | None = None,  # [num_targets]
    old_logprobs: Tensor | None = None,  # [num_targets]
    ref_logprobs: Tensor | None = None,  # [num_targets]
    behavior_logprobs: Tensor | None = None,  # [num_targets]
    per_token: bool = False,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    logits_dtype: torch.dtype | None = None,
    main_grad: Tensor | None = None,  # [vocab, hidden_size]
    kept: Kept | None = None,  # ids [num_kept], offsets [num_targets + 1]
) -> tuple[Tensor, Stats]:
    """`logits_grpo_loss` of hidden @ lm_head_weight^T, with the gradients made in the forward pass.

    The gradients are made only for those of hidden and lm_head_weight that require them, and wait
    for the backward pass, which multiplies them by the upstream scalar and cannot be differentiated
    again. The kernels do that in place, so autograd refuses a second backward pass. Rows whose
    gradient is exactly 0 leave the gradient GEMMs where fewer than 90% of a chunk are live. To count
    them the host waits for the device once a chunk, so under torch.compile all rows stay.

    With `main_grad`, [vocab, hidden_size] in fp32 (float64 for float64), the backward pass adds the
    weight's gradient there, in fp32, and lm_head_weight.grad gets nothing: as Megatron-LM keeps
    gradients over micro-batches; `grad_added_to_main_grad` is the caller's to set.

    Loss, metrics and arguments are those of `logits_grpo_loss`, the rest as in `linear_logprobs`; raises what they
    raise, and ValueError for a main_grad of another shape or dtype.
    """
    head = Head.of(hidden, lm_head_weight, targets, temperature, chunk_tokens, logits_dtype, kept)
    inputs = LossInputs.of(
        head.per_target(), config, target_cu_seqlens, denominator, per_token, targets=targets, rewards=rewards,
        sequence_ids=sequence_ids, advantages=advantages, token_advantages=token_advantages, old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs, behavior_logprobs=behavior_logprobs,
    )  # fmt: skip
    wide, shape = accumulation_dtype(head.weight.dtype), tuple(head.weight.shape)
    if main_grad is not None and (main_grad.dtype, main_grad.shape) != (wide, shape):
        raise ValueError(f"main_grad is {main_grad.dtype} {tuple(main_grad.shape)}; wanted {wide} {shape}")
    needed = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, lm_head_weight)]
    narrow = head.divides and main_grad is None and head.weight.dtype == lm_head_weight.dtype
    wanted = Wanted(*needed, compact=not torch.compiler.is_compiling(), narrow=narrow)
    with torch.no_grad():
        make = _linear_loss_op if by_triton(hidden) else _linear_loss
        loss, metrics, *of_tokens, d_hidden, d_weight = make(
            head.hidden, head.weight, inputs.tensors, inputs.numbers, *head[3:], wanted
        )
    gradients = d_hidden if wanted.d_hidden else None, d_weight if wanted.d_weight else None
    divisor = None if head.divides else inputs.divisor
    loss = WithGradients.apply(loss, hidden, lm_head_weight, *gradients, divisor, by_triton(hidden), main_grad)
    return loss, named_stats(metrics, inputs, *of_tokens)


def most_chunk_tokens(vocab_size: int, itemsize: int, on_cuda: bool) -> int:
    """Rows whose logits, of `itemsize` bytes each, exist at once at most; a multiple of _CHUNK_STEP."""
    if on_cuda:
        return _CUDA_CHUNK_BYTES // itemsize
    return max(_MIN_CPU_CHUNK, _CPU_CACHE // (4 * vocab_size * _CHUNK_STEP) * _CHUNK_STEP)


def default_chunk_tokens(num_rows: int, most: int) -> int:
    """Rows of a chunk, the last of which may be shorter: few and equal chunks, to a multiple of _CHUNK_STEP."""
    num_chunks = max(1, -(-num_rows // most))
    return max(1, -(-num_rows // (num_chunks * _CHUNK_STEP))) * _CHUNK_STEP


@dataclass
class Gradients:
    """None where nobody needs them."""

    d_hidden: Tensor | None  # [n, hidden_size], hidden's dtype
    d_weight: Tensor | None  # [vocab, hidden_size], the weight's dtype if `narrow` and in one chunk, else fp32, float64
    is_begun: bool = False  # d_weight has the first chunk's part

    @classmethod
    def of(cls, head: Head, wanted: Wanted) -> "Gradients":
        """d_hidden is 0, d_weight unwritten."""
        dtype, one_chunk = head.weight.dtype, head.hidden.shape[0] <= head.chunk_tokens
        if not (wanted.narrow and one_chunk and by_triton(head.hidden)):
            dtype = accumulation_dtype(dtype)
        return cls(
            d_hidden=head.hidden.new_zeros(head.hidden.shape) if wanted.d_hidden else None,
            d_weight=head.weight.new_empty(head.weight.shape, dtype=dtype) if wanted.d_weight else None,
        )

    @property
    def needed(self) -> bool:
        return self.d_hidden is not None or self.d_weight is not None

    def or_nothing(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Both, an empty tensor for None: an operator's results are tensors."""
        return or_nothing(self.d_hidden, like), or_nothing(self.d_weight, like)

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
        dtype, sums = self.d_weight.dtype, {}
        if d_logits.is_cuda and d_logits.dtype != dtype:
            sums["out_dtype"] = dtype
        else:
            d_logits, hidden = d_logits.to(dtype), hidden.to(dtype)
        if self.is_begun:
            torch.addmm(self.d_weight, d_logits.T, hidden, out=self.d_weight, **sums)
        else:
            torch.mm(d_logits.T, hidden, out=self.d_weight, **sums)
        self.is_begun = True


def sweep(
    head: Head,
    step: Step,
    gradients: Gradients | None = None,
    rows: Tensor | None = None,  # [num_rows], those to visit; None: all
) -> None:
    """Gives `step` the logits, chunk by chunk, and adds what it makes of them to `gradients`."""
    hidden, weight = head.hidden, head.weight
    num_rows = hidden.shape[0] if rows is None else rows.shape[0]
    logits_weight = weight if weight.is_cuda else weight.to(head.logits_dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, num_rows, head.chunk_tokens):
            chunk = slice(start, start + head.chunk_tokens)
            chosen = chunk if rows is None else rows[chunk]
            inputs = hidden[chosen]
            logits = head.logits(inputs, logits_weight)
            if head.kept:
                keep_only(logits, head.targets, head.kept, chosen)
            d_logits, live = step(logits, chosen)
            del logits  # it may be its gradient
            if d_logits is not None and gradients is not None:
                if live is not None:  # of all rows, so that a chunk's begin at `start`
                    inputs, chosen = inputs[live], start + live
                if d_logits.shape[0]:
                    gradients.add(d_logits, inputs, weight, chosen)
            del d_logits  # before the next chunk's are made
    if gradients is not None and gradients.d_weight is not None and not gradients.is_begun:
        gradients.d_weight.zero_()


def score(head: Head, entropy: bool = True) -> tuple[Tensor, Tensor]:  # [n], [n]
    """Log-probs and entropies, empty unless wanted."""
    logprobs, entropies = head.per_target(), head.per_target() if entropy else head.hidden.new_empty(0)

    def step(logits: Tensor, rows: slice | Tensor) -> tuple[None, None]:
        found = softmax_rows(logits, head.targets[rows], head.temperature, entropy)
        logprobs[rows] = found.logprobs
        if entropy:
            entropies[rows] = found.entropy
        return None, None

    sweep(head, step)
    return logprobs, entropies


def recompute(
    head: Head,
    d_logprobs: Tensor,  # [n]
    d_entropies: Tensor | None,  # [n]
    wanted: Wanted,
) -> Gradients:
    """The logits once more, when the gradients by log-prob and entropy are known; dead rows leave all three GEMMs."""

    def step(logits: Tensor, rows: slice | Tensor) -> tuple[Tensor, None]:
        found = softmax_rows(logits, head.targets[rows], head.temperature, d_entropies is not None)
        upstream = d_logprobs[rows], None if d_entropies is None else d_entropies[rows]
        return found.gradients(head.targets[rows], *upstream, head.temperature), None

    gradients, visited = Gradients.of(head, wanted), None
    if gradients.needed:
        if wanted.compact:
            live = is_live(d_logprobs, d_entropies).nonzero().squeeze(1)  # waits
            visited = live if live.shape[0] < _COMPACT_BELOW * d_logprobs.shape[0] else None
        sweep(head, step, gradients, visited)
    return gradients


def _linear_loss(
    hidden: Tensor, weight: Tensor, tensors: Sequence[Tensor | None], numbers: Sequence[float],
    temperature: float, chunk_tokens: int, logits_dtype: torch.dtype, kept: Sequence[Tensor], wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, metrics, per_token, logprobs, entropies, d_hidden, d_weight), the gradients as `Head.divides` says."""
    inputs, by, asked = LossInputs._make((*tensors, *numbers)), implementation(hidden), Wanted(*wanted)
    assert inputs.targets is not None
    head = Head(hidden, weight, inputs.targets, temperature, chunk_tokens, logits_dtype, kept)
    divided = inputs if head.divides else inputs.undivided()
    if inputs.scores_first:
        logprobs, entropies = score(head)
        made = by.loss_of_logprobs(logprobs, entropies, divided)
        gradients = recompute(head, made.d_logprobs, made.d_entropies, asked)
        sums = made.loss if head.divides else made.loss / inputs.divisor, made.metrics, made.per_token
    else:
        loss = by.RowLoss(divided, hidden, temperature)
        gradients = Gradients.of(head, asked)

        def step(logits: Tensor, rows: slice | Tensor) -> tuple[Tensor | None, Tensor | None]:
            assert isinstance(rows, slice)
            d_logits = loss.take(logits, rows.start, logits if gradients.needed else None)
            if d_logits is None or not asked.compact:
                return d_logits, None
            # The host waits here, once in 19 TFLOP at 6,144 x 4,096 x 128k. To hide the wait behind the next chunk's
            # logits would take a second chunk of memory.
            live = loss.live[rows]
            num_live = int(live.sum())
            if num_live >= _COMPACT_BELOW * live.shape[0]:
                return d_logits, None
            return by.live_rows(d_logits, live, num_live)

        sweep(head, step, gradients)
        logprobs, entropies, sums = loss.logprobs, loss.entropies, loss.result(inputs)
    return *sums, logprobs, entropies, *gradients.or_nothing(hidden)


_linear_loss_op = torch.library.custom_op("flashgrpo::linear_grpo_loss", _linear_loss, mutates_args=())


@_linear_loss_op.register_fake
def _(hidden, weight, tensors, numbers, *settings):
    head = Head(hidden, weight, tensors[0], *settings[:-1])
    gradients = Gradients.of(head, Wanted(*settings[-1]))
    sums = empty_sums(hidden, LossInputs._make((*tensors, *numbers)))
    return *sums, head.per_target(), head.per_target(), *gradients.or_nothing(hidden)


@torch.library.custom_op("flashgrpo::linear_logprobs", mutates_args=())
def _linear_logprobs_op(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk_tokens: int, logits_dtype: torch.dtype,
    kept: Sequence[Tensor], entropy: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return score(Head(hidden, weight, targets, temperature, chunk_tokens, logits_dtype, kept), entropy)


@_linear_logprobs_op.register_fake
def _(*inputs):
    logprobs = Head(*inputs[:-1]).per_target()
    return logprobs, logprobs.new_empty(logprobs.shape if inputs[-1] else 0)


@torch.library.custom_op("flashgrpo::linear_logprobs_bwd", mutates_args=())
def _linear_logprobs_bwd(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk_tokens: int, logits_dtype: torch.dtype,
    kept: Sequence[Tensor], upstream: Sequence[Tensor | None], wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(d_hidden, d_weight) by the gradients by log-prob and by entropy."""
    head = Head(hidden, weight, targets, temperature, chunk_tokens, logits_dtype, kept)
    d_logprobs, d_entropies = upstream
    if d_logprobs is None:
        d_logprobs = head.per_target().zero_()
    return recompute(head, d_logprobs, d_entropies, Wanted(*wanted)).or_nothing(hidden)


@_linear_logprobs_bwd.register_fake
def _(hidden, *inputs):
    *settings, _, wanted = inputs
    return Gradients.of(Head(hidden, *settings), Wanted(*wanted)).or_nothing(hidden)


def _keep_inputs(ctx, inputs, output):
    ctx.settings, kept, entropy = inputs[3:6], *inputs[6:]
    ctx.save_for_backward(*inputs[:3], *kept)
    ctx.mark_non_differentiable(*output[2 if entropy else 1 :])
    ctx.set_materialize_grads(False)


@backward_once
def _linear_logprobs_backward(ctx, *upstream):
    hidden, weight, targets, *kept = ctx.saved_tensors
    # On a GPU to count live rows would wait for the device.
    wanted = Wanted(*ctx.needs_input_grad[:2], compact=not hidden.is_cuda, narrow=True)
    d_hidden, d_weight = _linear_logprobs_bwd(hidden, weight, targets, *ctx.settings, kept, upstream, wanted)
    d_weight = d_weight.to(weight.dtype) if wanted.d_weight else None
    return d_hidden if wanted.d_hidden else None, d_weight, *[None] * 4, [None] * len(kept), None


_linear_logprobs_op.register_autograd(_linear_logprobs_backward, setup_context=_keep_inputs)
