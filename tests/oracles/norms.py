"""RMSNorm, float64."""

import numpy as np


def rms_norm(x: np.ndarray, weight: np.ndarray | float, eps: float) -> np.ndarray:
    """x / sqrt(mean(x²) + eps) · weight over the last axis; `weight=1.0` normalises only."""
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight
