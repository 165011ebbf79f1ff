"""What every kind of run shares: opening it, the loop over its steps, checkpoints, Ctrl-C, the final model."""

import abc
import contextlib
import dataclasses
import signal
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from flashgrpo.grpo.errors import GeneratorFailure, RewardFailure, RunError, RunInputError
from flashgrpo.grpo.learn.learner import Learner
from flashgrpo.grpo.recipe.load import Recipe, RewardModelRecipe, SftRecipe
from flashgrpo.grpo.run.costs import Costs, Lengths, TrainCosts, require_free, settle_budget
from flashgrpo.grpo.run.folder import RunFolder
from flashgrpo.grpo.run.interrupts import Stopped
from flashgrpo.grpo.run.ledger import begun_with
from flashgrpo.grpo.run.machines import hold_reserve, machine_of, resolve_dtype
from flashgrpo.grpo.run.policy import open_policy, open_sharded_model
from flashgrpo.grpo.run.progress import StepBar, say, step_bar
from flashgrpo.grpo.run.world import World
from flashgrpo.model.checkpoint import read_config, save_checkpoint
from flashgrpo.model.decoder import Decoder
from flashgrpo.model.sharding import is_finite

_MOST_SKIPPED = 3

_R = TypeVar("_R", bound=Recipe | SftRecipe | RewardModelRecipe)


