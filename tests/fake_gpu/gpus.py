"""Dry runs: the project's own code on fake GPUs, a rank of many, in one process and on any machine.

    with fake_gpus(world=64, shard_ranks=8) as gpus:                  # HSDP 8 x 8
        run = gpus.train_step(shape("Qwen2.5-7B", layers=4), tokens=16_384, checkpointing="full")
    assert run.syncs["linear_grpo.py:step"] == 6                     # where the host waits, and how often
    assert run.kernels_per_block["forward"].total() <= 20             # by operator: a Counter
    assert run.peak_bytes < 80e9

Anything else that runs on CUDA is traced by `record`: what is made under `fake_gpus` on gpus.device is fake.

    with fake_gpus() as gpus:
        model = gpus.model(shape("Qwen2.5-1.5B", layers=4))
        decoding = start(model, requests)
        with gpus.record() as run:
            decoding.step()
    assert run.syncs.total() == 1 and run.kernels.total() <= 15 * 4 + 19

Numbers that come from the device are ones; `gpus.tracer.answer` is what a number is that the host reads. Tests that use
this lie in this folder, whose conftest.py runs each in a process of its own. kernels.json has the kernels of a block:
more than there is a failure, and so are fewer until they are recorded, by

    RECORD=1 pytest -n0 tests/fake_gpu -k test_a_step
"""

import datetime
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from fake_gpu.device import install
from fake_gpu.tracer import DryRun, Tracer
from flashgrpo.bench.shapes import SHAPES
from flashgrpo.grpo.data.mixture import Position
from flashgrpo.grpo.learn.packing import Group
from flashgrpo.grpo.recipe.load import Recipe, RewardModelRecipe, SftRecipe, build_recipe
from flashgrpo.grpo.rollout.sync import DecoderSource
from flashgrpo.grpo.run.costs import Costs, Lengths
from flashgrpo.grpo.run.loop import RunLoop
from flashgrpo.grpo.run.machines import MACHINES
from flashgrpo.grpo.run.progress import Clock
from flashgrpo.grpo.run.world import World, _mesh
from flashgrpo.grpo.stages.reward_model import RewardModelTrainer, Row
from flashgrpo.grpo.stages.sft import SftTrainer
from flashgrpo.grpo.train import Trainer
from flashgrpo.grpo.types import Rollout, ScoredGroup, Scores, StepData
from flashgrpo.model.checkpoint import empty_decoder
from flashgrpo.model.config import ModelConfig
from flashgrpo.model.cost import ModelFlops
from flashgrpo.model.decoder import Decoder
from flashgrpo.model.sharding import shard

HELD_BACK = {"reserve", "lost between tensors", "vLLM, asleep"}  # plan's parts that no tensor of the trainer's fills
LIMIT = datetime.timedelta(seconds=60)


def shape(name: str, layers: int = 0, **changes: Any) -> ModelConfig:
    """A published model by its name in bench/shapes.py, with so many layers (0: its own)."""
    raw = SHAPES[name] | ({"num_hidden_layers": layers} if layers else {}) | changes
    return ModelConfig.from_dict(raw)


@dataclass(frozen=True, kw_only=True)
class FakeWorld(World):
    """A rank of many whose others are not there: what they would say of host values is what this one says. That it asks
    them is among the collectives.
    """

    tracer: Tracer

    def gather(self, value: Any) -> list[Any]:
        self.tracer.run.collectives.append("gather")
        return [value] * self.size

    def gather_array(self, values: np.ndarray) -> list[np.ndarray]:
        self.tracer.run.collectives.append("gather_array")
        return [values] * self.size


@contextmanager
def fake_gpus(world: int = 1, shard_ranks: int = 0, rank: int = 0) -> Iterator["Gpus"]:
    """Rank `rank` of `world` ranks on H200s, `shard_ranks` to a copy of the model (0: all)."""
    install()
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        device = torch.device("cuda", 0)
        mesh = _mesh(device, world, shard_ranks or world, LIMIT)
        tracer = Tracer()
        with tracer.on(), _phases_seen(tracer):
            yield Gpus(FakeWorld(rank, world, device, mesh, tracer=tracer), tracer)
    finally:
        dist.destroy_process_group()


