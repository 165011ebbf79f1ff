"""Data: every fault is named with its place, and no held-out question is ever trained on."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from flashgrpo.grpo.data.problems import load_problems, split_problems
from flashgrpo.grpo.data.prompts import located, render_prompt, render_text
from flashgrpo.grpo.errors import DataError
from flashgrpo.grpo.recipe.schema import DataSection
from flashgrpo.grpo.types import Problem


def Spec(**values: Any) -> DataSection:
    return DataSection(**{"size": 300, "held_out": 2, **values})


ROWS = [{"prompt": f"What is {i} + 1?", "answer": str(i + 1), "level": i} for i in range(8)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per character, and a beginning-of-sequence token that the tokenizer adds."""
    vocab = {"<s>": 0} | {chr(code): code for code in range(1, 127)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", chat_template=chat_template)


def test_task_questions_are_distinct_and_disjoint_and_depend_on_the_seed():
    """One-digit sums repeat many times in 300; a repeated one in both parts would be trained on and tested."""
    spec = Spec(task="reasoning_gym:chain_sum", options={"max_terms": 2, "max_digits": 1}, held_out=50)
    train, held_out = load_problems(spec, seed=3)
    questions = [problem.question for problem in train + held_out]
    assert len(held_out) == 50
    assert len(set(questions)) == len(questions) < 300
    assert load_problems(spec, seed=3) == (train, held_out)
    assert load_problems(spec, seed=4)[1] != held_out
    columns = held_out[0].columns
    assert json.loads(json.dumps(columns))["task"] == "reasoning_gym:chain_sum"
    assert columns["task_options"] == spec.options
    assert columns["answer"] == str(eval(columns["metadata"]["expression"]))


def test_neighbouring_seeds_make_other_problems():
    first, second = (load_problems(Spec(task="reasoning_gym:chain_sum", size=50), seed) for seed in (1, 2))
    shared = {p.question for p in first[0]} & {p.question for p in second[0]}
    assert len(shared) < 10  # items i + 1 and i would coincide if the seed were passed on as it is


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Spec(task="reasoning_gym:chain_sums"), "unknown task .*did you mean reasoning_gym:chain_sum\\?"),
        (Spec(task="chain_sum"), "unknown task 'chain_sum'; did you mean reasoning_gym:chain_sum\\?"),
        (
            Spec(task="reasoning_gym:chain_sum", options={"max_term": 3}),
            "no option 'max_term'; did you mean max_terms",
        ),
        (Spec(task="reasoning_gym:chain_sum", options={"max_terms": 0}), "refuses .*max_terms must be >= min_terms"),
        (Spec(task="reasoning_gym:chain_sum", size=3, held_out=3), "held_out is 3, and there are 3 different prompts"),
        (Spec(path="missing.jsonl"), "missing.jsonl: no such file or folder"),
        (Spec(path="./missing"), "no such file or folder"),
    ],
)
def test_faulty_sources_are_named(spec, message):
    with pytest.raises(DataError, match=message):
        load_problems(spec, seed=0)


def test_jsonl_keeps_order_and_columns(tmp_path):
    file = tmp_path / "data.jsonl"
    write_jsonl(file, ROWS)
    file.write_text(file.read_text().replace("\n", "\n\n", 1))  # a blank line is no row
    train, held_out = load_problems(Spec(path=str(file)), seed=0)
    assert [p.columns["level"] for p in train] == sorted(p.columns["level"] for p in train)
    assert sorted(p.question for p in train + held_out) == [row["prompt"] for row in ROWS]
    assert "prompt" not in train[0].columns


def test_other_column_names_and_the_answer_under_its_own(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"q": "a?", "solution": "1"}, {"q": "b?", "solution": "2"}])
    spec = Spec(path=path, prompt_column="q", answer_column="solution", held_out=0)
    assert load_problems(spec, 0)[0][1] == Problem("b?", {"solution": "2", "answer": "2"})


