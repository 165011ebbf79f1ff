"""The sides of `flashgrpo bench step`: our training step, and one of transformers with Liger's loss
or plain torch's.

Both have the same random weights, fp32 with AdamW's moments beside them, compute in `dtype`, and
clip the gradient.
"""

import importlib.util
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.utils.rnn import pad_sequence
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from flashgrpo.grpo.learn.balance import plan_packs
from flashgrpo.grpo.learn.learner import Learner, Stats, packed_loss
from flashgrpo.grpo.learn.packing import Completion, Group, build_batch
from flashgrpo.kernels.grpo_loss import LossConfig
from flashgrpo.model.batch import PackedBatch, gather_predictors
from flashgrpo.model.checkpoint import empty_decoder
from flashgrpo.model.config import ModelConfig
from flashgrpo.model.cost import ModelFlops
from flashgrpo.model.decoder import huggingface_views
from flashgrpo.model.sharding import free_gathered, local_rows, shard

LOSS = LossConfig.preset("dapo")
# What `Learner` reads of [train], whose class wants pydantic, which a bare machine lacks.
TRAIN: Any = SimpleNamespace(lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0, grad_clip=1.0)
# Rows of logits that plain torch holds at once.
_CHUNK = 4096


@dataclass(frozen=True)
class Workload:
    """The completions of an update, with their advantages."""

    groups: list[Group]
    advantages: np.ndarray  # [num_completions] fp32

    @classmethod
    def random(
        cls, groups: int, group_size: int, prompt_tokens: int, mean: float, cap: int, vocab_size: int, seed: int = 0
    ) -> "Workload":
        """Prompts of one length; completions lognormal (sigma 0.8) of about `mean` tokens, at most `cap`."""
        rng = np.random.default_rng(seed)
        log_lengths = rng.normal(np.log(mean) - 0.32, 0.8, groups * group_size)
        lengths = np.exp(log_lengths).round().clip(1, cap).astype(int)
        tokens = partial(rng.integers, 0, vocab_size)
        completions = [Completion(tokens(size=length), i) for i, length in enumerate(lengths)]
        made = []
        for first in range(0, len(completions), group_size):
            made.append(Group(tokens(size=prompt_tokens).tolist(), completions[first : first + group_size]))
        return cls(made, rng.standard_normal(len(lengths)).astype(np.float32))

    @property
    def num_targets(self) -> int:
        return self.num_tokens - sum(len(group.prompt_ids) for group in self.repeated().groups)

    @property
    def lengths(self) -> list[int]:
        """Of each completion with its prompt."""
        groups = self.repeated().groups
        return [len(group.prompt_ids) + len(group.completions[0].token_ids) for group in groups]

    @property
    def num_tokens(self) -> int:
        """Of all prompts and completions, each prompt once a completion."""
        return sum(self.lengths)

    def first(self) -> list[Group]:
        """Two completions."""
        group = self.groups[0]
        return [Group(group.prompt_ids, group.completions[:2])] if len(group.completions) > 1 else self.groups[:2]

    def repeated(self) -> "Workload":
        """The same, every completion with a prompt of its own."""
        groups = []
        for group in self.groups:
            groups += [Group(group.prompt_ids, [completion]) for completion in group.completions]
        return Workload(groups, self.advantages)

    def forward_flops(self, config: ModelConfig) -> float:
        """Of one forward pass over these groups as they are; training takes three times as many."""
        budget = sum(group.num_tokens for group in self.groups)
        return float(plan_packs(self.groups, budget, 1, ModelFlops.of(config)).costs.sum())


def fill(tensors: Mapping[str, Tensor]) -> None:
    """Random weights that depend on a tensor's name alone: matrices normal(0, 0.02), norms 1, biases 0."""
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            # Sides hold their parameters in other orders, and ours joins some: the name alone decides.
            generator = torch.Generator(tensor.device).manual_seed(zlib.crc32(name.encode()))
            tensor.copy_(torch.randn(tensor.shape, generator=generator, device=tensor.device) * 0.02)
        else:
            tensor.fill_(0.0 if name.endswith("bias") else 1.0)


