"""What is collected is what the model wrote, whoever wrote it when; and every filter rejects what it says."""

import dataclasses
import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import ranks
from flashgrpo.grpo.data.problems import load_completions, load_problems
from flashgrpo.grpo.data.prompts import render_prompts
from flashgrpo.grpo.errors import DataError, RecipeError, RunInputError
from flashgrpo.grpo.recipe.load import CollectRecipe, SftRecipe, build_recipe
from flashgrpo.grpo.recipe.schema import FilterSection, ModelSection, SftDataSection, WriteSection
from flashgrpo.grpo.rewards.pool import RewardPool
from flashgrpo.grpo.rollout.native import NativeGenerator
from flashgrpo.grpo.run.policy import open_policy
from flashgrpo.grpo.stages import collect as module
from flashgrpo.grpo.stages.collect import collect
from flashgrpo.grpo.stages.filters import Sample, Selection, rejected_by
from flashgrpo.grpo.stages.sft import sft
from flashgrpo.grpo.types import CompletionGroup, Request, Sampling
from flashgrpo.model.checkpoint import load_checkpoint, save_checkpoint, weights_sha256

GOOD = "<think>two and two make four</think><answer>4</answer>"
LOOSE = {"correct": False, "format": False}  # a random model's text has a chance


@pytest.fixture
def values(recipe_values) -> dict[str, Any]:
    """Half of what a random model samples stops in time."""
    rollout = {"group_size": 3, "max_new_tokens": 40, "prompts": 10, "prompts_per_part": 4}
    keys = {k: recipe_values[k] for k in ("model", "data", "run")}
    return keys | {"rollout": rollout, "filters": LOOSE, "rewards": {"functions": ["format"], "workers": 1}}


def made(values: dict[str, Any], **sections: Any) -> CollectRecipe:
    return build_recipe(CollectRecipe, {k: values.get(k, {}) | sections.get(k, {}) for k in {**values, **sections}})


