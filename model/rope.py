"""Rotary position embedding: x is rotated by the angle position * frequency in each plane (i, i + head_dim / 2).

Scalings stretch a model beyond the context it was trained on by lowering frequencies: `linear` all of them (position
interpolation, Chen et al. 2023), `llama3` those whose wavelength exceeds the trained context, `yarn` by a ramp between
the two (Peng et al. 2023), which also multiplies cos and sin by `attention_factor`. The formulas and their order in
fp32 are those of transformers, so that a checkpoint sees the angles it was trained with.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """Frequencies theta^(-2 i / head_dim) and their scaling; `kind` is default, linear, llama3 or yarn."""

    theta: float
    kind: str = "default"
    factor: float = 1.0  # how far the context is stretched
    original_context: int = 0  # tokens; the context before stretching (llama3, yarn)
    low_freq_factor: float = 1.0  # llama3: wavelengths beyond original_context / low_freq_factor are stretched in full
    high_freq_factor: float = 4.0  # llama3: those below original_context / high_freq_factor are left alone
    beta_fast: float = 32.0  # yarn: planes that turn more often than this over original_context are left alone
    beta_slow: float = 1.0  # yarn: planes that turn less often are stretched in full
    attention_factor: float = 1.0  # yarn: cos and sin are multiplied by this


def rotary_cos_sin(
    rope: Rope,
    head_dim: int,
    position_ids: Tensor,  # [n]
) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, each [n, 1, head_dim] fp32: one table for all heads and layers.

    The first half of sin is negated, which makes the rotation x cos + swapped(x) sin with the halves of x swapped.
    """
    angles = position_ids[:, None, None].float() * _signed_frequencies(rope, head_dim, position_ids.device)
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if rope.attention_factor == 1 else (cos * rope.attention_factor, sin * rope.attention_factor)


def apply_rope(
    x: Tensor,  # [n, num_heads, head_dim]
    cos: Tensor,  # [n, 1, head_dim]
    sin: Tensor,  # [n, 1, head_dim]
) -> Tensor:
    """x rotated, in x's dtype; computed in fp32 or better and rounded once."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


@functools.cache
def _signed_frequencies(rope: Rope, head_dim: int, device: torch.device) -> Tensor:
    """Minus the frequencies, then the frequencies, [head_dim]; cached, so that no step copies it to the device."""
    frequencies = inverse_frequencies(rope, head_dim)
    return torch.cat((-frequencies, frequencies)).to(device)


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians per position of every plane, [head_dim / 2] fp32, on the CPU."""
    wavelengths = rope.theta ** (torch.arange(0, head_dim, 2, device="cpu").float() / head_dim)
    frequencies = 1.0 / wavelengths
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    elif rope.kind == "llama3":
        frequencies = _llama3(rope, frequencies)
    elif rope.kind == "yarn":
        kept = 1 - _yarn_ramp(rope, head_dim)
        frequencies = 1.0 / (rope.factor * wavelengths) * (1 - kept) + frequencies * kept
    return frequencies


def _llama3(rope: Rope, frequencies: Tensor) -> Tensor:
    """Long wavelengths divided by `factor`, short ones kept, a linear blend in between."""
    wavelengths = 2 * math.pi / frequencies
    turns = rope.original_context / wavelengths
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - blend) * frequencies / rope.factor + blend * frequencies
    stretched = torch.where(
        wavelengths > rope.original_context / rope.low_freq_factor, frequencies / rope.factor, blended
    )
    return torch.where(wavelengths < rope.original_context / rope.high_freq_factor, frequencies, stretched)


def _yarn_ramp(rope: Rope, head_dim: int) -> Tensor:
    """Share of the stretched frequency in each plane, [head_dim / 2], rising from 0 to 1."""

    def plane_that_turns(times: float) -> float:
        return head_dim * math.log(rope.original_context / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = math.floor(plane_that_turns(rope.beta_fast)), math.ceil(plane_that_turns(rope.beta_slow))
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    return ((torch.arange(head_dim // 2, device="cpu").float() - low) / width).clamp(0, 1)
