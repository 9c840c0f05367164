"""Pools of fixed-size blocks: one pool per kind of entry for all its layers.

A plane of a pool is [layer, block, entry, bytes]. A block covers 128 tokens of one sequence; the
block table [slot, n] names its blocks in order, -1 where none is allocated.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

from dsv4_jax.cache.storage import Planes

BLOCK_TOKENS = 128


def write(
    pool: Planes,
    layer: int,
    block_table: Int[Array, "b m"],
    first: Int[Array, "b"],
    count: Int[Array, "b"],
    planes: Planes,
) -> Planes:
    """Writes entries first .. first + count - 1 of every sequence; planes are [b, n, bytes].

    Nothing else changes: entries past `count`, and such that have no block, are dropped.
    """
    num_blocks, per_block = pool[0].shape[1:3]
    offset = jnp.arange(planes[0].shape[1])
    ids = first[:, None] + offset
    column = jnp.minimum(ids // per_block, block_table.shape[1] - 1)
    block = jnp.take_along_axis(block_table, column, axis=1)
    writable = (offset < count[:, None]) & (block >= 0) & (ids < block_table.shape[1] * per_block)
    block = jnp.where(writable, block, num_blocks)
    return tuple(
        plane.at[layer, block, ids % per_block].set(new, mode="drop")
        for plane, new in zip(pool, planes, strict=True)
    )


def read(
    pool: Planes, layer: int, block_table: Int[Array, "b m"], ids: Int[Array, "b *n"]
) -> Planes:
    """Entries by id, planes [b, *n, bytes]; ids without a block read some other entry."""
    per_block = pool[0].shape[2]
    flat = ids.reshape(ids.shape[0], -1)
    block = jnp.take_along_axis(block_table, jnp.maximum(flat, 0) // per_block, axis=1, mode="clip")
    return tuple(
        plane[layer, jnp.maximum(block, 0), flat % per_block].reshape(*ids.shape, plane.shape[-1])
        for plane in pool
    )


def read_all(pool: Planes, layer: int, block_table: Int[Array, "b m"]) -> Planes:
    """Every entry of every block in order, planes [b, m * entries, bytes]."""
    blocks = jnp.maximum(block_table, 0)
    return tuple(
        plane[layer, blocks].reshape(blocks.shape[0], -1, plane.shape[-1]) for plane in pool
    )
