"""The device and the compute type of a run; what GPUs can do, by their data sheets."""

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


MACHINES = {  # NVIDIA's data sheets of the SXM modules; a 400 Gbit/s adapter a GPU, 200 on A100
    "a100": Machine(312e12, 80e9, 2.04e12, 300e9, 25e9),
    "h100": Machine(989e12, 80e9, 3.35e12, 450e9, 50e9),
    "h200": Machine(989e12, 141e9, 4.8e12, 450e9, 50e9),
    "b200": Machine(2250e12, 180e9, 7.7e12, 900e9, 50e9),
}


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
