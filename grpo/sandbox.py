"""A Python program in a sandbox: what it writes to standard output within its limits, or nothing.

bubblewrap gives the program namespaces of its own (processes, network, IPC, users or a user id that nobody has), a
read-only root with the standard library and what that links to, a temporary folder in memory and no environment.
The system calls by which it could reach other processes or memory that no limit counts are denied. With the first
process of its namespace, which is bubblewrap's and ends with the caller, the kernel ends all others.

Not covered: faults of the kernel, side channels such as time, and the CPU: there are no control groups.
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
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import psutil

from flashgrpo.grpo.rewards import RewardError

if TYPE_CHECKING:
    from flashgrpo.grpo.sections import ProgramsSection

_TICK_S = 0.1  # between two looks at the memory and output of a program
_OPEN_FILES = 64
_TRANSIENT_UIDS = range(61_184, 65_520)  # systemd's, of users who exist only as long as a service runs
_PYTHON = Path(sys.base_prefix, "bin", f"python{sys.version_info[0]}.{sys.version_info[1]}")
_PACKAGES = sysconfig.get_path("purelib", "posix_prefix", {"base": sys.base_prefix})

# Runs inside: sets the limits, gives up root, then becomes the program, or calls a function of it for each of the
# argument lists on standard input and writes the results as one JSON list. exit and quit are what -S leaves out.
_HARNESS = """
def _load():
    import builtins, os, resource, sys
    source, alive, uid, *limits = sys.argv[1:]
    try:
        os.set_blocking(int(alive), False)
        os.read(int(alive), 1)
        os._exit(1)  # at its end: the caller died before bubblewrap knew that it has to end with it
    except BlockingIOError:
        os.close(int(alive))
    for name, _, value in (limit.partition("=") for limit in limits):
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (int(value), int(value)))
    if uid != "0":
        os.setgroups([])
        os.setresgid(*[int(uid)] * 3)
        os.setresuid(*[int(uid)] * 3)
    builtins.exit = builtins.quit = sys.exit
    sys.argv[:] = ["program.py"]
    return compile(source, "program.py", "exec")
"""
_RUN = "exec(_load())"
# A solution is written as if its site's usual imports were there.
_CALL = """
import bisect, collections, functools, heapq, itertools, json, math, os, random, re, string, sys
from bisect import *; from collections import *; from functools import *; from heapq import *; from itertools import *
from math import ceil, floor, gcd, inf, log, log2, sqrt; from typing import *
def _main(dumps=json.dumps):
    cases, results = json.load(sys.stdin), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    exec(_load(), globals())
    owner = globals().get("Solution")
    if hasattr(owner, _NAME):
        values = [getattr(owner(), _NAME)(*case) for case in cases]
    else:
        values = [globals()[_NAME](*case) for case in cases]
    results.write(dumps(values))
    results.close()
