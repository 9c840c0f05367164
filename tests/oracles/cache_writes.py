"""What new tokens leave in the caches: the window's ring, compressed entries, indexer keys.

Numbers are float64 and rounded to bfloat16 where the model's activations are.
"""

import numpy as np

from tests.oracles import formats
from tests.oracles.compressor import pool
from tests.oracles.indexer import hadamard_matrix
from tests.oracles.norms import rms_norm
from tests.oracles.rotary import rotate


def queries(q: np.ndarray, positions: np.ndarray, omega: np.ndarray, eps: float) -> np.ndarray:
    """q [T, h, c] normalised head by head and rotated; the last step is not rounded."""
    return rotate(formats.to_bfloat16(rms_norm(q, 1.0, eps)), positions, omega)


def window_entries(
    kv: np.ndarray, weight: np.ndarray, positions: np.ndarray, omega: np.ndarray, eps: float
) -> np.ndarray:
    """kv [T, c] normalised and rotated; the last step is not rounded."""
    return rotate(formats.to_bfloat16(rms_norm(kv, weight, eps)), positions, omega)


def compressed_entries(
    value: np.ndarray,
    gate: np.ndarray,
    ape: np.ndarray,
    weight: np.ndarray,
    omega: np.ndarray,
    eps: float,
) -> np.ndarray:
    """A sequence's value and gate [T, channels] to entries [T // ratio, w] before the last
    rounding; entry i is rotated at its first token."""
    ratio = len(ape)
    score = formats.to_float32(gate + ape[np.arange(len(gate)) % ratio])
    pooled = formats.to_bfloat16(pool(value, score, ratio))
    normalised = formats.to_bfloat16(rms_norm(pooled, weight, eps))
    return rotate(normalised, ratio * np.arange(len(pooled)), omega)


def keys(entries: np.ndarray) -> np.ndarray:
    """Entries as indexer keys, before the last rounding."""
    return formats.to_bfloat16(entries) @ hadamard_matrix(entries.shape[-1])


def running_softmax(score: np.ndarray, value: np.ndarray) -> np.ndarray:
    """(max, sum, weighted sum) over the first axis, [3, w]."""
    peak = score.max(axis=0)
    weights = np.exp(score - peak)
    return np.stack([peak, weights.sum(axis=0), (weights * value).sum(axis=0)])


def record(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Entries [..., 512] of bfloat16 values to bodies of 576 bytes and 8 bytes of scales."""
    codes, scales, _ = formats.fp8_rows(x[..., :448], 64)
    padding = np.zeros((*scales.shape[:-1], 1), np.uint8)
    return np.concatenate([codes, bfloat16_bytes(x[..., 448:])], -1), np.concatenate(
        [scales, padding], -1
    )


def float_scale_record(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Entries [..., 512] of bfloat16 values to bodies of 576 bytes and a float32."""
    values = x[..., :448].astype(np.float32)
    amax = np.maximum(np.abs(values).max(-1, keepdims=True), np.float32(1e-4))
    scale = amax * (np.float32(1) / np.float32(448))
    codes = formats.to_e4m3((values * (np.float32(1) / scale)).astype(np.float64))
    return np.concatenate([codes, bfloat16_bytes(x[..., 448:])], -1), scale


def key_record(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys [..., 128] to 64 bytes of code pairs and 4 of scales."""
    codes, scales, _ = formats.mxfp4(x)
    return formats.packed(codes), scales


def bfloat16_bytes(x: np.ndarray) -> np.ndarray:
    """The upper halves of float32 numbers whose lower halves are zero, little-endian."""
    bits = (np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16).astype("<u2")
    return bits.view(np.uint8)
