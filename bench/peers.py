"""Who offers an operation of cases.py: flashgrpo first, then torch, then what others have published, where installed.

A provider prepares inputs (layout, masks, offsets: not timed) and gives the call that is timed. Those that know no
prefixes attend over repeated prompts. Those that have log-probs but no loss get torch's loss and its gradient behind
them. Gradients of logits are written beside the logits, which a benchmark needs again, by all.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashgrpo.bench.cases import (
    CLIP_HIGH,
    CLIP_LOW,
    Case,
    Inputs,
    Results,
    plain_logprobs,
    plain_loss,
    repeat_prompts,
    segments,
)
from flashgrpo.kernels.attention import packed_attention
from flashgrpo.kernels.grpo_loss import LossConfig, grpo_loss, logits_grpo_loss
from flashgrpo.kernels.linear_grpo import linear_grpo_loss, linear_logprobs
from flashgrpo.kernels.logprob import gather_logprobs

Call = Callable[[], Results]
_UNCOMPILED = "Liger, compiled=False"  # its compilation may fail where shapes change
_CONFIG = LossConfig.preset("dapo", clip_low=CLIP_LOW, clip_high=CLIP_HIGH)


@dataclass(frozen=True)
class Provider:
    """`prepare` raises ImportError where the package is missing, and whatever the package raises."""

    name: str
    prepare: Callable[[Case, Inputs], Call]
    is_repeated: bool = False  # takes the inputs of `repeat_prompts`
    is_bound: bool = False  # not the operation: nothing to check

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("flashgrpo")

    def call(self, case: Case, inputs: Inputs) -> Call:
        return self.prepare(case, repeat_prompts(case, inputs) if self.repeats(case) else inputs)

    def repeats(self, case: Case) -> bool:
        return self.is_repeated and bool(case.shape["group"])


def providers(case: Case, names: Iterable[str] | None = None) -> list[Provider]:
    """Those of an operation and of these names; ours on repeated prompts only where there are prompts to share."""
    fit = [x for x in PROVIDERS[case.op] if not (x.is_ours and x.is_repeated) or x.repeats(case)]
    return [x for x in fit if names is None or x.name in names]


def _attend(load: Callable[[Case, Inputs], Callable[[], Tensor]]) -> Callable[[Case, Inputs], Call]:
    """From what attends to what also gives gradients."""

    def prepare(case: Case, inputs: Inputs) -> Call:
        attend = load(case, inputs)
        return lambda: case.gradients({"out": attend()}, inputs)

    return prepare


def _score(load: Callable[[Inputs], Callable[[], Tensor]]) -> Callable[[Case, Inputs], Call]:
    """From log-probs to the operation: themselves, or torch's loss of them and its gradients."""

    def prepare(case: Case, inputs: Inputs) -> Call:
        score = load(inputs)
        if case.wanted:
            return lambda: case.gradients({"loss": plain_loss(score(), inputs)[0]}, inputs)
        return lambda: {"logprobs": score()}

    return prepare


def _published(
    module: str, name: str, use: Callable[[Callable[..., Any], Inputs], Tensor]
) -> Callable[[Case, Inputs], Call]:
    """The operation from the log-probs that a published function gives."""

    def load(inputs: Inputs) -> Callable[[], Tensor]:
        function = _peer(module, name)
        return lambda: use(function, inputs)

    return _score(load)


def _peer(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _loss(make: Callable[[Inputs], tuple[Tensor, object]]) -> Callable[[Case, Inputs], Call]:
    """From a function that gives (loss, anything else)."""
    return lambda case, inputs: lambda: case.gradients({"loss": make(inputs)[0]}, inputs)


def _own(backend: str) -> Callable[[Case, Inputs], Call]:
    return _attend(
        lambda case, x: (
            lambda: packed_attention(
                x["q"], x["k"], x["v"], x["cu_seqlens"], x["prefix"], max_seqlen=x["max_seqlen"], backend=backend
            )
        )
    )


def _heads_first(x: Inputs, rows: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:  # [1, heads, rows, head_dim]
    q, k, v = (x[name][rows].transpose(0, 1)[None] for name in ("q", "k", "v"))
    return q, k, v


def _sdpa(case: Case, x: Inputs) -> Callable[[], Tensor]:
    """One call: all sequences are of one length."""
    num = len(x["cu_seqlens"]) - 1

    def attend() -> Tensor:
        q, k, v = (x[name].unflatten(0, (num, -1)).transpose(1, 2) for name in ("q", "k", "v"))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    return attend


def _varlen(case: Case, x: Inputs) -> Callable[[], Tensor]:
    varlen_attn = _peer("torch.nn.attention.varlen", "varlen_attn")
    known = inspect.signature(varlen_attn).parameters  # releases differ in how they are told to be causal
    options = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    options |= {"enable_gqa": True} if "enable_gqa" in known else {}
    offsets, most = x["cu_seqlens"], x["max_seqlen"]
    return lambda: varlen_attn(x["q"], x["k"], x["v"], offsets, offsets, most, most, **options)


def _flash(module: str) -> Callable[[Case, Inputs], Call]:
    def load(case: Case, x: Inputs) -> Callable[[], Tensor]:
        attend = _peer(module, "flash_attn_varlen_func")
        options = {f"cu_seqlens_{side}": x["cu_seqlens"] for side in "qk"} | {"causal": True}
        options |= {f"max_seqlen_{side}": x["max_seqlen"] for side in "qk"}

        def call() -> Tensor:
            out = attend(x["q"], x["k"], x["v"], **options)
            return out[0] if isinstance(out, tuple) else out

        return call

    return _attend(load)


def _flex(case: Case, x: Inputs) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not x["q"].is_cuda:
        raise NotImplementedError("on a CPU it has no backward pass, and compiles for 10 s; measured on CUDA alone")
    segment = segments(x)
    parent = torch.full_like(segment, -1) if x["prefix"] is None else x["prefix"].long()[segment]

    def sees(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return ((segment[i] == segment[j]) & (i >= j)) | (parent[i] == segment[j])

    mask = create_block_mask(sees, None, None, case.tokens, case.tokens, device=str(x["q"].device))
    attend = _compiled(flex_attention)
    return lambda: attend(*_heads_first(x), block_mask=mask, enable_gqa=True)[0].transpose(0, 1)


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    torch._dynamo.config.recompile_limit = 64  # many shapes; beyond it fullgraph raises where else it would run eagerly
    return torch.compile(function, fullgraph=True)


def _compiled_loss(inputs: Inputs) -> Tensor:
    return plain_loss(inputs["logprobs"] if "logprobs" in inputs else plain_logprobs(inputs), inputs)[0]


def _torch_compile(case: Case, inputs: Inputs) -> Call:
    for name, value in inputs.items():
        if name != "weight":
            torch._dynamo.maybe_mark_dynamic(value, 0)  # one compilation for every number of tokens
    call = _compiled(_compiled_loss if case.wanted else plain_logprobs)
    return lambda: case.gradients({"loss" if case.wanted else "logprobs": call(inputs)}, inputs)


def _plain(case: Case, inputs: Inputs) -> Call:
    return lambda: case.plain(inputs)


def _own_arguments(x: Inputs) -> dict[str, Any]:
    name = "rewards" if "rewards" in x else "advantages"
    return {name: x[name], "old_logprobs": x["old_logprobs"], "denominator": float(len(x["old_logprobs"]))}


def _own_gather_loss(x: Inputs) -> tuple[Tensor, object]:
    logprobs, _ = gather_logprobs(x["logits"], x["targets"])
    return grpo_loss(logprobs, x["target_cu_seqlens"], _CONFIG, **_own_arguments(x))


def _own_linear_loss(x: Inputs) -> tuple[Tensor, object]:
    fixed = x["hidden"], x["weight"], x["targets"], x["target_cu_seqlens"], _CONFIG
    return linear_grpo_loss(*fixed, **_own_arguments(x))


def _padded(inputs: Inputs) -> Tensor:  # [completions, length + 1, vocab]
    """Logits with the row after each completion that Liger's Triton kernels skip."""
    completions = len(inputs["target_cu_seqlens"]) - 1
    return F.pad(inputs["logits"].detach().unflatten(0, (completions, -1)), (0, 0, 0, 1))


def _liger_logprobs(inputs: Inputs) -> Callable[[], Tensor]:
    score, logits = _peer("liger_kernel.ops.grpo_loss", "fused_selective_log_softmax"), _padded(inputs)
    targets = inputs["targets"].view(logits.shape[0], -1)
    return lambda: score(logits, targets, temperature=1.0).flatten()


def _liger_logits_loss(case: Case, inputs: Inputs) -> Call:
    loss_of, logits = _peer("liger_kernel.transformers.grpo_loss", "triton_grpo_loss"), _padded(inputs).requires_grad_()
    targets, old = (inputs[name].view(logits.shape[0], -1) for name in ("targets", "old_logprobs"))

    def call() -> Results:
        loss, _ = loss_of(
            logits, old, None, targets, inputs["advantages"], temperature=1.0, beta=0.0, eps_low=CLIP_LOW,
            eps_high=CLIP_HIGH, inplace=False, loss_type="bnpo", reduce=True,
        )  # fmt: skip
        (d_logits,) = torch.autograd.grad(loss, logits)
        return {"loss": loss.detach(), "d_logits": d_logits[:, :-1]}

    return call


def _liger_linear_loss(case: Case, inputs: Inputs, compiled: bool = True) -> Call:
    loss_of = _peer("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")(
        beta=0.0, use_ref_model=False, epsilon_low=CLIP_LOW, epsilon_high=CLIP_HIGH, loss_type="bnpo", compiled=compiled
    )
    completions = len(inputs["advantages"])
    targets, old = (inputs[name].view(completions, -1) for name in ("targets", "old_logprobs"))
    hidden, mask = inputs["hidden"].view(completions, -1, inputs["hidden"].shape[1]), torch.ones_like(old)

    def call() -> Results:
        loss, _ = loss_of(hidden, inputs["weight"], targets, mask, inputs["advantages"], old_per_token_logps=old)
        return case.gradients({"loss": loss}, inputs)

    return call


def _three_gemms(case: Case, inputs: Inputs) -> Call:
    hidden, weight = (inputs[name].detach() for name in ("hidden", "weight"))
    wide: dict[str, Any] = {"out_dtype": torch.float32} if hidden.is_cuda and hidden.dtype != torch.float32 else {}

    def call() -> Results:
        logits = hidden @ weight.T
        return {"d_hidden": logits @ weight, "d_weight": torch.mm(logits.T, hidden, **wide).to(weight.dtype)}

    return call


_ATTENTION = [
    Provider("flashgrpo", _own("triton")),
    Provider("flashgrpo, prompt repeated", _own("triton"), is_repeated=True),
    Provider("flash-attn 2, prompt shared", _own("flash_attn")),
    Provider("torch SDPA", _attend(_sdpa), is_repeated=True),
    Provider("torch varlen_attn", _attend(_varlen), is_repeated=True),
    Provider("torch FlexAttention", _attend(_flex)),
    Provider("flash-attn 2", _flash("flash_attn"), is_repeated=True),
    Provider("flash-attn 3", _flash("flash_attn_interface"), is_repeated=True),
    Provider("flash-attn 4", _flash("flash_attn.cute"), is_repeated=True),
]
_TORCH = [Provider("torch", _plain), Provider("torch.compile", _torch_compile)]
_OF_LOGITS = [
    Provider("QuACK", _published("quack.cross_entropy", "cross_entropy",
                                 lambda f, x: -f(x["logits"], x["targets"], reduction="none"))),
    Provider("TRL", _published("trl.trainer.utils", "selective_log_softmax",
                               lambda f, x: f(x["logits"], x["targets"]))),
    Provider("TRL kernel", _published("trl.kernels.logprob_entropy", "selective_log_softmax_and_entropy",
                                      lambda f, x: f(x["logits"], x["targets"])[0])),
]  # fmt: skip
_OF_HIDDEN = [
    Provider("Cut Cross-Entropy", _published("cut_cross_entropy", "linear_cross_entropy",
             lambda f, x: -f(x["hidden"], x["weight"], x["targets"], reduction="none"))),
    Provider("QuACK", _published("quack.linear_cross_entropy", "linear_cross_entropy_func",
             lambda f, x: -f(x["hidden"], x["weight"], None, x["targets"], reduction="none"))),
]  # fmt: skip
PROVIDERS = {
    "attention_fwd": _ATTENTION,
    "attention": _ATTENTION,
    "gather_logprobs": [
        Provider("flashgrpo", _score(lambda x: lambda: gather_logprobs(x["logits"], x["targets"])[0])),
        *_TORCH, Provider("Liger", _score(_liger_logprobs)), *_OF_LOGITS,
    ],
    "gather_grpo_loss": [Provider("flashgrpo", _loss(_own_gather_loss)), *_TORCH, *_OF_LOGITS],
    "logits_grpo_loss": [
        Provider("flashgrpo", _loss(lambda x: logits_grpo_loss(
            x["logits"], x["targets"], x["target_cu_seqlens"], _CONFIG, **_own_arguments(x)
        ))),
        *_TORCH, Provider("Liger", _liger_logits_loss),
    ],
    "linear_logprobs": [
        Provider("flashgrpo", _score(lambda x: lambda: linear_logprobs(x["hidden"], x["weight"], x["targets"])[0])),
        *_TORCH, *_OF_HIDDEN,
        Provider("Liger", _published("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy",
                 lambda f, x: -f(x["hidden"], x["weight"], x["targets"], reduction="none"))),
    ],
    "linear_grpo_loss": [
        Provider("flashgrpo", _loss(_own_linear_loss)),
        Provider("three GEMMs (bound)", _three_gemms, is_bound=True),
        *_TORCH, Provider("Liger", _liger_linear_loss),
        Provider(_UNCOMPILED, functools.partial(_liger_linear_loss, compiled=False)), *_OF_HIDDEN,
    ],
    "grpo_loss": [
        Provider("flashgrpo", _loss(lambda x: grpo_loss(
            x["logprobs"], x["target_cu_seqlens"], _CONFIG, **_own_arguments(x)
        ))),
        *_TORCH,
    ],
}  # fmt: skip
PROVIDERS["memory"] = [x for x in PROVIDERS["linear_grpo_loss"] if x.name not in ("three GEMMs (bound)", _UNCOMPILED)]
