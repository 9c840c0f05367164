"""Exact top-k with the tie rule of the whole library: the lower index wins."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def topk_select(
    scores: Float[Array, "*batch n"], k: int, valid: Bool[Array, "*batch n"] | None = None
) -> tuple[Float[Array, "*batch k"], Int[Array, "*batch k"]]:
    """The k largest scores of each row, descending, with their indices.

    Args:
        scores: finite float32 [..., n].
        k: how many, 1 <= k <= n.
        valid: entries that may be chosen; all when omitted.

    Returns:
        (values, indices int32), [..., k] each. Equal scores are ordered by index, and -0.0 equals
        0.0. Rows with fewer than k valid entries end in value -inf, index -1.

    Raises:
        ValueError: k is not within [1, n].
    """
    n = scores.shape[-1]
    if not 1 <= k <= n:
        raise ValueError(f"k: got {k}, expected 1 <= k <= {n} (the row length)")
    scores = jnp.where(scores == 0, 0.0, scores)
    if valid is not None:
        scores = jnp.where(valid, scores, -jnp.inf)
    values, indices = jax.lax.top_k(scores, k)
    if valid is not None:
        indices = jnp.where(values == -jnp.inf, -1, indices)
    return values, indices
