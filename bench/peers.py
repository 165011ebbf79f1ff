"""Who offers an operation of cases.py: flashgrpo first, then torch, then what others have
published, where installed.

A provider loads: it prepares inputs (layout, masks, offsets: not timed) and gives the call that is
timed. Those that know no prefixes attend over repeated prompts. Those that have log-probs but no
loss get torch's loss and its gradient behind them. Gradients of logits are written beside the
logits, which a benchmark needs again, by all.
"""

import functools
import importlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

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
from flashgrpo.grpo.errors import RunInputError, nearest
from flashgrpo.kernels.attention import packed_attention
from flashgrpo.kernels.grpo_loss import LossConfig, grpo_loss, logits_grpo_loss
from flashgrpo.kernels.linear_grpo import linear_grpo_loss, linear_logprobs
from flashgrpo.kernels.logprob import gather_logprobs

Load = Callable[[Inputs], Callable[[], Any]]
Gives = Literal["out", "logprobs", "loss", "results"]
_CONFIG = LossConfig.preset("dapo", clip_low=CLIP_LOW, clip_high=CLIP_HIGH)


@dataclass(frozen=True)
class Provider:
    """`load` raises ImportError where the package is missing, and whatever the package raises."""

    name: str
    gives: Gives  # what the loaded call gives; "results" are all, gradients too
    load: Load
    is_repeated: bool = False  # takes the inputs of `repeat_prompts`
    is_bound: bool = False  # not the operation: nothing to check

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("flashgrpo")

    def repeats(self, case: Case) -> bool:
        return self.is_repeated and bool(case.shape["group"])

    def call(self, case: Case, inputs: Inputs) -> Callable[[], Results]:
        """The whole operation: what is loaded, a loss where it gives none, and the gradients."""
        own = repeat_prompts(case, inputs) if self.repeats(case) else inputs
        forward = self.load(own)
        if self.gives == "results":
            return forward
        if self.gives == "logprobs" and case.wanted:
            return lambda: case.gradients({"loss": plain_loss(forward(), own)[0]}, own)
        return lambda: case.gradients({self.gives: forward()}, own)


Peers = dict[str, list[Provider]]  # by operation
PEERS = (
    "a dictionary from operation to a list of flashgrpo.bench.peers.Provider, whose load(inputs) gives the call that "
    "is timed; operations and inputs are those of flashgrpo.bench.cases"
)


