"""Fixed-size state per slot: rings addressed by position, position p at slot p mod ring.

A ring is an array [layer, slot, ring, ...]. What an earlier sequence left in it lies at positions
that the present one has not reached, and is never read: a recycled slot needs no clearing.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Int


@dataclass(frozen=True)
class Recent:
    """The newest rows of every sequence.

    Attributes:
        held: arrays [b, ring, ...], the ring.
        new: arrays [b, n, ...] that follow it, the chunk; n = 0 if the ring has it already.
        end: [b] one past the last position in the ring.
    """

    held: tuple[Array, ...]
    new: tuple[Array, ...]
    end: Int[Array, "b"]

    def positions(self) -> Int[Array, "b n"]:
        """The position of each row of `held` followed by `new`; negative if there is none."""
        ring, num_new = self.held[0].shape[1], self.new[0].shape[1]
        last = (self.end - 1)[:, None]
        held = last - (last - jnp.arange(ring)) % ring
        return jnp.concatenate([held, self.end[:, None] + jnp.arange(num_new)], axis=1)

    def rows(self) -> tuple[Array, ...]:
        """`held` followed by `new`."""
        return tuple(
            jnp.concatenate(pair, axis=1) for pair in zip(self.held, self.new, strict=True)
        )

    def index(self, position: Int[Array, "b n"]) -> Int[Array, "b n"]:
        """Where in `rows` a position lies, if it is there at all."""
        ring, num_new = self.held[0].shape[1], self.new[0].shape[1]
        after = position - self.end[:, None]
        return jnp.where(after < 0, position % ring, ring + jnp.clip(after, 0, max(num_new - 1, 0)))


def write_ring(
    ring: Array, layer: int, start: Int[Array, "b"], length: Int[Array, "b"], rows: Array
) -> Array:
    """Writes the last ring-full of each sequence's `length` new rows; rows are [b, t, ...]."""
    size = ring.shape[2]
    token = jnp.arange(rows.shape[1])
    kept = (token < length[:, None]) & (token >= length[:, None] - size)
    slot = jnp.where(kept, (start[:, None] + token) % size, size)
    sequence = jnp.arange(rows.shape[0])[:, None]
    return ring.at[layer, sequence, slot].set(rows.astype(ring.dtype), mode="drop")


def advance_ring(
    rings: tuple[Array, ...],
    layer: int,
    start: Int[Array, "b"],
    length: Int[Array, "b"],
    rows: tuple[Array, ...],
    needed: int,
) -> tuple[tuple[Array, ...], Recent]:
    """Writes a chunk and returns what its tokens may read.

    Args:
        rings: arrays [layer, slot, ring, ...].
        start, length: of the chunk.
        rows: the chunk's arrays [b, t, ...].
        needed: how many rows back, itself included, a token reads.

    Returns:
        (rings, recent). Where the ring can take the chunk and still hold what the first token
        needs, as for every single token, the rows are read back from the written ring: a read
        of the old one beside the write would cost a copy of it.
    """
    b, t = rows[0].shape[:2]
    written = tuple(
        write_ring(ring, layer, start, length, new) for ring, new in zip(rings, rows, strict=True)
    )
    if rings[0].shape[2] >= needed + t - 1:
        held = tuple(ring[layer, :b] for ring in written)
        return written, Recent(held, tuple(new[:, :0] for new in rows), start + length)
    return written, Recent(tuple(ring[layer, :b] for ring in rings), rows, start)
