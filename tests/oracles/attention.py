"""Attention of one layer: a sliding window, compressed entries and a sink."""

import numpy as np

from tests.oracles import indexer
from tests.oracles.compressor import compressor, num_visible
from tests.oracles.norms import rms_norm
from tests.oracles.rotary import frequencies, rotate
from tests.oracles.weights import EXACT, Rounding, Tensors, below


def window(p: int, size: int) -> np.ndarray:
    """Positions that a query at p sees directly: itself and the size - 1 before it."""
    return np.arange(max(0, p - size + 1), p + 1)


def core_attention(q: np.ndarray, kv: np.ndarray, sink: np.ndarray, scale: float) -> np.ndarray:
    """q [h, c], keys and values in one kv [s, c], a value-less logit sink [h], to [h, c]."""
    return softmax_with_sink(scale * q @ kv.T, sink) @ kv


def softmax_with_sink(logits: np.ndarray, sink: np.ndarray) -> np.ndarray:
    """exp(logit_s) / (Σ_s exp(logit_s) + exp(sink)) for logits [h, s], sink [h]."""
    highest = np.maximum(logits.max(axis=1, initial=-np.inf), sink)[:, None]
    weights = np.exp(logits - highest)
    return weights / (weights.sum(axis=1, keepdims=True) + np.exp(sink[:, None] - highest))


def project_out(o: np.ndarray, w: Tensors, config: dict, rounding: Rounding = EXACT) -> np.ndarray:
    """o [T, h, c]: consecutive groups of heads, a low-rank matrix each, then one to d."""
    groups, rank = config["o_groups"], config["o_lora_rank"]
    grouped = o.reshape(len(o), groups, -1)
    wo_a = w["wo_a.weight"].reshape(groups, rank, -1)
    low = np.einsum("tgi,goi->tgo", grouped, wo_a).reshape(len(o), -1)
    return rounding.quantize_activations(low) @ w["wo_b.weight"].T


def attention(
    x: np.ndarray,
    w: Tensors,
    ratio: int,
    config: dict,
    rounding: Rounding = EXACT,
    first_position: int = 0,
) -> tuple[np.ndarray, indexer.Selection | None]:
    """Normed x [T, d] of one sequence to (output [T, d], the selection of a CSA layer).

    `first_position` moves all positions of a window-only layer.
    """
    t, h, c = len(x), config["num_attention_heads"], config["head_dim"]
    eps = config["rms_norm_eps"]
    positions = first_position + np.arange(t)
    omega = frequencies(config, ratio)

    x8 = rounding.quantize_activations(x)
    q_lora = rms_norm(x8 @ w["wq_a.weight"].T, w["q_norm.weight"], eps)
    q = (rounding.quantize_activations(q_lora) @ w["wq_b.weight"].T).reshape(t, h, c)
    q = rotate(rms_norm(q, 1.0, eps), positions, omega)
    kv = rms_norm(x8 @ w["wkv.weight"].T, w["kv_norm.weight"], eps)
    kv = rounding.quantize_kv(rotate(kv, positions, omega))

    entries = np.zeros((0, c))
    if ratio:
        entries = compressor(x, below(w, "compressor."), ratio, config)
        entries = rounding.quantize_kv(entries)
    selection = None
    if ratio == 4:
        selection = indexer.select(x, q_lora, below(w, "indexer."), config, rounding)

    o = np.empty_like(q)
    for p in range(t):
        seen = selection.ids[p] if selection else np.arange(num_visible(p, ratio))
        kv_seen = np.concatenate([kv[window(p, config["sliding_window"])], entries[seen]])
        o[p] = core_attention(q[p], kv_seen, w["attn_sink"], c**-0.5)
    o = rotate(o, positions, omega, inverse=True)
    return project_out(o, w, config, rounding), selection
