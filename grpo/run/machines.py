"""The device and the compute type of a run; what GPUs can do, by their data sheets."""

import dataclasses
import math
import os
import re
from dataclasses import dataclass

import torch

from flashgrpo.grpo.errors import RecipeError


@dataclass(frozen=True)
class Machine:
    """Rates are a GPU's: FLOPs and bytes a second, links in one direction; memory is in bytes."""

    flops: float  # dense bf16
    memory: float
    memory_rate: float
    node_rate: float  # between GPUs of a node
    network_rate: float  # between nodes
    gpus_per_node: int = 8
    reserve: float = 3e9  # CUDA context, NCCL's buffers, cuBLAS' workspace: assumed
    is_cpu: bool = False  # counts what is kept on a CPU, in fp32
    segments_grow: bool = True  # those of torch's allocator can, so that less is lost between tensors


MACHINES = {  # NVIDIA's data sheets of the SXM modules; a 400 Gbit/s adapter a GPU, 200 on A100
    "a100": Machine(312e12, 80e9, 2.04e12, 300e9, 25e9),
    "h100": Machine(989e12, 80e9, 3.35e12, 450e9, 50e9),
    "h200": Machine(989e12, 141e9, 4.8e12, 450e9, 50e9),
    "b200": Machine(2250e12, 180e9, 7.7e12, 900e9, 50e9),
}


# Its memory is shared, and asked for by nobody; rates are not known.
_CPU = Machine(0.0, math.inf, 0.0, 0.0, 0.0, reserve=0.0, is_cpu=True)


def machine_of(device: torch.device) -> Machine:
    """What memory a run has; the rates of a GPU that is not known are an H100's."""
    if device.type != "cuda":
        return _CPU
    found = torch.cuda.get_device_properties(device)
    words = re.split(r"[ -]", found.name.lower())
    known = next((machine for name, machine in MACHINES.items() if name in words), MACHINES["h100"])
    theirs = allocator_settings()
    grow = not torch.version.hip and all("expandable_segments:true" in text.lower() for text in theirs.values())
    return dataclasses.replace(known, memory=float(found.total_memory), segments_grow=grow)


def allocator_settings() -> dict[str, str]:
    """What the user has set of torch's allocator, by the variable's name."""
    names = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"
    return {name: os.environ[name] for name in names if os.environ.get(name)}


def hold_reserve(device: torch.device, reserve: float, grows: bool) -> None:
    """Leave `reserve` bytes of a GPU to what torch's allocator knows nothing of: NCCL, cuBLAS, a sleeping engine.

    `grows`: with segments that grow, between which less is lost, unless the user has set the allocator's options. To
    be called before anything is loaded.
    """
    if device.type != "cuda":
        return
    if not allocator_settings():
        # Not by the environment: it would be an engine's, too, and torch may have read it. Another stage of a pipeline
        # may want the other.
        torch._C._accelerator_setAllocatorSettings(f"expandable_segments:{grows}")
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(max(0.0, 1 - reserve / total), device)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU as `torch.cuda.get_device_name` calls it, "NVIDIA H100 80GB HBM3"; None: not known.

    PCIe cards and slower modules of the same chips have other rates.
    """
    words = re.split(r"[ -]", device_name.lower())
    slower = {"pcie", "nvl", "mig"} & set(words)
    return None if slower else next((m.flops for name, m in MACHINES.items() if name in words), None)


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise RecipeError("run.device = cuda, but torch finds no CUDA device; use run.device = cpu or auto")
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on CUDA, float32 on a CPU."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, name)
