"""Gated feed-forward experts: routed and shared."""

import numpy as np

from tests.oracles.hyper_connections import sigmoid
from tests.oracles.router import Routing, route
from tests.oracles.weights import EXACT, Rounding, Tensors, below


def clamped_swiglu(gate: np.ndarray, up: np.ndarray, limit: float) -> np.ndarray:
    """silu(min(gate, limit)) · clamp(up, -limit, limit): the gate has no lower clamp."""
    gate = np.minimum(gate, limit)
    return gate * sigmoid(gate) * np.clip(up, -limit, limit)


def expert(
    x: np.ndarray,
    w: Tensors,
    limit: float,
    weight: np.ndarray | float = 1.0,
    rounding: Rounding = EXACT,
) -> np.ndarray:
    """w2 · (weight · swiglu(w1 · x, w3 · x)) for rows x [n, d]; weight [n, 1] or a number."""
    x = rounding.quantize_activations(x)
    hidden = clamped_swiglu(x @ w["w1.weight"].T, x @ w["w3.weight"].T, limit)
    return rounding.quantize_activations(weight * hidden) @ w["w2.weight"].T


def routed_experts(
    x: np.ndarray,
    weights: np.ndarray,
    ids: np.ndarray,
    w: Tensors,
    config: dict,
    rounding: Rounding = EXACT,
) -> np.ndarray:
    """Σ_k expert_{id_k}(x; weight_k) for x [T, d]; an id may occur twice in a row."""
    y = np.zeros_like(x)
    for e in range(config["n_routed_experts"]):
        w_e = below(w, f"{e}.")
        token, slot = np.nonzero(ids == e)
        out = expert(x[token], w_e, config["swiglu_limit"], weights[token, slot, None], rounding)
        np.add.at(y, token, out)
    return y


def moe(
    x: np.ndarray,
    token_ids: np.ndarray,
    w: Tensors,
    config: dict,
    rounding: Rounding = EXACT,
) -> tuple[np.ndarray, Routing]:
    """Returns (output [T, d], routing)."""
    routing = route(x, token_ids, below(w, "gate."), config)
    experts = below(w, "experts.")
    routed = routed_experts(x, routing.weights, routing.ids, experts, config, rounding)
    shared = below(w, "shared_experts.")
    return routed + expert(x, shared, config["swiglu_limit"], rounding=rounding), routing
