"""Files and folders that appear under their name only when every byte of them is on the disk."""

import contextlib
import functools
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place, then rename it."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A neighbour of `path` to write to; when the block ends it is synced and takes the name `path`."""
    temporary = path.with_name(path.name + ".tmp")
    yield temporary
    _sync(temporary)
    temporary.rename(path)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty neighbour of `folder` to write in; when the block ends it is synced and takes the name `folder`.

    A folder that was there stays whole until then. If the process dies between the two renames, `recover` puts it back.
    Raises OSError when the disk fails or is full; an error, this one or the block's, leaves the old folder untouched.
    """
    recover(folder)
    old, partial = _set_aside(folder), folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed while writing
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            _sync(path)
        shutil.rmtree(old, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            folder.rename(old)
        partial.rename(folder)
        _sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        recover(folder)


def recover(folder: Path) -> None:
    """Put the old folder back where a process died, or a rename failed, while it was set aside."""
    if not folder.exists() and _set_aside(folder).is_dir():
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            _set_aside(folder).rename(folder)


def content_hash(path: Path) -> str:
    """SHA-256 of a file, or of every file in a folder with its name; files are read once as long as they stay."""
    path = path.expanduser()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        state = file.stat()
        digest.update(f"{file.relative_to(path)}\n{state.st_size}\n".encode())
        digest.update(_file_hash(file, state.st_size, state.st_mtime_ns))
    return digest.hexdigest()


@functools.lru_cache(maxsize=1024)
def _file_hash(file: Path, size: int, mtime_ns: int) -> bytes:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").digest()


def _set_aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
