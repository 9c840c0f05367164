"""Which experts a token goes to, and with what weights."""

from typing import NamedTuple

import numpy as np

from tests.oracles.topk import margin, top_k
from tests.oracles.weights import Tensors


class Routing(NamedTuple):
    """weights and expert ids [T, k], and the smallest margin of the choices (inf for a table)."""

    weights: np.ndarray
    ids: np.ndarray
    margin: float


def sqrt_softplus(x: np.ndarray) -> np.ndarray:
    return np.sqrt(np.logaddexp(0, x))


def normalized(scores: np.ndarray, ids: np.ndarray, factor: float) -> np.ndarray:
    gathered = np.take_along_axis(scores, ids, axis=-1)
    return gathered / gathered.sum(axis=-1, keepdims=True) * factor


def scored_ids(scores: np.ndarray, bias: np.ndarray, k: int) -> np.ndarray:
    """The k experts with the largest score plus bias, best first, lower id first among equals."""
    return np.array([top_k(row, k) for row in scores + bias]).reshape(-1, k)


def route(x: np.ndarray, token_ids: np.ndarray, w: Tensors, config: dict) -> Routing:
    """Routes x [T, d]; a table `tid2eid` in w chooses by token id, the scores weigh."""
    scores = sqrt_softplus(x @ w["weight"].T)
    k, smallest = config["num_experts_per_tok"], np.inf
    if "tid2eid" in w:
        ids = w["tid2eid"][token_ids]
    else:
        ids = scored_ids(scores, w["bias"], k)
        smallest = min(margin(row, k) for row in scores + w["bias"])
    return Routing(normalized(scores, ids, config["routed_scaling_factor"]), ids, smallest)