_main()
"""

# System calls by (x86_64, aarch64) number. Those that make memory which belongs to no process; user namespaces; keys,
# processes and devices of others, among them the sockets of a virtual machine's host, which no namespace holds.
_DENIED = {
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186),
    "mq_open": (240, 180), "semget": (64, 190), "io_uring_setup": (425, 425), "unshare": (272, 97), "setns": (308, 268),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "socket": (41, 198),
}  # fmt: skip
_MACHINES = {"x86_64": (0, 0xC000003E, 56), "aarch64": (1, 0xC00000B7, 220)}  # column, audit architecture, clone
_CLONE3, _CLONE_NEWUSER, _X32 = 435, 0x10000000, 0x40000000
_ALLOW, _KILL, _NOT_PERMITTED, _NOT_THERE = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026


def check_isolation(limits: "ProgramsSection") -> None:
    """Runs a program as the reward would. Raises RewardError, which says what is missing, where that fails."""
    found = None
    if limits.isolation == "bubblewrap" and not shutil.which("bwrap"):
        found = "there is no bwrap"
    elif limits.isolation == "bubblewrap" and platform.machine() not in _MACHINES:
        found = f"found a processor {platform.machine()}, wanted {' or '.join(_MACHINES)}"
    else:
        with tempfile.TemporaryFile() as errors:
            patient = dataclasses.replace(limits, time_s=max(limits.time_s, 30.0))
            if run_program("import zoneinfo; print(6 * 7)", "", patient, max_bytes=3, errors=errors) != b"42\n":
                errors.seek(0)
                lines = errors.read().decode(errors="replace").split("\n")
                found = "a first program failed: " + (" ".join(filter(None, lines[-3:])) or "no message")
    if found:
        raise RewardError(
            f"reward 'code' cannot isolate programs: {found}; wanted bubblewrap (make sandbox, or apt-get install "
            "bubblewrap), run as root or with user namespaces allowed, and enough rewards.programs.memory_mb; or set "
            'rewards.programs.isolation = "none: run programs unprotected"'
        )


def run_program(
    source: str,
    stdin: str,
    limits: "ProgramsSection",
    *,
    max_bytes: int,
    function: str = "",
    deadline: float = math.inf,  # time.monotonic()
    errors: IO[bytes] | int = subprocess.DEVNULL,
) -> bytes | None:
    """Output of a program, or None where it fails, writes more than `max_bytes` or breaks a limit.

    With `function`, standard input holds a JSON list of argument lists, and the output is the JSON list of results.
    When it returns, no process of the program is left, but where isolation is none. `errors` takes standard error.
    """
    deadline = min(deadline, time.monotonic() + limits.time_s)
    code = source.encode(errors="replace")
    if b"\0" in code or len(code) > 100_000:  # no argument of a command; nor a program
        return None
    with contextlib.ExitStack() as stack:
        given, written = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
        given.write(stdin.encode(errors="replace"))
        given.seek(0)
        folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)) if _bare(limits) else "/"
        for end in (alive := os.pipe()):
            stack.callback(os.close, end)
        process, first = _start(code, function, limits, folder, alive[0], stdin=given, stdout=written, stderr=errors)
        try:
            succeeded = _await(process, written, limits, max_bytes, deadline)
        finally:
            _end(process, first)
        written.seek(0)
        output = written.read(max_bytes + 1)
    return output if succeeded and len(output) <= max_bytes else None


def _bare(limits: "ProgramsSection") -> bool:
    return limits.isolation != "bubblewrap"


def _start(
    code: bytes, function: str, limits: "ProgramsSection", folder: str, alive: int, **streams: Any
) -> tuple[Any, int | None]:
    """The process, and a descriptor of the first one of its process namespace, or None where it has none.

    `alive` is at its end for the program once the caller is dead.
    """
    uid = 0 if _bare(limits) or os.geteuid() else _TRANSIENT_UIDS[os.getpid() % len(_TRANSIENT_UIDS)]
    seconds, memory, files = math.ceil(limits.time_s) + 1, limits.memory_mb << 20, limits.files_mb << 20
    values = f"{alive} {uid} CORE=0 CPU={seconds} AS={memory} FSIZE={files} NOFILE={_OPEN_FILES}"
    if not _bare(limits):  # outside of a namespace it would count all processes of the user
        values += f" NPROC={limits.processes}"
    harness = _HARNESS + (f"_NAME = {function!r}\n{_CALL}" if function else _RUN)
    python = [_PYTHON, "-ISX", "utf8", "-c", harness, code, *values.split()]
    if _bare(limits):
        process = subprocess.Popen(python, cwd=folder, env={}, start_new_session=True, pass_fds=[alive], **streams)
        return process, None
    (rules, rules_end), (info, info_end) = os.pipe(), os.pipe()
    with open(rules, "rb"), open(info, "rb") as about:
        with open(info_end, "wb"):
            with open(rules_end, "wb") as pipe:
                pipe.write(_system_call_filter())
            command = [*_bubblewrap(limits), "--seccomp", str(rules), "--info-fd", str(info_end), *python]
            process = subprocess.Popen(command, env={}, pass_fds=[rules, info_end, alive], **streams)
        answer = about.read()
    with contextlib.suppress(ProcessLookupError):  # gone already, and all others with it
        return process, os.pidfd_open(json.loads(answer)["child-pid"]) if answer else None
    return process, None


def _bubblewrap(limits: "ProgramsSection") -> list[str]:
    """Only root counts processes of another user id by RLIMIT_NPROC, others those of a user namespace."""
    spaces = "--unshare-ipc --unshare-pid --unshare-net --unshare-uts --unshare-cgroup-try"
    user = "--cap-drop ALL --cap-add CAP_SETUID --cap-add CAP_SETGID" if os.geteuid() == 0 else "--unshare-user"
    folders = ["/usr", *map(str, reversed(Path(sys.base_prefix).parents[:-1]))]  # for all to enter; else bwrap's 0700
    libraries = [["--ro-bind-try", path, path] for path in ("/lib", "/lib64", "/usr/lib", "/usr/lib64")]
    return [
        shutil.which("bwrap") or "bwrap",
        *f"{spaces} {user} --die-with-parent --new-session --clearenv".split(),
        *(part for folder in folders for part in ("--dir", folder)),
        *(part for library in libraries for part in library),
        *("--ro-bind", sys.base_prefix, sys.base_prefix),
        *(["--tmpfs", _PACKAGES, "--remount-ro", _PACKAGES] if Path(_PACKAGES).is_dir() else []),
        *("--dev-bind", os.devnull, os.devnull),
        *f"--perms 1777 --size {limits.files_mb << 20} --tmpfs /tmp --chdir /tmp --remount-ro /".split(),
    ]


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


def _await(
    process: "subprocess.Popen[bytes]", written: IO[bytes], limits: "ProgramsSection", max_bytes: int, deadline: float
) -> bool:
    """Whether the program ends well before the deadline, without too much output, and memory of all its processes."""
    ended = os.pidfd_open(process.pid)
    try:
        while (left := deadline - time.monotonic()) > 0:
            if select.select([ended], [], [], min(_TICK_S, left))[0]:
                return process.wait() == 0
            if os.fstat(written.fileno()).st_size > max_bytes or _resident_bytes(process) > limits.memory_mb << 20:
                return False
        return False
    finally:
        os.close(ended)


def _resident_bytes(process: "subprocess.Popen[bytes]") -> int:
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        first = psutil.Process(process.pid)
        for one in [first, *first.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += one.memory_info().rss
    return total


def _end(process: "subprocess.Popen[bytes]", first: int | None) -> None:
    """Ends every process of the program; the first one of a namespace is gone only when all others are."""
    with contextlib.suppress(ProcessLookupError):
        if first is None:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            signal.pidfd_send_signal(first, signal.SIGKILL)
    if first is not None:
        select.select([first], [], [])
        os.close(first)
    process.wait()
