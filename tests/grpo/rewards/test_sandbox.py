"""The reward `code`: right programs score 1, wrong ones 0, and every attack scores 0 and leaves nothing behind."""

import contextlib
import ctypes
import dataclasses
import json
import math
import os
import platform
import resource
import signal
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from pydantic import ValidationError

from flashgrpo.grpo.errors import RewardError
from flashgrpo.grpo.recipe import schema as sections
from flashgrpo.grpo.recipe.schema import ProgramsSection
from flashgrpo.grpo.rewards import sandbox
from flashgrpo.grpo.rewards.language import share_in_language
from flashgrpo.grpo.rewards.pool import RewardPool
from flashgrpo.grpo.rewards.programs import extract_program, parse_tests, same_results, same_text, score_programs
from flashgrpo.grpo.rewards.rules import code
from flashgrpo.grpo.types import CompletionGroup, Problem

LIMITS = ProgramsSection(time_s=1.0, memory_mb=128)
UNPROTECTED = ProgramsSection(time_s=1.0, memory_mb=128, isolation="none: run programs unprotected")
ECHO = {"inputs": ["1\n", "2\n"], "outputs": ["1\n", "2\n"]}
# In all more processes than a program may have, but few at a time: who has ended does not count.
ORPHANS = """
import os, time
for _ in range(24):
    if os.fork() == 0:
        try:
            os._exit(0 * os.fork())
        except OSError:
            os._exit(1)
    assert os.wait()[1] == 0
    time.sleep(0.02)
print(input())
"""
CALL = {"inputs": [[1], [2]], "outputs": [1, 2], "fn_name": "same"}
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True, scope="module")
def is_reaper() -> Iterator[None]:
    """As in a container whose first process is the trainer: what loses its parent becomes this process's child."""
    prctl, subreaper = ctypes.CDLL(None).prctl, 36
    assert prctl(subreaper, 1, 0, 0, 0) == 0
    yield
    prctl(subreaper, 0, 0, 0, 0)


def children() -> set[psutil.Process]:
    """Of this process, at any depth; and zombies."""
    return set(psutil.Process().children(recursive=True))


@contextlib.contextmanager
def nothing_is_left() -> Iterator[None]:
    before = children()
    yield
    assert children() - before == set()


def wait_until(is_true: Callable[[], bool], limit_s: float = 60.0) -> None:
    end = time.monotonic() + limit_s
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.001)


def score(program: str, tests=ECHO, limits: ProgramsSection = LIMITS) -> float | None:
    (found,) = score_programs([""], [f"<think>so</think>\n```python\n{program}\n```"], [tests], limits)
    return found


def output(program: str, limits: ProgramsSection = LIMITS) -> str | None:
    with sandbox.sandboxed(program, limits) as runner:
        found = runner.run("", max_bytes=10_000)
    return None if found is None else found.decode()


def reached(attempts: dict[str, str], limits: ProgramsSection) -> list[str]:
    """The attempts of one program that do not end with an error."""
    program = f"reached = []\nfor name, attempt in {attempts}.items():\n    try:\n        exec(attempt, {{}})\n"
    program += "        reached.append(name)\n    except BaseException:\n        pass\nprint('=', *reached, sep='\\n')"
    found = output(program, dataclasses.replace(limits, time_s=20.0))
    assert found is not None
    return found.rpartition("=")[2].split("\n")[1:-1]


