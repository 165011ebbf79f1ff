"""Models by their names on the Hugging Face hub, without a network."""

import shutil
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

import hub_cache
from flashgrpo.model import hub, waits
from flashgrpo.model.checkpoint import (
    CheckpointError,
    init_decoder,
    load_checkpoint,
    read_config,
    save_checkpoint,
    weights_sha256,
)
from flashgrpo.model.config import ModelConfig
from flashgrpo.model.hub import local_folder

NAME, OLD, NEW = "someone/tiny-model", "0" * 40, "1" * 40
SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}


@pytest.fixture
def made(tmp_path) -> list[Path]:
    """Two models of one shape."""
    folders = []
    for seed in range(2):
        config = ModelConfig.from_dict({"model_type": "qwen3", "num_key_value_heads": 1, "vocab_size": 8, **SHAPE})
        folders.append(tmp_path / f"made_{seed}")
        save_checkpoint(init_decoder(config, seed=seed), folders[-1])
    return folders


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return hub_cache.offline(monkeypatch, tmp_path / "cache")


def test_a_name_stands_for_what_the_cache_has_of_its_branch_or_revision(cache, made):
    old, new = (hub_cache.put(cache, NAME, revision, folder) for revision, folder in zip((OLD, NEW), made, strict=True))
    assert local_folder(NAME) == new
    assert local_folder(f"{NAME}@{OLD}") == old
    assert read_config(NAME).hidden_size == 16
    assert weights_sha256(NAME) == weights_sha256(made[1]) != weights_sha256(made[0])
    weight = load_checkpoint(f"{NAME}@{OLD}").model.embed_tokens.weight
    assert torch.equal(weight, load_checkpoint(made[0]).model.embed_tokens.weight)


@pytest.mark.parametrize("there", [NAME, "someone/else"])
def test_a_folder_of_ones_own_wins_also_where_it_is_only_its_owner_s(cache, made, there):
    """Or a misspelt path would become somebody's model."""
    hub_cache.put(cache, NAME, OLD, made[0])
    shutil.copytree(made[1], there)
    if there == NAME:
        assert weights_sha256(NAME) == weights_sha256(made[1])
    else:
        with pytest.raises(CheckpointError, match="someone/tiny-model: no such folder"):
            read_config(NAME)


def test_what_is_missing_is_told_with_the_command_that_downloads_it(cache):
    for path in ("models/of/mine", "runs/a--b", "runs/old..new", "runs/model.git", f"runs/{'x' * 97}"):  # no names
        with pytest.raises(CheckpointError) as fault:
            read_config(path)
        command = f"`hf download OWNER/{Path(path).name} --local-dir {path}`"
        assert str(fault.value) == f"{path}: no such folder; {command} makes one"
    with pytest.raises(CheckpointError) as fault:
        read_config(f"{NAME}@v1")
    assert f"{NAME}@v1: no such folder, and the Hugging Face hub does not give it (LocalEntryNotFou" in str(fault.value)
    assert f"`hf download {NAME} --revision v1` puts it in the hub's cache" in str(fault.value)
    assert "\n" not in str(fault.value)


def test_only_what_is_needed_is_downloaded_and_once(cache, made, tmp_path, monkeypatch):
    """A plan needs no weights, and a cache without them has no whole model."""
    (made[0] / "pytorch_model.bin").touch()
    look_up, needed, downloads = hub.snapshot_download, tmp_path / "needed", []

    def download(name, *, allow_patterns, local_files_only, **options):
        if not local_files_only:
            downloads.append(name)
            shutil.copytree(made[0], needed)
            for file in needed.iterdir():
                if not any(file.match(pattern) for pattern in allow_patterns):
                    file.unlink()
            shutil.rmtree(cache, ignore_errors=True)
            hub_cache.put(cache, name, OLD, needed)
            shutil.rmtree(needed)
        return look_up(name, allow_patterns=allow_patterns, local_files_only=True, **options)

    monkeypatch.setattr(hub, "snapshot_download", download)
    for _ in range(2):
        read_config(NAME)
    assert {file.name for file in local_folder(NAME).iterdir()} == {"config.json"}
    for _ in range(2):
        load_checkpoint(NAME)
    assert {file.name for file in local_folder(NAME).iterdir()} == {"config.json", "model.safetensors"}
    assert downloads == [NAME, NAME]


@pytest.mark.parametrize(("takes_s", "said"), [(0.0, ""), (1.0, f"asking the Hugging Face hub for {NAME}\n")])
def test_only_a_hub_that_lets_wait_is_told_of(cache, takes_s, said, monkeypatch, capsys):
    """Or a name that is wrong, or a network that is missing, were two lines in place of one."""

    def fail(*_, local_files_only, **__):
        if local_files_only:
            raise LocalEntryNotFoundError("nothing there")
        time.sleep(takes_s)
        raise OSError("no network")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "snapshot_download", fail)
    monkeypatch.setattr(waits, "_PATIENCE_S", 0.3)
    with pytest.raises(CheckpointError, match="does not give it"):
        local_folder(NAME)
    assert capsys.readouterr().err == said
