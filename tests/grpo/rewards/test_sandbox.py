"""The reward `code`: right programs score 1, wrong ones 0, and every attack scores 0 and leaves nothing behind."""

import contextlib
import ctypes
import json
import math
import os
import platform
import resource
import socket
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from flashgrpo.grpo.errors import RecipeError, RewardError
from flashgrpo.grpo.recipe import schema as sections
from flashgrpo.grpo.recipe.load import Recipe, build_recipe
from flashgrpo.grpo.recipe.schema import ProgramsSection
from flashgrpo.grpo.rewards import language, sandbox
from flashgrpo.grpo.rewards import programs as code_reward
from flashgrpo.grpo.rewards.pool import RewardPool
from flashgrpo.grpo.rewards.programs import extract_program, parse_tests, score_programs
from flashgrpo.grpo.rewards.rules import code
from flashgrpo.grpo.types import CompletionGroup, Problem

LIMITS = ProgramsSection(time_s=1.0, memory_mb=128)
UNPROTECTED = ProgramsSection(time_s=1.0, isolation="none: run programs unprotected")
ECHO = {"inputs": ["1\n", "2\n"], "outputs": ["1\n", "2\n"]}
CALL = {"inputs": [[1], [2]], "outputs": [1, 2], "fn_name": "same"}
pytestmark = pytest.mark.timeout(120)


def score(program: str, tests=ECHO, limits: ProgramsSection = LIMITS) -> float | None:
    (found,) = score_programs([""], [f"<think>so</think>\n```python\n{program}\n```"], [tests], limits)
    return found


def processes_with(mark: str) -> list[psutil.Process]:
    """Those that have `mark` in their command line, this one left out."""
    found = []
    for process in psutil.process_iter():
        try:
            if mark in " ".join(process.cmdline()) and process.pid != os.getpid():
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize(
    ("program", "tests", "wanted"),
    [
        ("print(input())", ECHO, 1),
        ("print(input(), end='  \\n\\n')", ECHO, 1),
        ("import bisect, collections, heapq, math, subprocess, threading, zoneinfo\nprint(input())", ECHO, 1),
        ("import os\nos.wait() if os.fork() else os._exit(0)\nprint(input())", ECHO, 1),
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
        ("def same(x):\n    return 1", CALL, 0),
        ("def same(x):\n    return float('nan')", CALL, 0),
        ("def other(x):\n    return x", CALL, 0),
        ("def same(x):\n    return {'a': [x]}", {"inputs": [[1]], "outputs": [{"a": [1]}], "fn_name": "same"}, 1),
        ("def same(a, b):\n    return a + b", {"inputs": ["1\n[2]"], "outputs": ["3"], "fn_name": "same"}, 0),
        ("def same(a, b):\n    return a + sum(b)", {"inputs": ["1\n[2]"], "outputs": ["3"], "fn_name": "same"}, 1),
    ],
)
def test_programs_are_scored_by_their_tests(program, tests, wanted):
    assert score(program, tests) == wanted


ADD = {"input": "1\n2", "output": "3", "testtype": "functional"}
NAMED = {"func_name": "add"}


@pytest.mark.parametrize(
    ("tests", "metadata"),
    [
        ([ADD], json.dumps(NAMED)),
        (json.dumps([ADD]), NAMED),
        ([{**ADD, "metadata": NAMED}], "from a contest"),
        ([{**ADD, "metadata": json.dumps(NAMED)}], None),
        ({"inputs": ["1\n2"], "outputs": ["3"], "func_name": "add"}, {}),
    ],
)
def test_functions_of_livecodebench_are_called_by_the_name_in_their_metadata(tests, metadata):
    program = "```python\nclass Solution:\n    def add(self, a, b):\n        return a + b\n```"
    wrong = program.replace("a + b", "a - b")
    assert code([""] * 2, [program, wrong], [tests] * 2, LIMITS, metadata=[metadata] * 2) == [1.0, 0.0]


def test_functional_tests_without_a_name_are_refused_and_text_tests_need_none():
    with pytest.raises(ValueError, match="testtype is functional, and no fn_name or metadata with a func_name"):
        parse_tests([ADD], {"difficulty": "easy"})
    stdin = parse_tests([{**ADD, "testtype": "stdin"}], NAMED)
    assert stdin is not None
    assert (stdin.function, stdin.inputs) == ("", ["1\n2"])