@pytest.mark.parametrize(
    ("program", "tests", "wanted"),
    [
        ("print(input())", ECHO, 1),
        ("print(input(), end='  \\n\\n')", ECHO, 1),
        ("import bisect, collections, heapq, math, subprocess, threading, zoneinfo\nprint(input())", ECHO, 1),
        ("import os\nos.wait() if os.fork() else os._exit(0)\nprint(input())", ECHO, 1),
        (ORPHANS, ECHO, 1),
        ("print(1)", ECHO, 0),
        ("print(int(input()) / 3)", {"inputs": ["1"], "outputs": ["0.33333333"]}, 1),
        ("print(int(input()) / 3)", {"inputs": ["1"], "outputs": ["0.3334"]}, 0),
        ("print(12345678)", {"inputs": [""], "outputs": ["12345679"]}, 0),
        ("import sys\nprint(sum(map(int, sys.stdin)))", [{"input": "3\n4\n", "output": "7"}], 1),
        ("import collections, numpy", ECHO, 0),
        ("print(math.floor(float(input())))", ECHO, 0),
        ("open('/dev/null').close()\nprint(input())", ECHO, 1),
        ("raise SystemExit(0)", ECHO, 0),
        ("this is no program", ECHO, 0),
        ("def same(x):\n    return x", CALL, 1),
        ("def same(x):\n    print('debug')\n    return x", CALL, 1),
        ("class Solution:\n    def same(self, x: List[int]):\n        return x", CALL, 1),
        ("def same(x):\n    return x", {"inputs": [[1]], "outputs": [[1]], "fn_name": "same"}, 1),
        ("def same(x):\n    return 1", CALL, 0),
        ("def same(x):\n    return float('nan')", CALL, 0),
        ("def other(x):\n    return x", CALL, 0),
        ("def same(x):\n    return {'a': [x]}", {"inputs": [[1]], "outputs": [{"a": [1]}], "fn_name": "same"}, 1),
        ("def same(a, b):\n    return a + b", {"inputs": ["1\n[2]"], "outputs": ["3"], "fn_name": "same"}, 0),
        ("def same(a, b):\n    return a + sum(b)", {"inputs": ["1\n[2]"], "outputs": ["3"], "fn_name": "same"}, 1),
        ("print(input())  # " + "long " * 50_000, ECHO, 1),
        ("print(input())\n\0", ECHO, 0),
    ],
    ids=lambda value: str(value)[:40],
)
def test_programs_are_scored_by_their_tests(program, tests, wanted):
    assert score(program, tests) == wanted


ADD = {"input": "1\n2", "output": "3", "testtype": "functional"}
NAMED = {"func_name": "add"}


@pytest.mark.parametrize(
    ("tests", "metadata"),
    [
        (json.dumps([ADD]), json.dumps(NAMED)),
        ([{**ADD, "metadata": NAMED}], "from a contest"),
        ([{**ADD, "metadata": json.dumps(NAMED)}], None),
        ({"inputs": ["1\n2"], "outputs": ["3"], "func_name": "add"}, {}),
    ],
)
def test_functions_of_livecodebench_are_called_by_the_name_in_their_metadata(tests, metadata):
    program = "```python\nclass Solution:\n    def add(self, a, b):\n        return a + b\n```"
    wrong = program.replace("a + b", "a - b")
    assert code([""] * 2, [program, wrong], [tests] * 2, LIMITS, metadata=[metadata] * 2) == [1.0, 0.0]


def test_rows_without_tests_are_missing_and_faulty_tests_say_what_is_wanted():
    assert code(["", ""], ["```python\nprint(1)\n```"] * 2, tests=[None, json.dumps(ECHO)]) == [None, 0.0]
    for faulty in ({"inputs": ["1"], "outputs": []}, [{"in": 1}], {"inputs": ["1"]}):
        with pytest.raises(ValueError, match=r"tests: .* wanted .*all of one length"):
            parse_tests(faulty)
    with pytest.raises(ValueError, match="testtype is functional, and no fn_name or metadata with a func_name"):
        parse_tests([ADD], {"difficulty": "easy"})
    assert parse_tests([{**ADD, "testtype": "stdin"}], NAMED) == ("", [("1\n2", "3")])


def test_the_program_of_a_completion_is_its_last_block_after_the_reasoning():
    one, two, three = (f"```python\nprint({i})\n```" for i in (1, 2, 3))
    assert extract_program(f"<think>{one}\n</think>\n{two}\nor\n{three}") == "print(3)\n"
    assert extract_program(f"<think>{one}") is None
    assert extract_program(one, prompt="<think>\n") is None
    assert extract_program(f"```cpp\nint x;\n```\n{one}\n```\n1\n```") == "print(1)\n"
    assert extract_program("print(1)") is None


RIGHT_WORDS = "5.0=5 1e18=1000000000000000000 0.3333333333=0.33333333"
WRONG_WORDS = "5.0000001=5 1000000001.0=1000000000 1e18=1000000000000000001 sNaN=5 1e999999999=5 101=0101 1_000=1000"
RIGHT_VALUES = [(10**17 + 1.0, 10**17), (0.30000000000000004, 0.3)]
WRONG_VALUES = [(12345678.9, 12345678), ([1e23], [10**23]), (10**400, 0.5)]


