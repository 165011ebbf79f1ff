"""What every kernel needs: where it runs, how it is launched, and checks of arguments."""

import math
from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor


class _NoTriton:
    """In the place of a Triton that is not installed, as beside torch's CPU build: what it decorates cannot run."""

    def __getattr__(self, name: str) -> "_NoTriton":
        return self

    def __call__(self, *arguments: Any, **options: Any) -> "_NoTriton":
        return self

    def __getitem__(self, grid: tuple[int, ...]) -> None:
        raise ModuleNotFoundError("kernels on a GPU need triton, which is not installed; pip install triton")


HAS_TRITON = find_spec("triton") is not None
if TYPE_CHECKING or HAS_TRITON:
    import triton
    import triton.language as tl
    from triton import knobs
else:
    triton = tl = knobs = _NoTriton()

IGNORE_TARGET = -100
_INTERPRETED = HAS_TRITON and knobs.runtime.interpret  # Triton too reads it when a kernel is defined


def backward_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For a backward pass that autograd cannot differentiate: raises RuntimeError under create_graph=True.

    torch's once_differentiable raises only if an upstream gradient has a graph, and else treats d_logits as constant.
    """

    @wraps(backward)
    def checked(ctx: Any, *grad_outputs: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("operations of flashgrpo are differentiable once; leave create_graph out")
        return backward(ctx, *grad_outputs)

    return checked


def check_index(name: str, index: Tensor, device: torch.device, length: int | None = None) -> None:
    """Raises unless `index` is an int32 or int64 tensor [length] on `device`; None: of any length above 0."""
    if not isinstance(index, Tensor):
        raise TypeError(f"{name} is {type(index).__name__}; wanted a tensor of int32 or int64")
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} is {index.dtype}; wanted int32 or int64")
    if index.dim() != 1 or (not index.shape[0] if length is None else index.shape[0] != length):
        wanted = "one dimension, with an entry or more" if length is None else f"[{length}]"
        raise ValueError(f"{name} has shape {tuple(index.shape)}; wanted {wanted}")
    if index.device != device:
        raise ValueError(f"{name} is on {index.device}; wanted {device}")


def check_temperature(temperature: float) -> None:
    """Raises unless `temperature` is a finite number above 0."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; wanted a finite number above 0")


def by_triton(x: Tensor) -> bool:
    """Whether a Triton kernel works on `x`: on CUDA, and under TRITON_INTERPRET=1 on a CPU; never in float64."""
    return x.dtype != torch.float64 and (x.is_cuda or _INTERPRETED)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Queues a Triton kernel on its first argument's device; nothing for an empty grid, which CUDA refuses."""
    if all(grid):
        with torch.cuda.device_of(arguments[0]):
            kernel[grid](*arguments, **options)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, fp32 for everything else."""
    return torch.promote_types(dtype, torch.float32)
