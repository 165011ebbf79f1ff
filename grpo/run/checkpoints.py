"""A checkpoint's folder: whether it is what was written, and its tensors, read without running what is in it.

`SHA256SUMS` has a line for every other file, as `sha256sum -c SHA256SUMS` reads them.
"""

import dataclasses
import pickle
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from flashgrpo.grpo.errors import RunInputError
from flashgrpo.grpo.run.world import World, misses_a_rank
from flashgrpo.model.files import hash_files, write_text

SUMS, STATE = "SHA256SUMS", "state"
_IN_METADATA = {  # all that torch's metadata of tensors is made of
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # Python 3.13
}


def list_checkpoints(run: str | Path) -> list[Path]:
    """Those of a run's folder, the newest last."""
    found = [p for p in Path(run).glob("checkpoints/step_*") if p.name.removeprefix("step_").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def newest_checkpoint(run: str | Path) -> Path | None:
    """The newest whole checkpoint of a run's folder, if there is one."""
    return next(reversed(list_checkpoints(run)), None)


def load_tensors(tensors: dict[str, Tensor], checkpoint: Path) -> None:
    """Fill `tensors` in place, on any number of ranks. Raises RunInputError."""
    try:
        state_dict_loader.load(tensors, storage_reader=_Reader(checkpoint / STATE))
    except (OSError, RuntimeError, KeyError, ValueError, CheckpointException) as error:
        cause = cause_of(error)
        why = f"{type(cause).__name__}: {cause}".splitlines()[0]  # without torch's traceback
        raise RunInputError(
            f"{checkpoint}: broken checkpoint, or one of another model or recipe ({why}); remove it to continue from "
            "the one before"
        ) from error


def cause_of(error: BaseException) -> BaseException:
    """What DCP has found on a rank, or `error` itself. Raises it where a rank was lost, which is no fault of files."""
    causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    if any(map(misses_a_rank, causes)):
        raise error
    # Of several, that one which a person can do something about.
    return next(filter(is_of_the_disk, causes), causes[0])


def is_of_the_disk(error: BaseException) -> bool:
    """torch's zip writer tells of a write that failed by where it stands, and hides the OSError."""
    return isinstance(error, OSError) or "inline_container" in str(error)


def write_sums(checkpoint: Path, world: World) -> None:
    """Write the checksum of every file; each rank reads what it has written, while it is in memory."""

    def own() -> dict[str, str]:
        files = [*(checkpoint / STATE).glob(f"__{world.rank}_*.distcp")]
        if world.is_main:
            files += [p for p in checkpoint.rglob("*") if p.is_file() and p.suffix != ".distcp"]
        return {str(p.relative_to(checkpoint)): digest for p, digest in zip(files, hash_files(files), strict=True)}

    lines = [f"{digest}  {name}\n" for sums in world.everywhere(own) for name, digest in sums.items()]
    world.on_main(lambda: write_text(checkpoint / SUMS, "".join(sorted(lines))))


def check_sums(checkpoint: Path, world: World) -> None:
    """Raises RunInputError for a file that is not what was written, with its name and that of the newest whole
    checkpoint; each rank reads a share of the files.
    """
    found = next(filter(None, world.everywhere(lambda: _fault(checkpoint, world.rank, world.size))), None)
    if found is None:
        return

    def newest_whole() -> str | None:
        older = [p for p in list_checkpoints(checkpoint.parents[1]) if p != checkpoint]
        return next((p.name for p in reversed(older) if not _fault(p)), None)

    whole = world.on_main(newest_whole)
    rest = f"continue from {whole}, the newest that is whole" if whole else "begin anew: none is whole"
    raise RunInputError(f"{found}; restore it, or remove {checkpoint} to {rest}")


def _fault(checkpoint: Path, rank: int = 0, size: int = 1) -> str | None:
    """What is wrong with the files whose turn it is, if anything is."""
    sums = checkpoint / SUMS
    try:
        lines = [line.split("  ", 1) for line in sums.read_text(encoding="utf-8").splitlines()]
        wanted = {checkpoint / name: digest for digest, name in lines}
        present = {path for path in checkpoint.rglob("*") if path.is_file() and path != sums}
        if not wanted:
            raise ValueError("it is empty")
        for file in sorted(wanted.keys() ^ present):
            return f"{file}: broken checkpoint: {f'it is not in {SUMS}' if file in present else 'it is missing'}"
        own = sorted(wanted)[rank::size]
        for file, found in zip(own, hash_files(own), strict=True):
            if found != wanted[file]:
                return f"{file}: it is not what was written: its SHA-256 is not that in {SUMS}"
    except (OSError, ValueError) as error:
        file = getattr(error, "filename", None) or sums
        return f"{file}: broken checkpoint: {getattr(error, 'strerror', None) or 'not a list of checksums'}"
    return None


class _Reader(FileSystemReader):
    """torch's would run whatever code is in the pickled `.metadata`, or in a value that this calls an object."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"found {type(metadata).__name__}, wanted the metadata of tensors")
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


_PYTHONS: Any = pickle._Unpickler  # the one in C has no place to look at a state


class _Unpickler(_PYTHONS):
    dispatch: ClassVar = dict(_PYTHONS.dispatch)

    def load_build(self) -> None:
        built = self.stack[-2]
        if isinstance(built, type) or not dataclasses.is_dataclass(built):  # it is shared with the rest of the program
            raise pickle.UnpicklingError(f"its metadata asks to change {built!r:.80}, which is not of tensors")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module_name: str, global_name: str) -> Any:
        if global_name in _IN_METADATA.get(module_name, ()):
            return super().find_class(module_name, global_name)
        if module_name == "torch" and isinstance(dtype := getattr(torch, global_name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"its metadata asks for {module_name}.{global_name}, which is not of tensors")