def test_an_integer_is_expected_exactly_and_a_fraction_nearly():
    right, wrong = ([pair.split("=") for pair in words.split()] for words in (RIGHT_WORDS, WRONG_WORDS))
    wrong.append(["9" * 5000, "9" * 4999 + "8"])
    assert [pair for pair in right if not same_text(*pair)] == []
    assert [pair for pair in wrong if same_text(*pair)] == []
    assert [pair for pair in RIGHT_VALUES if not same_results(*(json.dumps([value]) for value in pair))] == []
    assert [pair for pair in WRONG_VALUES if same_results(*(json.dumps([value]) for value in pair))] == []


def test_a_completion_that_never_closes_what_it_opens_costs_no_more_than_others():
    """Quadratic in its length each of these would take minutes."""
    start = time.process_time()
    for text in ("```" + "a" * 300_000, "```" + " " * 300_000, "```\n" * 100_001, "\n" * 300_000):
        extract_program(f"</think>\n{text}")
    for text in (r"\(", r"\[", r"\(\[", "```", "$$", "$", "<a", "`", "'a"):
        share_in_language(text * 100_001, "EN")
    assert time.process_time() - start < 10


ATTACKS = {
    "fork bomb": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
    "threads": (
        "import threading, time\nfor _ in range(20):\n    threading.Thread(target=time.sleep, args=(0.1,)).start()\n"
        "print(input())"
    ),
    "one process's memory": "x = bytearray(200 << 20)\nprint(input())",
    "memory of no process": (
        "import os\nfor _ in range(10):\n    os.write(os.memfd_create('x'), bytes(15 << 20))\nprint(input())"
    ),
    "endless output": "while True:\n    print('x' * 1000)",
    "endless errors": "import sys\nwhile True:\n    sys.stderr.write('x' * 1000)",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f():\n    f()\nf()",
    "a huge number": "print(9**9**9)",
    "waiting": "import time\ntime.sleep(60)",
    "ignoring signals": (
        "import signal, time\nfor s in range(1, 32):\n    try:\n        signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError):\n        pass\nwhile True:\n    pass"
    ),
    "closing everything": "import os, time\nos.closerange(0, 64)\ntime.sleep(60)",
    "filling the folder": "for name in 'ab':\n    open(name, 'wb').write(bytes(10 << 20))\nprint(input())",
    "binary garbage": "import sys\nsys.stdout.buffer.write(bytes(range(256)) * 9)\ndef same(x):\n    return b'\\xff'",
    "killing the parent": "import os\nos.kill(os.getppid(), 9)\nos.kill(-1, 9)\nos.kill(1, 9)",
    "a verdict of its own": "print('{\"score\": 1}\\npassed\\n1.0')\nimport os\nos._exit(0)",
    "double fork": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        os.closerange(0, 64)\n"
        "        while True:\n            time.sleep(0.1)\n    os._exit(0)\ntime.sleep(60)"
    ),
}
BESIDE_OTHERS = ["waiting", "closing everything", "double fork", "fork bomb"]
# Of which it matters that functions write their results at the end, where programs print.
OF_FUNCTIONS = ["endless output", "binary garbage", "a verdict of its own"]
CASES = [pytest.param(name, ECHO, id=name) for name in ATTACKS if name not in BESIDE_OTHERS]
CASES += [pytest.param(name, CALL, id=f"{name}, function") for name in OF_FUNCTIONS]


