"""Files and folders that appear under their name only when every byte of them is on the disk; what is in them."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
import socket
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

LOCK = ".lock"
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "reward_model.json",
    "*.safetensors",
    "*.safetensors.index.json",
    *TOKENIZER_FILES,
    "additional_chat_templates/*",
)
_INTEGER_BITS = 63


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


def content_files(path: Path) -> list[Path]:
    """A file; those of a model's folder that are read to run it; every file, but hidden ones, of any other folder."""
    if not path.is_dir():
        return [path]
    is_model = (path / "config.json").is_file() and any(path.glob("*.safetensors"))
    patterns = MODEL_FILES if is_model else ("**/*",)
    found = set()
    for pattern in patterns:
        found.update(file for file in path.glob(pattern) if file.is_file())
    return sorted(file for file in found if "/." not in f"/{file.relative_to(path)}")  # hidden, or in a hidden folder


def content_hash(path: Path) -> str:
    """SHA-256 of `content_files` with their names; files are read once as long as they stay."""
    files = content_files(path)
    digest = hashlib.sha256()
    states = [file.stat() for file in files]
    with ThreadPoolExecutor() as pool:
        kept = [(s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for s in states]
        # Taken here: at the pool's end it would read all that is left first, also after an error or Ctrl-C.
        hashes = [*pool.map(_known_hash, files, kept)]
    for file, state, found in zip(files, states, hashes, strict=True):
        digest.update(f"{file.relative_to(path)}\n{state.st_size}\n".encode())
        digest.update(bytes.fromhex(found))
    return digest.hexdigest()


def hash_files(files: Sequence[Path]) -> list[str]:
    """The SHA-256 of each, read now, several at a time."""
    with ThreadPoolExecutor() as pool:
        return [*pool.map(_hash, files)]


def _hash(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


@functools.lru_cache(maxsize=1024)
def _known_hash(file: Path, state: tuple[int, ...]) -> str:
    return _hash(file)


def parse_json(text: str | bytes) -> Any:
    """What the JSON in `text` holds; raises ValueError, with one line, for whatever is wrong with it."""
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_toml(text: str) -> dict[str, Any]:
    """What the TOML in `text` holds; raises ValueError, with one line, for whatever is wrong with it."""
    try:
        values = tomllib.loads(text)
        _refuse_long_integers(values)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return values


def _refuse_long_integers(value: Any, key: str = "") -> None:
    """TOML's have 64 bits, and Python's parser does not say so."""
    if isinstance(value, dict):
        for name, item in value.items():
            _refuse_long_integers(item, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for item in value:
            _refuse_long_integers(item, key)
    elif isinstance(value, int) and value.bit_length() > _INTEGER_BITS:
        raise ValueError(f"{key} is an integer of {value.bit_length()} bits, wanted at most {_INTEGER_BITS}")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder`, which is made where it is missing, against other processes, until the block or this process ends.

    Nothing stays of a folder in which the block has left nothing. Raises BlockingIOError, which says who holds it, and
    OSError where it cannot be written.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with _open_lock(folder) as file:
        file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
        try:
            yield
        finally:
            if [path.name for path in folder.glob("*")] == [LOCK]:
                with contextlib.suppress(OSError):  # another process has put something there
                    (folder / LOCK).unlink()
                    for path in missing:
                        path.rmdir()


def _open_lock(folder: Path) -> TextIO:
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context((folder / LOCK).open("a+", encoding="utf-8"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise BlockingIOError(f"{folder} is in use by {file.read().strip() or 'another process'}") from None
        except OSError as error:  # a file system without locks
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), (folder / LOCK).stat()):
                stack.pop_all()
                return file
    return _open_lock(folder)  # its owner took it away between the two lines, and the next process makes another


def _set_aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_local(path: str) -> bool:
    """Whether a path to data is that of a file or folder, rather than a data set's name on the Hugging Face hub."""
    file = Path(path)
    by_name = path.startswith(("/", ".")) or file.suffix in (".jsonl", ".parquet") or path.count("/") > 1
    return by_name or file.exists()