class Ours:
    """The step of `flashgrpo train` on one rank."""

    def __init__(self, shape: dict[str, Any], mesh: DeviceMesh, dtype: torch.dtype, checkpointing: Any):
        self.config, self.device = ModelConfig.from_dict(shape), torch.device(mesh.device_type)
        self.model = empty_decoder(self.config, torch.float32, self.device)
        self.model.activation_checkpointing = checkpointing
        shard(self.model, mesh, dtype)
        self.model.to_empty(device=self.device)
        rows = {name: local_rows(parameter.detach())[0] for name, parameter in self.model.named_parameters()}
        fill(huggingface_views(rows, self.config))
        self.learner = Learner(self.model, TRAIN, total_steps=1)

    def load(self, work: Workload, token_budget: int) -> None:
        """Pack what `step` trains on."""
        plan = plan_packs(work.groups, token_budget, 1, ModelFlops.of(self.config))
        self.batches = [build_batch(pack).to(self.device) for pack in plan.packs[0]]
        self.denominator, self.advantages = float(work.num_targets), torch.from_numpy(work.advantages).to(self.device)
        self.num_tokens = sum(batch.total_tokens for batch in self.batches)

    @torch.no_grad()
    def probe(self, work: Workload) -> Tensor:
        """Hidden states that predict the first two completions, [num_targets, hidden_size]."""
        batch = build_batch(work.first()).to(self.device)
        hidden = gather_predictors(self.model(batch), batch).float()
        free_gathered(self.model)
        return hidden

    def step(self) -> tuple[Tensor, Tensor]:
        """Loss and gradient norm, of the weights before the update."""
        stats, norm = self.learner.update(self.batches, self._loss)
        return torch.stack([s["loss"] for s in stats]).sum(), norm

    def _loss(self, batch: PackedBatch) -> tuple[Tensor, Stats]:
        own = self.advantages[batch.sequence_ids]
        return packed_loss(self.model, batch, LOSS, denominator=self.denominator, advantages=own)


class _Rows(NamedTuple):
    """A micro-batch of the peer: right-padded rows, or all in one row without padding."""

    input_ids: Tensor  # [rows, longest], or [1, total_tokens]
    position_ids: Tensor | None  # [1, total_tokens], where all are in one row
    predictors: Tensor  # [num_completions, longest completion], rows of the flat hidden states
    targets: Tensor  # the same shape
    mask: Tensor  # the same shape, 1.0 for tokens of a completion
    advantages: Tensor  # [num_completions] fp32

    def to(self, device: torch.device) -> "_Rows":
        moved: Any = [tensor if tensor is None else tensor.to(device) for tensor in self]
        return _Rows(*moved)


