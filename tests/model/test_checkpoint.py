"""What is trained must load in transformers with the same logits, and a bad checkpoint must say what is wrong."""

import dataclasses
import json
import resource

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from flashgrpo.model.checkpoint import (
    empty_decoder,
    init_decoder,
    load_checkpoint,
    load_weights,
    read_config,
    save_checkpoint,
)
from flashgrpo.model.config import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SEQUENCE = list(range(3, 23))


@pytest.fixture
def decoder(tiny):
    return init_decoder(tiny(custom_key={"kept": True}), seed=0)


@pytest.fixture
def folder(decoder, tmp_path):
    save_checkpoint(decoder, tmp_path / "model")
    return tmp_path / "model"


def edit_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def edit_weights(folder, change):
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


def assert_equal_weights(found, wanted):
    assert found.state_dict().keys() == wanted.state_dict().keys()
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


@pytest.mark.parametrize("model_name", ["llama-tied", "qwen2-yarn", "qwen3-bias"], indirect=True)
def test_reward_models_made_of_causal_ones_load_in_transformers(model_name, reference, pack, tmp_path):
    """The LM head goes, tied or not; where padding is an end of sequence, transformers would read another token."""
    reference(model_name, pad_token_id=3, eos_token_id=[2, 3]).save_pretrained(tmp_path / "causal")
    ours = empty_decoder(read_config(tmp_path / "causal").as_reward_model(), torch.float32).to_empty(device="cpu")
    load_weights(ours, tmp_path / "causal", new_score=True)
    last_rows = {"predictors": torch.tensor([20, 22]), "target_cu_seqlens": torch.tensor([0, 1, 2], dtype=torch.int32)}
    batch = dataclasses.replace(pack([[5], SEQUENCE, [7, 3]], [-1, 0, 0]), **last_rows)
    with torch.no_grad():
        assert ours.scores(batch).tolist() == [0, 0]
        ours.get_parameter("score.weight").normal_(generator=torch.Generator().manual_seed(0))
        save_checkpoint(ours, tmp_path / "ours", max_shard_bytes=10_000)
        theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
        found = ours.scores(batch)
        for score, completion in zip(found, [SEQUENCE, [7, 3]], strict=True):
            wanted = theirs(torch.tensor([[5, *completion]])).logits
            torch.testing.assert_close(score, wanted[0, 0], atol=1e-5, rtol=0)
    assert_equal_weights(load_checkpoint(tmp_path / "ours", reward_model=True), ours)
    with pytest.raises(CheckpointError, match="ours holds a reward model; a causal language model is wanted"):
        load_checkpoint(tmp_path / "ours")
    with pytest.raises(CheckpointError, match="causal holds a causal language model; a reward model is wanted"):
        load_checkpoint(tmp_path / "causal", reward_model=True)


