"""SFT is cross-entropy of the completion given the prompt, whatever the packing, and it can be stopped at any step."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flashgrpo.grpo.errors import DataError
from flashgrpo.grpo.learn.balance import plan_packs
from flashgrpo.grpo.recipe.load import SftRecipe, build_recipe, load_recipe
from flashgrpo.grpo.recipe.schema import ModelSection
from flashgrpo.grpo.run import costs
from flashgrpo.grpo.run.folder import read_rows
from flashgrpo.grpo.run.policy import open_policy
from flashgrpo.grpo.stages.sft import SftTrainer, load_examples, sft

ROWS = [{"prompt": f"{a}+{b}=", "completion": f"{a + b}" + "!" * (a + b)} for a in range(4) for b in range(4)]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def recipe(model_path, tmp_path) -> SftRecipe:
    values = {
        "model": {"path": str(model_path)},
        "data": {"path": str(write_rows(tmp_path / "sft.jsonl", ROWS)), "template": "none"},
        "train": {"lr": 1e-3, "epochs": 2, "batch_size": 4, "token_budget": 64, "checkpoint_every": 2},
        "run": {"output": str(tmp_path / "run"), "seed": 3, "device": "cpu"},
    }
    return build_recipe(SftRecipe, values)


@pytest.fixture
def policy(model_path):
    return open_policy(ModelSection(str(model_path)), torch.device("cpu"))


def changed(recipe: SftRecipe, section: str, **values) -> SftRecipe:
    return dataclasses.replace(recipe, **{section: dataclasses.replace(getattr(recipe, section), **values)})


def reference_model(model_path: Path):
    """The model in transformers, after one backward pass of the mean cross-entropy of all completion tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    losses = []
    for row in ROWS:
        prompt, completion = tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"]
        ids = torch.tensor([*prompt, *completion, tokenizer.eos_token_id])
        logits = model(ids[None]).logits[0, len(prompt) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[len(prompt) :], reduction="none"))
    loss = torch.cat(losses).mean()
    loss.backward()
    return model, loss.item()


@pytest.mark.parametrize("token_budget", [32, 4096], ids=["many micro-batches", "one"])
def test_loss_and_gradient_are_those_of_cross_entropy(recipe, model_path, token_budget):
    """Completion tokens alone are trained on, the end-of-sequence token among them; packing changes nothing."""
    sft(changed(recipe, "train", epochs=1, batch_size=len(ROWS), token_budget=token_budget))
    (row,) = read_rows(Path(recipe.run.output) / "metrics.jsonl")
    model, loss = reference_model(model_path)
    norm = torch.cat([param.grad.flatten() for param in model.parameters()]).norm().item()
    assert (row["loss"], row["epoch"]) == (pytest.approx(loss, rel=1e-5), 1.0)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_loss_falls_and_the_model_answers(recipe):
    recipe = changed(recipe, "train", epochs=12, lr=2e-2)
    model = sft(recipe)
    losses = [row["loss"] for row in read_rows(Path(recipe.run.output) / "metrics.jsonl")]
    assert len(losses) == 12 * 4
    assert np.mean(losses[-4:]) < 0.2 * np.mean(losses[:4])
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(model).config.model_type == "qwen3"


def test_a_budget_that_is_left_open_holds_the_longest_row_and_stays(recipe, monkeypatch):
    monkeypatch.setattr(costs, "CPU_BUDGET", 4)
    recipe = changed(recipe, "train", token_budget="auto", epochs=1)
    sft(recipe)
    stored = Path(recipe.run.output) / "recipe.toml"
    found = load_recipe(SftRecipe, stored).train.token_budget
    assert 4 < found < 64
    monkeypatch.setattr(costs, "CPU_BUDGET", 999)
    sft(changed(recipe, "train", epochs=2), resume=True)
    assert load_recipe(SftRecipe, stored).train.token_budget == found