class Peer:
    """transformers' model as a trainer would use it: bf16 by autocast over fp32 weights, prompts
    repeated, the loss by Liger's fused linear GRPO where it is installed, else from chunks of
    logits that are computed again backwards.

    With flash-attn, sequences are packed in one row; else SDPA on right-padded rows of like
    lengths.
    """

    def __init__(
        self,
        shape: dict[str, Any],
        device: torch.device,
        dtype: torch.dtype,
        checkpointing: str,
        packs: bool | None = None,  # None: where there is flash-attn
        attention: str = "",  # of transformers; "": what packs or pads
    ):
        from transformers import AutoConfig, AutoModelForCausalLM

        self.device, self.dtype = device, dtype
        self.packs = importlib.util.find_spec("flash_attn") is not None if packs is None else packs
        attention = attention or ("flash_attention_2" if self.packs else "sdpa")
        has_liger = importlib.util.find_spec("liger_kernel") is not None
        self.loss = self._liger if has_liger else self._plain
        self.name = f"transformers, {attention}{'' if self.packs else ' on padded rows'}, "
        self.name += "Liger's loss" if has_liger else "plain torch's loss"
        values = shape | {"attn_implementation": attention, "use_cache": False}
        with device:
            config = AutoConfig.for_model(values.pop("model_type"), **values)
            self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        fill({name: parameter.detach() for name, parameter in self.model.named_parameters()})
        if checkpointing == "full":
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        options: dict[str, Any] = {"weight_decay": TRAIN.weight_decay, "fused": True}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), TRAIN.lr, TRAIN.betas, **options)

    def load(self, work: Workload, token_budget: int) -> None:
        """Micro-batches of at most `token_budget` tokens, padding included, the longest sequences first."""
        self.batches, rows, lengths = [], [], []
        # Rows of like lengths have the least padding.
        for group in sorted(work.repeated().groups, key=lambda group: -len(group.completions[0].token_ids)):
            lengths.append(len(group.prompt_ids) + len(group.completions[0].token_ids))
            if rows and (sum(lengths) if self.packs else lengths[0] * len(lengths)) > token_budget:
                self.batches.append(self._build(rows, work.advantages))
                rows, lengths = [], lengths[-1:]
            rows.append(group)
        self.batches.append(self._build(rows, work.advantages))
        self.num_targets = work.num_targets
        self.num_tokens = sum(batch.input_ids.numel() for batch in self.batches)

    def _build(self, rows: Sequence[Group], advantages: np.ndarray) -> _Rows:
        texts, targets, own = [], [], []
        for group in rows:
            (completion,) = group.completions
            targets.append(torch.from_numpy(completion.token_ids))
            texts.append(torch.cat([torch.tensor(group.prompt_ids), targets[-1]]))
            own.append(advantages[completion.sequence_id])
        padded = partial(pad_sequence, batch_first=True)
        # Rows are causal, so that no token sees the padding behind it: a mask would only slow attention down.
        ids, positions = padded(texts), None
        if self.packs:
            ids, positions = torch.cat(texts)[None], torch.cat([torch.arange(len(text)) for text in texts])[None]
        places, start = [], 0
        for text, tokens in zip(texts, targets, strict=True):
            # A token's predictor is the one before it.
            end = start + len(text) - 1
            places.append(torch.arange(end - len(tokens), end))
            start += len(text) if self.packs else ids.shape[1]
        mask = padded([torch.ones(len(tokens)) for tokens in targets])
        batch = _Rows(ids, positions, padded(places), padded(targets), mask, torch.tensor(own))
        return batch.to(self.device)

    @torch.no_grad()
    def probe(self, work: Workload) -> Tensor:
        """As `Ours.probe`."""
        batch = self._build(Workload(work.first(), work.advantages).repeated().groups, work.advantages)
        return self._hidden(batch)[batch.mask.bool()].float()

    def _hidden(self, batch: _Rows) -> Tensor:  # [num_completions, longest completion, hidden_size]
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            hidden = self.model.model(batch.input_ids, position_ids=batch.position_ids).last_hidden_state
        return hidden.to(self.dtype).flatten(0, 1)[batch.predictors]

    def step(self) -> tuple[Tensor, Tensor]:
        """As `Ours.step`."""
        losses = []
        for batch in self.batches:
            hidden = self._hidden(batch)
            with record_function("loss"):
                loss = self.loss(hidden, batch)
            loss.backward()
            losses.append(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), TRAIN.grad_clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).sum(), norm

    def _liger(self, hidden: Tensor, batch: _Rows) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss  # pyright: ignore[reportMissingImports]

        loss = LigerFusedLinearGRPOLoss(
            beta=0.0,
            # Compiled by torch 2.13 it fails on the second shape.
            compiled=False,
            use_ref_model=False,
            epsilon_low=LOSS.clip_low,
            epsilon_high=LOSS.clip_high,
            loss_type="dapo",
        )
        weight = self.model.lm_head.weight.to(hidden.dtype)
        return loss(hidden, weight, batch.targets, batch.mask, batch.advantages, num_items_in_batch=self.num_targets)[0]

    def _plain(self, hidden: Tensor, batch: _Rows) -> Tensor:
        """On policy the ratio is 1, and the loss has the gradient of -advantage x log-prob."""
        rows = batch.mask.flatten().nonzero().squeeze(1)
        hidden, targets = hidden.flatten(0, 1)[rows], batch.targets.flatten()[rows]
        advantages = batch.advantages[rows // batch.mask.shape[1]]

        weight = self.model.lm_head.weight.to(hidden.dtype)

        def chunk_loss(hidden: Tensor, targets: Tensor, advantages: Tensor) -> Tensor:
            logits = (hidden @ weight.T).float()
            logprobs = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
            return -(torch.exp(logprobs - logprobs.detach()) * advantages).sum()

        chunks = zip(hidden.split(_CHUNK), targets.split(_CHUNK), advantages.split(_CHUNK), strict=True)
        losses = [checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.stack(losses).sum() / self.num_targets  # pyright: ignore[reportArgumentType]