class RunLoop(abc.ABC):
    """A subclass calls `open_learner` once it knows its number of steps, and says what a step is."""

    title: str
    recipe: Any  # of the subclass' kind

    def __init__(self, recipe: Recipe | SftRecipe | RewardModelRecipe, folder: RunFolder, world: World):
        self.folder, self.world, self.settings = folder, world, recipe.train
        self.device = world.device
        self._check_room(recipe)
        say(f"loading {recipe.model.path}")
        opened: list[Decoder] = []
        load = partial(
            open_sharded_model,
            recipe.model,
            world.device,
            world.mesh,
            reshard_after_forward=recipe.train.reshard_after_forward,
            read_weights=folder.checkpoint is None,
            new_score=isinstance(recipe, RewardModelRecipe),
        )
        # A rank may find a fault in its own rows alone; then all of them end.
        world.everywhere(lambda: opened.append(load()))
        self.policy = open_policy(recipe.model, world.device, *opened)
        self.compute_dtype = resolve_dtype(recipe.model.dtype, world.device)
        self.step = folder.state.get("step", 0)
        self.ends = contextlib.ExitStack()  # of what runs beside this rank

    def _check_room(self, recipe: Recipe | SftRecipe | RewardModelRecipe) -> None:
        """Before anything is loaded: whether a GPU holds the recipe; what is not for tensors is held back.

        The longest row, or prompt, is known later.
        """
        config, world = read_config(recipe.model.path), self.world
        if isinstance(recipe, RewardModelRecipe):
            config = config.as_reward_model()
        # The cards of all ranks may differ, and their packs are planned alike.
        self.machine = min(world.gather(machine_of(world.device)), key=lambda machine: machine.memory)
        if isinstance(recipe, Recipe):
            lengths = Lengths.assumed(recipe)
            costs: TrainCosts = Costs(recipe, config, self.machine, world.size, lengths, foresees=False)
            settle_budget(costs, recipe.train.token_budget, lengths.needed)
            if costs.generator == "vllm" and world.device.type == "cuda":
                world.everywhere(partial(require_free, costs, torch.cuda.mem_get_info(world.device)[0]))
        else:
            costs = TrainCosts(recipe, config, self.machine, world.size)
            settle_budget(costs, recipe.train.token_budget, 1)
        hold_reserve(world.device, costs.reserve, grows=costs.generator != "vllm")

    @property
    def token_budget(self) -> int:
        """Most tokens of a micro-batch, once `settle_budget` has been asked."""
        budget = self.recipe.train.token_budget
        assert budget != "auto"
        return budget

    def settle_budget(self, recipe: _R, costs: TrainCosts, needed: int) -> _R:
        """The recipe with a number for train.token_budget, which becomes that of the run's folder; the longest sequence
        has `needed` tokens. Raises RecipeError where a GPU does not hold it.
        """
        wanted = recipe.train.token_budget
        budget = settle_budget(costs, wanted, needed)
        if wanted == "auto":
            why = "enough for a CPU" if costs.machine.is_cpu else "the most that fit"
            say(f"train.token_budget = {budget} (auto: {why})")
        self.folder.recipe = settled = _with_budget(recipe, budget)
        return settled

    @abc.abstractmethod
    def run_step(self, step: int, bar: StepBar) -> tuple[dict[str, float], str]:
        """Take a step, log it, set `self.step`; returns its metrics and the progress bar's text."""

    def begin(self) -> None:  # noqa: B027  # most runs have nothing to do here
        """What comes before the first step that is left."""

    def extra_tensors(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint besides the learner's, filled in place on resume."""
        return {}

    def extra_state(self) -> dict[str, Any]:
        """Plain values of a checkpoint besides the step."""
        return {}

    def model_files(self) -> dict[str, dict[str, Any]]:
        """JSON files of the model's folder besides Hugging Face's, by name; all ranks make them."""
        return {}

    def open_learner(self, total_steps: int) -> None:
        """Make the optimizer; on resume, everything becomes what it was."""
        self.total_steps = total_steps
        self.learner = Learner(self.policy.model, self.settings, total_steps)
        if self.folder.checkpoint:
            self.folder.restore(self.learner.state_tensors() | self.extra_tensors())
            hint = f"remove {self.folder.checkpoint} to continue from the one before"
            self.world.everywhere(lambda: self._check_weights(RunInputError, hint))

    def run(self) -> Path:
        """Every step that is left, then the final model; returns its folder.

        Ctrl-C, a signal and a reward or generator that fails leave a checkpoint of the last whole step.
        """
        with self.ends:
            self.folder.start()
            with self.world.interrupts:
                self._run()
            final = self.folder.path / "model"
            self.world.everywhere(lambda: self._write_model(final))
            return final

    def _run(self) -> None:
        try:
            self.begin()
            with step_bar(self.title, self.step, self.total_steps) as bar:
                for step in range(self.step + 1, self.total_steps + 1):
                    # Here a Ctrl-C is raised that came during an update or a checkpoint, on all ranks.
                    self.world.together(lambda: None)
                    metrics, text = self.run_step(step, bar)
                    bar.advance(step, text)
                    self._raise_alarms(metrics)
                    every = self.settings.checkpoint_every
                    if (every and step % every == 0) or step == self.total_steps:
                        self.save()
        except (KeyboardInterrupt, RewardFailure, GeneratorFailure) as error:
            self.save()
            by = ""
            if isinstance(error, Stopped) and self.world.size > 1:
                by = f" ({signal.Signals(error.signum).name} on rank {error.rank})"
            say(f"stopped after step {self.step}; continue with --resume{by}", style="yellow")
            # All ranks wait for the slowest end here: one that ended sooner would be taken for one that has died.
            self.world.everywhere(self.ends.close)
            raise

    def save(self) -> None:
        """Write a checkpoint of the last whole step, unless it has one."""
        if self.step == self.folder.state.get("step", 0):
            return
        kept = self.folder.checkpoint
        hint = f"no checkpoint is written of them; {f'the last good one is {kept}' if kept else 'there is none'}"
        self.world.everywhere(lambda: self._check_weights(RunError, hint))
        tensors = self.learner.state_tensors() | self.extra_tensors()
        keep = self.settings.keep_checkpoints
        self.folder.save(self.step, self._write_model, tensors, self.extra_state(), keep)

    def _check_weights(self, error: type[Exception], hint: str) -> None:
        params = self.learner.params
        finite = torch.stack([is_finite(shard) for shard in params.values()]).tolist()  # the one wait for the device
        if not all(finite):
            name = [*params][finite.index(False)]
            raise error(f"the weights of step {self.step} hold NaN or infinity, as {name}: {hint}")

    def _write_model(self, folder: Path) -> None:
        files, source = self.model_files(), self.policy.path
        save_checkpoint(
            self.policy.model, folder, tokenizer_files_from=source, dtype=self.compute_dtype, json_files=files
        )

    def _raise_alarms(self, metrics: dict[str, float]) -> None:
        if metrics["update/skipped"]:
            skipped = f"{metrics['update/skipped']:.0f} updates skipped"
            say(f"step {self.step}: {skipped}: gradient not finite", style="yellow")
        if metrics["update/skipped_in_a_row"] >= _MOST_SKIPPED:
            kept = self.folder.checkpoint
            raise RunError(
                f"{_MOST_SKIPPED} updates in a row had a gradient that is not finite, up to step {self.step}; "
                f"{f'the last good checkpoint is {kept}' if kept else 'there is no checkpoint yet'}: lower train.lr, "
                "or look at samples.jsonl for what the rewards score"
            )


def as_begun(recipe: _R, world: World) -> _R:
    """The recipe of a run to continue: with the token budget that was chosen when it began, if it leaves that open."""
    begun = world.on_main(lambda: begun_with(recipe, "train", "token_budget"))
    is_open = recipe.train.token_budget == "auto" and type(begun) is int
    return _with_budget(recipe, begun) if is_open else recipe


def _with_budget(recipe: _R, token_budget: int) -> _R:
    settled: Any = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, token_budget=token_budget))
    return settled
