"""A rank that dies or is stopped ends the others, which tell its name: also those that wait in NCCL, or compute.

Rank 0 holds a connection to each of the others, and both ends say every second that they live. A process that dies,
wherever it runs, closes its connections; a machine that is gone confirms no packet; one that is stopped is silent.
"""

import contextlib
import datetime
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

GRACE_S = 5.0  # for this rank to find the same error, and for torchrun to end the ranks beside one that died
NOTICE_S = 5.0  # more than it takes until all know of a rank that is lost
_BEAT_S = 1.0
_GREETING_S = 1.0  # that a stranger at the port may keep rank 0 waiting
_ANSWER_S = 60.0  # of rank 0, which greets one after the other
_GONE_MS = 20_000  # after which packets that were not confirmed break a connection
_ALIVE, _DONE = b".", b"!"

Links = dict[int, socket.socket]  # by the rank at the other end


def meet(store: Any, rank: int, size: int, limit_s: float) -> tuple[Any, Links]:
    """A part of torchrun's store for these processes alone, and rank 0's connections to the others, theirs to it.

    The store outlives a restart, with all that the ranks of before have left in it, and nothing
    that torchrun hands on tells them apart: TORCHELASTIC_RESTART_COUNT differs between nodes. So
    rank 0 gives each start a name, beside the port where it hears of the others; at the port of
    before nobody does.
    """
    store.set_timeout(datetime.timedelta(seconds=limit_s))
    try:
        name, links = _gather_others(store, size, limit_s) if rank == 0 else _join(store, rank, limit_s)
    except OSError as error:
        raise dist.DistStoreError(f"not all of the {size} ranks have started") from error
    for link in links.values():
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _GONE_MS)
    return dist.PrefixStore(name, store), links  # pyright: ignore[reportPrivateImportUsage]


def _gather_others(store: Any, size: int, limit_s: float) -> tuple[str, Links]:
    name, links = uuid.uuid4().hex, {}
    has_both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if has_both else socket.AF_INET
    with socket.create_server(("", 0), family=family, backlog=size, dualstack_ipv6=has_both) as server:
        server.settimeout(limit_s)
        store.set("rank 0", f"{name} {server.getsockname()[1]}")
        while len(links) < size - 1:
            link, _ = server.accept()
            link.settimeout(_GREETING_S)
            with contextlib.suppress(OSError):  # anybody may knock at a port
                greeting = link.recv(64).split()
                if greeting[:1] == [name.encode()]:
                    link.sendall(name.encode())
                    links[int(greeting[1])] = link
    return name, links


def _join(store: Any, rank: int, limit_s: float) -> tuple[str, Links]:
    deadline = time.monotonic() + limit_s
    while True:
        name, port = store.get("rank 0").decode().split()
        try:
            link = socket.create_connection((os.environ["MASTER_ADDR"], int(port)), timeout=_ANSWER_S)
            link.sendall(f"{name} {rank}".encode())
            if link.recv(len(name)) == name.encode():
                return name, {0: link}
            raise ConnectionRefusedError("another service has taken the port")
        except OSError:  # rank 0 has not started yet: this is where the one of before was
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@contextmanager
def watched(links: Links, size: int, limit_s: float) -> Iterator[None]:
    """Ends this process soon after one at the other end of a link has died, or was silent for `limit_s`."""
    is_done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(links, size, is_done, limit_s), daemon=True)
    watcher.start()
    yield
    is_done.set()
    watcher.join()
    for link in links.values():
        link.close()


def _watch(links: Links, size: int, is_done: threading.Event, limit_s: float) -> None:
    """Until all others are done, too."""
    silence_s = limit_s + 2 * _BEAT_S
    # Counted here, not by a clock: of ranks that were all stopped for a while none is lost.
    silent_s, is_over = dict.fromkeys(links, 0.0), False  # of those that are not done
    while silent_s or not is_over:
        is_over = is_done.wait(_BEAT_S)
        for rank, link in links.items():
            is_left = rank in silent_s
            # Until this rank is done, none of the others may keep it waiting for the beat of the next.
            link.settimeout(_BEAT_S if is_over and is_left else 0)
            # Also to one that is done: it waits until this rank is, too.
            _tell(link, _DONE if is_over else _ALIVE)
            try:
                said = link.recv(1024)
            except (BlockingIOError, TimeoutError):
                if is_left:
                    silent_s[rank] += _BEAT_S
                    if silent_s[rank] >= silence_s:
                        fate = f"has given no sign of life for {silence_s:g} s, as if stopped"
                        _end(links, f"rank {rank} of {size} {fate}")
                continue
            except OSError:
                said = b""
            if said.strip(_ALIVE + _DONE):  # rank 0 tells of a third one, and its name itself
                _end({}, "")
            elif not said and is_left:
                _end(links, f"rank {rank} of {size} has died")
            elif is_left:
                silent_s[rank] = 0.0
                if _DONE in said:
                    del silent_s[rank]


def _tell(link: socket.socket, word: bytes) -> None:
    with contextlib.suppress(OSError):  # that one is lost, which is found when it is listened to
        link.send(word)


def _end(links: Links, news: str) -> None:
    for link in links.values():
        _tell(link, news.encode())
    time.sleep(GRACE_S)
    if news:
        os.write(2, f"flashgrpo: {news}; continue with --resume\n".encode())
    os._exit(1)
