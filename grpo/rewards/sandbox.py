"""A Python program in a sandbox: what it writes to standard output within its limits, or nothing.

bubblewrap gives the program namespaces of its own (processes, network, IPC, users or a user id that
nobody has), a read-only root with the standard library and the library folders of Python and the
system, a temporary folder in memory and no environment. The system calls by which it could reach
other processes or memory that no limit counts are denied.

The first process of the namespace is the harness, a Python that has started and waits: it forks a
child for each test, which becomes the program, and ends whatever that leaves. It ends with the
caller, and the kernel all others with it.

Not covered: faults of the kernel, side channels such as time, and the CPU: there are no control
groups.
"""

import contextlib
import dataclasses
import json
import math
import os
import platform
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

import psutil

from flashgrpo.grpo.errors import RewardError

if TYPE_CHECKING:
    from flashgrpo.grpo.recipe.schema import ProgramsSection

_TICK_S = 0.1  # between two looks at the time, memory and output of a program
_TEST_S = 0.05  # what each test has of its own, for imports
_BARE_END_S = 2.0  # in which the harness, without a namespace, ends and reaps its test
_OPEN_FILES = 64
_FILES_MB = 16  # of a program's temporary folder, which is in memory
# systemd's user ids, of users who exist only as long as a service runs.
_TRANSIENT_UIDS = range(61_184, 65_520)
_PYTHON = Path(sys.base_prefix, "bin", f"python{sys.version_info[0]}.{sys.version_info[1]}")
_LIBRARY = Path(os.__file__).parent  # the standard one
_LIBRARY_FOLDERS = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", f"{sys.base_prefix}/lib", f"{sys.base_prefix}/lib64"]

# Runs inside: sets the limits and says that it is there; then, for each byte that the caller sends,
# a child gives up root and becomes the program, or calls a function of it for each of the argument
# lists on standard input and writes the results as one JSON list. Input and output are files that
# the caller shares and rewrites between two tests. exit and quit are what -S leaves out. After the
# first test come the imports that programs begin with: a fork has them for nothing.
_HARNESS = """
def _await(test, control):
    import os, select, signal
    ended = os.pidfd_open(test)
    while True:
        if control in select.select([control, ended], [], [], 0.1)[0]:  # at its end: the caller is dead, or done
            os.kill(test, signal.SIGKILL)
            os.waitpid(test, 0)
            os.killpg(0, signal.SIGKILL)
            os._exit(1)
        while (one := os.waitpid(-1, os.WNOHANG))[0]:  # what the program orphans is the first process's to reap
            if one[0] == test:
                os.close(ended)
                return one[1]
def _end_others():
    import os, signal
    if os.getpid() == 1:  # of its namespace, in which -1 are all others
        try:
            os.kill(-1, signal.SIGKILL)
            while os.wait():
                pass
        except (ProcessLookupError, ChildProcessError):  # there is none, or none any longer
            pass
def _load(source):
    import builtins, os, sys
    for left in os.scandir():  # in the temporary folder, by the test before
        if left.is_dir(follow_symlinks=False):
            import shutil
            os.chmod(left, 0o700)  # and all below, from the top: it may have hidden them from itself
            for folder, names, _ in os.walk(left):
                for name in names:
                    if not os.path.islink(below := os.path.join(folder, name)):
                        os.chmod(below, 0o700)
            shutil.rmtree(left, ignore_errors=True)
        else:
            os.unlink(left)
    builtins.exit = builtins.quit = sys.exit
    sys.argv[:] = ["program.py"]
    return compile(source, "program.py", "exec")
def _serve():
    import os, resource, sys
    source, control, uid, *limits = sys.argv[1:]
    control, uid = int(control), int(uid)
    for name, _, value in (limit.partition("=") for limit in limits):
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (int(value), int(value)))
    os.write(control, b"r")
    while os.read(control, 1):
        test = os.fork()
        if not test:
            os.close(control)
            if uid:
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
            return _load(source)
        status = _await(test, control)
        _end_others()
        os.write(control, b"x" if status else b"0")
        import bisect, collections, copy, functools, heapq, itertools, json, math, operator, random, re, string, typing
    os._exit(0)
"""
_RUN = "exec(_serve())"
# A solution is written as if its site's usual imports were there.
_CALL = """
import bisect, collections, functools, heapq, itertools, json, math, os, random, re, string, sys
from bisect import *; from collections import *; from functools import *; from heapq import *; from itertools import *
from math import ceil, floor, gcd, inf, log, log2, sqrt; from typing import *
def _main(dumps=json.dumps):
    program, cases, results = _serve(), json.load(sys.stdin), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    exec(program, globals())
    owner = globals().get("Solution")
    if hasattr(owner, _NAME):
        values = [getattr(owner(), _NAME)(*case) for case in cases]
    else:
        values = [globals()[_NAME](*case) for case in cases]
    results.write(dumps(values))
    results.close()
_main()
"""

