"""A Python program in a sandbox: what it writes to standard output within its limits, or nothing.

bubblewrap gives the program namespaces of its own (processes, network, IPC, users or a user id that
nobody has), a read-only root with the standard library and the library folders of Python and the
system, a temporary folder in memory and no environment. The system calls by which it could reach
other processes or memory that no limit counts are denied.

The first process of the namespace is the harness, harness.py: it forks a child for each test, which
becomes the program, and ends whatever that leaves. It ends with the caller, and the kernel all
others with it.

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
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

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
_HARNESS = Path(__file__).with_name("harness.py").read_text(encoding="utf-8")
_LIBRARY = Path(os.__file__).parent  # the standard one
_LIBRARY_FOLDERS = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", f"{sys.base_prefix}/lib", f"{sys.base_prefix}/lib64"]

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
        with (
            contextlib.suppress(NoVerdict),
            sandboxed("import zoneinfo; print(6 * 7)", patient, errors=errors) as program,
        ):
            if program.run("", max_bytes=3) == b"42\n":
                return None
        errors.seek(0)
        lines = errors.read().decode(errors="replace").split("\n")
    return "a first program failed: " + (" ".join(filter(None, lines[-3:])) or "no message")


class Program:
    """A program in a sandbox, see `sandboxed`; it is run once a test, and all tests share its limits."""

    def __init__(
        self,
        limits: "ProgramsSection",
        process: subprocess.Popen[bytes],
        given: IO[bytes],  # its standard input and output
        written: IO[bytes],
        control: socket.socket,  # the harness at its other end
        end: float,  # by the clock, when it must have broken a limit
    ):
        self._limits, self._process, self._end = limits, process, end
        self._given, self._written, self._control = given, written, control
        self._allowed_s = limits.time_s
        self._next_look = time.monotonic() + _TICK_S
        self._asleep_s = 0.0
        self.cpu_s = 0.0  # of all its processes, when it was last looked at

    def run(self, stdin: str, *, max_bytes: int) -> bytes | None:
        """Output, or None where the program fails, breaks a limit or writes more than `max_bytes`.

        Raises NoVerdict for one that got too little of the processor to break the limit in
        `limits.longest_s`.
        """
        _rewrite(self._given, stdin)
        _rewrite(self._written, "")
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
        family: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            first = psutil.Process(self._process.pid)
            family = [first, *first.children(recursive=True)]
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess), one.oneshot():
                cpu_s += sum(one.cpu_times()[:4])  # with that of the children it has waited for
                resident += one.memory_info().rss
                is_ready |= one.status() in (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)
        now = time.monotonic()
        if not is_ready and cpu_s <= self.cpu_s:
            self._asleep_s += now - self._looked
        self.cpu_s, self._looked = max(cpu_s, self.cpu_s), now
        if self.cpu_s + self._asleep_s > self._allowed_s or resident > self._limits.memory_mb << 20:
            return False
        if now > self._end:
            raise NoVerdict(f"a program got {self.cpu_s:.1f} s of the processor in {self._limits.longest_s:g} s")
        return True


@contextlib.contextmanager
def sandboxed(
    source: str, limits: "ProgramsSection", function: str = "", errors: IO[bytes] | int = subprocess.DEVNULL
) -> Iterator[Program]:
    """A program in a sandbox of its own, of which no process is left at the end of the context.

    With `function`, standard input holds a JSON list of argument lists, and the output is the JSON
    list of results. `errors` takes standard error. Without isolation those processes may live until
    the end that a test leaves in the program's process group, and for ever those that leave the
    group. Raises NoVerdict where the sandbox does not start.
    """
    end = time.monotonic() + limits.longest_s
    is_bare = limits.isolation != "bubblewrap"
    control, theirs = socket.socketpair()
    with (
        control,
        theirs,
        tempfile.TemporaryFile(buffering=0) as given,
        tempfile.TemporaryFile(buffering=0) as written,
    ):
        _rewrite(given, source)
        streams = {"stdin": given, "stdout": written, "stderr": errors, "env": {}}
        python = _python(function, limits, is_bare, theirs.fileno())
        start = _bare(python, control, theirs, streams) if is_bare else _isolated(python, limits, theirs, streams)
        with start as process:
            theirs.close()  # so that the socket ends with the harness
            # No program has run yet, so that none is at fault.
            if not select.select([control], [], [], limits.longest_s)[0] or not control.recv(1):
                raise NoVerdict("the sandbox of a program did not start")
            yield Program(limits, process, given, written, control, end)


def _rewrite(file: IO[bytes], content: str) -> None:
    """The file's position is the program's, too."""
    file.seek(0)
    file.truncate()
    file.write(content.encode(errors="replace"))
    file.seek(0)


def _python(function: str, limits: "ProgramsSection", is_bare: bool, control: int) -> list[str]:
    """The command of the harness."""
    uid = 0 if is_bare or os.geteuid() else _TRANSIENT_UIDS[os.getpid() % len(_TRANSIENT_UIDS)]
    seconds, memory, files = math.ceil(limits.time_s) + 1, limits.memory_mb << 20, _FILES_MB << 20
    values = f"{control} {uid} CORE=0 CPU={seconds} AS={memory} FSIZE={files} NOFILE={_OPEN_FILES}"
    if not is_bare:  # outside of a namespace it would count all processes of the user
        values += f" NPROC={limits.processes}"
    return [str(_PYTHON), "-ISX", "utf8", "-c", _HARNESS, function, *values.split()]


@contextlib.contextmanager
def _bare(
    python: list[str], control: socket.socket, theirs: socket.socket, streams: dict[str, Any]
) -> Iterator[subprocess.Popen[bytes]]:
    """The harness in a temporary folder, and nothing around it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        descriptors = [theirs.fileno()]
        process: Any = subprocess.Popen(python, cwd=folder, start_new_session=True, pass_fds=descriptors, **streams)
        try:
            yield process
        finally:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                control.shutdown(socket.SHUT_RDWR)
                process.wait(_BARE_END_S)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def _isolated(
    python: list[str], limits: "ProgramsSection", theirs: socket.socket, streams: dict[str, Any]
) -> Iterator[subprocess.Popen[bytes]]:
    """bubblewrap's process, with the harness as the first of a namespace."""
    (rules, rules_end), (info, info_end) = os.pipe(), os.pipe()
    with open(rules, "rb"), open(info, "rb") as about:
        with open(info_end, "wb"):
            with open(rules_end, "wb") as pipe:
                # The filter fits the pipe, so that nobody has to read meanwhile.
                pipe.write(_system_call_filter())
            command = [*_bubblewrap(limits), "--seccomp", str(rules), "--info-fd", str(info_end), *python]
            descriptors = [rules, info_end, theirs.fileno()]
            process: Any = subprocess.Popen(command, pass_fds=descriptors, **streams)
        answer = about.read()  # which ends when the namespace is there, or bubblewrap has failed
    first = None
    with contextlib.suppress(ProcessLookupError):  # gone already, and all others with it
        first = os.pidfd_open(json.loads(answer)["child-pid"]) if answer else None
    try:
        yield process
    finally:
        if first is None:
            process.kill()
        else:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(first, signal.SIGKILL)
            select.select([first], [], [])  # it is gone only when all others of the namespace are
            os.close(first)
        process.wait()


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
