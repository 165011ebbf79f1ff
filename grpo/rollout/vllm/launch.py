"""Starting `vllm serve`: by `flashgrpo serve` for a run elsewhere, or by a run on devices of its own."""

import contextlib
import ipaddress
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from flashgrpo.grpo.errors import RunInputError
from flashgrpo.grpo.rollout.vllm.options import API_KEY, NCCL, SHARED_MEMORY, EngineOptions
from flashgrpo.grpo.run.child import own_environment
from flashgrpo.grpo.run.progress import console

_START_LIMIT_S, _END_LIMIT_S = 1500.0, 10.0  # the other ranks wait meanwhile, and not for ever
_LOG_LINES = 5
# Ends with the process that started it, however that ends (PR_SET_PDEATHSIG, SIGTERM).
_DIE_WITH_PARENT = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"


def serve(options: EngineOptions, host: str, port: int, devices: str) -> None:
    """Become `vllm serve`, on the GPUs `devices` ("0,1", one model over both) or on the CPU."""
    key = os.environ.get(API_KEY)
    who = f"whoever has the key in {API_KEY}" if key else "whoever reaches the port, without a key,"
    what = "can replace the weights, sample and pause; no route writes files, runs code or sets the environment"
    console.print(f"{host}:{port}: {who} {what}", markup=False, highlight=False, soft_wrap=True)
    if not (key or _is_loopback(host)):
        found = f"warning: other machines reach {host}; set {API_KEY} to a secret, here and for the runs"
        console.print(found, style="yellow", markup=False, highlight=False, soft_wrap=True)
    os.environ.update(_environment(devices))
    command = _command(options, host, port, devices)
    os.execv(command[0], command)


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


class OwnServers:
    """Servers on this machine that end with this process; their output goes to `logs`/server_N.log. They answer to
    `key` alone.
    """

    def __init__(self, options: EngineOptions, devices: list[str], logs: Path):
        self.urls: list[str] = []
        self.key = secrets.token_urlsafe()
        self._processes: list[subprocess.Popen] = []
        logs.mkdir(parents=True, exist_ok=True)
        for number, own in enumerate(devices):
            port, log = _free_port(), logs / f"server_{number}.log"
            command = [sys.executable, "-c", _DIE_WITH_PARENT, *_command(options, "127.0.0.1", port, own)]
            with log.open("ab") as output:
                self._processes.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        env=own_environment() | _environment(own) | {API_KEY: self.key},
                        process_group=0,  # Ctrl-C at the terminal is for the trainer, which ends them
                    )
                )
            self.urls.append(f"http://127.0.0.1:{port}")
        deadline = time.monotonic() + _START_LIMIT_S
        try:
            for number, (url, process) in enumerate(zip(self.urls, self._processes, strict=True)):
                console.print(f"waiting for the vLLM server on {devices[number]}", highlight=False)
                _await_server(url, process, logs / f"server_{number}.log", deadline)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End them, and the workers that one which has died may have left."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_LIMIT_S)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _command(options: EngineOptions, host: str, port: int, devices: str) -> list[str]:
    if options.on_gpu:
        return options.serve_command(NCCL, host, port, len(devices.split(",")))
    return options.serve_command(SHARED_MEMORY, host, port, 1)


def _environment(devices: str) -> dict[str, str]:
    visible = {} if devices == "cpu" else {"CUDA_VISIBLE_DEVICES": devices}
    return {"VLLM_SERVER_DEV_MODE": "1", **visible}  # the routes for weights are a developer's


def _await_server(url: str, process: subprocess.Popen, log: Path, deadline: float) -> None:
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    lines = " | ".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
    raise RunInputError(f"the vLLM server did not start (exit code {process.poll()}), see {log}: {lines}")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
