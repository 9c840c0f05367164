"""Lightning indexer: which compressed entries a query attends to."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsv4_jax.ops.product import product
from dsv4_jax.ops.topk import topk_select

# Keys scored at a time: bounds the [queries, heads, keys] intermediate of long contexts.
_KEY_BLOCK = 4096


def indexer_scores(
    q: Float[Array, "b t h c"], keys: Float[Array, "b n c"], weights: Float[Array, "b t h"]
) -> Float[Array, "b t n"]:
    """I = Σ_h weights_h · relu(q_h · k), accumulated in float32.

    Args:
        q: indexer queries.
        keys: one key per compressed entry.
        weights: float32 head weights, scale included; may be negative.
    """

    def score(block: Array) -> Array:
        dots = product("bthc,bnc->bthn", q, block)
        return product("bth,bthn->btn", weights, jax.nn.relu(dots))

    b, n, c = keys.shape
    if n <= _KEY_BLOCK:
        return score(keys)
    blocks = -(-n // _KEY_BLOCK)
    padded = jnp.pad(keys, ((0, 0), (0, blocks * _KEY_BLOCK - n), (0, 0)))
    scores = jax.lax.map(score, padded.reshape(b, blocks, _KEY_BLOCK, c).swapaxes(0, 1))
    return jnp.moveaxis(scores, 0, 2).reshape(b, q.shape[1], blocks * _KEY_BLOCK)[..., :n]


def indexer_topk(
    q: Float[Array, "b t h c"],
    keys: Float[Array, "b n c"],
    weights: Float[Array, "b t h"],
    visible: Bool[Array, "b t n"],
    top_k: int,
) -> Int[Array, "b t k"]:
    """Ids of the top_k visible entries by `indexer_scores`; -1 where there are fewer.

    The lower id wins ties. No gradient flows through the choice.
    """
    scores = jax.lax.stop_gradient(indexer_scores(q, keys, weights))
    return topk_select(scores, top_k, visible)[1]
