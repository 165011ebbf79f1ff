"""The pool: a faulty reward costs what the rules say and no more, and no process is left behind."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest

from flashgrpo.grpo.errors import RewardError, RewardFailure
from flashgrpo.grpo.rewards.pool import RewardPool
from flashgrpo.grpo.types import CompletionGroup, Problem, Scores, given_scores
from flashgrpo.model import waits

# What each function does is told by the text of a completion.
FUNCTIONS = """
import asyncio, os, subprocess, time
import numpy as np

def obey(prompts, completions, **columns):
    order = completions[0]
    if order == "hang":
        time.sleep(60)
    if order == "fork" and os.fork() == 0:
        return [100.0] * len(prompts)
    if order == "fork and hang":
        os.fork()
        time.sleep(60)
    if order == "write":
        for descriptor in range(3, 50):
            try:
                os.write(descriptor, b"x" * 9 + b'\\n[1, [100.0], null]\\n[[')
            except OSError:
                pass
    if order == "exit":
        os._exit(3)
    if order == "crash":
        os.kill(os.getpid(), 11)
    if order == "raise":
        raise KeyError("no luck")
    if order == "slow":
        time.sleep(0.1)
    print("a reward may print")
    num = len(prompts)
    results = {
        "short": [1.0], "number": 1.0, "words": ["good"] * num, "array": np.ones(num), "infinite": [float("inf")] * num,
        "nan": [float("nan")] * num, "huge": [10**400] * num,
    }
    return results.get(order, [None if text == "none" else float(len(text)) for text in completions])

def see(prompts, completions, completion_ids, finish_reasons, questions, max_new_tokens, answer, **columns):
    num = len(prompts)
    seen = [
        prompts == ["Q: q"] * num, questions == ["q"] * num, completion_ids == [[7]] * num, max_new_tokens == 99,
        finish_reasons == ["stop"] * num, answer == ["a"] * num, columns == {"level": [3] * num},
    ]
    return [float(all(seen))] * num

def pid(prompts, completions, **columns):
    return [os.getpid()] * len(prompts)

def meet(prompts, completions, **columns):
    folder = completions[0]
    open(f"{folder}/{os.getpid()}", "w").close()
    while len(os.listdir(folder)) < 2:
        time.sleep(0.01)
    return [1.0] * len(prompts)

def blank(prompts, completions, **columns):
    return [None] * len(prompts)

def words(prompts, completions, **columns):
    return [1.0 if text.isalpha() else None for text in completions]

def numbers(prompts, completions, **columns):
    return [10.0 if text.isdigit() else None for text in completions]

def chat(prompts, completions, **columns):
    return [float(len(completion[0]["content"])) for completion in completions]

loops = set()

async def asynchronous(prompts, completions, **columns):
    await asyncio.sleep(0)
    loops.add(asyncio.get_running_loop())
    return [float(len(loops))] * len(prompts)

def spin(prompts, completions, **columns):
    os.sched_setaffinity(0, {int(completions[0])})
    start = time.process_time()
    while time.process_time() - start < 0.25:
        pass
    return [1.0] * len(prompts)

def leave(prompts, completions, **columns):
    if os.fork() == 0:
        print(subprocess.Popen(["sleep", "60"], start_new_session=True).pid, file=open(completions[0], "w"), flush=True)
        os._exit(0)
    os.wait()
    if completions[1] == "hang":
        time.sleep(60)
    return [1.0] * len(prompts)

def closed(prompts, completions):
    return []

def demanding(prompts, completions, solution, **columns):
    return []