@pytest.mark.parametrize("named", [{}, {"answer_column": ""}])
def test_data_without_answers_can_be_trained_on(tmp_path, named):
    """By rewards that need none; but a column that the recipe names must be there."""
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "a?", "level": 1}])
    assert load_problems(Spec(path=path, held_out=0, **named), 0)[0] == [Problem("a?", {"level": 1})]
    with pytest.raises(DataError, match=r"d\.jsonl:1: no column 'answer'"):
        load_problems(Spec(path=path, answer_column="answer", held_out=0), 0)


def test_a_file_that_may_not_be_read_is_a_data_error(tmp_path, monkeypatch):
    def refuse(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    path = write_jsonl(tmp_path / "d.jsonl", ROWS)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"d\.jsonl: cannot be read: Permission denied"):
        load_problems(Spec(path=path), 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a", "answer": 1}\n{"prompt": "b", \n', r"bad\.jsonl:2: unreadable line: "),
        (b'{"prompt": "a", "answer": 1}\n\n{"prompt": "\xff"}\n', r"bad\.jsonl:3: unreadable line: .*utf-8"),
        (b"[1]\n", r"bad\.jsonl:1: unreadable line: wanted a JSON object, found list"),
        (
            b'{"promt": "a", "answer": 1}\n',
            r"bad\.jsonl:1: no column 'prompt'; did you mean promt\? known: promt, answer",
        ),
        (
            b'{"problem": "a", "level": 1, "solution": "b"}\n',
            r"bad\.jsonl:1: no column 'prompt'; known: problem, level, solution",
        ),
        (b'{"prompt": "a", "answer": 1}\n{"prompt": "b"}\n', r"bad\.jsonl:2: no column 'answer'; known: prompt"),
        (b'{"prompt": "a", "answer": null}\n', r"bad\.jsonl:1: column 'answer' is null"),
        (b'{"prompt": "a", "answer": 1}\n{"prompt": "b", "answer": ""}\n', r"bad\.jsonl:2: column 'answer' is empty"),
        (b'{"prompt": "a", "answer": " \\n"}\n', r"bad\.jsonl:1: column 'answer' is empty"),
        (b'{"prompt": "a", "answer": "so it is\\n#### "}\n', r"bad\.jsonl:1: column 'answer' is empty"),
        (b'{"prompt": "a", "answer": NaN}\n', r"bad\.jsonl:1: column 'answer' is NaN"),
        (b'{"prompt": "a", "answer": -Infinity}\n', r"bad\.jsonl:1: column 'answer' is infinite"),
        (b'{"prompt": "a", "answer": ["B"]}\n', r"bad\.jsonl:1: column 'answer' holds list, wanted text or a number"),
        (
            b'{"prompt": "a", "answer": {"ground_truth": "34", "style": "rule"}}\n',
            r"bad\.jsonl:1: column 'answer' holds dict of ground_truth, style, wanted text or a number",
        ),
        (b'{"prompt": "a", "answer": 1}\n{"prompt": " ", "answer": 1}\n', r"bad\.jsonl:2: the prompt .* is empty"),
        (b'{"prompt": 7, "answer": 1}\n', r"bad\.jsonl:1: column 'prompt' holds int, wanted text or"),
        (b'{"prompt": [{"role": "user", "content": ""}], "answer": 1}\n', r"bad\.jsonl:1: the prompt .* is empty"),
        (
            b'{"prompt": [{"role": "user", "content": null}]}',
            r"bad\.jsonl:1: message 1 .* has the content 'None', wanted",
        ),
        (
            b'{"prompt": [{"role": "user", "content": "a"}, {"role": "user", "content": 7}]}',
            r"bad\.jsonl:1: message 2 of column 'prompt' has the content '7'",
        ),
        (
            b'{"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]}',
            r"bad\.jsonl:1: message 1 .* parts of the type text",
        ),
        (b'{"prompt": [{"role": null, "content": "a"}]}', r"bad\.jsonl:1: message 1 .* has the role None"),
        (b'{"prompt": "a\\ud83d", "answer": 1}\n', r"bad\.jsonl:1: '\\ud83d' is half of a character"),
        (b'{"prompt": "a"}\n{"prompt": "\xed\xa0\xbd", "answer": 1}\n', r"bad\.jsonl:2: unreadable line: "),
        (b'{"prompt": "a", "meta": {"note": ["\\uDE00"]}}\n', r"bad\.jsonl:1: .* half of a character"),
        (b"[" * 100_000 + b"\n", r"bad\.jsonl:1: unreadable line: "),
        (b"\n", "no problems in .*bad.jsonl"),
    ],
)
def test_faulty_lines_are_named_with_file_and_line(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_problems(Spec(path=str(tmp_path / "bad.jsonl"), held_out=0), seed=0)


def test_parquet_and_saved_data_sets_give_the_same_problems(tmp_path):
    data = Dataset.from_list(ROWS)
    data.to_parquet(tmp_path / "data.parquet")
    data.save_to_disk(str(tmp_path / "single"))
    DatasetDict({"train": data.select([0]), "test": data}).save_to_disk(str(tmp_path / "splits"))
    from_jsonl = load_problems(Spec(path=write_jsonl(tmp_path / "data.jsonl", ROWS)), seed=5)
    assert load_problems(Spec(path=str(tmp_path / "data.parquet")), seed=5) == from_jsonl
    assert load_problems(Spec(path=str(tmp_path / "single")), seed=5) == from_jsonl
    assert load_problems(Spec(path=str(tmp_path / "splits"), split="test"), seed=5) == from_jsonl
    with pytest.raises(DataError, match="no split 'val'; known: train, test"):
        load_problems(Spec(path=str(tmp_path / "splits"), split="val"), seed=0)


def test_folder_of_data_files_is_a_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder" / "train.jsonl", ROWS)
    train, held_out = load_problems(Spec(path=str(tmp_path / "folder")), seed=0)
    assert len(train) + len(held_out) == len(ROWS)
    with pytest.raises(DataError, match="cannot load split 'test'"):
        load_problems(Spec(path=str(tmp_path / "folder"), split="test"), seed=0)


def test_broken_files_are_data_errors(tmp_path):
    for name, message in {
        "d.parquet": "unreadable Parquet file",
        "d.csv": r"must be \.jsonl or \.parquet, found \.csv",
    }.items():
        (tmp_path / name).write_text("nonsense")
        with pytest.raises(DataError, match=message):
            load_problems(Spec(path=str(tmp_path / name)), seed=0)


def test_repeated_prompts_stay_on_one_side():
    problems = [Problem(f"q{i % 4}", {"answer": i}) for i in range(12)]
    train, held_out = split_problems(problems, held_out=2, seed=1)
    assert len(held_out) == 2
    assert len(train) == 6
    assert not {p.question for p in train} & {p.question for p in held_out}


def test_r1_template_is_the_papers():
    text = render_text("What is 1 + 1?", "r1")
    assert text.startswith(
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves"
    )
    assert "i.e., <think> reasoning process here </think> <answer> answer here </answer>. User: " in text
    assert text.endswith("User: What is 1 + 1?\nAssistant:")
    assert render_prompt("What is 1 + 1?", "r1", make_tokenizer()) == [0, *map(ord, text)]


def test_plain_prompt_gets_the_tokenizers_special_tokens():
    assert render_prompt("ab{c}", "none", make_tokenizer()) == [0, *map(ord, "ab{c}")]


def test_chat_template_takes_text_and_messages():
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}ai:{% endif %}"
    )
    tokenizer = make_tokenizer(template)
    assert render_prompt("hi", "chat", tokenizer) == list(map(ord, "user:hi;ai:"))
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    assert render_prompt(messages, "chat", tokenizer) == list(map(ord, "system:s;user:hi;ai:"))
    assert Problem(messages, {}).question == "hi"


CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if thinks is false %}no thoughts:{% endif %}{% endif %}"
)


def chat(*messages: str) -> list[dict[str, str]]:
    return [{"role": message.split(":")[0], "content": message.split(":")[1]} for message in messages]


@pytest.mark.parametrize(
    ("messages", "rendered"),
    [
        (chat("user:hi", "assistant:Let me see. <think>"), "<user>hi</><assistant>Let me see. <think>"),
        (chat("user:hi", "assistant:"), "<user>hi</><assistant>"),
        (chat("user:hi", "assistant:ho", "user:so"), "<user>hi</><assistant>ho</><user>so</><assistant>"),
    ],
)
def test_what_the_assistant_has_begun_is_continued_and_not_closed(messages, rendered):
    """A prompt that ends with a prefill: a second turn of the assistant's would have to begin anew."""
    assert render_prompt(messages, "chat", make_tokenizer(CHATML)) == list(map(ord, rendered))


def test_template_options_and_system_prompt_reach_the_chat_template():
    tokenizer = make_tokenizer(CHATML)

    def text(prompt, **options):
        return "".join(map(chr, render_prompt(prompt, "chat", tokenizer, **options)))

    assert text("hi", options={"thinks": False}) == "<user>hi</><assistant>no thoughts:"
    assert text("hi", system_prompt="Be brief.") == "<system>Be brief.</><user>hi</><assistant>"
    assert text(chat("system:s", "user:hi"), system_prompt="Be brief.") == "<system>s</><user>hi</><assistant>"
    with pytest.raises(DataError, match=r"does not read template_options\.think;"):
        text("hi", options={"think": False})
    with pytest.raises(DataError, match="multiple values for keyword argument 'tokenize'"):
        text("hi", options={"tokenize": True})