def rows_of(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def given_file(path: Path, number: int, **columns: Any) -> str:
    return row_file(path, [{"prompt": f"What is {i}?", "completion": f"It is {i}.", **columns} for i in range(number)])


def row_file(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sample(completion: str = GOOD, **known: Any) -> Sample:
    scores = {"accuracy": 1.0, "language_consistency": 1.0, "repetition": 0.0} | known.pop("scores", {})
    known = {"answer": "4", "prompt_id": 0, "num_tokens": 10, "finish_reason": "stop"} | known
    return Sample("2+2=", known.pop("context", "2+2="), completion, scores=scores, **known)


@pytest.mark.parametrize(
    ("name", "filters", "passes", "rejected"),
    [
        ("truncated", {}, sample(), sample(finish_reason="length")),
        ("correct", {}, sample(), sample(scores={"accuracy": 0.5})),
        ("correct", {}, sample(scores={"code": 1.0, "accuracy": 0.0}), sample(scores={"code": 0.0})),
        ("correct", {}, sample(), sample(scores={"accuracy": float("nan")})),
        ("format", {}, sample("<think>a</think> so 4"), sample("a so 4")),
        ("format", {}, sample("a</think>4", context="2+2=<think>\n"), sample("<think>a</think> ")),
        ("format", {}, sample("<think>a</think>so<answer>4</answer>\n"), sample("<think>a</think><answer>4")),
        ("format", {}, sample("\n<think>3 < 4</think>4"), sample("<think>a<think>b</think>4")),
        ("format", {}, sample(), sample("<think> </think><answer>4</answer>")),
        ("format", {}, sample(), sample(f"{GOOD} and more")),
        ("language", {"min_language": 0.9}, sample(), sample(scores={"language_consistency": 0.89})),
        ("language", {"min_language": 0.1}, sample(), sample(scores={"language_consistency": float("nan")})),
        ("min_tokens", {"min_tokens": 10}, sample(), sample(num_tokens=9)),
        ("max_tokens", {"max_tokens": 10}, sample(), sample(num_tokens=11)),
        (
            "repetition",
            {"max_repetition": 0.2},
            sample(scores={"repetition": -0.2}),
            sample(scores={"repetition": -0.3}),
        ),
        (
            "paragraphs",
            {"max_paragraph_words": 3},
            sample("<think>a b c\n \nd e f</think>one two three four"),
            sample("<think>a\n\nb c\nd e</think>4"),
        ),
        (
            "code_blocks",
            {"code_blocks": False},
            sample("<think>a</think>```4```"),
            sample("<think>```a```</think>4"),
        ),
    ],
)
def test_a_filter_rejects_what_it_is_for(name, filters, passes, rejected):
    section = FilterSection(**filters)
    assert rejected_by(passes, section) is None
    assert rejected_by(rejected, section) == name
    assert (rejected_by(rejected, FilterSection(**LOOSE)) is None) == (name != "truncated")
    bare = dataclasses.replace(sample(answer=None), scores={})
    assert rejected_by(bare, FilterSection()) is None  # without an answer nothing is wrong


def taken(selection: Selection, *samples: Sample) -> list[str | None]:
    kept = [selection.take(each) for each in samples]
    return [each and each.completion for each in kept]


def test_duplicates_and_the_cap_look_at_all_that_was_kept():
    texts = [f"<think>a</think>{text}" for text in ("One  way", "one way\n", "two", "three")]
    selection = Selection(FilterSection(max_per_prompt=2), WriteSection())
    assert taken(selection, *map(sample, texts)) == [texts[0], None, texts[2], None]
    other = dataclasses.replace(sample(texts[0], prompt_id=1), prompt="another")
    assert taken(selection, other, dataclasses.replace(other, finish_reason="length")) == [texts[0], None]
    found = selection.report()
    rejected = {name: n for name, n in found["rejected"].items() if n}
    assert rejected == {"truncated": 1, "duplicate": 1, "max_per_prompt": 1}
    assert (found["seen"], found["kept"], found["prompts"], found["prompts_with_none"]) == (6, 3, 2, 0.0)
    assert found["prompts_by_kept"] == {"1": 1, "2": 1}


@pytest.mark.parametrize(
    ("template", "completion", "written"),
    [
        ("", GOOD, GOOD),
        ("<think>{reasoning}</think>{summary}", GOOD, "<think>two and two make four</think>4"),
        ("|special|{reasoning}|special|{summary}", "a </think> so 4", "|special|a|special|so 4"),
        ("{{{reasoning}}} {answer}", r"<think>a</think>It is \boxed{4}", "{a} 4"),
        ("{summary}", "<think>a</think> ", None),
        ("{reasoning}: {answer}", "<think>never closed, no answer", None),
    ],
)
def test_completions_are_rewritten(template, completion, written):
    selection = Selection(FilterSection(format=False), WriteSection(template))
    assert taken(selection, sample(completion)) == [written]
    assert selection.rejected == ({} if written else {"template": 1})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"write": {"completion": "{reasoning} {answers}"}},
            r"write: completion: unknown field \{answers\}; known: reasoning",
        ),
        ({"write": {"completion": "{"}}, r"write: .*Single '\{' encountered"),
        (
            {"data": {"path": None}},
            r"nothing to collect: wanted data\.path or data\.task to sample, or a \[given\.NAME\]",
        ),
        ({"data": {"path": None}, "given": {"cold": {"path": "a", "ratio": 1}}}, r"given\.cold\.ratio is per sample"),
        ({"data": {"task": "reasoning_gym:chain_sum"}}, r"data: found task='reasoning_gym:chain_sum' and path="),
        ({"given": {"samples": {"path": "a"}}}, r"given\.samples: found the name that the samples have"),
        ({"rewards": {"start": {"format": 0.5}}}, r"rewards\.start is for training runs"),
    ],
)
def test_faulty_recipes_are_refused(values, sections, message):
    with pytest.raises(RecipeError, match=message):
        made(values, **sections)