def load_peers(name: str) -> Peers:
    """Of `package.module:PROVIDERS`, also of the working folder. Raises RunInputError for what are no `PEERS`."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = pkgutil.resolve_name(name)
        for op, offered in found.items():
            if op not in PROVIDERS:
                raise ValueError(f"unknown operation {op!r}{nearest(str(op), PROVIDERS)}")
            for provider in offered:
                if not isinstance(provider, Provider) or provider.is_ours:
                    raise TypeError(f"{op}: found {provider!r:.80}, wanted a Provider whose name is not flashgrpo's")
                if provider.gives not in get_args(Gives):
                    wanted = ", ".join(get_args(Gives))
                    raise ValueError(f"{op}: {provider.name} gives {provider.gives!r}, wanted one of {wanted}")
    except Exception as error:  # a person's module may raise anything
        raise RunInputError(f"--peer {name}: {type(error).__name__}: {error}; wanted {PEERS}") from error
    return found


def providers(case: Case, names: Iterable[str] | None = None, more: Peers | None = None) -> list[Provider]:
    """Those of an operation and of these names; ours on repeated prompts only where there are prompts to share."""
    offered = [*PROVIDERS[case.op], *(more or {}).get(case.op, ())]
    fit = [x for x in offered if not (x.is_ours and x.is_repeated) or x.repeats(case)]
    return [x for x in fit if names is None or x.name in names]


def _calls(use: Callable[..., Tensor], *package: str) -> Load:
    """Of what has nothing to prepare: `use` takes the inputs, after the function of a package where one is named."""

    def load(inputs: Inputs) -> Callable[[], Tensor]:
        found = [_peer(*package)] if package else []
        return functools.partial(use, *found, inputs)

    return load


def _peer(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def own_attention(x: Inputs, backend: str = "triton") -> Tensor:
    own = {"max_seqlen": x["max_seqlen"], "backend": backend}
    return packed_attention(x["q"], x["k"], x["v"], x["cu_seqlens"], x["prefix"], **own)


def _sdpa(x: Inputs) -> Tensor:
    """In one call: all sequences are of one length."""
    num = len(x["cu_seqlens"]) - 1
    q, k, v = (x[name].unflatten(0, (num, -1)).transpose(1, 2) for name in ("q", "k", "v"))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


def _varlen(x: Inputs) -> Callable[[], Tensor]:
    varlen_attn = _peer("torch.nn.attention.varlen", "varlen_attn")
    # Releases differ in how they are told to be causal.
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    offsets, most = x["cu_seqlens"], x["max_seqlen"]
    return lambda: varlen_attn(x["q"], x["k"], x["v"], offsets, offsets, most, most, **options)


def _flash(module: str) -> Load:
    def load(x: Inputs) -> Callable[[], Tensor]:
        attend = _peer(module, "flash_attn_varlen_func")
        options: dict[str, Any] = {"causal": True}
        for side in "qk":
            options |= {f"cu_seqlens_{side}": x["cu_seqlens"], f"max_seqlen_{side}": x["max_seqlen"]}

        def call() -> Tensor:
            out = attend(x["q"], x["k"], x["v"], **options)
            # Releases differ in whether they give the log-sum-exp, too.
            return out[0] if isinstance(out, tuple) else out

        return call

    return load


def _flex(x: Inputs) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not x["q"].is_cuda:
        raise NotImplementedError("on a CPU it has no backward pass, and compiles for 10 s; measured on CUDA alone")
    segment = segments(x)
    parent = torch.full_like(segment, -1) if x["prefix"] is None else x["prefix"].long()[segment]

    def sees(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return ((segment[i] == segment[j]) & (i >= j)) | (parent[i] == segment[j])

    mask = create_block_mask(sees, None, None, len(segment), len(segment), device=str(x["q"].device))
    attend = _compiled(flex_attention)

    def call() -> Tensor:
        q, k, v = (x[name].transpose(0, 1)[None] for name in ("q", "k", "v"))  # [1, heads, tokens, head_dim]
        return attend(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return call


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # There are many shapes; beyond the limit fullgraph raises where else it would run eagerly.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, fullgraph=True)


def _torch_compile(function: Callable[..., Tensor]) -> Load:
    def load(inputs: Inputs) -> Callable[[], Tensor]:
        for name, value in inputs.items():
            if name != "weight":
                # One compilation is for every number of tokens.
                torch._dynamo.maybe_mark_dynamic(value, 0)
        return functools.partial(_compiled(function), inputs)

    return load


def _loss_of(inputs: Inputs) -> Tensor:
    return plain_loss(plain_logprobs(inputs), inputs)[0]


def _own_loss(kernel: Callable[..., Any], *names: str) -> Load:
    """Of a kernel that takes these inputs."""

    def loss(x: Inputs) -> Tensor:
        of_group = "rewards" if "rewards" in x else "advantages"
        own = {of_group: x[of_group], "old_logprobs": x["old_logprobs"], "denominator": float(len(x["old_logprobs"]))}
        return kernel(*(x[name] for name in names), x["target_cu_seqlens"], _CONFIG, **own)[0]

    return _calls(loss)


def _own_gathered_loss(logits: Tensor, targets: Tensor, *rest: Any, **own: Any) -> tuple[Tensor, Any]:
    return grpo_loss(gather_logprobs(logits, targets)[0], *rest, **own)


def _padded(inputs: Inputs) -> Tensor:  # [completions, length + 1, vocab]
    """Logits with the row after each completion that Liger's Triton kernels skip."""
    completions = len(inputs["target_cu_seqlens"]) - 1
    return F.pad(inputs["logits"].detach().unflatten(0, (completions, -1)), (0, 0, 0, 1))


def _liger_logprobs(inputs: Inputs) -> Callable[[], Tensor]:
    score, logits = _peer("liger_kernel.ops.grpo_loss", "fused_selective_log_softmax"), _padded(inputs)
    targets = inputs["targets"].view(logits.shape[0], -1)
    return lambda: score(logits, targets, temperature=1.0).flatten()


def _liger_logits_loss(inputs: Inputs) -> Callable[[], Results]:
    loss_of, logits = _peer("liger_kernel.transformers.grpo_loss", "triton_grpo_loss"), _padded(inputs).requires_grad_()
    targets, old = (inputs[name].view(logits.shape[0], -1) for name in ("targets", "old_logprobs"))
    options = {"temperature": 1.0, "beta": 0.0, "eps_low": CLIP_LOW, "eps_high": CLIP_HIGH}
    options |= {"inplace": False, "loss_type": "bnpo", "reduce": True}

    def call() -> Results:
        loss, _ = loss_of(logits, old, None, targets, inputs["advantages"], **options)
        (d_logits,) = torch.autograd.grad(loss, logits)
        return {"loss": loss.detach(), "d_logits": d_logits[:, :-1]}

    return call


def _liger_linear_loss(compiled: bool) -> Load:
    def load(inputs: Inputs) -> Callable[[], Tensor]:
        options = {"beta": 0.0, "use_ref_model": False, "loss_type": "bnpo", "compiled": compiled}
        options |= {"epsilon_low": CLIP_LOW, "epsilon_high": CLIP_HIGH}
        loss_of = _peer("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")(**options)
        advantages, weight = inputs["advantages"], inputs["weight"]
        targets, old = (inputs[name].view(len(advantages), -1) for name in ("targets", "old_logprobs"))
        # All completions are of one length, so that nothing is masked.
        hidden, mask = inputs["hidden"].unflatten(0, targets.shape), torch.ones_like(old)
        return lambda: loss_of(hidden, weight, targets, mask, advantages, old_per_token_logps=old)[0]

    return load


