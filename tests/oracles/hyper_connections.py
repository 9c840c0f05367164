"""Residual streams: collapse before a sub-block, spread after it, collapse at the end."""

import numpy as np

from tests.oracles.norms import rms_norm


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


def sinkhorn(logits: np.ndarray, num_iterations: int, eps: float) -> np.ndarray:
    """[..., j, k]: softmax over k, then alternating sums to 1; the last one is over j."""
    b = np.exp(logits - logits.max(axis=-1, keepdims=True))
    b = b / b.sum(axis=-1, keepdims=True) + eps
    b = b / (b.sum(axis=-2, keepdims=True) + eps)
    for _ in range(num_iterations - 1):
        b = b / (b.sum(axis=-1, keepdims=True) + eps)
        b = b / (b.sum(axis=-2, keepdims=True) + eps)
    return b


def projected(streams: np.ndarray, fn: np.ndarray, config: dict) -> np.ndarray:
    v = streams.reshape(len(streams), -1)
    return rms_norm(v, 1.0, config["rms_norm_eps"]) @ fn.T


def hc_pre(
    streams: np.ndarray, fn: np.ndarray, scale: np.ndarray, base: np.ndarray, config: dict
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Streams [T, n, d] to (u [T, d], post [T, n], comb [T, n (from), n (to)])."""
    n, eps = config["hc_mult"], config["hc_eps"]
    m = projected(streams, fn, config)
    pre = sigmoid(m[:, :n] * scale[0] + base[:n]) + eps
    post = 2 * sigmoid(m[:, n : 2 * n] * scale[1] + base[n : 2 * n])
    logits = (m[:, 2 * n :] * scale[2] + base[2 * n :]).reshape(-1, n, n)
    comb = sinkhorn(logits, config["hc_sinkhorn_iters"], eps)
    return np.einsum("tj,tjd->td", pre, streams), post, comb


def hc_post(
    output: np.ndarray, streams: np.ndarray, post: np.ndarray, comb: np.ndarray
) -> np.ndarray:
    """X'_k = post_k · output + Σ_j comb[j, k] · X_j."""
    return post[:, :, None] * output[:, None, :] + np.einsum("tjk,tjd->tkd", comb, streams)


def hc_head(
    streams: np.ndarray, fn: np.ndarray, scale: np.ndarray, base: np.ndarray, config: dict
) -> np.ndarray:
    weights = sigmoid(projected(streams, fn, config) * scale + base) + config["hc_eps"]
    return np.einsum("tj,tjd->td", weights, streams)