def test_the_program_of_a_completion_is_its_last_block_after_the_reasoning():
    block = "```python\nprint({})\n```"
    blocks = [block.format(i) for i in (1, 2, 3)]
    assert extract_program("<think>{}\n</think>\n{}\nor\n{}".format(*blocks)) == "print(3)\n"
    assert extract_program(f"<think>{block.format(1)}") is None
    assert extract_program(block.format(1), prompt="<think>\n") is None
    assert extract_program("```cpp\nint x;\n```\n```python\nprint(1)\n```\n```\n1\n```") == "print(1)\n"
    assert extract_program("print(1)") is None


@pytest.mark.parametrize(
    ("found", "wanted", "is_right"),
    [
        ("5.0", "5", True),
        ("5.0000001", "5", False),
        ("1000000001.0", "1000000000", False),
        ("1e18", "1000000000000000001", False),
        ("1e18", "1000000000000000000", True),
        ("9" * 5000, "9" * 4999 + "8", False),
        ("sNaN", "5", False),
        ("1e999999999", "5", False),
        ("101", "0101", False),
        ("1_000", "1000", False),
        ("0.3333333333", "0.33333333", True),
        (10**17 + 1.0, 10**17, True),
        (12345678.9, 12345678, False),
        ([1e23], [10**23], False),
        (0.30000000000000004, 0.3, True),
        (10**400, 0.5, False),
    ],
)
def test_an_integer_is_expected_exactly_and_a_fraction_nearly(found, wanted, is_right):
    if isinstance(wanted, str):
        assert code_reward._same_text(found.encode(), wanted) == is_right
    else:
        assert code_reward._same_results(json.dumps([found]).encode(), [wanted]) == is_right


def test_a_completion_that_never_closes_what_it_opens_costs_no_more_than_others():
    """Quadratic in its length each of these would take minutes."""
    start = time.process_time()
    for text in ("```" + "a" * 300_000, "```" + " " * 300_000, "```\n" * 100_001, "\n" * 300_000):
        extract_program(f"</think>\n{text}")
    for text in (r"\(", r"\[", r"\(\[", "```", "$$", "$", "<a", "`", "'a"):
        language._BETWEEN_WORDS.sub(" ", text * 100_001)
    assert time.process_time() - start < 10


def test_rows_without_tests_are_missing_and_faulty_tests_say_what_is_wanted():
    assert code(["", ""], ["```python\nprint(1)\n```"] * 2, tests=[None, json.dumps(ECHO)]) == [None, 0.0]
    for faulty in ({"inputs": ["1"], "outputs": []}, [{"in": 1}], {"inputs": ["1"]}):
        with pytest.raises(ValueError, match=r"tests: .* wanted .*all of one length"):
            parse_tests(faulty)


