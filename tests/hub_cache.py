"""A cache of the Hugging Face hub as its client lays it out, with nothing of the hub behind it."""

from pathlib import Path

from huggingface_hub import constants


def put(cache: Path, name: str, revision: str, folder: Path, branch: str = "main") -> Path:
    """The files of a folder as a revision of a model, and the newest of its branch; returns the snapshot."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot, blobs, refs = repository / "snapshots" / revision, repository / "blobs", repository / "refs"
    for each in (snapshot, blobs, refs):
        each.mkdir(parents=True, exist_ok=True)
    (refs / branch).write_text(revision)
    for file in folder.iterdir():
        blob = blobs / f"{revision}-{file.name}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


def offline(monkeypatch, cache: Path) -> Path:
    """The client reads `cache`, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache
