"""Choosing the largest, and how close the choice was."""

import numpy as np


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest of scores [n], best first; among equals the lower index first."""
    return np.argsort(-scores, kind="stable")[:k]


def margin(scores: np.ndarray, k: int) -> float:
    """Score of the last one taken minus that of the first one left; inf when all are taken."""
    if len(scores) <= k:
        return np.inf
    ordered = -np.sort(-scores)
    return ordered[k - 1] - ordered[k]