def test_what_is_written_is_what_the_model_samples(values, model_path, data_path):
    """Every sample again by its seed alone, from the problem of its number, scored anew."""
    data = collect(recipe := made(values, rewards={"functions": ["accuracy", "format"], "weights": [2.0, 1.0]}))
    parts = [row for part in sorted(data.parent.glob("parts/*.parquet")) for row in rows_of(part)]
    assert [(row["prompt_id"], row["sample"]) for row in parts] == [(i, j) for i in range(10) for j in range(3)]
    assert {row["finish_reason"] for row in parts} == {"stop", "length"}
    rows = {(row["prompt_id"], row["sample"]): row for row in rows_of(data)}
    assert rows.keys() == {(row["prompt_id"], row["sample"]) for row in parts if row["finish_reason"] == "stop"}
    assert [*rows] != sorted(rows)  # shuffled

    policy = open_policy(ModelSection(str(model_path)), torch.device("cpu"))
    training, held_out = load_problems(recipe.data, recipe.run.seed)
    prompts = render_prompts(training[:10], policy, recipe.data)
    generator = NativeGenerator(policy.model, policy.stop_token_ids)
    for (i, _), row in rows.items():
        request = Request(i, prompts[i].token_ids, np.array([row["seed"]], dtype=np.uint64))
        ((again,),) = generator.generate([request], Sampling(40))
        assert row["completion"] == policy.decode(again.completion_ids)
        assert row["num_tokens"] == len(again.completion_ids)
        assert (row["prompt"], row["answer"]) == (prompts[i].problem.prompt, prompts[i].problem.columns["answer"])
        assert row["prompt"] not in {problem.prompt for problem in held_out}
        assert row["source"] == "samples"
        assert row["model"] == str(model_path)
        assert row["weights_sha256"] == weights_sha256(model_path)
    with RewardPool({"data": {"accuracy": 1.0}}, {"data": training[0]}, max_new_tokens=40, num_workers=1) as pool:
        for (i, _), row in rows.items():
            ids = policy.tokenizer(row["completion"])["input_ids"]
            group = CompletionGroup(prompts[i].problem, prompts[i].text, [row["completion"]], [ids], ["stop"])
            assert pool.score([group], "accuracy") == row["accuracy"]
            assert pool.score([group], "format") == row["format"]
            assert row["reward"] == 2 * row["accuracy"] + row["format"]
            assert -1 <= row["repetition"] <= 0 <= row["language_consistency"] <= 1


def test_ranks_and_parts_change_nothing(values, tmp_path):
    values["given"] = {"cold": {"path": given_file(tmp_path / "cold.jsonl", 5)}}
    one = collect(made(values))
    recipe = made(values, run={"output": str(tmp_path / "other")}, rollout={"prompts_per_part": 3})
    assert ranks.run(collect, 2, recipe) == [tmp_path / "other/data.parquet"] * 2
    assert (tmp_path / "other/data.parquet").read_bytes() == one.read_bytes()


def collect_killed(recipe: CollectRecipe, part: int, when: str) -> None:
    """Dies as by SIGKILL before or after a part, or in the middle of its file."""
    original = module.pq.write_table

    def dying(table, file):
        if file.name.startswith(f"part_{part:05}"):
            if when != "before":
                original(table, file)
            if when == "within":
                file.write_bytes(file.read_bytes()[:100])
            if when == "after":
                file.rename(file.with_suffix(""))
            os._exit(9)
        original(table, file)

    module.pq.write_table = dying
    collect(recipe, resume=True)