# System calls by (x86_64, aarch64) number. Those that make memory which belongs to no process; user
# namespaces; keys, processes and devices of others, among them the sockets of a virtual machine's
# host, which no namespace holds.
_DENIED = {
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186),
    "mq_open": (240, 180), "semget": (64, 190), "io_uring_setup": (425, 425), "unshare": (272, 97), "setns": (308, 268),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "socket": (41, 198), "pidfd_getfd": (438, 438),
    "kcmp": (312, 272), "process_madvise": (440, 440), "fanotify_init": (300, 262),
}  # fmt: skip
# The column of _DENIED, the audit architecture, the number of clone.
_MACHINES = {"x86_64": (0, 0xC000003E, 56), "aarch64": (1, 0xC00000B7, 220)}
_CLONE3, _CLONE_NEWUSER, _X32 = 435, 0x10000000, 0x40000000
_ALLOW, _KILL, _NOT_PERMITTED, _NOT_THERE = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026


class NoVerdict(RuntimeError):
    """A program that could not be judged: its sandbox did not start, or others kept it from the processor."""


def check_isolation(limits: "ProgramsSection") -> None:
    """Runs a program as the reward would. Raises RewardError, which says what is missing, where that fails."""
    found = _missing(limits)
    if found:
        raise RewardError(
            f"reward 'code' cannot isolate programs: {found}; wanted bubblewrap (make sandbox, or apt-get install "
            "bubblewrap), run as root or with user namespaces allowed, and enough rewards.programs.memory_mb; or set "
            'rewards.programs.isolation = "none: run programs unprotected"'
        )


def _missing(limits: "ProgramsSection") -> str | None:
    if limits.isolation == "bubblewrap" and not shutil.which("bwrap"):
        return "there is no bwrap"
    if limits.isolation == "bubblewrap" and platform.machine() not in _MACHINES:
        return f"found a processor {platform.machine()}, wanted {' or '.join(_MACHINES)}"
    # A first start may have to read the disk.
    patient = dataclasses.replace(limits, time_s=max(limits.time_s, 30.0))
    with tempfile.TemporaryFile() as errors:
        with contextlib.suppress(NoVerdict):
            if run_program("import zoneinfo; print(6 * 7)", "", patient, max_bytes=3, errors=errors) == b"42\n":
                return None
        errors.seek(0)
        lines = errors.read().decode(errors="replace").split("\n")
    return "a first program failed: " + (" ".join(filter(None, lines[-3:])) or "no message")


def run_program(
    source: str,
    stdin: str,
    limits: "ProgramsSection",
    *,
    max_bytes: int,
    function: str = "",
    errors: IO[bytes] | int = subprocess.DEVNULL,
) -> bytes | None:
    """Output of a program that is run once; see `Program`."""
    with Program(source, limits, function, errors) as program:
        return program.run(stdin, max_bytes=max_bytes)


