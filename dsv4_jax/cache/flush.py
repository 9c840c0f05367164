"""From per-token rows to compressed entries: pooling with what earlier chunks left behind.

A compressor gives every token a row (value, gate score) per channel. An entry is the per-channel
softmax-weighted sum of the rows of its tokens. Tokens arrive in chunks of any size, so what an
unfinished entry needs waits in a tail. The flush always runs; how many entries a chunk completes
is data, not control flow.

Shapes: b sequences, t rows in the chunk, w channels. `start` is the position of the chunk's first
row, `length` how many of its rows count.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv4_jax.cache.state import Recent, advance_ring

OVERLAP_RATIO = 4
OVERLAP_ROWS = 2 * OVERLAP_RATIO


@dataclass(frozen=True)
class Completed:
    """Which entries a chunk completes.

    Attributes:
        first: [b] id of the first.
        count: [b] how many.
        bound: how many at most.
    """

    first: Int[Array, "b"]
    count: Int[Array, "b"]
    bound: int

    @classmethod
    def by(
        cls, start: Int[Array, "b"], length: Int[Array, "b"], num_tokens: int, ratio: int
    ) -> "Completed":
        first = start // ratio
        return cls(first, (start + length) // ratio - first, -(-num_tokens // ratio))

    @property
    def ids(self) -> Int[Array, "b n"]:
        return self.first[:, None] + jnp.arange(self.bound)


def pool_overlapping(recent: Recent, completed: Completed) -> Float[Array, "b n w"]:
    """Entries of 4 tokens that also pool the 4 tokens before (CSA, indexer keys).

    Args:
        recent: rows [b, m, 2, 2w] float32 (value, score): the first half of the channels is a
            token's role in the next entry, the second half in its own.
        completed: ids to pool.

    Returns:
        float32; entries past `completed.count` are undefined.
    """
    (rows,) = recent.rows()
    b, width = rows.shape[0], rows.shape[-1] // 2

    def at(position: Int[Array, "b n 4"], half: slice) -> Float[Array, "b n 4 2 w"]:
        """Rows at absolute positions; score -inf where there is no such token."""
        index = recent.index(position.reshape(b, -1))[..., None, None]
        found = jnp.take_along_axis(rows[..., half], index, axis=1)
        found = found.reshape(*position.shape, 2, width)
        absent = jnp.array([0.0, -jnp.inf], rows.dtype)[:, None]
        return jnp.where((position < 0)[..., None, None], absent, found)

    own = completed.ids[..., None] * OVERLAP_RATIO + jnp.arange(OVERLAP_RATIO)
    pooled = jnp.concatenate(
        [at(own - OVERLAP_RATIO, slice(None, width)), at(own, slice(width, None))], axis=2
    )
    weights = jax.nn.softmax(pooled[..., 1, :], axis=2)
    return (weights * pooled[..., 0, :]).sum(axis=2)


def advance_overlapping(
    tails: Float[Array, "l s 8 2 w2"],
    layer: int,
    start: Int[Array, "b"],
    length: Int[Array, "b"],
    rows: Float[Array, "b t 2 w2"],
) -> tuple[Float[Array, "l s 8 2 w2"], Float[Array, "b n w"]]:
    """Remembers the chunk's rows; (tails, what `pool_overlapping` makes of the old and the new)."""
    (tails,), recent = advance_ring((tails,), layer, start, length, (rows,), OVERLAP_ROWS)
    completed = Completed.by(start, length, rows.shape[1], OVERLAP_RATIO)
    return tails, pool_overlapping(recent, completed)


def advance_running(
    tails: Float[Array, "l s 3 w"],
    layer: int,
    start: Int[Array, "b"],
    length: Int[Array, "b"],
    rows: Float[Array, "b t 2 w"],
    ratio: int,
) -> tuple[Float[Array, "l s 3 w"], Float[Array, "b n w"]]:
    """Folds the chunk's rows into the running softmaxes; (tails, the entries it completes)."""
    b, t = rows.shape[:2]
    states = accumulate(rows, tails[layer, :b], start, length, ratio)
    # The entry of the last token waits in the tail, complete or not; a token that begins an
    # entry does not read it.
    last = (start + length - 1) // ratio - start // ratio
    tail = jnp.take_along_axis(states, jnp.maximum(last, 0)[:, None, None, None], axis=1)
    slot = jnp.where(length > 0, jnp.arange(b), tails.shape[1])
    tails = tails.at[layer, slot].set(tail[:, 0], mode="drop")
    if t == 1:
        # Read back for the same reason as in `advance_ring`.
        states = tails[layer, :b, None]
    return tails, weighted_mean(states)[:, : Completed.by(start, length, t, ratio).bound]


def accumulate(
    rows: Float[Array, "b t 2 w"],
    tail: Float[Array, "b 3 w"],
    start: Int[Array, "b"],
    length: Int[Array, "b"],
    ratio: int,
) -> Float[Array, "b n 3 w"]:
    """Running softmax of the entries of `ratio` tokens (HCA) that the chunk's tokens belong to.

    Args:
        rows: float32 (value, score) of the chunk.
        tail: (max, sum, weighted sum) of entry start // ratio so far; ignored where `start` is its
            first token.

    Returns:
        (max, sum, weighted sum) of entries start // ratio onwards; (-inf, 0, 0) without tokens.
    """
    b, t = rows.shape[:2]
    num_entries = (t + ratio - 2) // ratio + 1
    entry = (start // ratio)[:, None] + jnp.arange(num_entries)
    begin = jnp.maximum(entry * ratio - start[:, None], 0)
    end = jnp.minimum((entry + 1) * ratio - start[:, None], length[:, None])
    index = begin[..., None] + jnp.arange(min(ratio, t))
    taken = (index < end[..., None])[..., None]
    index = jnp.clip(index, 0, t - 1).reshape(b, -1, 1, 1)
    found = jnp.take_along_axis(rows, index, axis=1).reshape(b, num_entries, -1, *rows.shape[2:])
    value, score = found[..., 0, :], jnp.where(taken, found[..., 1, :], -jnp.inf)

    carried = (start % ratio > 0)[:, None, None] & (jnp.arange(num_entries) == 0)[:, None]
    tail_max, tail_sum, tail_weighted = jnp.split(tail, 3, axis=1)
    tail_max = jnp.where(carried, tail_max, -jnp.inf)
    peak = jnp.maximum(tail_max, jax.lax.stop_gradient(score).max(axis=2))
    reference = jnp.where(jnp.isfinite(peak), peak, 0.0)
    kept = jnp.exp(tail_max - reference)
    weights = jnp.exp(score - reference[:, :, None])
    total = weights.sum(axis=2) + kept * jnp.where(carried, tail_sum, 0.0)
    weighted = (weights * value).sum(axis=2) + kept * jnp.where(carried, tail_weighted, 0.0)
    return jnp.stack([peak, total, weighted], axis=2)


def weighted_mean(states: Float[Array, "b n 3 w"]) -> Float[Array, "b n w"]:
    """The entries of running softmaxes; 0 for one without tokens."""
    total, weighted = states[:, :, 1], states[:, :, 2]
    return weighted / jnp.where(total > 0, total, 1.0)
