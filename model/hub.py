"""Where a model is: in a folder of one's own, or, by its name on the Hugging Face hub, in the hub's cache."""

import contextlib
import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from flashgrpo.model.config import CheckpointError
from flashgrpo.model.files import MODEL_FILES, recover
from flashgrpo.model.waits import word_for


def local_folder(path: str | os.PathLike, *, with_weights: bool = False) -> Path:
    """The folder of a model: `path`, or the snapshot in the hub's cache of a name, "OWNER/NAME" or
    "OWNER/NAME@REVISION". A name has neither its folder nor its owner's in the working folder.

    What the cache lacks is downloaded, weights only where they are asked for; what it has is taken as it is, so that a
    new revision never comes unasked. Of processes that ask at the same time the hub's client lets one download.

    Raises CheckpointError where there is neither a folder nor such a model.
    """
    recover(Path(path))
    folder = cached_folder(path, with_weights=with_weights)
    if folder.is_dir():
        return folder
    name, _, revision = str(path).partition("@")
    to_folder = f"`hf download OWNER/{Path(name).name} --local-dir {name}`"
    if not _is_name(path):
        raise CheckpointError(f"{path}: no such folder; {to_folder} makes one")
    if os.environ.get("LOCAL_RANK", "0") != "0":
        disable_progress_bars()
    try:
        with word_for(f"asking the Hugging Face hub for {path}"):
            return _snapshot(path, with_weights)
    except Exception as error:  # the hub's client raises OSErrors, ValueErrors and those of its HTTP library
        why, command = str(error).strip().partition("\n")[0], f"hf download {name}"
        command += f" --revision {revision}" if revision else ""
        raise CheckpointError(
            f"{path}: no such folder, and the Hugging Face hub does not give it ({type(error).__name__}: {why}); where "
            f"there is a network, `{command}` puts it in the hub's cache, or {to_folder} in this folder"
        ) from error


def cached_folder(path: str | os.PathLike, *, with_weights: bool = False) -> Path:
    """As `local_folder` without a download: of a name that the cache does not hold, `path`."""
    if _is_name(path):
        with contextlib.suppress(LocalEntryNotFoundError):
            folder = _snapshot(path, with_weights, cached=True)
            # Older clients did not note what a whole snapshot has.
            if not with_weights or any(folder.glob("*.safetensors")):
                return folder
    return Path(path)


def _is_name(path: str | os.PathLike) -> bool:
    if Path(path).exists() or Path(path).parent.exists():
        return False
    try:
        validate_repo_id(str(path).partition("@")[0])
    except HFValidationError:
        return False
    return True


def _snapshot(name: str | os.PathLike, with_weights: bool, cached: bool = False) -> Path:
    repository, _, revision = str(name).partition("@")
    files = [pattern for pattern in MODEL_FILES if with_weights or pattern != "*.safetensors"]
    return Path(snapshot_download(repository, revision=revision or None, allow_patterns=files, local_files_only=cached))
