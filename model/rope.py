"""Rotary position embedding: x is rotated by the angle position * frequency in each plane (i, i + head_dim / 2)."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """Angles of a model; whatever stretches its context is in them already (`ModelConfig.from_dict`)."""

    frequencies: tuple[float, ...]  # [head_dim / 2], radians per position in every plane; fp32 numbers
    scale: float  # of cos and sin (YaRN, Peng et al. 2023)


def rotary_cos_sin(
    rope: Rope,
    position_ids: Tensor,  # [n]
) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, each [n, 1, head_dim] fp32: one table for all heads and layers.

    The first half of sin is negated, which makes the rotation x cos + swapped(x) sin with the halves of x swapped.
    """
    angles = position_ids[:, None, None].float() * _signed_frequencies(rope, position_ids.device)
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if rope.scale == 1 else (cos * rope.scale, sin * rope.scale)


@functools.cache
def _signed_frequencies(rope: Rope, device: torch.device) -> Tensor:
    """Minus the frequencies, then the frequencies, [head_dim]; cached, so that no step copies it to the device."""
    frequencies = torch.tensor(rope.frequencies, dtype=torch.float32, device="cpu")
    return torch.cat((-frequencies, frequencies)).to(device)
