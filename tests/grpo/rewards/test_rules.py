"""Rewards: what is right must score, what only looks right must not, and faults must be named."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from flashgrpo.grpo.data.answers import fault_of_answer
from flashgrpo.grpo.errors import RewardError
from flashgrpo.grpo.rewards.response import Response, count_reflections
from flashgrpo.grpo.rewards.rules import (
    BUILTINS,
    accuracy,
    exact_match,
    format_tags,
    is_correct,
    language_consistency,
    overlong,
    repetition,
    resolve_reward,
)

GOOD = "<think>2 and 2 make 4</think>\n<answer>4</answer>"


def one(function: Any, completion: str, prompt: str = "Q", **columns: Any) -> float | None:
    (score,) = function(prompts=[prompt], completions=[completion], **{name: [v] for name, v in columns.items()})
    return score


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (GOOD, "4"),
        ("<think>maybe <answer>3</answer></think><answer>4</answer>", "4"),
        ("<answer>3</answer> no, <answer>4</answer>", "4"),
        ("<answer>the sum is \\boxed{4}</answer>", "4"),
        ("<answer>4", None),
        ("<answer></answer> \\boxed{4}", None),
        ("<think>so 4", None),
        ("<think>so <answer>4</answer>", "4"),
        ("so \\boxed{3}, or rather \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{\\left\\{ 1 \\right.} and an open \\boxed{2", "\\left\\{ 1 \\right."),
        ("3 + 1 = 4\n#### 4\nbye", "4"),
        ("First.\nThe answer is 4.\n", "The answer is 4."),
        ("", None),
    ],
)
def test_answer_is_the_final_one(completion, answer):
    assert Response(completion).answer() == answer


def test_reasoning_that_the_prompt_opened_is_no_answer():
    assert Response("let me see: 4", prompt="Assistant: <think>\n").answer() is None
    assert Response("let me see</think>4", prompt="Assistant: <think>\n").answer() == "4"


def test_reflective_phrases_are_whole_words_in_any_case():
    assert count_reflections("Wait, WAIT! However, I check: wrong.") == 5
    assert count_reflections("checked errors, butter, await, mistakes") == 0


def test_unclosed_boxes_without_end_do_not_take_quadratic_time():
    assert Response("\\boxed{" * 50_000).answer() is not None  # two minutes if each were scanned to the end


@pytest.mark.parametrize("gold", ["$$", r"\text{}", "{}", ".", r"\boxed{}", "**", "$", "work\n#### $", float("inf")])
def test_a_reference_that_nothing_equals_is_refused(gold):
    assert fault_of_answer(gold)


@pytest.mark.parametrize("gold", ["0", "-", "<", "A", r"\emptyset", r"\$5", "()", 0, False, 0.0])
def test_short_references_are_taken(gold):
    assert fault_of_answer(gold) is None
    assert one(accuracy, f"\\boxed{{{gold}}}", answer=gold) == 1.0


def test_accuracy_reads_gsm8k_solutions_and_only_the_answer_tags():
    assert one(accuracy, "<think>7</think><answer>$1,042</answer>", answer="10 + ... #### 1,042") == 1.0
    assert one(accuracy, "<think>1042</think><answer>7</answer> 1042", answer="#### 1042") == 0.0
    assert one(accuracy, "no idea", answer="1042") == 0.0


def test_accuracy_of_a_task_is_its_own_scorers_with_partial_credit():
    row = {"task": "reasoning_gym:chain_sum", "metadata": {}, "answer": "100"}
    assert one(accuracy, "<answer>+100.0</answer>", **row) == 1.0
    partial = one(accuracy, "<answer>=100</answer>", **row)
    assert partial == 0.75
    assert not is_correct(partial)
    assert one(accuracy, "<answer>7</answer>", **row) == 0.0
    assert one(accuracy, "<think>100", **row) == 0.0


def test_a_task_without_one_expected_answer_is_scored_from_its_metadata():
    metadata = {"puzzle": {"vertices": [0, 1], "edges": [[0, 1]], "num_colors": 2, "color_options": [1, 2]}}
    row = {"task": "reasoning_gym:graph_color", "answer": None, "metadata": metadata}
    assert one(accuracy, '{"0": 1, "1": 2}', **row) == 1.0
    assert not is_correct(one(accuracy, '{"0": 1,\n "1": 1}', **row))


def test_accuracy_uses_the_options_of_the_task():
    row = {"task": "reasoning_gym:decimal_arithmetic", "metadata": {}, "answer": "1.25"}
    loose = {"max_num_decimal_places": 1, "min_num_decimal_places": 1, "precision": 8}
    assert one(accuracy, "<answer>1.26</answer>", **row, task_options={}) == 0.0
    assert one(accuracy, "<answer>1.26</answer>", **row, task_options=loose) == 1.0


def test_a_scorer_that_cannot_read_an_answer_scores_zero_but_a_broken_row_raises():
    row = {"task": "reasoning_gym:time_intervals", "answer": "10:00"}
    metadata = {"task_type": "time", "start_time": None, "end_time": None}
    assert one(accuracy, "<answer>soon</answer>", **row, metadata=metadata) == 0.0
    with pytest.raises(KeyError):
        one(accuracy, "<answer>1</answer>", task="reasoning_gym:complex_arithmetic", answer="1", metadata={})


def test_exact_match_is_exact():
    scores = exact_match(["Q"] * 3, ["<answer> 4 </answer>", "<answer>4.0</answer>", "no"], ["4", 4, "x"])
    assert scores == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        (GOOD, 1.0),
        ("  " + GOOD + "\n", 1.0),
        ("Sure. " + GOOD, 0.0),
        (GOOD + " Done.", 0.0),
        ("<think>a</think> b <answer>4</answer>", 0.0),
        ("<think> </think><answer>4</answer>", 0.0),
        ("<think>a</think><answer>\n</answer>", 0.0),
        ("<think>a<think>b</think><answer>4</answer>", 0.0),
        ("<answer>4</answer><think>a</think>", 0.0),
        ("a</think><answer>4</answer>", 0.0),
    ],
)
def test_format_wants_exactly_the_two_blocks(completion, score):
    assert one(format_tags, completion) == score


def test_format_takes_the_opening_tag_from_the_prompt_once():
    prompt = "User: Q\nAssistant: <think>\n"
    assert one(format_tags, "a</think><answer>4</answer>", prompt) == 1.0
    assert one(format_tags, GOOD, prompt) == 0.0


def test_overlong_is_a_ramp_over_the_last_fifth():
    ids = [[0] * n for n in (0, 80, 90, 100)]
    scores = overlong(completions=[""] * 4, completion_ids=ids, max_new_tokens=100)
    np.testing.assert_allclose(np.array(scores, dtype=float), [0, 0, -0.5, -1], atol=1e-12)


def test_repetition_falls_with_loops_only():
    loop, fresh, short = [1, 2, 3] * 100, list(range(300)), [1, 1]
    scores = repetition(completions=["", "", ""], completion_ids=[loop, fresh, short])
    assert scores[0] is not None
    assert -1 <= scores[0] < -0.95
    assert scores[1:] == [0.0, 0.0]


ENGLISH = "First we add the two numbers, and then we check that the result is right."
CHINESE = "首先我们把两个数字相加然后检查结果"
FRENCH = "Ensuite nous calculons la somme des deux nombres et nous vérifions le résultat."


@pytest.mark.parametrize(
    ("reasoning", "language", "low", "high"),
    [
        (ENGLISH, "en", 1.0, 1.0),
        (ENGLISH + " $x^2 + y$ \\alpha x1 7", "English", 1.0, 1.0),
        (ENGLISH + CHINESE, "en", 0.4, 0.55),
        (FRENCH, "en", 0.0, 0.0),
        (ENGLISH + FRENCH, "fr", 0.3, 0.7),
        (CHINESE, "zh", 1.0, 1.0),
        (CHINESE + ENGLISH, "zh", 0.45, 0.6),
        ("Първо събираме двете числа и после проверяваме резултата", "bg", 1.0, 1.0),
        ("12 + 30 = 42", "en", 1.0, 1.0),
        ("", "en", 0.0, 0.0),
    ],
)
def test_language_consistency_is_the_share_of_words(reasoning, language, low, high):
    score = one(
        language_consistency, f"<think>{reasoning}</think><answer>42 абв</answer>", questions="", language=language
    )
    assert score is not None
    assert low <= score <= high


def test_target_language_is_that_of_the_question_not_of_the_template():
    completion = f"<think>{CHINESE}</think>"
    assert one(language_consistency, completion, prompt=ENGLISH, questions="两个数字的和是多少") == 1.0
    assert one(language_consistency, completion, prompt=ENGLISH, questions="What is the sum?") == 0.0
    reasoning = f"<think>{ENGLISH}</think>"
    assert (
        one(language_consistency, reasoning, questions="Cheer Max up.") == 1.0
    )  # too short: lingua takes it for Dutch
    assert one(language_consistency, reasoning, questions="Combien font deux et deux, et encore deux ?") < 1.0
    with pytest.raises(ValueError, match="'englsh' is unknown; did you mean ENGLISH"):
        one(language_consistency, completion, questions="", language="englsh")


def test_correct_means_full_marks():
    assert is_correct(np.array([1.0, 1 - 1e-9, 0.99, np.nan])).tolist() == [True, True, False, False]


def test_builtins_resolve_and_wrong_names_say_what_is_near(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_of_test.py").write_text(
        "def brief(prompts, completions, answer, **columns): return [1.0] * len(prompts)\n"
    )
    (tmp_path / "broken_rewards_of_test.py").write_text("def f(prompts\n")
    (tmp_path / "failing_rewards_of_test.py").write_text("weight = wieght\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert all(resolve_reward(name) is function for name, function in BUILTINS.items())
    assert resolve_reward("my_rewards_of_test:brief")(["a"], ["b"], ["c"]) == [1.0]
    for name, message in {
        "acuracy": "unknown reward 'acuracy', .*; did you mean accuracy",
        "no_such_module:f": "cannot import 'no_such_module': ModuleNotFoundError",
        "my_rewards_of_test:breif": "no function 'breif'; did you mean brief",
        "broken_rewards_of_test:f": "cannot import 'broken_rewards_of_test': SyntaxError",
        "failing_rewards_of_test:f": "cannot import 'failing_rewards_of_test': NameError: name 'wieght'",
    }.items():
        with pytest.raises(RewardError, match=message):
            resolve_reward(name)


def test_import_is_light():
    """Workers import the module: a heavy import would cost seconds for each, and torch its threads."""
    heavy = "{'torch', 'transformers', 'datasets', 'sympy', 'math_verify', 'reasoning_gym', 'lingua'}"
    code = f"import sys, flashgrpo.grpo.rewards.pool; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