"""

EXAMPLE = Problem("q", {"answer": "a", "level": 3})
GOOD = "<think>a</think><answer>a</answer>"


def open_pool(names: Sequence[str], example: Problem = EXAMPLE, weights: Sequence[float] = (), **options) -> RewardPool:
    by_function = dict(zip(names, weights or [1.0] * len(names), strict=True))
    options = {"max_new_tokens": 99, "timeout_s": 1.0, "num_workers": 1, **options}
    return RewardPool({"data": by_function}, {"data": example}, **options)


@pytest.fixture(scope="module")
def functions(tmp_path_factory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "pool_test_rewards.py").write_text(FUNCTIONS)
    sys.path.append(str(folder))
    yield str(folder)
    sys.path.remove(str(folder))


def test_a_reward_that_takes_long_to_import_has_a_word(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(waits, "_PATIENCE_S", 0.05)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "slow_rewards.py").write_text("import time; time.sleep(0.5)\ndef zero(prompts, completions, **_): ...")
    open_pool(["slow_rewards:zero"]).close()
    assert capsys.readouterr().err == "importing reward slow_rewards:zero\n"


@pytest.fixture(scope="module")
def make_pool(functions) -> Iterator[Callable[..., RewardPool]]:
    """Pools of one worker, or shared ones: starting a process takes a fifth of a second."""
    pools = []

    def make(names: Sequence[str], **options) -> RewardPool:
        names = [name if name in ("format", "accuracy") else f"pool_test_rewards:{name}" for name in names]
        pools.append(open_pool(names, **options))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


@pytest.fixture(scope="module")
def obey(make_pool) -> RewardPool:
    return make_pool(["obey"])


def group(*completions: str) -> CompletionGroup:
    num = len(completions)
    return CompletionGroup(EXAMPLE, "Q: q", completions, [[7]] * num, ["stop"] * num)


def step(pool: RewardPool, *groups: CompletionGroup) -> list[Scores]:
    for each in groups:
        pool.submit(each)
    scores = pool.collect()
    pool.check_step(scores)
    return scores


def rewards_of(pool: RewardPool, *groups: CompletionGroup) -> list[list[float]]:
    return [scores.rewards.tolist() for scores in step(pool, *groups)]


def test_scores_stand_in_the_order_of_submission_and_are_weighted(make_pool):
    pool = make_pool(["obey", "format"], weights=[0.5, 2], num_workers=2)
    slow, short, array = step(pool, group("slow", GOOD, "a"), group("a", "bb"), group("array", GOOD))
    assert slow.by_function == {"pool_test_rewards:obey": [4, 34, 1], "format": [0, 1, 0]}
    assert short.by_function == {"pool_test_rewards:obey": [1, 2], "format": [0, 0]}
    assert array.by_function == {"pool_test_rewards:obey": [1, 1], "format": [0, 1]}
    assert [each.rewards.tolist() for each in (slow, short, array)] == [[2, 19, 0.5], [0.5, 1], [0.5, 2.5]]


def test_groups_are_spread_over_the_workers(make_pool, tmp_path):
    """Each waits for the other, which only a second worker can begin."""
    pool = make_pool(["meet"], num_workers=2, timeout_s=20)
    assert rewards_of(pool, group(str(tmp_path)), group(str(tmp_path))) == [[1], [1]]


def test_functions_see_the_columns_and_what_the_pool_adds(make_pool):
    assert rewards_of(make_pool(["see"]), group("a", "b")) == [[1, 1]]


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        ("hang", "no result within the limit of 1 s"),
        ("exit", "its process ended with exit code 3"),
        ("crash", "its process ended with exit code -11"),
        ("raise", "KeyError: 'no luck'"),
        ("infinite", "it returned inf"),
        ("nan", "it returned nan"),
        ("huge", "OverflowError: int too large to convert to float"),
    ],
)
def test_a_fault_costs_its_own_group_and_gives_one_warning(obey, caplog, order, reason):
    with caplog.at_level(logging.WARNING):
        rewards = rewards_of(obey, group("a", "bb"), group(order, "bb"), group(order, "bb"), group("ccc", "bb"))
    assert np.array_equal(rewards, [[1, 2], [np.nan] * 2, [np.nan] * 2, [3, 2]], equal_nan=True)
    (warning,) = caplog.messages
    assert warning == f"reward 'pool_test_rewards:obey': 4 of 8 scores missing: {reason}"


def test_none_leaves_a_completion_to_the_other_functions(make_pool, caplog):
    """TRL's way of mixing tasks: each function gives None for what is not its own."""
    pool = make_pool(["words", "numbers", "blank"])
    for _ in range(4):  # of which one scores nothing at all
        assert rewards_of(pool, group("a", "1", "b")) == [[1, 10, 1]]
    assert not caplog.messages
    scores = step(pool, group("a", "1", "-"))
    for name, wanted in {"words": [1], "numbers": [10], "blank": []}.items():
        assert given_scores(scores, f"pool_test_rewards:{name}") == wanted
    assert np.array_equal(scores[0].rewards, [1, 10, np.nan], equal_nan=True)
    assert caplog.messages == ["1 of 3 completions have no reward: each function that scores them returned None"]


