"""The decoder of Llama, Qwen2 and Qwen3 on packed tokens: [n] token ids -> [n, hidden_size] hidden states.

Attention is an argument of the forward pass, so that training (packed segments) and generation (a
KV cache) share every other line. The LM head is not applied: `lm_head_weight` goes to the fused
loss or log-prob kernels instead, and the logits never exist. A reward model has a head of one score
in its place. What multiplies the same input is one parameter: the projections to q, k and v, and
those to gate and up. `huggingface_views` has them apart, under the names that checkpoints use.
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from flashgrpo.kernels.attention import AttentionPlan, plan_attention, planned_attention
from flashgrpo.kernels.common import accumulation_dtype, backward_once
from flashgrpo.kernels.elementwise import QKNorm, rms_norm, rope, swiglu, swiglu_backward
from flashgrpo.model.batch import PackedBatch
from flashgrpo.model.config import ModelConfig
from flashgrpo.model.rope import rotary_cos_sin

# (layer index, q [n, num_heads, head_dim], k and v [n, num_kv_heads, head_dim]) -> [n, num_heads, head_dim];
# q and k come after QK norm and RoPE
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
ActivationCheckpointing = Literal["none", "selective", "full"]


class Decoder(nn.Module):
    """A causal language model without its logits, or a reward model.

    `activation_checkpointing` trades time for memory, block by block: "full" keeps each block's
    input and recomputes the rest, "selective" keeps the outputs of matrix products and attention
    too and recomputes what is cheap. `attention_backend` is the backend of `plan_attention`.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        own_head = not (config.tie_embeddings or config.is_reward_model)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False) if own_head else None
        self.score = nn.Linear(config.hidden_size, 1, bias=False) if config.is_reward_model else None
        self.activation_checkpointing: ActivationCheckpointing = "none"
        self.attention_backend = "triton"

    @property
    def lm_head_weight(self) -> Tensor:  # [vocab_size, hidden_size]
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, batch: PackedBatch) -> Tensor:
        """Hidden states of every packed token, [total_tokens, hidden_size], after the final norm."""

        total_tokens = len(batch.input_ids)
        padding = self.padded_tokens(total_tokens) - total_tokens  # tokens of no segment
        ids, positions = batch.input_ids, batch.position_ids
        if padding:
            ids, positions = F.pad(ids, (0, padding)), F.pad(positions, (0, padding))
        plan = self.plan_attention(batch.cu_seqlens, batch.prefix, len(ids), batch.max_seqlen)

        def attend(_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return planned_attention(q, k, v, plan)

        hidden = self._run(ids, positions, attend)
        return hidden[:total_tokens].clone() if padding else hidden  # FSDP wants no view

    def plan_attention(
        self, cu_seqlens: Tensor, prefix: Tensor | None, total_tokens: int, max_seqlen: int
    ) -> AttentionPlan:
        """For all layers of a pass over packed tokens."""
        heads = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        options = {"max_seqlen": max_seqlen, "backend": self.attention_backend}
        return plan_attention(cu_seqlens, prefix, total_tokens, heads, self.lm_head_weight.dtype, **options)

    def scores(self, batch: PackedBatch) -> Tensor:
        """A reward model's score of every completion at the last token that is fed, [num_completions], fp32.

        Completions of one token have none of their own fed, and are not for this.
        """
        assert self.score is not None
        hidden = self(batch)
        hidden = hidden[batch.predictors[batch.target_cu_seqlens[1:].long() - 1]]  # each row has one reader at most
        wide = accumulation_dtype(hidden.dtype)
        return F.linear(hidden.to(wide), self.score.weight.to(wide)).squeeze(1)

    def padded_tokens(self, num_tokens: int) -> int:
        """`num_tokens`, or a little more where the decoder is on a CPU: model/cpu.py has the reason."""
        return num_tokens

    def run(
        self,
        input_ids: Tensor,  # [n]
        position_ids: Tensor,  # [n]
        attend: Attend,
    ) -> Tensor:
        """Hidden states of the tokens, [n, hidden_size], after the final norm; tokens meet only inside `attend`.

        Never compiled: every new `attend` would be compiled again, until torch gives up on the blocks altogether.
        """
        with torch.compiler.set_stance("force_eager"):
            return self._run(input_ids, position_ids, attend)

    def _run(self, input_ids: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        cos, sin = rotary_cos_sin(self.config.rope, position_ids)
        hidden = self.model.embed_tokens(input_ids)
        for index, block in enumerate(self.model.layers):
            hidden = block(hidden, cos, sin, attend, index, self.activation_checkpointing)
        return self.model.norm(hidden)[0]

    def compile_blocks(self, backend: str | Callable = "inductor") -> None:
        """Compiles each block of `forward`, for any number of tokens; parameter names stay. Meant for CUDA."""
        for block in self.model.layers:
            block.compile(backend=backend, dynamic=True)


def huggingface_rows(name: str, num_rows: int, config: ModelConfig) -> dict[str, slice]:
    """The rows of a decoder's parameter under the names that Hugging Face checkpoints use: one, or those of a joint."""
    parts = {
        ".qkv_proj.": {".q_proj.": config.q_size, ".k_proj.": config.kv_size, ".v_proj.": config.kv_size},
        ".gate_up_proj.": {".gate_proj.": config.intermediate_size, ".up_proj.": config.intermediate_size},
    }
    joint = next((joint for joint in parts if joint in name), None)
    if joint is None:
        return {name: slice(0, num_rows)}
    stops = itertools.accumulate(parts[joint].values())
    return {
        name.replace(joint, part): slice(stop - size, stop)
        for (part, size), stop in zip(parts[joint].items(), stops, strict=True)
    }


def huggingface_views(
    tensors: Mapping[str, Tensor],  # a decoder's parameters, or what has their names and shapes
    config: ModelConfig,
) -> dict[str, Tensor]:
    """Views of `tensors` under the names that Hugging Face checkpoints use, in their order."""
    return {
        part: tensor[rows]
        for name, tensor in tensors.items()
        for part, rows in huggingface_rows(name, len(tensor), config).items()
    }


class Trunk(nn.Module):
    """What Hugging Face names `model`: embedding, blocks, final norm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class RMSNorm(nn.RMSNorm):
    """The norm of x, or of x added to the residual stream, and that stream for what follows."""

    eps: float  # pyright: ignore[reportIncompatibleVariableOverride]

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return rms_norm(x, self.weight, self.eps, residual)


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        hidden: Tensor,  # [n, hidden_size]
        cos: Tensor,  # [n, 1, head_dim]
        sin: Tensor,  # [n, 1, head_dim]
        attend: Attend,
        index: int,
        checkpointing: ActivationCheckpointing = "none",
    ) -> Tensor:
        if checkpointing == "none" or not torch.is_grad_enabled():
            return self.transform(hidden, cos, sin, attend, index)
        recompute = functools.partial(checkpoint, self.transform, use_reentrant=False, preserve_rng_state=False)
        if checkpointing == "selective":
            return recompute(hidden, cos, sin, attend, index, overwrite=False, context_fn=_keep_products)
        if checkpointing != "full":
            raise ValueError(f"activation_checkpointing is {checkpointing!r}; wanted none, selective or full")
        return recompute(hidden, cos, sin, attend, index)

    def transform(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend, index: int, overwrite: bool = True
    ) -> Tensor:
        """`overwrite` lets RoPE take the place of the product that it turns; a checkpoint that keeps that does not."""
        normed, hidden = self.input_layernorm(hidden)
        attended = self.self_attn(normed, cos, sin, attend, index, overwrite)
        normed, hidden = self.post_attention_layernorm(attended, hidden)
        return hidden + self.mlp(normed)


class SelfAttention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.qkv_proj = nn.Linear(config.hidden_size, config.q_size + 2 * config.kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.q_size, config.hidden_size, bias=config.output_bias)
        self.q_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend, index: int, overwrite: bool = True
    ) -> Tensor:
        num_heads = self.num_heads + 2 * self.num_kv_heads
        qkv = self.qkv_proj(hidden).unflatten(1, (num_heads, -1))
        q, k, v = self.rotate(qkv, cos, sin, overwrite)
        return self.o_proj(attend(index, q, k, v).flatten(1))

    def rotate(
        self,
        qkv: Tensor,  # [n, num_heads + 2 * num_kv_heads, head_dim]
        cos: Tensor,
        sin: Tensor,
        overwrite: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return rope(qkv, cos, sin, self.num_heads, self.qk_norm, overwrite=overwrite)

    @property
    def qk_norm(self) -> QKNorm | None:
        if self.q_norm is None or self.k_norm is None:
            return None
        assert self.q_norm.eps is not None
        return QKNorm(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)


class SwiGLU(torch.autograd.Function):
    """(silu(x gate^T) * (x up^T)) down^T (Shazeer 2020) of x, gate and up as one, and down; product(x, w) is x w^T.

    It keeps two tensors of [n, intermediate_size] for the backward pass where plain autograd keeps four: silu and the
    product are computed again, at no matmul's cost.
    """

    @staticmethod
    def forward(ctx, x, gate_up_weight, down_weight, product):
        gate_up = product(x, gate_up_weight)
        ctx.save_for_backward(x, gate_up, gate_up_weight, down_weight)
        ctx.product = product
        return product(swiglu(gate_up), down_weight)

    @staticmethod
    @backward_once
    def backward(ctx, *grad_outputs):
        (d_out,) = grad_outputs
        x, gate_up, gate_up_weight, down_weight = ctx.saved_tensors
        product = ctx.product
        d_gate_up, activated = swiglu_backward(gate_up, product(d_out, down_weight.T))
        d_down_weight = product(d_out.T, activated.T)
        del activated
        return product(d_gate_up, gate_up_weight.T), product(d_gate_up.T, x.T), d_down_weight, None


class MLP(nn.Module):
    product = staticmethod(F.linear)  # x w^T

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        weights = self.gate_up_proj.weight, self.down_proj.weight
        if torch.is_grad_enabled():
            return SwiGLU.apply(hidden, *weights, self.product)
        return self.product(swiglu(self.product(hidden, weights[0])), weights[1])


# What selective checkpointing keeps: products and attention, flash-attn's too, except 4's, which is no operator.
# model/cpu.py adds its product.
KEPT_OPERATORS = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.flashgrpo.packed_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]
_KEPT_NAMESPACES = ("flash_attn", "flash_attn_3", "torch_attn")


def _what_to_keep(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    kept = operator in KEPT_OPERATORS or getattr(operator, "namespace", "") in _KEPT_NAMESPACES
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


_keep_products = functools.partial(create_selective_checkpoint_contexts, _what_to_keep)
