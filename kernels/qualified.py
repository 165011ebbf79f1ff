"""What the kernels of attention_gluon.py have won on this machine: `flashgrpo bench attention --qualify` writes it, and
backend "auto" reads it.

An entry of attention.json, in the user's cache, is of one chip, one Triton and one text of the kernels.
"""

import functools
import hashlib
import json
import os
from pathlib import Path

import torch

from flashgrpo.kernels.common import triton

_SOURCES = ("attention_gluon.py", "attention_plan.py", "attention.py")


def cache_path() -> Path:
    """attention.json, in the folder of the user's cache."""
    # Unlike Path.home() this raises nothing where there is no home, as in some containers.
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder) / "flashgrpo" / "attention.json"


def machine_key(device: torch.device) -> str:
    """What a qualification is of."""
    texts = b"".join(Path(__file__).with_name(name).read_bytes() for name in _SOURCES)
    chip = torch.cuda.get_device_name(device)
    return f"{chip}, triton {triton.__version__}, kernels {hashlib.sha256(texts).hexdigest()[:12]}"


def input_key(head_dim: int, dtype: torch.dtype) -> str:
    """What a winner is of."""
    return f"head_dim {head_dim}, {str(dtype).removeprefix('torch.')}"


def read_winners() -> dict[str, dict[str, str]]:
    """By `machine_key`, then by `input_key`, "gluon" or "triton"; nothing of a file, or an entry, that is damaged."""
    try:
        found = json.loads(cache_path().read_text())
    except (OSError, ValueError, RecursionError):
        found = None
    entries = found.items() if isinstance(found, dict) else ()
    return {machine: winners for machine, winners in entries if isinstance(winners, dict)}


@functools.cache
def _winners(device: torch.device) -> tuple[str, ...]:
    winners = read_winners().get(machine_key(device), {})
    return tuple(key for key, winner in winners.items() if winner == "gluon")


@torch.compiler.assume_constant_result  # of a function without a cache: torch.compile would look through that
def gluon_wins(device: torch.device) -> tuple[str, ...]:
    """By `input_key`, what "gluon" has won on this machine."""
    return _winners(device)
