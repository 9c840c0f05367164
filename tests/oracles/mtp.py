"""Multi-token prediction: one more block over the backbone's streams and the next token."""

import numpy as np

from tests.oracles.model import block, logits_of
from tests.oracles.norms import rms_norm
from tests.oracles.weights import Rounding, Tensors, below, float64


def draft(
    config: dict, tensors: Tensors, streams: np.ndarray, next_ids: np.ndarray, **rounding
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (logits [T, V], streams [T, n, d] for a further step) of the first MTP block.

    streams [T, n, d] are the backbone's before its final collapse, next_ids [T] the token after
    each position; position t of the block is position t of the backbone.
    """
    tensors = float64(tensors)
    w, quantize = below(tensors, "mtp.0."), Rounding(**rounding)
    eps = config["rms_norm_eps"]
    embedded = rms_norm(tensors["embed.weight"][next_ids], w["enorm.weight"], eps)
    normed = rms_norm(streams, w["hnorm.weight"], eps)
    streams = (
        quantize.quantize_activations(embedded)[:, None] @ w["e_proj.weight"].T
        + quantize.quantize_activations(normed) @ w["h_proj.weight"].T
    )
    streams, *_ = block(streams, next_ids, w, 0, config, quantize)
    return logits_of(streams, w, tensors["head.weight"], config), streams