def test_parts_of_text_are_joined_and_nulls_left_out(tmp_path):
    """Multimodal exports have parts; Parquet gives every message all keys that any message has."""
    parts = [{"type": "text", "text": "1 + "}, {"type": "text", "text": "1?", "image_url": None}]
    row = {"prompt": [{"role": "user", "content": parts, "tool_calls": None}], "answer": "2"}
    (problem,), _ = load_problems(Spec(path=write_jsonl(tmp_path / "d.jsonl", [row]), held_out=0), 0)
    assert problem.prompt == [{"role": "user", "content": "1 + 1?"}]
    assert problem.question == "1 + 1?"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content }", "unexpected"),
        ("{{ messages[0].name.first }}", "'dict object' has no attribute 'name'"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
    ],
)
def test_a_template_that_refuses_a_row_is_named_with_it(template, message):
    problem = Problem(chat("user:hi"), {}, "data.jsonl:7")
    with pytest.raises(DataError, match=rf"data\.jsonl:7: the chat template refuses .*{message}"), located(problem):
        render_prompt(problem.prompt, "chat", make_tokenizer(template))


def test_a_tokenizer_that_fails_on_a_text_is_named_with_it():
    """The tokenizers library raises bare exceptions, as for a letter that it does not know and has no token for."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.model = models.WordLevel({"a": 0}, unk_token="<unk>")
    with pytest.raises(DataError, match=r"the tokenizer refuses 'b': WordLevel error"):
        render_prompt("b", "none", tokenizer)


@pytest.mark.parametrize("text", ["1+1=", "<s>1+1="])
def test_a_prompt_begins_once_and_does_not_end(text):
    """Tokenizers with add_eos_token close what the model is to continue, and texts may have their <s> already."""
    tokenizer = make_tokenizer()
    ends = [("<s>", 0), ("~", ord("~"))]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A ~", special_tokens=ends)
    tokenizer.add_special_tokens({"eos_token": "~"})
    assert render_prompt(text, "none", tokenizer) == [0, *map(ord, "1+1=")]
    assert render_prompt(text, "r1", tokenizer)[-1] == ord(":")
    for template, chat in (("none", None), ("chat", "{{ messages[0].content }}")):
        tokenizer.chat_template = chat
        with pytest.raises(DataError, match="the prompt ends with ~"):
            render_prompt("1+1=~", template, tokenizer)


@pytest.mark.parametrize(
    ("prompt", "template", "message"),
    [
        ("hi", "chat", "the tokenizer has no chat template"),
        ([{"role": "user", "content": "hi"}], "r1", "wants text, found chat messages"),
        ("\u4f60", "bare", "has no tokens in template 'none'"),
    ],
)
def test_unusable_prompts_are_refused(prompt, template, message):
    tokenizer = make_tokenizer()
    if template == "bare":
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
        template = "none"
    with pytest.raises(DataError, match=message):
        render_prompt(prompt, template, tokenizer)


def test_hub_failure_names_the_data_set(monkeypatch):
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(DataError, match=re.escape("some/set: cannot load split 'train' of subset 'main'")):
        load_problems(Spec(path="some/set", subset="main"), seed=0)
