"""From gate logits to experts and weights."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv4_jax.ops.topk import topk_select


def gate_scores(logits: Float[Array, "*batch e"]) -> Float[Array, "*batch e"]:
    """sqrt(softplus(logits)), float32, stable for large |logits|."""
    return jnp.sqrt(jax.nn.softplus(logits.astype(jnp.float32)))


def normalized_weights(
    scores: Float[Array, "*batch e"], ids: Int[Array, "*batch k"], scale: float
) -> Float[Array, "*batch k"]:
    """Scores at the chosen ids, divided by their sum, times `scale`."""
    chosen = jnp.take_along_axis(scores, ids, axis=-1)
    # The floor keeps a token whose scores all underflow from 0 / 0.
    return chosen / jnp.maximum(chosen.sum(-1, keepdims=True), 1e-20) * scale


def activation_topk(
    logits: Float[Array, "*batch e"], bias: Float[Array, "e"], top_k: int, scale: float
) -> tuple[Float[Array, "*batch k"], Int[Array, "*batch k"]]:
    """Scored routing: the bias decides who is chosen, the unbiased scores how much they weigh.

    Returns:
        (weights float32, ids int32), [..., k] each, by descending biased score; the lower expert
        wins ties.
    """
    scores = gate_scores(logits)
    biased = jax.lax.stop_gradient(scores + bias.astype(jnp.float32))
    ids = topk_select(biased, top_k)[1]
    return normalized_weights(scores, ids, scale), ids