def test_what_could_not_be_scored_is_missing_whatever_others_say(make_pool):
    assert np.isnan(rewards_of(make_pool(["obey", "words"]), group("raise", "a"))).all()


def test_where_no_function_counts_rewards_are_0_and_none_is_missed(make_pool):
    """As beside a teacher: no functions, or such as are only watched."""
    for pool, completion in (make_pool([]), GOOD), (make_pool(["obey"], weights=[0.0]), "1234"):
        for _ in range(3):
            (scores,) = step(pool, group(completion, completion))
            assert scores.rewards.tolist() == [0.0, 0.0]


def test_missing_scores_of_weight_zero_leave_the_reward(make_pool):
    (scores,) = step(make_pool(["obey", "format"], weights=[0, 1]), group("nan", GOOD))
    assert scores.rewards.tolist() == [0, 1]
    assert np.isnan(scores.by_function["pool_test_rewards:obey"]).all()


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("short", r"pool_test_rewards:obey' returned 1 scores for 3 completions, wanted 3"),
        ("number", "returned float, wanted a list of 3 numbers or None"),
        ("words", "returned str 'good' as a score, wanted a number or None"),
    ],
)
def test_a_malformed_result_ends_the_run_at_once(obey, order, message):
    with pytest.raises(RewardFailure, match=message):
        step(obey, group("a", "b", "c"), group(order, "b", "c"))
    assert rewards_of(obey, group("a")) == [[1]]  # nothing of the failed step is left


@pytest.mark.parametrize(
    ("names", "orders", "message"),
    [
        (
            ["obey"],
            ["nan", "raise", "a", "nan", "raise", "nan"],
            "obey' gave no number in 3 steps in a row: it returned",
        ),
        (["words", "numbers"], [*"--a---"], "every reward function gave no number in 3 steps in a row: each returned"),
    ],
)
def test_three_steps_without_a_number_end_the_run_but_not_with_one_between(make_pool, names, orders, message):
    pool = make_pool(names)
    for order in orders[:-1]:
        step(pool, group(order))
    with pytest.raises(RewardFailure, match=message):
        step(pool, group(orders[-1]))


def test_evaluation_scores_by_a_function_of_its_own_while_a_step_is_open(obey):
    obey.submit(group("a", "bb"))
    assert obey.score([group(GOOD, "a"), group("b", GOOD)], "format").tolist() == [[1, 0], [0, 1]]
    assert obey.collect()[0].rewards.tolist() == [1, 2]


def test_a_step_counts_once_however_often_it_collects(make_pool, caplog):
    """Dynamic sampling collects several times a step; two bad steps of two rounds each are not four bad steps."""
    pool = make_pool(["obey"])

    def collect() -> list[Scores]:
        pool.submit(group("nan"))
        return pool.collect()

    for _ in range(2):
        pool.check_step(collect() + collect())
    assert len(caplog.messages) == 2
    with pytest.raises(RewardFailure, match="no number in 3 steps in a row: it returned nan"):
        pool.check_step(collect())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("acuracy", "did you mean accuracy"),
        ("no_such_module:f", "^reward 'no_such_module:f': cannot import 'no_such_module': ModuleNotFoundError"),
        ("pool_test_rewards:closed", "closed': got an unexpected keyword argument 'answer'; it is called as "),
        ("pool_test_rewards:demanding", "demanding': missing a required argument: 'solution'; it is called as "),
        ("builtins:iter", "iter': no signature found .*; it is called as "),
        ("accuracy", "'accuracy': missing a required argument: 'answer'"),
    ],
)
def test_functions_that_cannot_be_called_fail_before_the_first_step(functions, name, message):
    example = Problem("q", {}) if name == "accuracy" else EXAMPLE
    with pytest.raises(RewardError, match=message):
        open_pool(["format", name], example)