@pytest.mark.parametrize(("name", "tests"), CASES)
def test_an_attack_scores_0_and_leaves_nothing(name, tests, tmp_path, monkeypatch):
    """Among processes and temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with nothing_is_left():
        assert score(f"def same(x):\n    return x\n{ATTACKS[name]}", tests, LIMITS) == 0
    assert [*tmp_path.iterdir()] == []


def test_attacks_beside_right_programs_do_not_change_their_scores():
    """What sleeps until it breaks a limit does so all at once."""
    attacks = [(ATTACKS[name], tests, LIMITS) for name in BESIDE_OTHERS[:3] for tests in (ECHO, CALL)]
    right, bomb = ("print(input())", ECHO, LIMITS), (ATTACKS["fork bomb"], ECHO, LIMITS)
    with nothing_is_left(), ThreadPoolExecutor(10) as threads:
        found = threads.map(lambda each: score(*each), [*attacks, bomb, *[right] * 3])
        assert [*found] == [0] * 7 + [1] * 3


SPIES = {
    "a file in the home": "print(open('{secret}').read())",
    "its folder": "import os\nprint(os.listdir('{folder}'))",
    "the environment": "import os\nprint(os.environ['SECRET_OF_TEST'])",
    "the project": "import flashgrpo.grpo.rewards\nprint('found')",
    "the users": "print(open('/etc/passwd').read())",
    "the command line of the first process": "print(open('/proc/1/cmdline').read())",
    "the root of the first process": "import os\nprint(os.listdir('/proc/1/root'))",
    "other processes": "import os\nprint([p for p in os.listdir('/proc') if p.isdigit()])",
    "a process's memory": "print(open('/proc/{pid}/mem', 'rb'))",
    "signals to other processes": "import os\nos.kill({pid}, 0)\nprint('reached')",
    "the local network": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)\nprint('connected')",
    "a Unix socket": "import socket\nsocket.socket(socket.AF_UNIX)\nprint('made')",
    "names of hosts": "import socket\nprint(socket.gethostbyname('localhost'))",
    "being root": "import os\nos.setuid(0)\nprint(os.getuid())",
    "a new root": "import os\nos.chroot('/tmp')\nprint('changed')",
    "devices": "print(open('/dev/mem', 'rb').read(1), open('/dev/sda', 'rb').read(1))",
    "a file outside": "open('{folder}/left', 'w').write('x')\nprint('written')",
    "the root": "open('/left', 'w').write('x')\nprint('written')",
    "the interpreter": "import os\nopen(os.__file__, 'a').write('#')\nprint('written')",
    "another command": "import subprocess\nprint(subprocess.run(['/bin/sh', '-c', 'id'], capture_output=True).stdout)",
}
# What is reached without isolation, so that it can be tried there.
HARMLESS = ["a file in the home", "its folder", "the users", "the command line of the first process", "other processes"]
HARMLESS += ["signals to other processes", "the local network", "a Unix socket", "names of hosts", "a file outside"]


def test_a_program_reaches_nothing_outside(monkeypatch):
    monkeypatch.setenv("SECRET_OF_TEST", "42")
    with tempfile.TemporaryDirectory(dir=Path.home()) as folder, socket.create_server(("127.0.0.1", 0)) as listener:
        secret = Path(folder, "secret")
        secret.write_text("42")
        secret.chmod(0o644)
        Path(folder).chmod(0o777)
        values = {"secret": secret, "folder": folder, "port": listener.getsockname()[1], "pid": os.getpid()}
        attempts = {name: program.format(**values) for name, program in SPIES.items()}
        assert reached(attempts, LIMITS) == []
        assert os.listdir(folder) == ["secret"]
        harmless = {name: attempts[name] for name in HARMLESS}
        assert reached(harmless, UNPROTECTED) == HARMLESS
        assert Path(folder, "left").exists()


def executable(number: int, *arguments: int) -> bytes:
    """An x86-64 ELF file whose exit code is 0 where the system call succeeds: it needs no compiler and no ctypes."""
    base, code = 0x400000, b""
    for move, value in zip((b"\xbf", b"\xbe", b"\xba", b"\x41\xba"), arguments, strict=False):  # edi, esi, edx, r10d
        code += move + struct.pack("<I", value)
    code += b"\xb8" + struct.pack("<I", number) + b"\x0f\x05"  # mov eax, number; syscall
    code += b"\x48\xc1\xe8\x3f\x89\xc7\xb8\x3c\x00\x00\x00\x0f\x05"  # exit(rax >> 63)
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, 62, 1, base + 120, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    return header + struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, 120 + len(code), 120 + len(code), 4096) + code


CALLS = {
    "unshare a user namespace": (272, 0x10000000),
    "clone into a user namespace": (56, 0x10000011, 0),
    "ptrace": (101, 0),
    "keys of the user": (250, 0, 0xFFFFFFFC, 1),
    "shared memory of no process": (29, 0, 4096, 0o1600),
    "getpid": (39,),
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the machine code and the numbers are those of x86-64")
def test_system_calls_that_lead_out_are_denied():
    run = "import os, subprocess\nopen('x', 'wb').write({})\nos.chmod('x', 0o755)\n"
    run += "subprocess.run(['./x'], check=True)\nos.remove('x')"
    attempts = {name: run.format(executable(*call)) for name, call in CALLS.items()}
    assert reached(attempts, LIMITS) == ["getpid"]
    assert reached(attempts, UNPROTECTED) == [*CALLS]


def test_handles_and_memory_of_others_are_out_of_reach_for_every_user():
    program = (
        "import ctypes, os\ncall = ctypes.CDLL(None, use_errno=True).syscall\nme = os.getpid()\n"
        "for number in {}:\n    call(number, me, me, 1, 0, 0)\n    print(ctypes.get_errno(), end=' ')"
    )
    kcmp = {"x86_64": 312, "aarch64": 272}[platform.machine()]
    assert output(program.format([kcmp, 438])) == "1 1 "  # EPERM; 438 is pidfd_getfd


def test_a_program_sees_the_standard_library_and_writes_to_the_temporary_folder_alone():
    """Wherever Python is: below /usr, too, it must not see what the machine has installed."""
    library = Path(os.__file__).parent
    others = [f"{prefix}/{name}" for prefix in ("/usr", "/usr/local", sys.base_prefix) for name in ("", "bin", "share")]
    others += [library / "site-packages", *Path("/usr/lib").glob("python3*"), *Path("/usr/lib").glob("python3/*")]
    tried = [str(path) for path in (library, *others)]
    program = f"import os\nfor path in {tried}:\n    try:\n        os.listdir(path)\n        print(path)\n"
    program += "    except OSError:\n        pass\n"
    program += "for folder, _, _ in os.walk('/'):\n    try:\n        open(folder + '/x', 'w')\n"
    program += "        print(folder)\n    except OSError:\n        pass"
    assert output(program, ProgramsSection(time_s=60)) == f"{library}\n/tmp\n"


def test_a_test_finds_nothing_of_the_one_before():
    """Nor is a process left of a right program that stays behind."""
    program = (
        "import os, time\nos.makedirs('x/y')\nopen('x/y/z', 'x')\nos.symlink('/', 'link')\n"
        "os.chmod('x/y', 0)\nos.chmod('x', 0)\n"
        "if os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\nprint(input(), len(os.listdir()))"
    )
    with nothing_is_left(), sandbox.sandboxed(program, ProgramsSection(processes=3)) as runner:
        for i in range(20):
            assert runner.run(str(i), max_bytes=9) == f"{i} 2\n".encode()


def test_a_program_costs_little_beside_what_it_does():
    """In seconds of processor, which other work does not change: of a quiet one 0.02 a program and 0.007 a test."""
    tests = {"inputs": [*map(str, range(40))], "outputs": [str(i + 1) for i in range(40)]}
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert score("print(int(input()) + 1)", tests, ProgramsSection()) == 1
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime < 1.5


def test_a_program_that_waits_for_a_busy_processor_is_not_wrong(monkeypatch):
    """Ready to run, it has all the time that it needs, up to the cap, where it is missing; asleep, it is wrong."""
    state = psutil.STATUS_RUNNING
    fake = SimpleNamespace(
        children=lambda recursive: [],
        cpu_times=lambda: (0.1, 0.0, 0.0, 0.0, 0.0),
        memory_info=lambda: SimpleNamespace(rss=0),
        status=lambda: state,
        oneshot=contextlib.nullcontext,
    )
    monkeypatch.setattr(psutil, "Process", lambda pid: fake)
    limits = ProgramsSection(time_s=0.3)
    slow, endless = (f"import time\ntime.sleep({s})\nprint(input())" for s in (0.7, 60))
    assert score(slow, {"inputs": ["1"], "outputs": ["1"]}, limits) == 1
    state = psutil.STATUS_SLEEPING
    assert score(endless, limits=limits) == 0
    state = psutil.STATUS_RUNNING
    monkeypatch.setattr(sections, "_PROGRAM_WALL", 2)
    assert math.isnan(score(endless, limits=limits) or 0)


def test_resident_memory_of_all_its_processes_is_a_programs():
    program = "import os, time\nfor _ in range(3):\n    if os.fork() == 0:\n        break\nx = bytearray(50 << 20)\n"
    program += "for i in range(0, len(x), 4096):\n    x[i] = 1\ntime.sleep(0.5)"
    for memory_mb, wanted in ((150, 0), (600, 1)):
        limits = ProgramsSection(time_s=6, memory_mb=memory_mb)
        assert score(program, {"inputs": [""], "outputs": [""]}, limits) == wanted


def test_processor_time_of_all_its_processes_is_a_programs():
    with sandbox.sandboxed("import os\nos.fork(), os.fork()\nwhile True:\n    pass", LIMITS) as forks:
        assert forks.run("", max_bytes=9) is None
        assert LIMITS.time_s < forks.cpu_s < 8 * LIMITS.time_s


@pytest.mark.parametrize(("after_s", "limits"), [(0, LIMITS), (0.002, LIMITS), (0.3, LIMITS), (0.3, UNPROTECTED)])
def test_a_program_ends_with_the_worker_that_is_killed(after_s, limits):
    """While bubblewrap starts, too, of which a process may then be left that waits, but never the program."""
    before = children()
    if not (worker := os.fork()):
        asleep = sandbox.sandboxed("import time; time.sleep(60)", dataclasses.replace(limits, time_s=60))
        with contextlib.suppress(BaseException), asleep as program:
            program.run("", max_bytes=9)
        os._exit(0)
    wait_until(lambda: bool(psutil.Process(worker).children()))
    time.sleep(after_s)
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
    time.sleep(0.1)  # in which that process may become the harness, which ends, but not the program

    def has_ended() -> bool:
        left = children() - before
        return all(one.status() == psutil.STATUS_ZOMBIE or one.name() == "bwrap" for one in left)

    wait_until(has_ended)
    for one in children() - before:
        one.kill()
        one.wait()


FORGERIES = {
    "an object equal to all": "class All(int):\n    def __eq__(self, other):\n        return True\n"
    "def same(x):\n    return All(7)",
    "the expected values in a frame": (
        "import sys\ndef same(x):\n    frame = sys._getframe()\n    while frame:\n"
        "        for key in ('outputs', 'wanted', 'expected', 'tests'):\n"
        "            if key in frame.f_globals | frame.f_locals:\n"
        "                return (frame.f_globals | frame.f_locals)[key]\n        frame = frame.f_back\n    return 7"
    ),
    "results on standard output": "print('[1, 2]', flush=True)\ndef same(x):\n    return 7",
    "results and an early end": "import os\nos.write(1, b'[1, 2]')\nos._exit(0)\ndef same(x):\n    return 7",
    "garbage among the objects": (
        "import gc\ndef same(x):\n"
        "    return next((o[x - 1] for o in gc.get_objects() if isinstance(o, list) and 913 in o), 7)"
    ),
    "too long a result": "def same(x):\n    return 'x' * 10**8",
    "too deep a result": "def same(x):\n    for _ in range(10**4):\n        x = [x]\n    return x",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_verdict_cannot_be_forged(name):
    """What is expected never enters the sandbox; numbers are chosen that a program cannot guess."""
    guessed = {"inputs": [[1], [2]], "outputs": [913, 548], "fn_name": "same"}
    assert score(FORGERIES[name], guessed) == 0


def test_without_isolation_limits_and_the_process_group_still_hold():
    for name in ("waiting", "endless output", "one process's memory", "ignoring signals"):
        with nothing_is_left():
            assert score(ATTACKS[name], limits=UNPROTECTED) == 0


def test_isolation_that_cannot_be_had_is_refused_unless_the_recipe_says_so(tmp_path, monkeypatch):
    with pytest.raises(ValidationError):
        ProgramsSection(isolation="none")  # type: ignore
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(RewardError, match="a first program failed: bwrap: No permissions to create new namespace"):
        sandbox.check_isolation(LIMITS)
    assert math.isnan(score("print(input())") or 0)  # the program is not at fault
    monkeypatch.setenv("PATH", "")
    sandbox.check_isolation(UNPROTECTED)
    weights, examples = {"data": {"code": 1.0}}, {"data": Problem("Echo.", {"tests": ECHO})}
    with pytest.raises(RewardError, match=r"there is no bwrap; wanted bubblewrap .*isolation = \"none: run"):
        RewardPool(weights, examples, max_new_tokens=8, num_workers=1, programs=LIMITS)


def test_each_program_of_a_group_gets_its_own_score():
    problem = Problem("Echo.", {"tests": {"inputs": ["1"], "outputs": ["1"]}})
    texts = [f"```python\nprint({i % 2})\n```" for i in range(4)]
    group = CompletionGroup(problem, "Echo.", texts, [[0]] * 4, ["stop"] * 4)
    weights, examples = {"data": {"code": 1.0}}, {"data": problem}
    with RewardPool(weights, examples, max_new_tokens=8, num_workers=1, programs=LIMITS) as pool:
        assert pool.score([group], "code").tolist() == [[0.0, 1.0] * 2]