def test_every_example_is_seen_once_an_epoch(recipe, monkeypatch):
    """The last batch of an epoch may be short; the order is new in each."""
    recipe = changed(recipe, "train", batch_size=6, epochs=2)
    seen: list[list[int]] = []

    def spy(groups, *options, **more):
        seen.append([group.completions[0].sequence_id for group in groups])
        return plan_packs(groups, *options, **more)

    monkeypatch.setattr("flashgrpo.grpo.stages.sft.plan_packs", spy)
    sft(recipe)
    assert [len(batch) for batch in seen] == [6, 6, 4] * 2
    first, second = seen[0] + seen[1] + seen[2], seen[3] + seen[4] + seen[5]
    assert sorted(first) == sorted(second) == list(range(len(ROWS)))
    assert first != second


def test_ctrl_c_in_an_update_and_resume_is_bitwise(recipe, tmp_path, monkeypatch):
    recipe = changed(recipe, "train", schedule="cosine", warmup_steps=2, token_budget=4096)
    recipe = changed(recipe, "model", dtype="bfloat16")
    whole, stopped = (changed(recipe, "run", output=str(tmp_path / name)) for name in ("whole", "stopped"))
    sft(whole)
    original = SftTrainer._loss

    def interrupted(self, batch, shared):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch, shared)

    with monkeypatch.context() as patch:
        patch.setattr(SftTrainer, "_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sft(stopped)
    assert (tmp_path / "stopped/checkpoints/step_3").is_dir()  # the update was finished first
    torch.manual_seed(99)
    sft(stopped, resume=True)
    models = [load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "stopped")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    timing = ("tokens_per_s/trained", "memory/peak_mb")
    rows, again = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("whole", "stopped"))
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [{k: v for k, v in row.items() if k not in timing} for row in rows] == [
        {k: v for k, v in row.items() if k not in timing} for row in again
    ]


def test_the_end_of_sequence_is_appended_once(recipe, policy, tmp_path):
    rows = [{"prompt": "a", "completion": "bc"}, {"prompt": "a", "completion": "bc<eos>"}]
    first, second = load_examples(changed(recipe, "data", path=str(write_rows(tmp_path / "rows.jsonl", rows))), policy)
    end = policy.tokenizer.eos_token_id
    assert first.completions[0].token_ids.tolist() == second.completions[0].token_ids.tolist()
    assert first.completions[0].token_ids.tolist().count(end) == 1
    assert first.completions[0].token_ids[-1] == end
    assert policy.decode(first.prompt_ids) == "a"


GOOD = {"prompt": "1+1=", "completion": "2"}


@pytest.mark.parametrize(
    ("rows", "data", "message"),
    [
        ([GOOD, {"prompt": "1", "completion": " \n"}], {}, r"rows\.jsonl:2: column 'completion' is empty"),
        ([{"prompt": "1", "completion": 5}], {}, r"rows\.jsonl:1: column 'completion' holds int, wanted the text"),
        ([GOOD, {"prompt": "1"}], {}, r"rows\.jsonl:2: no column 'completion'"),
        ([GOOD], {"completion_column": "answer"}, r"rows\.jsonl:1: no column 'answer'"),
        ([GOOD, {"prompt": " ", "completion": "2"}], {}, r"rows\.jsonl:2: the prompt in column 'prompt' is empty"),
        ([GOOD, GOOD], {"max_tokens": 5}, r"rows\.jsonl:1 has 6 tokens, data\.max_tokens = 5"),
        ([GOOD, {"prompt": "1", "completion": "2" * 64}], {}, r"rows\.jsonl:2 has 66 tokens, train\.token_budget = 64"),
        ([], {}, r"no rows in .*rows\.jsonl"),
    ],
)
def test_bad_examples_are_found_before_the_first_step(recipe, policy, tmp_path, rows, data, message):
    recipe = changed(recipe, "data", path=str(write_rows(tmp_path / "rows.jsonl", rows)), **data)
    with pytest.raises(DataError, match=message):
        load_examples(recipe, policy)