def test_stopped_and_killed_and_resumed_is_the_same_bytes(values, tmp_path, monkeypatch, capsys):
    """Whole parts stay, and are not sampled again."""
    whole = collect(made(values))
    recipe = made(values, run={"output": str(tmp_path / "stopped")})
    original, written = module.sample_seeds, []

    def interrupted(seed, step, prompt, num_samples):
        written.append(prompt)
        if prompt == 5 and written.count(5) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(seed, step, prompt, num_samples)

    def parts() -> list[str]:
        return sorted(file.name for file in (tmp_path / "stopped/parts").glob("*.parquet"))

    monkeypatch.setattr(module, "sample_seeds", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect(recipe)
    assert parts() == ["part_00000.parquet"]
    assert "stopped after 1 of 3 parts; continue with --resume" in capsys.readouterr().err
    for part, when in ((1, "before"), (1, "within"), (1, "after")):
        (outcome,) = ranks.run(collect_killed, 1, recipe, part, when, check=False)
        assert outcome.exit_code == 9
        assert len(parts()) == 1 + (when == "after")
    written.clear()
    assert collect(recipe, resume=True).read_bytes() == whole.read_bytes()
    assert written == [8, 9]  # what was there is not sampled again


def test_other_filters_cost_no_sampling_and_other_samples_are_refused(
    values, model_path, make_model, data_path, monkeypatch
):
    path = make_model()
    values["model"] = {"path": str(path)}
    before = len(rows_of(collect(recipe := made(values))))
    with pytest.raises(RunInputError, match=r"run exists: continue it with --resume, or choose another run\.output"):
        collect(recipe)
    for key, changes in {
        "rollout.temperature": {"rollout": {"temperature": 0.5}},
        "rewards.functions": {"rewards": {"functions": ["repetition"]}},
        "run.seed": {"run": {"seed": 4}},
        "data.held_out": {"data": {"held_out": 7}},
        "model.path": {"model": {"path": str(model_path)}},
    }.items():
        with pytest.raises(RunInputError, match=rf"{key} is .*keep it, or choose another run\.output"):
            collect(made(values, **changes), resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(module, "open_generator", None)
        changes = {"filters": {"min_tokens": 12}, "rewards": {"timeout_s": 5.0}, "write": {"completion": "= {answer}"}}
        rows = rows_of(collect(made(values, **changes), resume=True))
    assert 0 < len(rows) < before
    assert all(row["num_tokens"] >= 12 and row["completion"].startswith("= ") for row in rows)

    rows, weights = data_path.read_text(), load_checkpoint(path)
    data_path.write_text(rows.replace('"answer": "3"', '"answer": "33"'))
    with pytest.raises(RunInputError, match=r"data.path: what .* holds has changed since the run in .* began"):
        collect(recipe, resume=True)
    data_path.write_text(rows)
    weights.model.norm.weight.data[0] += 1
    save_checkpoint(weights, path, tokenizer_files_from=path)
    with pytest.raises(RunInputError, match=r"model.path: what .* holds has changed since the run in .* began"):
        collect(recipe, resume=True)


def test_given_rows_are_mixed_in_at_their_ratio(values, tmp_path, capsys):
    given = {
        "chat": {"path": given_file(tmp_path / "chat.jsonl", 50), "ratio": 0.5, "filtered": False},
        "few": {"path": given_file(tmp_path / "few.jsonl", 2), "ratio": 3, "filtered": False},
        "cold": {
            "path": given_file(tmp_path / "cold.jsonl", 4, solution=2),
            "answer_column": "solution",
            "template": "none",
        },
    }
    rows = rows_of(collect(made(values, given=given)))
    count = Counter(row["source"] for row in rows)
    assert count["chat"] == round(0.5 * count["samples"]) > 0
    assert (count["few"], count["cold"]) == (2, 4)
    assert f"given.few has 2 rows for the {3 * count['samples']} that its ratio asks for" in " ".join(
        capsys.readouterr().err.split()
    )
    for row in rows:
        if row["source"] == "cold":
            assert (row["answer"], row["accuracy"]) == ("2", float(row["prompt_id"] == 2))
            assert row["prompt"] == f"What is {row['prompt_id']}?"
        elif row["source"] == "chat":
            assert row["completion"] == f"It is {row['prompt_id']}."
            assert {row[name] for name in ("sample", "seed", "model", "weights_sha256", "reward", "format")} == {None}


def test_a_cold_start_from_given_rows_alone_is_learnt_by_sft(values, tmp_path, model_path):
    """No weights are read; the text is rewritten, the wrong rows are left out, and SFT takes what is written."""
    rows = [{"completion": f"<think>one more than {a}</think>{a + 1 + a % 2}", "answer": a + 1} for a in range(6)]
    rows = [{"prompt": f"{a}+1=", "tests": None, **row} for a, row in enumerate(rows)]  # others may be programs
    given = {"cold": {"path": row_file(tmp_path / "cold.jsonl", rows), "answer_column": "answer", "template": "none"}}
    write = {"completion": "|special|{reasoning}|special|{summary}"}
    sections = {
        "given": given,
        "write": write,
        "rewards": {"programs": {"isolation": "none: run programs unprotected"}},
    }
    recipe = build_recipe(CollectRecipe, {k: values[k] for k in ("model", "run")} | sections)
    found = rows_of(data := collect(recipe))
    assert sorted(row["prompt_id"] for row in found) == [0, 2, 4]
    assert {row["prompt_id"]: row["completion"] for row in found}[2] == "|special|one more than 2|special|3"
    assert json.loads((data.parent / "report.json").read_text())["cold"]["rejected"]["correct"] == 3
    sections = {"model": values["model"], "data": {"path": str(data), "template": "none"}}
    train = {"epochs": 1, "batch_size": 3, "token_budget": 64}
    output = {"run": {"output": str(tmp_path / "sft"), "device": "cpu"}}
    assert (sft(build_recipe(SftRecipe, sections | {"train": train} | output)) / "model.safetensors").exists()


def test_chat_messages_are_read_back(values, tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 7?"}]
    rows = [{"prompt": chat, "completion": "7"}, {"prompt": "What is 8?", "completion": "8"}]
    given = {"chat": {"path": row_file(tmp_path / "chat.jsonl", rows), "filtered": False}}
    data = collect(build_recipe(CollectRecipe, {k: values[k] for k in ("model", "run")} | {"given": given}))
    found = load_completions(SftDataSection(path=str(data)), "completion")
    wanted = {"7": chat, "8": [{"role": "user", "content": "What is 8?"}]}
    assert {text: problem.prompt for problem, text in found} == wanted


def test_a_row_without_a_completion_is_named_and_nothing_is_left(values, tmp_path):
    file = Path(given_file(tmp_path / "given.jsonl", 1))
    file.write_text(file.read_text() + '{"prompt": "a", "completion": ""}\n')
    with pytest.raises(DataError, match=r"given\.jsonl:2: column 'completion' is empty, wanted the text"):
        collect(made(values, given={"chat": {"path": str(file)}}))
    assert not Path(values["run"]["output"]).exists()


def test_all_rejected_says_by_what_and_shows_examples(values):
    with pytest.raises(DataError) as caught:
        collect(made(values, filters={"correct": True, "format": True}))
    message = str(caught.value)
    output = Path(values["run"]["output"])
    report = json.loads((output / "report.json").read_text())["samples"]
    counts = {name: number for name, number in report["rejected"].items() if number}
    assert sum(counts.values()) == report["seen"] == 30
    assert report["prompts_with_none"] == 1.0
    assert counts.keys() == {"truncated", "correct"}
    for name, number in counts.items():
        assert f"{number} by {name}" in message
    assert message.count(" -> '") == 3
    assert "\n" not in message
    assert f"change [filters] and start again with --resume: {output / 'parts'} is kept" in message
    assert not (output / "data.parquet").exists()
    assert len(rows_of(collect(made(values), resume=True))) == counts["correct"]


def test_a_weights_hash_is_that_of_names_shapes_and_bytes(make_model, tmp_path):
    path = make_model()
    whole = weights_sha256(path)
    model = load_checkpoint(path)
    save_checkpoint(model, tmp_path / "sharded", max_shard_bytes=20_000)
    assert len([*(tmp_path / "sharded").glob("*.safetensors")]) > 1
    assert weights_sha256(tmp_path / "sharded") == whole
    model.model.norm.weight.data[-1] += 1e-6
    save_checkpoint(model, tmp_path / "changed")
    assert weights_sha256(tmp_path / "changed") != whole
    save_checkpoint(model, tmp_path / "half", dtype=torch.bfloat16)
    assert weights_sha256(tmp_path / "half") not in (whole, weights_sha256(tmp_path / "changed"))
