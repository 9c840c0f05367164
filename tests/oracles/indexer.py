"""Lightning indexer: which compressed entries a query attends to."""

from typing import NamedTuple

import numpy as np

from tests.oracles.compressor import compressor, num_visible
from tests.oracles.rotary import frequencies, rotate
from tests.oracles.topk import margin, top_k
from tests.oracles.weights import EXACT, Rounding, Tensors, below


class Selection(NamedTuple):
    """The ascending entry ids of each query, and the smallest margin of all the choices."""

    ids: list[np.ndarray]
    margin: float


def hadamard_matrix(n: int) -> np.ndarray:
    """Sylvester's matrix in natural order over sqrt(n)."""
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h / np.sqrt(n)


def scores(q: np.ndarray, keys: np.ndarray, head_weights: np.ndarray) -> np.ndarray:
    """q [h, c], keys [n, c], head_weights [h] to Σ_h w_h · relu(q_h · k_i), [n]."""
    return head_weights @ np.maximum(q @ keys.T, 0)


def keys(x: np.ndarray, w: Tensors, config: dict, rounding: Rounding = EXACT) -> np.ndarray:
    entries = compressor(x, below(w, "compressor."), 4, config)
    return rounding.quantize_indexer(entries @ hadamard_matrix(config["index_head_dim"]))


def queries(q_lora: np.ndarray, w: Tensors, config: dict, rounding: Rounding = EXACT) -> np.ndarray:
    h, c = config["index_n_heads"], config["index_head_dim"]
    q = (rounding.quantize_activations(q_lora) @ w["wq_b.weight"].T).reshape(-1, h, c)
    q = rotate(q, np.arange(len(q)), frequencies(config, 4))
    return rounding.quantize_indexer(q @ hadamard_matrix(c))


def select(
    x: np.ndarray, q_lora: np.ndarray, w: Tensors, config: dict, rounding: Rounding = EXACT
) -> Selection:
    """Normed x [T, d] and the low-rank query [T, q] to the entries that each query attends to."""
    h, c = config["index_n_heads"], config["index_head_dim"]
    head_weights = x @ w["weights_proj.weight"].T * (c**-0.5 * h**-0.5)
    k, q = keys(x, w, config, rounding), queries(q_lora, w, config, rounding)
    rows = [scores(q[p], k[: num_visible(p, 4)], head_weights[p]) for p in range(len(x))]
    top = config["index_topk"]
    return Selection([np.sort(top_k(s, top)) for s in rows], min(margin(s, top) for s in rows))