def _three_gemms(inputs: Inputs) -> Callable[[], Results]:
    hidden, weight = (inputs[name].detach() for name in ("hidden", "weight"))
    # As ours, which sums the gradient of the weight in fp32.
    wide: dict[str, Any] = {"out_dtype": torch.float32} if hidden.is_cuda and hidden.dtype != torch.float32 else {}

    def call() -> Results:
        logits = hidden @ weight.T
        return {"d_hidden": logits @ weight, "d_weight": torch.mm(logits.T, hidden, **wide).to(weight.dtype)}

    return call


_ATTENTION = [
    Provider("flashgrpo", "out", _calls(own_attention)),
    Provider("flashgrpo, prompt repeated", "out", _calls(own_attention), is_repeated=True),
    Provider("flash-attn, prompt shared", "out", _calls(functools.partial(own_attention, backend="flash_attn"))),
    Provider("torch SDPA", "out", _calls(_sdpa), is_repeated=True),
    Provider("torch varlen_attn", "out", _varlen, is_repeated=True),
    Provider("torch FlexAttention", "out", _flex),
    Provider("flash-attn 2", "out", _flash("flash_attn"), is_repeated=True),
    Provider("flash-attn 3", "out", _flash("flash_attn_interface"), is_repeated=True),
    Provider("flash-attn 4", "out", _flash("flash_attn.cute"), is_repeated=True),
]
_TORCH = Provider("torch", "logprobs", _calls(plain_logprobs))
_TORCH_LOSS = [_TORCH, Provider("torch.compile", "loss", _torch_compile(_loss_of))]
_TORCH_LOGPROBS = [_TORCH, Provider("torch.compile", "logprobs", _torch_compile(plain_logprobs))]
_OF_LOGITS = [
    Provider("QuACK", "logprobs", _calls(
        lambda f, x: -f(x["logits"], x["targets"], reduction="none"), "quack.cross_entropy", "cross_entropy")),
    Provider("TRL", "logprobs", _calls(
        lambda f, x: f(x["logits"], x["targets"]), "trl.trainer.utils", "selective_log_softmax")),
    Provider("TRL kernel", "logprobs", _calls(
        lambda f, x: f(x["logits"], x["targets"])[0],
        "trl.kernels.logprob_entropy", "selective_log_softmax_and_entropy")),
]  # fmt: skip
_OF_HIDDEN = [
    Provider("Cut Cross-Entropy", "logprobs", _calls(
        lambda f, x: -f(x["hidden"], x["weight"], x["targets"], reduction="none"),
        "cut_cross_entropy", "linear_cross_entropy")),
    Provider("QuACK", "logprobs", _calls(
        lambda f, x: -f(x["hidden"], x["weight"], None, x["targets"], reduction="none"),
        "quack.linear_cross_entropy", "linear_cross_entropy_func")),
]  # fmt: skip
_LIGER_HIDDEN = Provider("Liger", "logprobs", _calls(
    lambda f, x: -f(x["hidden"], x["weight"], x["targets"], reduction="none"),
    "liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"))  # fmt: skip
_LINEAR_LOSS = [
    Provider("flashgrpo", "loss", _own_loss(linear_grpo_loss, "hidden", "weight", "targets")),
    *_TORCH_LOSS,
    Provider("Liger", "loss", _liger_linear_loss(compiled=True)),
    *_OF_HIDDEN,
]
PROVIDERS = {
    "attention_fwd": _ATTENTION,
    "attention": _ATTENTION,
    "gather_logprobs": [
        Provider("flashgrpo", "logprobs", _calls(lambda x: gather_logprobs(x["logits"], x["targets"])[0])),
        *_TORCH_LOGPROBS,
        Provider("Liger", "logprobs", _liger_logprobs),
        *_OF_LOGITS,
    ],
    "gather_grpo_loss": [
        Provider("flashgrpo", "loss", _own_loss(_own_gathered_loss, "logits", "targets")),
        *_TORCH_LOSS,
        *_OF_LOGITS,
    ],
    "logits_grpo_loss": [
        Provider("flashgrpo", "loss", _own_loss(logits_grpo_loss, "logits", "targets")),
        *_TORCH_LOSS,
        Provider("Liger", "results", _liger_logits_loss),
    ],
    "linear_logprobs": [
        Provider("flashgrpo", "logprobs", _calls(lambda x: linear_logprobs(x["hidden"], x["weight"], x["targets"])[0])),
        *_TORCH_LOGPROBS,
        *_OF_HIDDEN,
        _LIGER_HIDDEN,
    ],
    "linear_grpo_loss": [
        *_LINEAR_LOSS,
        Provider("three GEMMs (bound)", "results", _three_gemms, is_bound=True),
        # Its compilation may fail where shapes change.
        Provider("Liger, compiled=False", "loss", _liger_linear_loss(compiled=False)),
    ],
    "grpo_loss": [Provider("flashgrpo", "loss", _own_loss(grpo_loss, "logprobs")), *_TORCH_LOSS],
    "memory": _LINEAR_LOSS,
}