class Program:
    """A program in a sandbox of its own, run once a test. Use as a context manager.

    All tests share its limits. With `function`, standard input holds a JSON list of argument lists,
    and the output is the JSON list of results. `errors` takes standard error. When it is closed no
    process of the program is left. Without isolation those may live until then that a test leaves
    in the program's process group, and for ever those that leave the group.
    """

    def __init__(
        self,
        source: str,
        limits: "ProgramsSection",
        function: str = "",
        errors: IO[bytes] | int = subprocess.DEVNULL,
    ):
        self._code = source.encode(errors="replace")
        self._limits, self._function, self._errors = limits, function, errors
        # Else it could not be an argument of a command.
        self._is_program = b"\0" not in self._code and len(self._code) <= 100_000
        self._stack = contextlib.ExitStack()
        self._cpu_s = self._asleep_s = 0.0
        self._allowed_s = limits.time_s

    def __enter__(self) -> Self:
        if self._is_program:
            try:
                self._start()
            except BaseException:
                self._stack.close()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, stdin: str, *, max_bytes: int) -> bytes | None:
        """Output, or None where the program fails, breaks a limit or writes more than `max_bytes`.

        Raises NoVerdict for one that got too little of the processor to break the limit in
        `limits.longest_s`.
        """
        if not self._is_program:
            return None
        _rewrite(self._given, stdin.encode(errors="replace"))
        _rewrite(self._written, b"")
        self._allowed_s += _TEST_S
        self._looked = time.monotonic()
        try:
            self._control.send(b"t")
            succeeded = self._await(max_bytes)
        except ConnectionError:  # what it ran in has ended
            succeeded = False
        if not succeeded:
            return None
        self._written.seek(0)
        output = self._written.read(max_bytes + 1)
        return output if len(output) <= max_bytes else None

    def _start(self) -> None:
        enter = self._stack.enter_context
        self._given = enter(tempfile.TemporaryFile(buffering=0))  # noqa: SIM115  # the stack closes it
        self._written = enter(tempfile.TemporaryFile(buffering=0))  # noqa: SIM115
        self._control, theirs = map(enter, socket.socketpair())
        self._end = time.monotonic() + self._limits.longest_s
        self._next_look = time.monotonic() + _TICK_S
        streams: dict[str, Any] = {"stdin": self._given, "stdout": self._written, "stderr": self._errors, "env": {}}
        is_bare, own = self._limits.isolation != "bubblewrap", theirs.fileno()
        python = _python(self._code, self._function, self._limits, is_bare, own)
        first = None
        with theirs:  # closed here, so that the socket ends with the harness
            if is_bare:
                folder = enter(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
                self._process: Any = subprocess.Popen(
                    python, cwd=folder, start_new_session=True, pass_fds=[own], **streams
                )
            else:
                self._process, first = _start_isolated(python, self._limits, own, **streams)
            self._stack.callback(_end, self._process, first, self._control)
        self._control.settimeout(self._limits.longest_s)
        try:
            is_there = self._control.recv(1)
        except TimeoutError:
            is_there = b""
        if not is_there:  # no program has run yet, so that none is at fault
            raise NoVerdict("the sandbox of a program did not start")

    def _await(self, max_bytes: int) -> bool:
        """Whether the program ends well within its limits."""
        # The harness writes a byte when the test has ended; until then this thread sleeps from look to look.
        while not select.select([self._control], [], [], max(0.0, self._next_look - time.monotonic()))[0]:
            if os.fstat(self._written.fileno()).st_size > max_bytes or not self._is_within_limits():
                return False
            self._next_look = time.monotonic() + _TICK_S
        return self._control.recv(1) == b"0"

    def _is_within_limits(self) -> bool:
        """By the time and the resident memory of all processes of the program.

        Time that passes while one of them is ready to run, and others have the processor, is not
        the program's; that in which all of them sleep is.
        """
        cpu_s, resident, is_ready = 0.0, 0, False
        for one in _family(self._process.pid):
            with contextlib.suppress(psutil.NoSuchProcess), one.oneshot():
                cpu_s += sum(one.cpu_times()[:4])  # with that of the children it has waited for
                resident += one.memory_info().rss
                is_ready |= one.status() in (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)
        now = time.monotonic()
        if not is_ready and cpu_s <= self._cpu_s:
            self._asleep_s += now - self._looked
        self._cpu_s, self._looked = max(cpu_s, self._cpu_s), now
        if self._cpu_s + self._asleep_s > self._allowed_s or resident > self._limits.memory_mb << 20:
            return False
        if now > self._end:
            raise NoVerdict(f"a program got {self._cpu_s:.1f} s of the processor in {self._limits.longest_s:g} s")
        return True


def _rewrite(file: IO[bytes], content: bytes) -> None:
    """The file's position is the program's, too."""
    file.seek(0)
    file.truncate()
    file.write(content)
    file.seek(0)


def _family(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]
    return []


def _python(code: bytes, function: str, limits: "ProgramsSection", bare: bool, control: int) -> list[Any]:
    """The command of the harness."""
    uid = 0 if bare or os.geteuid() else _TRANSIENT_UIDS[os.getpid() % len(_TRANSIENT_UIDS)]
    seconds, memory, files = math.ceil(limits.time_s) + 1, limits.memory_mb << 20, _FILES_MB << 20
    values = f"{control} {uid} CORE=0 CPU={seconds} AS={memory} FSIZE={files} NOFILE={_OPEN_FILES}"
    if not bare:  # outside of a namespace it would count all processes of the user
        values += f" NPROC={limits.processes}"
    harness = _HARNESS + (f"_NAME = {function!r}\n{_CALL}" if function else _RUN)
    return [_PYTHON, "-ISX", "utf8", "-c", harness, code, *values.split()]


def _start_isolated(
    python: list[Any], limits: "ProgramsSection", control: int, **streams: Any
) -> tuple[Any, int | None]:
    """bubblewrap's process, and a descriptor of the harness, or None where that has ended already."""
    (rules, rules_end), (info, info_end) = os.pipe(), os.pipe()
    with open(rules, "rb"), open(info, "rb") as about:
        with open(info_end, "wb"):
            with open(rules_end, "wb") as pipe:
                # The filter fits the pipe, so that nobody has to read meanwhile.
                pipe.write(_system_call_filter())
            command = [*_bubblewrap(limits), "--seccomp", str(rules), "--info-fd", str(info_end), *python]
            process = subprocess.Popen(command, pass_fds=[rules, info_end, control], **streams)
        answer = about.read()  # which ends when the namespace is there, or bubblewrap has failed
    with contextlib.suppress(ProcessLookupError):  # gone already, and all others with it
        return process, os.pidfd_open(json.loads(answer)["child-pid"]) if answer else None
    return process, None


def _bubblewrap(limits: "ProgramsSection") -> list[str]:
    """The command, up to the filter of system calls and the harness.

    Only root counts processes of another user id by RLIMIT_NPROC, others those of a user namespace.
    The harness is the namespace's first process, since bubblewrap would leave one of its own
    unreaped. It stays root where the caller is, and so ends with bubblewrap, which a change of its
    user id would undo.
    """
    spaces = "--as-pid-1 --unshare-ipc --unshare-pid --unshare-net --unshare-uts --unshare-cgroup-try"
    root = "--cap-drop ALL --cap-add CAP_SETUID --cap-add CAP_SETGID --cap-add CAP_KILL"
    user = root if os.geteuid() == 0 else "--unshare-user"
    command = [shutil.which("bwrap") or "bwrap"]
    command += f"{spaces} {user} --die-with-parent --new-session --clearenv".split()
    folders = [path for path in dict.fromkeys(_LIBRARY_FOLDERS) if Path(path).is_dir()]
    above: set[Path] = set()
    for path in (_PYTHON, os.devnull, *folders):
        above.update(Path(path).parents)
    for path in sorted(above - {Path("/")}):
        command += ["--perms", "0111", "--dir", str(path)]  # to enter, not to list
    for path in folders:
        command += ["--ro-bind", path, path]
    for path in _packages(folders):  # an empty folder over each
        command += ["--perms", "0000", "--tmpfs", path, "--remount-ro", path]
    command += ["--ro-bind", str(_PYTHON), str(_PYTHON), "--dev-bind", os.devnull, os.devnull]
    # The root last: below it everything has been made by now.
    command += f"--perms 1777 --size {_FILES_MB << 20} --tmpfs /tmp --chdir /tmp --remount-ro /".split()
    return command


def _packages(folders: list[str]) -> list[str]:
    """What library folders have for Python beside the standard library: packages, and other versions of it."""
    hidden: list[Path] = []
    for folder in folders:
        for path in filter(Path.is_dir, Path(folder).glob("python[0-9]*")):
            is_own = path.samefile(_LIBRARY)
            hidden += filter(Path.is_dir, [path / "site-packages", path / "dist-packages"]) if is_own else [path]
    return [*map(str, hidden)]


def _system_call_filter() -> bytes:
    """Classic BPF over struct seccomp_data (number at byte 0, architecture at 4, first argument at 16)."""
    column, architecture, clone = _MACHINES[platform.machine()]
    load, equal, at_least, any_bit, result = 0x20, 0x15, 0x35, 0x45, 0x06
    steps = [(load, 0, 0, 4), (equal, 1, 0, architecture), (result, 0, 0, _KILL), (load, 0, 0, 0)]
    steps += [(at_least, 0, 1, _X32), (result, 0, 0, _KILL), (equal, 0, 1, _CLONE3), (result, 0, 0, _NOT_THERE)]
    for numbers in _DENIED.values():
        steps += [(equal, 0, 1, numbers[column]), (result, 0, 0, _NOT_PERMITTED)]
    steps += [(equal, 0, 3, clone), (load, 0, 0, 16), (any_bit, 0, 1, _CLONE_NEWUSER), (result, 0, 0, _NOT_PERMITTED)]
    return b"".join(struct.pack("=HBBI", *step) for step in [*steps, (result, 0, 0, _ALLOW)])


def _end(process: "subprocess.Popen[bytes]", first: int | None, control: socket.socket) -> None:
    """Ends every process of the program; the first one of a namespace is gone only when all others are."""
    if first is not None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(first, signal.SIGKILL)
        select.select([first], [], [])
        os.close(first)
    else:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            control.shutdown(socket.SHUT_RDWR)
            process.wait(_BARE_END_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