def test_dtype_is_cast_and_recorded(decoder, tmp_path):
    save_checkpoint(decoder, tmp_path / "model", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    stored = load_checkpoint(tmp_path / "model")
    assert {parameter.dtype for parameter in stored.parameters()} == {torch.bfloat16}
    cast = load_checkpoint(tmp_path / "model", dtype=torch.float32)
    for name, parameter in cast.named_parameters():
        assert torch.equal(parameter, decoder.get_parameter(name).bfloat16().float()), name


def test_config_and_tokenizer_files_travel_with_the_weights(decoder, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "pytorch_model.bin"):
        (source / name).write_text(name)
    save_checkpoint(decoder, tmp_path / "model", tokenizer_files_from=source)
    written = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    assert written.keys() == {"config.json", WEIGHTS, "tokenizer.json", "chat_template.jinja", "generation_config.json"}
    assert written["tokenizer.json"] == b"tokenizer.json"
    assert json.loads(written["config.json"])["custom_key"] == {"kept": True}


def test_loaded_weights_outlive_the_file(decoder, folder):
    """A checkpoint that is pruned or overwritten while the run goes on must not change the weights, or crash."""
    loaded = load_checkpoint(folder)
    with open(folder / WEIGHTS, "r+b") as file:
        file.truncate(0)
    assert_equal_weights(loaded, decoder)


@pytest.mark.parametrize("fails", [False, True], ids=["", "the disk is full"])
def test_a_checkpoint_is_replaced_whole_or_not_at_all(fails, decoder, folder):
    """A limit on the file size stands for the full disk: the write fails half way."""
    before = load_checkpoint(folder)
    with torch.no_grad():
        decoder.lm_head_weight.add_(1)
    (folder.parent / ".model.partial").mkdir()  # of a run that was killed
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if fails:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            with pytest.raises(OSError, match=WEIGHTS):
                save_checkpoint(decoder, folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    else:
        save_checkpoint(decoder, folder)
    assert_equal_weights(load_checkpoint(folder), before if fails else decoder)
    assert [file.name for file in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("save_fails", [False, True])
def test_a_crash_between_the_renames_loses_nothing(save_fails, decoder, folder):
    folder.rename(folder.parent / ".model.old")
    if save_fails:
        with pytest.raises(CheckpointError, match="no tokenizer files"):
            save_checkpoint(decoder, folder, tokenizer_files_from=folder.parent)
    assert_equal_weights(load_checkpoint(folder), decoder)
    assert [file.name for file in folder.parent.iterdir()] == ["model"]


def test_initialisation_follows_the_seed(tiny):
    config = tiny(attention_bias=True, initializer_range=0.05)
    first, again, other = (init_decoder(config, seed=seed) for seed in (1, 1, 2))
    assert_equal_weights(first, again)
    assert not torch.equal(first.lm_head_weight, other.lm_head_weight)
    assert first.lm_head_weight.std().item() == pytest.approx(0.05, rel=0.1)
    assert (first.get_parameter("model.layers.0.self_attn.q_norm.weight") == 1).all()
    assert (first.get_parameter("model.layers.0.self_attn.o_proj.bias") == 0).all()


@pytest.mark.parametrize("new_score", [False, True])
def test_a_tied_model_loads_from_either_name_of_its_embedding(new_score, tiny, tmp_path):
    """safetensors keeps one of the names of a shared tensor, and some tools have it keep lm_head.weight."""
    config = tiny(tie_word_embeddings=True)
    save_checkpoint(init_decoder(config, seed=0), tmp_path)
    embedding = load_file(tmp_path / WEIGHTS)["model.embed_tokens.weight"]
    loaded = empty_decoder(config.as_reward_model() if new_score else config, torch.float32).to_empty(device="cpu")

    def load_with(change):
        weights = load_file(tmp_path / WEIGHTS)
        change(weights)
        save_file(weights, tmp_path / WEIGHTS)
        loaded.get_parameter("model.embed_tokens.weight").data.zero_()
        load_weights(loaded, tmp_path, new_score=new_score)
        assert torch.equal(loaded.get_parameter("model.embed_tokens.weight"), embedding)

    load_with(lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))  # both
    load_with(lambda w: w.pop("model.embed_tokens.weight"))
    with pytest.raises(CheckpointError, match="but they differ in the file"):
        load_with(lambda w: w.update({"model.embed_tokens.weight": w["lm_head.weight"] + 1}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has shape \[96, 32\]; config\.json wants \[97, 32\]"):
        load_with(lambda w: w.update({"lm_head.weight": w.pop("model.embed_tokens.weight")[1:].clone()}))


@pytest.mark.parametrize(
    ("name", "value", "dtype"),
    [
        ("model.layers.1.self_attn.k_proj.weight", float("nan"), torch.float32),
        ("model.norm.weight", float("-inf"), torch.bfloat16),
        ("lm_head.weight", float("nan"), torch.bfloat16),
    ],
)
def test_weights_that_are_no_numbers_are_refused_by_name(name, value, dtype, decoder, tmp_path):
    """A model with one of them computes nothing else, and every checkpoint of a run on it would be lost."""
    save_checkpoint(decoder, tmp_path, dtype=dtype)
    edit_weights(tmp_path, lambda w: w[name].view(-1)[3].fill_(value))
    with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity"):
        load_checkpoint(tmp_path)


def test_rotary_buffers_of_older_checkpoints_are_ignored(decoder, folder):
    edit_weights(folder, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}))
    assert_equal_weights(load_checkpoint(folder), decoder)


NORM = "model.layers.1.self_attn.q_norm.weight"
SHARD = "model-00002-of-00003.safetensors"


def truncated(file):
    file.write_bytes(file.read_bytes()[:-100])


BROKEN = {  # how a folder is spoiled, and what is said
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "config is not JSON": (lambda f: (f / "config.json").write_text('{"model_type": '), "config.json: not valid JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json: holds a JSON list"),
    "config is binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json: not valid JSON"),
    "config is a folder": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
        "config.json: cannot be read: Is a directory",
    ),
    "unknown family": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(model_type="qwen3_moe")),
        "config.json: model_type is 'qwen3_moe'; supported families are llama, qwen2, qwen3",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "holds neither model.safetensors nor"),
    "truncated": (lambda f: truncated(f / WEIGHTS), "model.safetensors: broken or incomplete"),
    "not safetensors": (lambda f: (f / WEIGHTS).write_bytes(b"PK" * 100), "model.safetensors: broken or incomplete"),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), "model.safetensors: broken or incomplete"),
    "renamed": (
        lambda f: edit_weights(f, lambda w: w.update({NORM.replace("q_norm", "query_norm"): w.pop(NORM)})),
        f"{NORM} is missing, one of 1 missing tensors; the nearest unused one is "
        "model.layers.1.self_attn.query_norm.weight",
    ),
    "unexpected": (
        lambda f: edit_weights(f, lambda w: w.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(48, 32)})),
        "model.layers.2.mlp.up_proj.weight is unexpected",
    ),
    "wrong shape": (
        lambda f: edit_weights(f, lambda w: w.update({NORM: torch.zeros(4)})),
        f"{NORM} has shape [4]; config.json wants [16]",
    ),
    "no shard": (lambda f: (f / SHARD).unlink(), f"{SHARD}: no such file, though {INDEX} names it"),
    "shard is truncated": (lambda f: truncated(f / SHARD), f"{SHARD}: broken or incomplete"),
    "index is not JSON": (lambda f: (f / INDEX).write_text("weight_map"), f"{INDEX}: not valid JSON"),
    "index is empty": (lambda f: (f / INDEX).write_text("{}"), f"{INDEX}: has no object 'weight_map'"),
    "tensor in another shard": (
        lambda f: edit_json(f / INDEX, lambda c: c["weight_map"].update({"model.norm.weight": SHARD})),
        f"{SHARD}: broken or incomplete",
    ),
    "tensor is not listed": (
        lambda f: edit_json(f / INDEX, lambda c: c["weight_map"].pop("model.norm.weight")),
        "model.norm.weight is missing",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_say_what_is_wrong(case, decoder, tmp_path):
    spoil, message = BROKEN[case]
    is_sharded = "shard" in case or "index" in case or "listed" in case
    save_checkpoint(decoder, tmp_path, max_shard_bytes=40_000 if is_sharded else 5_000_000_000)
    assert (tmp_path / SHARD).exists() == is_sharded
    spoil(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_missing_folders_are_named(decoder, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        read_config(tmp_path / "nowhere")
    (tmp_path / "generation_config.json").write_text("{}")
    for source in ("nowhere", ""):
        with pytest.raises(CheckpointError, match="holds no tokenizer files"):
            save_checkpoint(decoder, tmp_path / "model", tokenizer_files_from=tmp_path / source)
