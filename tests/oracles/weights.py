"""Tensors by their official names, and the places where an oracle can be told to round."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

Tensors = Mapping[str, np.ndarray]


def float64(tensors: Tensors) -> dict[str, np.ndarray]:
    """Every float tensor in float64; integer tables stay."""
    return {n: t if t.dtype.kind in "iu" else t.astype(np.float64) for n, t in tensors.items()}


def below(tensors: Tensors, prefix: str) -> dict[str, np.ndarray]:
    """The tensors whose names start with `prefix`, without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def identity(x: np.ndarray) -> np.ndarray:
    return x


class Rounding(NamedTuple):
    """The quantisation points as functions of an array; nothing is rounded by default.

    quantize_activations: Q1, rows [..., K] that enter an FP8 or FP4 linear.
    quantize_kv: Q2, rotated KV vectors and entries [..., head_dim].
    quantize_indexer: Q3, indexer queries and keys [..., index_head_dim] after Hadamard.
    """

    quantize_activations: Callable[[np.ndarray], np.ndarray] = identity
    quantize_kv: Callable[[np.ndarray], np.ndarray] = identity
    quantize_indexer: Callable[[np.ndarray], np.ndarray] = identity


EXACT = Rounding()
