"""Rotary embedding of the last channels, in adjacent pairs; YaRN in layers that compress."""

import math

import numpy as np


def frequencies(config: dict, ratio: int) -> np.ndarray:
    """Radians per token of each channel pair, float64 [qk_rope_head_dim / 2]."""
    width = config["qk_rope_head_dim"]
    base = config["compress_rope_theta"] if ratio else config["rope_theta"]
    omega = np.array([base ** (-2 * j / width) for j in range(width // 2)])
    yarn = config.get("rope_scaling")
    if not ratio or yarn is None:
        return omega

    def pair(rotations: float) -> float:
        context = yarn["original_max_position_embeddings"]
        return width * math.log(context / (2 * math.pi * rotations)) / (2 * math.log(base))

    low = max(math.floor(pair(yarn["beta_fast"])), 0)
    high = min(math.ceil(pair(yarn["beta_slow"])), width - 1)
    t = np.clip((np.arange(width // 2) - low) / max(high - low, 1e-3), 0, 1)
    return omega * (1 - t) + omega / yarn["factor"] * t


def rotate(
    x: np.ndarray, positions: np.ndarray, omega: np.ndarray, inverse: bool = False
) -> np.ndarray:
    """Rotates x [T, ..., c] by positions [T]; the angle alone is one float32 product."""
    angle = (positions.astype(np.float32)[:, None] * omega.astype(np.float32)).astype(np.float64)
    angle = angle.reshape(len(x), *[1] * (x.ndim - 2), len(omega))
    cos, sin = np.cos(angle), np.sin(-angle if inverse else angle)
    rest = x.shape[-1] - 2 * len(omega)
    even, odd = x[..., rest::2], x[..., rest + 1 :: 2]
    y = x.copy()
    y[..., rest::2] = even * cos - odd * sin
    y[..., rest + 1 :: 2] = even * sin + odd * cos
    return y
