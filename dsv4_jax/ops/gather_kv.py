"""Compressed entries of a paged pool as dense numbers."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

import dsv4_ffi
from dsv4_jax.cache import paged
from dsv4_jax.cache.storage import Storage
from dsv4_jax.ops.cache_planes import check_entries
from dsv4_jax.ops.dispatch import dispatch

Planes = tuple[Shaped[Array, "layers blocks entries _"], ...]


def gather_kv(
    pool: Planes,
    layer: int,
    block_table: Int[Array, "b m"],
    ids: Int[Array, "b *n"],
    *,
    storage: Storage,
    dtype: DTypeLike = jnp.bfloat16,
    implementation: str | None = None,
) -> Float[Array, "b *n c"]:
    """The entries that ids name, [b, *n, c], exactly as stored; zeros for -1.

    Args:
        pool: planes [layer, block, entry, width] of `storage`.
        layer: which of the pool's layers.
        block_table: the blocks of each sequence in order; -1 where there is none.
        ids: entries of each sequence; -1, and ids without a block, give zeros.
        storage: how the pool keeps entries.
        dtype: of the result; records are exact in bfloat16 and float32.
        implementation: "ffi" (entries of 448 + 64 channels, bfloat16), "xla" or None for the
            fastest.
    """
    return dispatch(
        implementation,
        {"ffi": _ffi, "xla": _xla},
        *(pool, block_table, ids),
        layer=layer,
        storage=storage,
        dtype=jnp.dtype(dtype),
    )


def _xla(
    pool: Planes,
    block_table: Array,
    ids: Array,
    *,
    layer: int,
    storage: Storage,
    dtype: np.dtype,
) -> Array:
    flat = ids.reshape(ids.shape[0], -1)
    column = jnp.maximum(flat, 0) // pool[0].shape[2]
    block = jnp.take_along_axis(block_table, column, axis=1, mode="fill", fill_value=-1)
    found = storage.decode(paged.read(pool, layer, block_table, ids), dtype)
    return jnp.where(((flat >= 0) & (block >= 0)).reshape(ids.shape)[..., None], found, 0)


def _ffi(
    pool: Planes,
    block_table: Array,
    ids: Array,
    *,
    layer: int,
    storage: Storage,
    dtype: np.dtype,
) -> Array:
    check_entries("gather_kv", storage, dtype)
    width = storage.planes[0][0] if len(pool) == 1 else 512
    return dsv4_ffi.call(
        "gather_kv",
        jax.ShapeDtypeStruct((*ids.shape, width), jnp.bfloat16),
        *(block_table.astype(jnp.int32), ids.astype(jnp.int32), *pool),
        layer=np.int64(layer),
    )