def test_a_worker_killed_while_idle_is_replaced_without_loss(make_pool, caplog):
    pool = make_pool(["pid"])
    ((first,),) = rewards_of(pool, group("a"))
    os.kill(int(first), signal.SIGKILL)
    time.sleep(0.1)
    ((second,),) = rewards_of(pool, group("a"))
    assert second not in (first, np.nan)
    assert not caplog.messages


def test_imports_of_a_builtin_are_done_before_the_limit_counts(make_pool):
    """reasoning_gym takes a second to import; the first group must not pay for it."""
    problem = Problem("1 + 1", {"task": "reasoning_gym:chain_sum", "task_options": {}, "answer": "2", "metadata": {}})
    pool = make_pool(["accuracy"], timeout_s=0.3, example=problem)
    scored = CompletionGroup(problem, "", ["<answer>2</answer>", "<answer>3</answer>"], [[0], [0]], ["stop", "stop"])
    assert rewards_of(pool, scored) == [[1, 0]]


# In place of the real one, so that what is slow is known.
MATH_VERIFY = """
import time

time.sleep(0.5)

def parse(text, **options):
    return [text]

def verify(gold, target, **options):
    while "777" in str(target):
        pass
    return False
"""


@pytest.fixture
def slow_math(tmp_path, monkeypatch) -> None:
    (tmp_path / "math_verify.py").write_text(MATH_VERIFY)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize("names", [["accuracy", "obey"], ["obey"]])
def test_no_worker_ever_imports_math_verify_within_a_time_limit(make_pool, slow_math, names, caplog):
    """Whole numbers are compared without it; with a slow disk another answer would kill all workers."""
    pool = make_pool(names, timeout_s=0.3, example=Problem("q", {"answer": "72"}))
    wrong = CompletionGroup(Problem("q", {"answer": "72"}), "q", ["x^2"] * 2, [[0]] * 2, ["stop"] * 2)
    assert pool.score([wrong], "accuracy").tolist() == [[0, 0]]  # as an evaluation, whatever the rewards are
    step(pool, group("exit", "exit"))
    caplog.clear()
    assert pool.score([wrong], "accuracy").tolist() == [[0, 0]]  # by another worker
    assert not caplog.messages


def test_a_slow_answer_is_wrong_and_its_group_keeps_its_scores(make_pool, slow_math, caplog):
    pool = make_pool(["accuracy"], timeout_s=1.0)
    problem = Problem("q", {"answer": "x^2"})
    texts = [r"\boxed{x^777}", r"\boxed{x^2}", r"\boxed{x^3}", r"\boxed{x^2}"]
    scored = CompletionGroup(problem, "q", texts, [[0]] * 4, ["stop"] * 4)
    assert rewards_of(pool, scored) == [[0, 1, 0, 1]]
    (warning,) = caplog.messages  # in silence a limit that is too short would look like a bad policy
    assert warning == "reward 'accuracy': no result within the limit of 0.375 s for an answer, which counts as wrong"


def test_waiting_for_a_busy_processor_does_not_count_against_the_limit(make_pool):
    pool = make_pool(["spin"], timeout_s=0.5)
    processor = min(os.sched_getaffinity(0))
    spinning = f"import os; os.sched_setaffinity(0, {{{processor}}})\nwhile True: pass"
    others = [subprocess.Popen([sys.executable, "-c", spinning]) for _ in range(3)]
    try:
        assert rewards_of(pool, group(str(processor))) == [[1]]  # a quarter of a second of work, in one, within a half
    finally:
        for other in others:
            other.kill()
            other.wait()


def test_what_a_function_writes_or_answers_from_a_fork_is_no_score(obey, caplog):
    for order in ("fork", "write", "fork"):
        assert rewards_of(obey, group(order, "bb"), group("a", "bb")) == [[len(order), 2], [1, 2]]
    assert not caplog.messages


