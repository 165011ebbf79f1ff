"""What `bench kernels` measures: operations at named shapes, their useful work, inputs, and what
torch makes of them.

| op | from | to |
| --- | --- | --- |
| attention_fwd, attention | q, k, v | out; and d_q, d_k, d_v |
| gather_logprobs | logits | log-probs |
| gather_grpo_loss | logits | loss and d_logits, by way of log-probs: logits are read twice |
| logits_grpo_loss | logits | loss and d_logits: logits are read once |
| linear_logprobs | hidden | log-probs |
| linear_grpo_loss | hidden | loss, d_hidden and d_weight |
| grpo_loss | log-probs | loss and d_logprobs |
| memory | as linear_grpo_loss, for its peak memory alone | |

The loss is that of a token-level clipped ratio with given advantages, a mean over tokens without
KL, which every peer has. Completions are of one length, so no peer pays for padding. FLOPs are
those of matmuls on live rows, and of causal query-key pairs in attention: 2 matmuls forward, 5
backward. Bytes are what must cross the memory bus at the least.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashgrpo.kernels.common import accumulation_dtype

Inputs = dict[str, Any]
Results = dict[str, Tensor]
CLIP_LOW, CLIP_HIGH = 0.2, 0.28
# About 4 nats of entropy at a vocabulary of 128k.
_LOGITS_STD = 4.0
_GROUP = 8
_GATE_TOKENS = 128
# From hidden states on a GPU the gate takes more rows than `linear_grpo` does at once, so that it sees two chunks.
_GATE_CHUNKED = 6144 + 128
_WANTED = {
    "attention": ("q", "k", "v"),
    "gather_grpo_loss": ("logits",),
    "logits_grpo_loss": ("logits",),
    "linear_grpo_loss": ("hidden", "weight"),
    "memory": ("hidden", "weight"),
    "grpo_loss": ("logprobs",),
}  # differentiated by; other operations are forward only


@dataclass(frozen=True)
class Case:
    """An operation at a shape.

    Attention has `sequences` of `length` tokens, each a prompt shared by `group` completions of
    `completion` tokens. The others have `n` targets in `completions`; with `dead` every second
    completion has advantage 0.
    """

    op: str
    dtype: torch.dtype
    shape: Mapping[str, int]
    variant: str = ""  # what sets it apart from the cases that a plot joins by a line

    @property
    def name(self) -> str:
        numbers = " ".join(f"{key}={value}" for key, value in self.shape.items() if value)
        return f"{self.op} {self.variant and self.variant + ' '}{numbers}"

    @property
    def is_attention(self) -> bool:
        return self.op.startswith("attention")

    @property
    def wanted(self) -> tuple[str, ...]:
        return _WANTED.get(self.op, ())

    @property
    def tokens(self) -> int:
        s = self.shape
        return s["sequences"] * (s["length"] + s["group"] * s["completion"]) if self.is_attention else s["n"]

    @property
    def flops(self) -> int:
        """Of matmuls, those of live rows alone."""
        s = self.shape
        if self.is_attention:
            pairs = s["length"] * (s["length"] + 1) // 2
            pairs += s["group"] * s["completion"] * (2 * s["length"] + s["completion"] + 1) // 2
            return (14 if self.wanted else 4) * s["sequences"] * pairs * s["heads"] * s["head_dim"]
        if "hidden" not in s:
            return 0
        # Of rows without an advantage the loss has no gradient: only their logits are needed.
        live = s["n"] - s["n"] // s["completions"] * (s["completions"] // 2) * s["dead"]
        return (2 * s["n"] + (4 * live if self.wanted else 0)) * s["vocab"] * s["hidden"]

    @property
    def bytes(self) -> int:
        """Of tensors that are read or written, once each; of logits as the table above says."""
        s, size = self.shape, self.dtype.itemsize
        if self.is_attention:
            return (6 if self.wanted else 2) * self.tokens * (s["heads"] + s["kv_heads"]) * s["head_dim"] * size
        if self.op == "grpo_loss":
            return 12 * s["n"]
        if "hidden" in s:
            return (2 if self.wanted else 1) * (s["n"] + s["vocab"]) * s["hidden"] * size
        passes = {"gather_logprobs": 1, "gather_grpo_loss": 3, "logits_grpo_loss": 2}
        return passes[self.op] * s["n"] * s["vocab"] * size

    def reduced(self) -> "Case":
        """The same operation on fewer tokens, for the gate: float64 takes its time."""
        s = dict(self.shape)
        if self.is_attention:
            for key, most in (("sequences", 4), ("length", 512), ("completion", 128)):
                s[key] = min(s[key], most)
        else:
            most = _GATE_CHUNKED if "hidden" in s and self.dtype == torch.bfloat16 else _GATE_TOKENS
            s["n"] = min(s["n"], most)
            s["completions"] = min(s["completions"], _GROUP)
        return Case("linear_grpo_loss" if self.op == "memory" else self.op, self.dtype, s, self.variant)

    def make(self, device: torch.device) -> Inputs:
        """Random inputs; what is differentiated by requires a gradient."""
        rng = torch.Generator(device).manual_seed(0)
        inputs = self._make_attention(rng) if self.is_attention else self._make_targets(rng)
        for name in self.wanted:
            inputs[name].requires_grad_()
        return inputs

    def _normal(self, rng: torch.Generator, *shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, device=rng.device, dtype=self.dtype)

    def _make_attention(self, rng: torch.Generator) -> Inputs:
        s = self.shape
        heads, kv = (self.tokens, s["heads"], s["head_dim"]), (self.tokens, s["kv_heads"], s["head_dim"])
        inputs: Inputs = {"q": self._normal(rng, *heads), "k": self._normal(rng, *kv), "v": self._normal(rng, *kv)}
        lengths, prefix = [], []
        for _ in range(s["sequences"]):
            prefix += [-1] + [len(lengths)] * s["group"]
            lengths += [s["length"]] + [s["completion"]] * s["group"]
        inputs |= {"d_out": self._normal(rng, *heads), "max_seqlen": max(lengths)}
        inputs["cu_seqlens"] = _ends(lengths).to(rng.device)
        inputs["prefix"] = torch.tensor(prefix, dtype=torch.int32, device=rng.device) if s["group"] else None
        return inputs

    def _make_targets(self, rng: torch.Generator) -> Inputs:
        s, inputs = self.shape, {}
        n, completions = s["n"], s["completions"]
        if self.op == "grpo_loss":
            inputs["logprobs"] = logprobs = -self._normal(rng, n).abs()
        else:
            if "hidden" in s:
                inputs["hidden"] = self._normal(rng, n, s["hidden"])
                inputs["weight"] = self._normal(rng, s["vocab"], s["hidden"]).mul_(_LOGITS_STD / s["hidden"] ** 0.5)
            else:
                inputs["logits"] = self._normal(rng, n, s["vocab"]).mul_(_LOGITS_STD)
            inputs["targets"], logprobs = _sample(inputs, rng)
        # Ratios near 1, one in twenty clipped; none so near a bound that rounding would decide.
        shift = torch.randn(n, generator=rng, device=rng.device).mul_(0.05).clamp_(-0.1, 0.1)
        shift[::20] = torch.where(shift[::20] > 0, 0.5, -0.5)
        inputs["old_logprobs"] = logprobs + shift
        inputs["target_cu_seqlens"] = _ends([n // completions] * completions).to(rng.device)
        inputs["advantages"] = torch.randn(completions, generator=rng, device=rng.device)
        if s["dead"]:
            # Whole completions, as where all rewards of a group are equal.
            inputs["advantages"][1::2] = 0
        if self.op == "grpo_loss" and completions % _GROUP == 0:
            inputs["rewards"] = torch.randn(completions // _GROUP, _GROUP, generator=rng, device=rng.device)
        return inputs

    def gradients(self, results: Results, inputs: Inputs) -> Results:
        """`results`, detached, and the gradients by what is `wanted`."""
        made = {name: value.detach() for name, value in results.items()}
        if self.wanted:
            sources = [inputs[name] for name in self.wanted]
            gradients = torch.autograd.grad(next(iter(results.values())), sources, inputs.get("d_out"))
            made |= zip([f"d_{name}" for name in self.wanted], gradients, strict=True)
        return made

    def plain(self, inputs: Inputs) -> Results:
        """What torch makes of the inputs in their own dtype; `terms` are the loss of each token.

        Log-softmax is of fp32 at the least, attention dense, softmax in fp32 and probabilities in
        the inputs' dtype.
        """
        if self.is_attention:
            return self.gradients({"out": _dense_attention(inputs)}, inputs)
        logprobs = plain_logprobs(inputs)
        if not self.wanted:
            return {"logprobs": logprobs}
        loss, terms = plain_loss(logprobs, inputs)
        return self.gradients({"loss": loss, "terms": terms}, inputs)


def as_float64(inputs: Inputs) -> Inputs:
    def widen(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.detach().double().requires_grad_(value.requires_grad)

    return {name: widen(value) for name, value in inputs.items()}


def plain_logprobs(inputs: Inputs) -> Tensor:  # [n]
    """Of targets: as they are, from logits, or from hidden and weight."""
    if "logprobs" in inputs:
        return inputs["logprobs"]
    logits = inputs["logits"] if "logits" in inputs else inputs["hidden"] @ inputs["weight"].T
    logprobs = logits.to(accumulation_dtype(logits.dtype)).log_softmax(-1)
    return logprobs.gather(1, inputs["targets"][:, None]).squeeze(1)


def plain_loss(logprobs: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:  # [], [n]
    """The clipped loss, and of each token."""
    if (rewards := inputs.get("rewards")) is not None:
        advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    else:
        advantages = inputs["advantages"]
    logprobs = logprobs.view(advantages.numel(), -1)
    ratio, advantages = (logprobs - inputs["old_logprobs"].view_as(logprobs)).exp(), advantages.reshape(-1, 1)
    terms = -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantages)
    return terms.mean(), terms.flatten()


def repeat_prompts(case: Case, inputs: Inputs) -> Inputs:
    """Attention's inputs with a copy of the prompt before each completion.

    A copy has its share of the prompt's upstream gradient, so that gradients of copies add up to
    the prompt's.
    """
    s, rows = case.shape, _copied_rows(case, inputs["q"].device)
    share = torch.ones(rows.shape, device=rows.device, dtype=case.dtype)
    # A prompt's gradient counts once, however many copies of it there are.
    share[:, : s["length"]] /= s["group"]
    copied = {x: inputs[x].detach()[rows.flatten()].requires_grad_(inputs[x].requires_grad) for x in ("q", "k", "v")}
    cu_seqlens = _ends([rows.shape[1]] * rows.shape[0]).to(rows.device)
    d_out = inputs["d_out"][rows.flatten()] * share.view(-1, 1, 1)
    return copied | {"d_out": d_out, "cu_seqlens": cu_seqlens, "prefix": None, "max_seqlen": rows.shape[1]}


def fold_prompts(case: Case, results: Results) -> Results:
    """Results on repeated prompts as those on shared ones."""
    folded = {}
    for name, value in results.items():
        rows = _copied_rows(case, value.device).flatten()
        whole = torch.zeros(case.tokens, *value.shape[1:], device=value.device, dtype=torch.float64)
        # Copies of an output are equal, gradients of copies add up.
        add = whole.index_copy_ if name == "out" else whole.index_add_
        folded[name] = add(0, rows, value.double())
    return folded


def _copied_rows(case: Case, device: torch.device) -> Tensor:  # [completions, length + completion]
    """Which token stands where, if every completion has a prompt of its own."""
    s = case.shape
    family = torch.arange(case.tokens, device=device).view(s["sequences"], -1)
    prompts = family[:, None, : s["length"]].expand(-1, s["group"], -1)
    completions = family[:, s["length"] :].view(s["sequences"], s["group"], -1)
    return torch.cat([prompts, completions], 2).flatten(0, 1)


def attention_mask(inputs: Inputs) -> Tensor:  # [tokens, tokens]
    """True where a query sees a key."""
    segment = segments(inputs)
    place = torch.arange(len(segment), device=segment.device)
    seen = (segment[:, None] == segment) & (place[:, None] >= place)
    return seen if inputs["prefix"] is None else seen | (inputs["prefix"][segment][:, None] == segment)


def segments(inputs: Inputs) -> Tensor:  # [tokens]
    """The segment of each token."""
    lengths = inputs["cu_seqlens"].diff()
    return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)


def cases(sizes: str, dtype: torch.dtype) -> Iterator[Case]:
    """Those of the targets first, then memory, then what else the plots need; `sizes` is "small" or "full"."""
    full = sizes == "full"
    heads = {"heads": 32, "kv_heads": 8, "head_dim": 128} if full else {"heads": 4, "kv_heads": 2, "head_dim": 64}
    length, short = (512, 16) if full else (32, 4)  # of a completion; sequences
    logits = {"vocab": 151_936} if full else {"vocab": 2048}
    hidden = {"vocab": 128_256, "hidden": 4096} if full else {"vocab": 2048, "hidden": 128}
    scored = hidden | ({"vocab": 131_072} if full else {})

    def attention(op: str, sequences: int, tokens: int, group: int = 0, completion: int = 0, variant: str = "") -> Case:
        layout = {"sequences": sequences, "length": tokens, "group": group, "completion": completion}
        return Case(op, dtype, layout | heads, variant)

    def rows(op: str, n: int, sizes: Mapping[str, int], variant: str = "", dead: int = 0, completions: int = 0) -> Case:
        shape = {"n": n, **sizes, "completions": completions or max(1, n // length), "dead": dead}
        return Case(op, torch.float32 if op == "grpo_loss" else dtype, shape, variant)

    of_logits = ("gather_logprobs", "gather_grpo_loss", "logits_grpo_loss")
    tokens, n = (8192, 8192) if full else (512, 512)
    for op in ("attention_fwd", "attention"):
        yield attention(op, 1, tokens)
        yield attention(op, short, tokens // short, variant="short")
        yield attention(op, 1, *((4096, 8, 1024) if full else (256, 4, 64)), variant="shared prefix")
    yield from (rows(op, n, logits) for op in of_logits)
    yield rows("linear_logprobs", n, scored)
    yield rows("linear_grpo_loss", n // 2, hidden)
    yield rows("linear_grpo_loss", n // 2, hidden, "half dead", dead=1)
    many = 65_536 if full else 4096
    yield rows("grpo_loss", many, {}, completions=64)
    yield rows("grpo_loss", many, {}, "one completion", completions=1)
    for k in (1, 4, 16, 64) if full else (1, 4, 16):
        yield rows("memory", 1024 * k, hidden)
    for smaller in (8, 4) if full else (4,):
        yield from (attention(op, 1, tokens // smaller) for op in ("attention_fwd", "attention"))
        yield from (rows(op, n // smaller, logits) for op in of_logits)
        yield rows("linear_logprobs", n // smaller, scored)
        yield rows("linear_grpo_loss", n // smaller, hidden)
        yield rows("grpo_loss", many // smaller, {}, completions=64)
    if full:
        yield from (attention(op, 1, 4 * tokens) for op in ("attention_fwd", "attention"))
        yield rows("linear_grpo_loss", 2 * n, hidden)
        # Last, for some peers take many seconds.
        yield rows("memory", 256 * 1024, hidden)


def _ends(lengths: list[int]) -> Tensor:  # [len(lengths) + 1]
    return torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


def _sample(inputs: Inputs, rng: torch.Generator) -> tuple[Tensor, Tensor]:  # [n], [n]
    """Targets as a sampler would draw them, and their log-probs, a few rows at a time."""
    targets, logprobs = [], []
    # All rows at once would need a second copy of the logits, in fp32.
    for rows in inputs["logits" if "logits" in inputs else "hidden"].split(512):
        logits = (rows if "logits" in inputs else rows @ inputs["weight"].T).float()
        every = logits.log_softmax(-1)
        chosen = every.exp().div_(torch.empty_like(every).exponential_(generator=rng)).argmax(1, keepdim=True)
        targets.append(chosen.squeeze(1))
        logprobs.append(every.gather(1, chosen).squeeze(1))
    return torch.cat(targets), torch.cat(logprobs)


def _dense_attention(inputs: Inputs) -> Tensor:  # [tokens, heads, head_dim]
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[2] ** -0.5
    scores = scores.masked_fill(~attention_mask(inputs), float("-inf"))
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1, dtype=accumulation_dtype(q.dtype)).to(q.dtype), v)