ATTACKS = {
    "fork bomb": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
    "threads": "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(9,)).start()",
    "one process's memory": "x = []\nwhile True:\n    x.append(bytearray(1 << 24))",
    "many processes' memory": (
        "import os, time\nfor _ in range(12):\n    if os.fork() == 0:\n        break\nx = bytearray(100 << 20)\n"
        "for i in range(0, len(x), 4096):\n    x[i] = 1\ntime.sleep(1)\nprint(input())"
    ),
    "memory of no process": (
        "import os\nfor _ in range(40):\n    f = os.memfd_create('x')\n    for _ in range(15):\n"
        "        os.write(f, bytes(1 << 20))\nprint(input())"
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
    "filling the folder": "while True:\n    open('/tmp/x', 'ab').write(bytes(1 << 20))",
    "binary garbage": "import sys\nsys.stdout.buffer.write(bytes(range(256)) * 9)\ndef same(x):\n    return b'\\xff'",
    "killing the parent": "import os\nos.kill(os.getppid(), 9)\nos.kill(-1, 9)\nos.kill(1, 9)",
    "a verdict of its own": "print('{\"score\": 1}\\npassed\\n1.0')\nimport os\nos._exit(0)",
    "double fork": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        os.closerange(0, 64)\n"
        "        while True:\n            time.sleep(0.1)\n    os._exit(0)\ntime.sleep(60)"
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("tests", [ECHO, CALL], ids=["text", "function"])
def test_an_attack_scores_0_and_leaves_no_process(name, tests, tmp_path, monkeypatch):
    """In the longest time that a busy machine grants, with nothing left among processes and temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mark = uuid.uuid4().hex
    start = time.monotonic()
    assert score(f"def same(x):\n    return x\nmark = '{mark}'\n{ATTACKS[name]}", tests) == 0
    assert time.monotonic() - start < LIMITS.longest_s + 3
    assert processes_with(mark) == []
    assert [*tmp_path.iterdir()] == []


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


HARMLESS = ["a file in the home", "its folder", "the users", "the command line of the first process", "other processes"]
HARMLESS += ["signals to other processes", "the local network", "a Unix socket", "names of hosts", "a file outside"]


@pytest.mark.parametrize("name", SPIES)
def test_a_program_reaches_nothing_outside(name, monkeypatch):
    """It ends with an error where it tries; so its output, whatever it had been, is not even looked at."""
    monkeypatch.setenv("SECRET_OF_TEST", "42")
    with tempfile.TemporaryDirectory(dir=Path.home()) as folder, socket.create_server(("127.0.0.1", 0)) as listener:
        secret = Path(folder, "secret")
        secret.write_text("42")
        secret.chmod(0o644)
        Path(folder).chmod(0o777)
        values = {"secret": secret, "folder": folder, "port": listener.getsockname()[1], "pid": os.getpid()}
        program = SPIES[name].format(**values)
        assert sandbox.run_program(program, "", LIMITS, max_bytes=10_000) is None
        assert os.listdir(folder) == ["secret"]
    ours = subprocess.run([sys.executable, "-c", "print(1)"], capture_output=True, text=True)
    assert ours.stdout == "1\n"


def executable(number: int, *arguments: int) -> bytes:
    """An x86-64 ELF file whose exit code is 0 where the system call succeeds: it needs no compiler and no ctypes."""
    base, code = 0x400000, b""
    for move, value in zip((b"\xbf", b"\xbe", b"\xba", b"\x41\xba"), arguments, strict=False):  # edi, esi, edx, r10d
        code += move + struct.pack("<I", value)
    code += b"\xb8" + struct.pack("<I", number) + b"\x0f\x05"  # mov eax, number; syscall
    code += b"\x48\xc1\xe8\x3f\x89\xc7\xb8\x3c\x00\x00\x00\x0f\x05"  # exit(rax >> 63)
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, 62, 1, base + 120, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    return header + struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, 120 + len(code), 120 + len(code), 4096) + code


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the machine code and the numbers are those of x86-64")
@pytest.mark.parametrize(
    "call",
    [
        pytest.param((272, 0x10000000), id="unshare a user namespace"),
        pytest.param((56, 0x10000011, 0), id="clone into a user namespace"),
        pytest.param((101, 0), id="ptrace"),
        pytest.param((250, 0, 0xFFFFFFFC, 1), id="keys of the user"),
        pytest.param((29, 0, 4096, 0o1600), id="shared memory of no process"),
    ],
)
def test_system_calls_that_lead_out_are_denied(call):
    program = (
        "import os, subprocess\nopen('x', 'wb').write({})\nos.chmod('x', 0o755)\nsubprocess.run(['./x'], check=True)"
    )
    denied = program.format(executable(*call))
    assert sandbox.run_program(denied, "", LIMITS, max_bytes=9) is None
    assert sandbox.run_program(denied, "", UNPROTECTED, max_bytes=9) == b""
    assert sandbox.run_program(program.format(executable(39)), "", LIMITS, max_bytes=9) == b""  # getpid


def test_handles_and_memory_of_others_are_out_of_reach_for_every_user():
    program = (
        "import ctypes, os\ncall = ctypes.CDLL(None, use_errno=True).syscall\nme = os.getpid()\n"
        "for number in {}:\n    call(number, me, me, 1, 0, 0)\n    print(ctypes.get_errno(), end=' ')"
    )
    column = sandbox._MACHINES[platform.machine()][0]
    numbers = [sandbox._DENIED[name][column] for name in ("kcmp", "pidfd_getfd")]
    assert sandbox.run_program(program.format(numbers), "", LIMITS, max_bytes=99) == b"1 1 "  # EPERM


def test_a_program_sees_the_standard_library_and_no_other_packages_or_commands():
    """Wherever Python is: below /usr, too, it must not see what the machine has installed."""
    library = Path(os.__file__).parent
    others = [f"{prefix}/{name}" for prefix in ("/usr", "/usr/local", sys.base_prefix) for name in ("", "bin", "share")]
    others += [library / "site-packages", *Path("/usr/lib").glob("python3*"), *Path("/usr/lib").glob("python3/*")]
    tried = [str(path) for path in (library, *others)]
    program = f"import os\nfor path in {tried}:\n    try:\n        os.listdir(path)\n        print(path)\n"
    program += "    except OSError:\n        pass"
    assert sandbox.run_program(program, "", LIMITS, max_bytes=9999) == f"{library}\n".encode()


def test_a_test_finds_nothing_of_the_one_before():
    program = (
        "import os, time\nos.makedirs('x/y')\nopen('x/y/z', 'x')\nos.symlink('/', 'link')\n"
        "os.chmod('x/y', 0)\nos.chmod('x', 0)\n"
        "if os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\nprint(input(), len(os.listdir()))"
    )
    with sandbox.Program(program, ProgramsSection(processes=3)) as twenty:
        for i in range(20):
            assert twenty.run(str(i), max_bytes=9) == f"{i} 2\n".encode()


def test_a_right_program_passes_150_tests_within_the_default_limits():
    tests = {"inputs": [*map(str, range(150))], "outputs": [str(i + 1) for i in range(150)]}
    assert score("print(int(input()) + 1)", tests, ProgramsSection()) == 1


def test_a_program_that_waits_for_a_busy_processor_is_not_wrong(monkeypatch):
    """Ready to run, it has all the time that it needs, up to the cap, where it is missing; asleep, it is wrong."""
    times, memory = (0.1, 0.0, 0.0, 0.0, 0.0), SimpleNamespace(rss=0)
    states = {"status": psutil.STATUS_RUNNING}
    fake = SimpleNamespace(
        cpu_times=lambda: times,
        memory_info=lambda: memory,
        status=lambda: states["status"],
        oneshot=contextlib.nullcontext,
    )
    monkeypatch.setattr(sandbox, "_family", lambda pid: [fake])
    limits = ProgramsSection(time_s=0.4)
    slow = "import time\ntime.sleep(1)\nprint(input())"
    assert score(slow, {"inputs": ["1"], "outputs": ["1"]}, limits) == 1
    monkeypatch.setattr(sections, "_PROGRAM_WALL", 2)
    assert math.isnan(score(slow, limits=limits) or 0)
    states["status"] = psutil.STATUS_SLEEPING
    assert score(slow, limits=limits) == 0


def test_processor_time_of_all_its_processes_is_a_programs():
    program = "import os\nos.fork(), os.fork()\nwhile True:\n    pass"
    limits = ProgramsSection(time_s=1.0)
    with sandbox.Program(program, limits) as forks:
        assert forks.run("", max_bytes=9) is None
        assert limits.time_s < forks._cpu_s < 4 * limits.time_s


def test_no_zombie_is_left_where_nobody_reaps_them():
    """As in a container whose first process is the trainer: here orphans come to this process."""
    prctl, subreaper = ctypes.CDLL(None).prctl, 36
    assert prctl(subreaper, 1, 0, 0, 0) == 0
    try:
        for program in ("print(input())", "import os\nos.fork()", "raise SystemExit(1)", ATTACKS["killing the parent"]):
            score(program)
        assert [one for one in psutil.Process().children() if one.status() == psutil.STATUS_ZOMBIE] == []
    finally:
        prctl(subreaper, 0, 0, 0, 0)


def test_only_the_temporary_folder_can_be_written():
    program = "import os\nfor folder, _, _ in os.walk('/'):\n    try:\n        open(folder + '/x', 'w')\n"
    program += "        print(folder)\n    except OSError:\n        pass"
    assert sandbox.run_program(program, "", ProgramsSection(time_s=60), max_bytes=1000) == b"/tmp\n"


def test_a_process_that_stays_behind_ends_with_a_right_program():
    mark = uuid.uuid4().hex
    stay = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(60)\n"
    assert score(f"{stay}    os._exit(0)\nprint(input())\nmark = '{mark}'") == 1
    assert processes_with(mark) == []


@pytest.mark.parametrize(("after_s", "limits"), [(0, LIMITS), (0.002, LIMITS), (0.5, LIMITS), (0.5, UNPROTECTED)])
def test_a_program_ends_with_the_worker_that_is_killed(after_s, limits):
    """While bubblewrap starts, too, of which a process may then be left that waits, but never the program."""
    mark = uuid.uuid4().hex
    script = (
        "from flashgrpo.grpo.rewards.sandbox import run_program\n"
        "from flashgrpo.grpo.recipe.schema import ProgramsSection\n"
        f"run_program(input(), '', ProgramsSection(time_s=60, isolation={limits.isolation!r}), max_bytes=9)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, text=True) as worker:
        assert worker.stdin is not None
        print(f"import time; time.sleep(60)  # {mark}", file=worker.stdin, flush=True)
        wait_until(lambda: processes_with(mark))
        time.sleep(after_s)
        worker.kill()
    time.sleep(0.1)  # in which that process may become the harness, which ends, but not the program
    wait_until(lambda: all(process.name() == "bwrap" for process in processes_with(mark)))
    for process in processes_with(mark):
        process.kill()


def wait_until(is_true, limit_s: float = 20.0) -> None:
    end = time.monotonic() + limit_s
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.001)


FORGERIES = {
    "an object equal to all": "class All(int):\n    def __eq__(self, other):\n        return True\n"
    "def same(x):\n    return All(7)",
    "json that lies": "import json\njson.dumps = lambda *_: '[1, 2]'\ndef same(x):\n    return 7",
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


def test_without_isolation_the_same_attacks_leave_traces(tmp_path):
    """That the tests above can fail; and what still holds: deadline, process group, output."""
    assert score("print(input())", limits=UNPROTECTED) == 1
    left = tmp_path / "left"
    assert score(f"open('{left}', 'w').write('x')\nprint(input())", limits=UNPROTECTED) == 1
    assert left.read_text() == "x"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        values = {"secret": left, "folder": tmp_path, "port": listener.getsockname()[1], "pid": os.getpid()}
        for name in HARMLESS:
            program = SPIES[name].format(**values)
            assert sandbox.run_program(program, "", UNPROTECTED, max_bytes=10**6) is not None, name
    for name in ("waiting", "endless output", "one process's memory", "ignoring signals"):
        mark = uuid.uuid4().hex
        assert score(f"mark = '{mark}'\n{ATTACKS[name]}", limits=UNPROTECTED) == 0
        assert processes_with(mark) == []


def test_isolation_that_cannot_be_had_is_refused_unless_the_recipe_says_so(monkeypatch):
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    with pytest.raises(RewardError, match=r"there is no bwrap; wanted bubblewrap .*isolation = \"none: run"):
        sandbox.check_isolation(LIMITS)
    sandbox.check_isolation(UNPROTECTED)
    weights, examples = {"data": {"code": 1.0}}, {"data": Problem("Echo.", {"tests": ECHO})}
    with pytest.raises(RewardError, match="there is no bwrap"):
        RewardPool(weights, examples, max_new_tokens=8, num_workers=1, programs=LIMITS)


def test_a_bwrap_that_fails_is_told_with_its_own_words(tmp_path, monkeypatch):
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(RewardError, match="a first program failed: bwrap: No permissions to create new namespace"):
        sandbox.check_isolation(LIMITS)
    assert math.isnan(score("print(input())") or 0)  # the program is not at fault


def test_limits_are_checked_with_the_recipe(recipe_values):
    recipe_values["rewards"] = {"functions": ["code"], "programs": {"time_s": 3}}
    assert build_recipe(Recipe, recipe_values, overrides=["--rewards.programs.memory_mb=64"]).rewards.programs == (
        ProgramsSection(time_s=3.0, memory_mb=64)
    )
    for key, value in {"time": 1, "processes": 0, "isolation": "none"}.items():
        recipe_values["rewards"]["programs"] = {key: value}
        with pytest.raises(RecipeError, match=rf"rewards.programs.{key}: "):
            build_recipe(Recipe, recipe_values)


def test_each_program_of_a_group_gets_its_own_score():
    problem = Problem("Echo.", {"tests": {"inputs": ["1"], "outputs": ["1"]}})
    texts = [f"```python\nprint({i % 2})\n```" for i in range(8)]
    group = CompletionGroup(problem, "Echo.", texts, [[0]] * 8, ["stop"] * 8)
    with RewardPool({"data": {"code": 1.0}}, {"data": problem}, max_new_tokens=8, programs=LIMITS) as pool:
        assert pool.score([group] * 2, "code").tolist() == [[0.0, 1.0] * 4] * 2


def test_a_program_costs_little_beside_what_it_does():
    """In seconds of processor, which other work on the machine does not change; 0.02 of a quiet one's."""
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    for _ in range(5):
        assert score("print(input())") == 1
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime) / 5 < 0.2


def test_attacks_beside_right_programs_do_not_change_their_scores():
    mark = uuid.uuid4().hex
    programs = ["print(input())", f"mark = '{mark}'\n{ATTACKS['fork bomb']}"] * 4
    with ThreadPoolExecutor(4) as threads:
        assert [*threads.map(score, programs)] == [1, 0] * 4
    assert processes_with(mark) == []
