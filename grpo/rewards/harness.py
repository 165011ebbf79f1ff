"""What runs inside a sandbox: a Python that has started and waits, and becomes the program once a test.

The project is not to be seen there, so that this file is the text of a command:

    python -ISX utf8 -c TEXT FUNCTION CONTROL UID LIMIT=VALUE ..

It sets the limits, reads the program on standard input, and writes a byte to the socket CONTROL.
For each byte that it reads there, a child gives up root and becomes the program; with a FUNCTION,
that is called for each of the argument lists on standard input, and the results are written as one
JSON list. When the child has ended, and all that it has left, the harness writes how. Input and
output are files that the caller rewrites between two tests.
"""

import builtins
import os
import resource
import select
import sys

# Modules are few here: to import signal, with its enums, would be a sixth of the start.
SIGKILL = 9
_REAP_S = 0.1
# A solution is written as if its site's usual imports were there; programs begin with some of them.
USUAL_IMPORTS = """
import bisect, collections, functools, heapq, itertools, json, math, os, random, re, string, sys
from bisect import *; from collections import *; from functools import *; from heapq import *; from itertools import *
from math import ceil, floor, gcd, inf, log, log2, sqrt; from typing import *
"""


def serve(function: str, control: int, uid: int, limits: list[str]) -> None:
    for limit in limits:
        name, _, value = limit.partition("=")
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (int(value), int(value)))
    source = b""
    while part := os.read(0, 1 << 20):  # past sys.stdin, which would keep what it reads ahead
        source += part
    os.write(control, b"r")
    while os.read(control, 1):
        test = os.fork()
        if not test:
            os.close(control)
            if uid:
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
            empty_folder()
            return become(source.decode(), function)
        status = wait_for(test, control)
        end_others()
        os.write(control, b"x" if status else b"0")
        exec(USUAL_IMPORTS, {})  # a fork has them for nothing
    os._exit(0)


def empty_folder() -> None:
    """The temporary one, of what the test before has left, and may have hidden from itself."""
    for folder, names, _ in os.walk("."):
        for name in names:  # before the walk enters them
            if not os.path.islink(below := os.path.join(folder, name)):
                os.chmod(below, 0o700)
    for left in os.scandir():
        if left.is_dir(follow_symlinks=False):
            import shutil

            shutil.rmtree(left, ignore_errors=True)
        else:
            os.unlink(left)


def become(source: str, function: str) -> None:
    builtins.exit = builtins.quit = sys.exit  # which -S leaves out
    sys.argv[:] = ["program.py"]
    program = sys.modules["__main__"] = type(sys)("__main__")
    code = compile(source, "program.py", "exec")
    if not function:
        exec(code, vars(program))
        return
    import json

    cases, results = json.load(sys.stdin), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    exec(USUAL_IMPORTS, vars(program))
    exec(code, vars(program))
    solution = getattr(program, "Solution", None)
    owner = solution if solution and hasattr(solution, function) else lambda: program
    results.write(json.dumps([getattr(owner(), function)(*case) for case in cases]))
    results.close()


def wait_for(test: int, control: int) -> int:
    """The status with which a test ends. When the socket ends before it, the caller is dead, or done: all ends."""
    ended = os.pidfd_open(test)
    while True:
        if control in select.select([control, ended], [], [], _REAP_S)[0]:
            os.kill(test, SIGKILL)
            os.waitpid(test, 0)
            os.killpg(0, SIGKILL)
            os._exit(1)
        # Orphans are the first process's to reap: until then they count as processes that the program has.
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            if found[0] == test:
                os.close(ended)
                return found[1]


def end_others() -> None:
    if os.getpid() != 1:  # no namespace of its own, in which -1 would be all others
        return
    try:
        os.kill(-1, SIGKILL)
        while os.wait():
            pass
    except (ProcessLookupError, ChildProcessError):  # there is none, or none any longer
        pass


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
