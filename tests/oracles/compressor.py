"""Compressors: the tokens of a block (and, with ratio 4, of the block before) to one entry."""

import numpy as np

from tests.oracles.norms import rms_norm
from tests.oracles.rotary import frequencies, rotate
from tests.oracles.weights import Tensors


def num_visible(p: int, ratio: int) -> int:
    """Entries whose last token is not after position p; ratio 0 has none."""
    return (p + 1) // ratio if ratio else 0


def softmax_pool(values: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Per channel: Σ_slot softmax(scores)_slot · values_slot over axis 0."""
    weights = np.exp(scores - scores.max(axis=0))
    return (weights * values).sum(axis=0) / weights.sum(axis=0)


def pool(a: np.ndarray, z: np.ndarray, ratio: int) -> np.ndarray:
    """Token values a and scores z [T, channels] to pooled entries [T // ratio, width].

    With ratio 4 the channels are two halves: the first is a token's part in the next block's
    entry, the second its part in its own block's.
    """
    width = a.shape[1] // 2 if ratio == 4 else a.shape[1]
    entries = []
    for i in range(len(a) // ratio):
        own = slice(ratio * i, ratio * (i + 1))
        before = slice(max(ratio * (i - 1), 0), ratio * i)
        if ratio == 4:
            values = np.concatenate([a[before, :width], a[own, width:]])
            scores = np.concatenate([z[before, :width], z[own, width:]])
        else:
            values, scores = a[own], z[own]
        entries.append(softmax_pool(values, scores))
    return np.array(entries).reshape(-1, width)


def compressor(x: np.ndarray, w: Tensors, ratio: int, config: dict) -> np.ndarray:
    """Normed hidden states x [T, d] from position 0 to rotated entries [T // ratio, width]."""
    a = x @ w["wkv.weight"].T
    z = x @ w["wgate.weight"].T + w["ape"][np.arange(len(x)) % ratio]
    entries = rms_norm(pool(a, z, ratio), w["norm.weight"], config["rms_norm_eps"])
    first_tokens = ratio * np.arange(len(entries))
    return rotate(entries, first_tokens, frequencies(config, ratio))
