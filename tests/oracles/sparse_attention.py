"""Attention over cache records: one query of a sequence whose whole history is at hand."""

import numpy as np

from tests.oracles.attention import core_attention, window
from tests.oracles.formats import E4M3, E8M0
from tests.oracles.rotary import rotate


def record_values(bodies: np.ndarray, scales: np.ndarray, rope_dim: int) -> np.ndarray:
    """bodies [..., d + rope_dim], scales [..., 8] to the entries [..., d]."""
    plain = bodies.shape[-1] - 2 * rope_dim
    groups = plain // 64
    factors = np.repeat(E8M0[scales[..., :groups]], 64, -1)
    low, high = bodies[..., plain::2], bodies[..., plain + 1 :: 2]
    bits = (low.astype(np.uint32) << 16) | (high.astype(np.uint32) << 24)
    rotary = bits.view(np.float32).astype(np.float64)
    return np.concatenate([E4M3[bodies[..., :plain]] * factors, rotary], -1)


def attend(
    q: np.ndarray,
    position: int,
    tokens: np.ndarray,
    entries: np.ndarray,
    chosen: np.ndarray,
    sink: np.ndarray,
    scale: float,
    window_size: int,
    omega: np.ndarray,
) -> np.ndarray:
    """q [h, c] at `position` to its output, rotated back.

    `tokens` [n, c] are the newest of the sequence, the last at `position`; of the compressed
    `entries` [m, c] it sees those of the ids `chosen`.
    """
    age = position - window(position, window_size)
    seen = np.concatenate([tokens[len(tokens) - 1 - age], entries[chosen]])
    o = core_attention(q, seen, sink, scale)
    return rotate(o[None], np.array([position]), omega, inverse=True)[0]