@dataclass
class Gpus:
    """What can be run on them."""

    world: World
    tracer: Tracer

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def record(self):
        """A context: what is done under it is in the DryRun that it gives."""
        return self.tracer.record

    def model(
        self,
        config: ModelConfig,
        checkpointing: str = "none",
        *,
        dtype: torch.dtype = torch.bfloat16,
        stored: torch.dtype = torch.float32,
        reshard: bool = True,
    ) -> Decoder:
        """A decoder sharded as by `open_sharded_model`; on one rank whole, where `stored` is dtype."""
        model = empty_decoder(config, stored, self.device)
        model.activation_checkpointing = checkpointing
        shard(model, self.world.mesh, dtype, reshard)
        model.to_empty(device=self.device)
        _mark_blocks(model, self.tracer)
        return model

    def train_step(
        self,
        config: ModelConfig,
        tokens: int = 16_384,  # of a pack, all of which are full
        checkpointing: str = "none",
        *,
        prompt: int = 256,
        response: int = 2048,  # at most
        mini_batches: int = 1,
        micro_batches: int = 2,
        packs: int | None = None,  # of an update over all ranks, where it is not micro_batches for each
        group_size: int = 16,
        reshard: bool = True,
        warm: bool = False,  # a step before the recorded one: as every step but the first
        teacher: ModelConfig | None = None,
        **loss: Any,
    ) -> DryRun:
        """A step of `Trainer.run_step` but for sampling; `loss` is the recipe's section."""
        packs = micro_batches * self.world.size if packs is None else packs
        groups = mini_batches * packs * packed_groups(tokens, prompt, response, group_size)
        recipe = step_recipe(
            rollout={"prompts_per_step": groups, "group_size": group_size, "max_new_tokens": response},
            train={
                "token_budget": tokens,
                "mini_batches": mini_batches,
                "reshard_after_forward": reshard,
                "shard_ranks": self.world.mesh.size() if self.world.mesh.ndim == 1 else self.world.mesh.shape[1],
            },
            model={"path": "models/none", "activation_checkpointing": checkpointing},
            loss={"preset": "dapo"} | loss,
        )
        data = step_data(groups, tokens, prompt, response, group_size)
        with self.record():
            trainer = self._opened(Trainer, recipe, self.model(config, checkpointing, reshard=reshard))
            trainer.reference = None
            if recipe.loss.kl_coef:
                trainer.reference = self.model(config, stored=torch.bfloat16).requires_grad_(False)
            trainer.teacher = None
            if teacher:
                trainer.teacher = self.model(teacher, stored=torch.bfloat16).requires_grad_(False)
            trainer.position, trainer.has_comparable_logprobs = Position({}, {}), True
            trainer._steps_without_signal = 0
            trainer.sampler = _Sampled(data)
            trainer.open_learner(10)
            self._mark_optimizer(trainer)
        if warm:
            with self.record():
                trainer.run_step(1, _Bar())
        with self.record() as run:
            trainer.run_step(1 + warm, _Bar())
        run.planned = planned(recipe, config, self.world.size, prompt, data)
        return run

    def supervised_step(
        self,
        config: ModelConfig,
        tokens: int = 16_384,
        checkpointing: str = "none",
        *,
        reward_model: bool = False,
        packs: int | None = None,  # over all ranks, where it is not one for each
    ) -> DryRun:
        """The second step of SFT, or of a reward model on pairs, of full packs."""
        kind, recipe_kind = (RewardModelTrainer, RewardModelRecipe) if reward_model else (SftTrainer, SftRecipe)
        length = 1024
        rows = (self.world.size if packs is None else packs) * (tokens // (2 * length))
        recipe = build_recipe(
            recipe_kind,
            _sections(train={"token_budget": tokens, "batch_size": rows}) | {"data": {"path": "none.jsonl"}},
        )
        config = config.as_reward_model() if reward_model else config
        with self.record():
            trainer: Any = self._opened(kind, recipe, self.model(config, checkpointing))
            trainer.held_out, trainer.steps_per_epoch = [], 1
            texts = [np.zeros(length // 2, np.int64)] * 2
            row = Row([1] * length, texts, [1.0, -1.0]) if reward_model else _group(length, [length])
            trainer.rows = [row] * rows
            trainer.open_learner(10)
            self._mark_optimizer(trainer)
            trainer.run_step(1, _Bar())
        with self.record() as run:
            trainer.run_step(2, _Bar())
        return run

    def weight_source(self, config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> tuple[DryRun, list[str]]:
        """A pass over all weights on their way to a sampler, and what is wrong with it."""
        with self.record():
            model = self.model(config)
        source, wrong = DecoderSource(dict(model.named_parameters()), config, dtype), []
        with self.record() as run:
            for meta, (name, tensor) in zip(source.metadata(), source, strict=True):
                found = name, tensor.dtype, tuple(tensor.shape), tensor.device.type
                if found != (meta.name, meta.dtype, meta.shape, "cuda"):
                    wrong.append(f"{found}, wanted {meta}")
                del tensor
        return run, wrong

    def _opened(self, kind: type[RunLoop], recipe: Any, model: Decoder) -> Any:
        """A trainer of `kind` without its files, tokenizer and data."""
        trainer: Any = kind.__new__(kind)
        trainer.recipe, trainer.world, trainer.settings = recipe, self.world, recipe.train
        trainer.device, trainer.compute_dtype = self.device, torch.bfloat16
        trainer.policy = SimpleNamespace(model=model, decode=str)
        trainer.folder = _Folder()
        trainer.flops, trainer.step = ModelFlops.of(model.config), 0
        return trainer

    def _mark_optimizer(self, trainer: Any) -> None:
        trainer.learner.optimizer.register_step_pre_hook(lambda *_: self.tracer.enter("optimizer"))


class _Folder(SimpleNamespace):
    checkpoint = None

    def nothing(self, *arguments: Any) -> None:
        pass

    log = log_more = log_samples = nothing


class _Bar:
    def phase(self, name: str) -> None:
        pass


class _Sampled:
    """A Sampler whose completions are there."""

    def __init__(self, data: StepData):
        self.data, self.sync_seconds = data, []
        self.generator = SimpleNamespace(free_weights=lambda: None)
        self.pool, self.mixture = SimpleNamespace(functions={}), SimpleNamespace(prompts={})

    def sync(self, version: int) -> None:
        pass

    def sync_metrics(self) -> dict[str, float]:
        return {}

    def start_ahead(self, step: int, position: Position) -> Position:
        return position

    def probe(self, step: int) -> list[list[Rollout]]:
        return []

    def rollout(self, step: int, position: Position, clock: Clock) -> tuple[StepData, Position]:
        return replace(self.data, version=step - 1), position


def step_recipe(**sections: dict[str, Any]) -> Recipe:
    """A recipe of those sections."""
    return build_recipe(Recipe, _sections(data={"path": "none.jsonl"}) | sections)


def _sections(**sections: dict[str, Any]) -> dict[str, Any]:
    return {"model": {"path": "models/none"}, "run": {"output": "runs/none"}} | sections


def planned(recipe: Recipe, config: ModelConfig, ranks: int, prompt: int, data: StepData) -> dict[str, float]:
    """What plan counts for the moments of training, without what it holds back."""
    lengths = [len(rollout.completion_ids) for rollout in data.rollouts]
    expected = Lengths(prompt, sum(lengths) / len(lengths), recipe.rollout.max_new_tokens)
    moments = Costs(recipe, config, MACHINES["h200"], ranks, expected).memory(recipe.train.token_budget)
    found = {}
    for moment in ("loss", "backward", "reduction"):
        parts = moments[moment].items()
        found[moment] = sum(size for name, size in parts if name not in HELD_BACK)
    return found


def packed_groups(tokens: int, prompt: int, response: int, group_size: int) -> int:
    """Groups of a full pack."""
    return -(-tokens // (prompt + group_size * (response - 1)))


def step_data(groups: int, tokens: int, prompt: int, response: int, group_size: int) -> StepData:
    """Groups whose packs are full to the last token; half of the completions are right."""
    in_a_pack = packed_groups(tokens, prompt, response, group_size)
    scored = []
    for number in range(groups):
        own = _share(tokens, number % in_a_pack, in_a_pack) - prompt
        lengths = [1 + _share(own, i, group_size) for i in range(group_size)]
        scored.append(ScoredGroup(_rollouts(number, prompt, lengths), Scores(np.arange(group_size) % 2.0, {})))
    return StepData(scored, version=0)


def _share(total: int, place: int, parts: int) -> int:
    """Of `total` in whole numbers that differ by one at most."""
    return (place + 1) * total // parts - place * total // parts


def _rollouts(group: int, prompt: int, lengths: Sequence[int]) -> list[Rollout]:
    prompt_ids, found = [1] * prompt, []
    for length in lengths:
        ids, logprobs = np.zeros(length, np.int64), np.zeros(length, np.float32)
        found.append(Rollout(prompt_ids, ids, logprobs, "stop", group, ((0, length),)))
    return found


def _group(prompt: int, lengths: Sequence[int]) -> Group:
    return Group.of(_rollouts(0, prompt, lengths))


def _mark_blocks(model: Decoder, tracer: Tracer) -> None:
    """Tell the tracer which block runs. A scope reaches from the end of a block to the end of the next."""
    blocks = model.model.layers

    def begin(*_: Any) -> None:
        is_trained = torch.is_grad_enabled()
        tracer.enter("forward" if is_trained else tracer.phase, ("forward" if is_trained else "scoring", 0))

    def ended(number: int, output: torch.Tensor) -> None:
        way = "forward" if torch.is_grad_enabled() else "scoring"
        is_last = number == len(blocks) - 1
        tracer.enter(tracer.moment, "head" if is_last else (way, number + 1))
        if output.requires_grad:
            # Its gradient is there: what comes next is its own backward pass.
            output.register_hook(lambda _: tracer.enter("backward", ("backward", number)))

    def embedded(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda _: tracer.enter("reduction"))

    model.register_forward_pre_hook(begin, prepend=True)
    model.model.embed_tokens.register_forward_hook(embedded)
    for number, block in enumerate(blocks):
        block.register_forward_hook(lambda _block, _inputs, output, n=number: ended(n, output))


@contextmanager
def _phases_seen(tracer: Tracer) -> Iterator[None]:
    """A clock's phases are the tracer's, too; one that ends over what nobody has waited for is noted."""
    plain = Clock.__call__

    @contextmanager
    def seen(clock: Clock, phase: str) -> Iterator[None]:
        before = tracer.phase, tracer.moment, tracer.scope
        tracer.phase = phase
        tracer.enter(phase)
        with plain(clock, phase):
            yield
        if tracer.pending:
            tracer.run.unwaited[phase] = tracer.pending
        tracer.phase, tracer.moment, tracer.scope = before

    Clock.__call__ = seen  # type: ignore[method-assign]
    try:
        yield
    finally:
        Clock.__call__ = plain  # type: ignore[method-assign]
