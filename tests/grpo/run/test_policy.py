"""Opening a model: its tokenizer fits it, and its tokens become the text that was sampled."""

import dataclasses
import json
import shutil

import pytest
import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from flashgrpo.grpo.data.prompts import closed_ids
from flashgrpo.grpo.recipe.schema import ModelSection
from flashgrpo.grpo.rewards.rules import accuracy, format_tags
from flashgrpo.grpo.run.policy import Policy, open_policy, open_tokenizer, stop_token_ids, warn_beyond_context
from flashgrpo.model.checkpoint import CheckpointError

TAGS = "<think>", "</think>", "<answer>", "</answer>"


@pytest.fixture
def with_tokens(make_model):
    """with_tokens(*names, stops, vocab_size) -> a policy whose tokenizer has these special tokens and cleans spaces."""

    def make(*names: str, stops: tuple[str, ...] = (), vocab_size: int = 120, special: bool = True, **changes):
        path = make_model(vocab_size=vocab_size)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(path / "tokenizer.json"), eos_token="<eos>", bos_token="<bos>", **changes
        )
        tokenizer.add_tokens([AddedToken(name, special=special) for name in names], special_tokens=special)
        tokenizer.save_pretrained(path)
        policy = open_policy(ModelSection(str(path)), torch.device("cpu"))
        ends = [tokenizer.convert_tokens_to_ids(name) for name in stops]
        return dataclasses.replace(policy, stop_token_ids=sorted([*policy.stop_token_ids, *ends]))

    return make


def ids(policy: Policy, text: str) -> list[int]:
    return policy.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", ["the word 'a' is", "x != y and a , b", "print('a , b !')", "do n't . 've", " \n a"])
def test_rewards_read_the_spaces_that_were_sampled(with_tokens, text):
    """Llama 3's tokenizer asks for spaces before punctuation to be dropped: right programs would score 0."""
    policy = with_tokens(clean_up_tokenization_spaces=True)
    assert policy.decode(torch.tensor([*ids(policy, text), 0]).numpy()) == text


def test_tags_that_are_special_tokens_are_read(with_tokens):
    policy = with_tokens(*TAGS, "<|user|>", "<|end|>", stops=("<|end|>",))
    text = "<think>2+2</think><answer>4</answer>"
    for end in ("", "<eos>", "<|end|>"):
        assert policy.decode(ids(policy, text + end)) == text
    assert policy.decode(ids(policy, "<bos><|user|>2+2?<|end|>\n<think>")) == "<|user|>2+2?<|end|>\n<think>"
    assert policy.decode(ids(policy, "a<|end|>b<eos>c")) == "a<|end|>b<eos>c"
    assert policy.decode([]) == policy.decode([0]) == ""
    assert format_tags([""], [policy.decode(ids(policy, text + "<eos>"))]) == [1.0]
    assert accuracy([policy.decode(ids(policy, "2+2? <think>"))], ["4"], ["4"]) == [0.0]  # never left its reasoning


def test_a_token_that_ends_completions_is_read_if_it_is_a_tag_whatever_its_flag(with_tokens):
    """As <|im_end|> that was added as an ordinary token: an answer would end with it, and be wrong."""
    policy = with_tokens(*TAGS, "<|im_end|>", stops=("</answer>", "<|im_end|>"), special=False)
    assert policy.decode(ids(policy, "<answer>4</answer>")) == "<answer>4</answer>"
    assert policy.decode(ids(policy, "5<|im_end|>")) == "5"


def test_what_is_collected_is_learned_token_by_token(with_tokens):
    policy = with_tokens(*TAGS, clean_up_tokenization_spaces=True)
    sampled = [*ids(policy, "<think>a , b</think><answer>4 .</answer>"), 0]
    assert closed_ids(policy.decode(sampled), policy.tokenizer, 0).tolist() == sampled


def test_tokens_without_an_embedding_are_refused_by_name(with_tokens, make_model):
    with_tokens("<x0>", vocab_size=100)
    with pytest.raises(CheckpointError, match=r"has tokens up to 101 \('<x2>'\), and vocab_size = 100 in config\.json"):
        with_tokens("<x0>", "<x1>", "<x2>", vocab_size=100)
    path = make_model(eos_token_id=[0, 500])
    with pytest.raises(CheckpointError, match=r"eos_token_id = 500 .* is beyond vocab_size = 98"):
        open_policy(ModelSection(str(path)), torch.device("cpu"))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"eos_token_id": "<eos>"}', "eos_token_id has '<eos>', wanted a token's number"),
        ('{"eos_token_id": [0, "1"]}', "eos_token_id has '1'"),
        ('{"eos_token_id": true}', "eos_token_id has True"),
        ("[]", "holds a JSON list"),
    ],
)
def test_a_stop_token_that_is_no_number_is_refused(model_path, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        stop_token_ids(tmp_path, open_tokenizer(model_path))


def test_stop_tokens_are_those_of_every_file(model_path, tmp_path):
    for name, ends in (("config.json", 5), ("generation_config.json", [7, 5])):
        (tmp_path / name).write_text(json.dumps({"eos_token_id": ends}))
    assert stop_token_ids(tmp_path, open_tokenizer(model_path)) == [0, 5, 7]


@pytest.mark.parametrize("content", ['{"model": {"type": "none"}}', "", "version https://git-lfs.github.com/spec"])
def test_a_broken_tokenizer_is_named(model_path, tmp_path, content):
    """The tokenizers library raises bare exceptions for some of them."""
    folder = shutil.copytree(model_path, tmp_path / "broken")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=f"{folder}: no usable tokenizer: ."):
        open_tokenizer(folder)


@pytest.mark.parametrize(("longest", "is_told"), [(64, False), (65, True)])
def test_a_run_beyond_the_models_context_is_told(make_model, capsys, longest, is_told):
    policy = open_policy(ModelSection(str(make_model(max_position_embeddings=64))), torch.device("cpu"))
    warn_beyond_context(policy, longest)
    shown = " ".join(capsys.readouterr().err.split())
    assert ("sequences may come to 65 tokens, and the model was made for 64" in shown) == is_told