def test_asynchronous_functions_are_awaited_in_one_event_loop(make_pool):
    pool = make_pool(["asynchronous"])
    assert rewards_of(pool, group("a"), group("b")) == [[1], [1]]  # clients that they keep belong to a loop


def test_a_function_for_lists_of_messages_is_told_that_completions_are_text(make_pool, caplog):
    step(make_pool(["chat"]), group("a"))
    assert 'take completion in place of completion[0]["content"]' in caplog.text


@pytest.mark.parametrize("then", ["return", "hang"])
def test_what_a_function_has_started_ends_with_its_worker(make_pool, tmp_path, then):
    """A daemon in a session of its own whose parent has ended."""
    pool = make_pool(["leave"])
    step(pool, group(str(tmp_path / "pid"), then))
    daemon = psutil.Process(int((tmp_path / "pid").read_text())) if then == "return" else None
    pool.close()
    if daemon is None:
        assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))
    else:
        assert not daemon.is_running()


def test_closing_ends_hanging_workers_at_once(functions):
    children = set(psutil.Process().children())
    with open_pool(["pool_test_rewards:obey"], timeout_s=600) as pool:
        for _ in range(4):
            pool.submit(group("hang"))
        time.sleep(0.5)  # until one hangs
        start = time.perf_counter()
    assert time.perf_counter() - start < 5  # in which a worker that does not end is killed
    assert set(psutil.Process().children()) <= children


SCRIPT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which Python leaves out in the background of a shell
sys.path.append({folder!r})
from flashgrpo.grpo.rewards.pool import RewardPool
from flashgrpo.grpo.types import CompletionGroup, Problem
weights, examples = {{"data": {{"pool_test_rewards:obey": 1.0}}}}, {{"data": Problem("q", {{}})}}
with RewardPool(weights, examples, max_new_tokens=1, timeout_s=5) as pool:
    group = lambda text: CompletionGroup(Problem("q", {{}}), "q", [text], [[0]], ["stop"])
    pool.submit(group("a"))
    pool.collect()
    {then}
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("sent", "then"),
    [
        (signal.SIGINT, "pass"),
        (signal.SIGKILL, "pool.submit(group('fork and hang')); pool.submit(group('a')); time.sleep(0.5)"),
    ],
)
def test_workers_end_with_the_main_process(functions, sent, then):
    """Written without a main guard, which spawned workers must not need; Ctrl-C must not print their tracebacks."""
    script = SCRIPT.format(folder=functions, then=then)
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as main:
        assert main.stdout is not None
        assert main.stdout.readline() == "ready\n"  # and nothing of what the reward printed
        while len(workers := psutil.Process(main.pid).children(recursive=True)) < 4 + ("fork" in then):
            time.sleep(0.01)  # each has a guard
        for worker in workers:
            worker.send_signal(signal.SIGINT)
        main.send_signal(sent)
        _, errors = main.communicate(timeout=20)
    assert main.returncode == -sent
    assert errors.count("Traceback") == (1 if sent == signal.SIGINT else 0)
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert not alive


def test_workers_do_not_import_the_main_script_or_torch(functions):
    (Path(functions) / "modules_of_test.py").write_text(
        "import sys\n"
        "def loaded(prompts, completions, **columns): return [float(name in sys.modules) for name in completions]\n"
    )
    with open_pool(["modules_of_test:loaded"]) as pool:
        assert rewards_of(pool, group("torch", "numpy", "pytest", "json")) == [[0, 0, 0, 1]]


def test_a_warm_step_takes_milliseconds(make_pool):
    """Twice 64 tasks; 0.05 s on two idle cores, where a poll interval per task would make seconds."""
    pool = make_pool(["accuracy", "format"], num_workers=2)
    step(pool, *[group(GOOD, "a")] * 64)
    seconds = []
    for _ in range(5):  # of which one at least has the processors
        start = time.perf_counter()
        assert np.sum(rewards_of(pool, *[group(*[GOOD] * 8)] * 64)) == 2 * 64 * 8
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1
