"""Attention over cache records: sliding window and compressed entries in one softmax."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

import dsv4_ffi
from dsv4_jax.cache import paged
from dsv4_jax.cache.state import Recent
from dsv4_jax.cache.storage import EntryRecord, Planes, Storage
from dsv4_jax.ops.attention import Source, attention, selected_source
from dsv4_jax.ops.dispatch import dispatch
from dsv4_jax.ops.rotary import rotate

# What the CUDA kernel is made for: heads and slots of a tile, channels, rotary channels.
_TILE, _WIDTH, _ROTARY = 64, 512, 64
_MULTIPROCESSORS = 132
# So many parts of a query are combined by the two thread blocks that have them, more of them by a
# second kernel, which has place for so many.
_PAIR, _MAX_PARTS = 2, 256
# Batch-invariant: parts depend on nothing but the query's own entries.
_INVARIANT_SPLITS, _INVARIANT_BLOCKS = 8, 4


class Entries(NamedTuple):
    """Compressed entries in a paged pool.

    Attributes:
        pool: planes [layer, block, entry, width].
        block_table: [b, m], the blocks of each sequence in order; -1 where there is none.
        ids: [b, t, k], the entries that each query sees, -1 for none; or None, and it sees all
            that are complete.
    """

    pool: Planes
    block_table: Int[Array, "b m"]
    ids: Int[Array, "b t k"] | None = None


def sparse_attention(
    q: Float[Array, "b t h c"],
    sink: Float32[Array, "h"],
    frequencies: Float32[Array, "pairs"] | Float32[np.ndarray, "pairs"],
    start: Int[Array, "b"],
    length: Int[Array, "b"],
    ring: Planes,
    new: Planes | None = None,
    entries: Entries | None = None,
    *,
    storage: Storage,
    scale: float,
    window: int,
    layer: int,
    pool_layer: int = 0,
    ratio: int = 0,
    batch_invariant: bool = False,
    implementation: str | None = None,
) -> Float[Array, "b t h c"]:
    """`attention` of a chunk's queries, its output rotated back by the query's position.

    The query of token i of row s is at position p = start[s] + i. It sees the window's positions
    p - window + 1 .. p and the compressed entries; in the denominator also the sink.

    Args:
        q: queries, normalised and rotated; their last 2 * pairs channels are rotary.
        sink: a logit for each head, not scaled.
        frequencies: radians per token of each pair of rotary channels.
        start: position of each row's first token.
        length: how many tokens of each row count; the output of the others is 0.
        ring: planes [layer, slot, n, width] of the window, row s in slot s, position p at p mod n.
            Without `new` it holds the chunk already, n >= window + t - 1.
        new: planes [b, t, width] of the chunk; `ring` is then that of before, n >= window - 1.
        entries: compressed entries, or None.
        storage: how ring and pool keep entries.
        scale: factor of the logits.
        window: tokens that a query sees directly, itself included.
        layer: which of the ring's layers.
        pool_layer: which of the pool's layers.
        ratio: tokens of a compressed entry. With `entries.ids` None a query sees the entries
            below floor((p + 1) / ratio).
        batch_invariant: a query's result does not depend, in any bit, on what else is in the
            batch or how long its block table is; slower for few queries.
        implementation: "ffi" (records; on CUDA 512 bfloat16 channels, 64 of them rotary), "xla" or
            None for the fastest.

    Raises:
        ValueError: the ring is too short, or `entries.ids` is None and `ratio` 0.
    """
    needed = window + (q.shape[1] - 1 if new is None else -1)
    if ring[0].shape[2] < needed:
        raise ValueError(f"ring: got {ring[0].shape[2]} tokens, expected at least {needed}")
    if entries is not None and entries.ids is None and ratio < 1:
        raise ValueError(f"ratio: got {ratio}, expected at least 1 where all entries are seen")
    return dispatch(
        implementation,
        {"ffi": _ffi, "xla": _xla},
        *(q, sink, jnp.asarray(frequencies), start, length, ring, new, entries),
        storage=storage,
        scale=scale,
        window=window,
        layer=layer,
        pool_layer=pool_layer,
        ratio=ratio,
        batch_invariant=batch_invariant,
    )


def _xla(
    q: Array,
    sink: Array,
    frequencies: Array,
    start: Array,
    length: Array,
    ring: Planes,
    new: Planes | None,
    entries: Entries | None,
    *,
    storage: Storage,
    scale: float,
    window: int,
    layer: int,
    pool_layer: int,
    ratio: int,
    batch_invariant: bool,
) -> Array:
    del batch_invariant
    b, t = q.shape[:2]
    positions = start[:, None] + jnp.arange(t)

    held = tuple(plane[layer, :b] for plane in ring)
    if new is None:
        recent = Recent(held, tuple(plane[:, :0] for plane in held), start + length)
    else:
        recent = Recent(held, new, start)
    position, query = recent.positions()[:, None], positions[..., None]
    visible = (position >= 0) & (position <= query) & (position > query - window)
    sources = [_source(Source(storage.decode(recent.rows(), q.dtype)[:, None], visible))]

    if entries is not None:
        pool, table, ids = entries

        def read(ids: Array | None) -> Array:
            if ids is None:
                return storage.decode(paged.read_all(pool, pool_layer, table), q.dtype)
            return storage.decode(paged.read(pool, pool_layer, table, ids), q.dtype)

        num_entries = table.shape[1] * pool[0].shape[2]
        if ids is not None:
            sources.append(_source(selected_source(read, ids, num_entries)))
        else:
            visible = jnp.arange(num_entries) < ((positions + 1) // ratio)[..., None]
            sources.append(_source(Source(read(None)[:, None], visible)))

    o = rotate(attention(q, sources, sink, scale), positions, frequencies, inverse=True)
    return jnp.where((jnp.arange(t) < length[:, None])[..., None, None], o, 0)


def _source(source: Source) -> Source:
    """Entries that nobody sees are zeros: what lies there may be no number."""
    kv, visible = source
    b, groups, num_entries = kv.shape[:3]
    seen = visible.reshape(b, groups, -1, num_entries).any(2)
    return Source(jnp.where(seen[..., None], kv, 0), visible)


def _ffi(
    q: Array,
    sink: Array,
    frequencies: Array,
    start: Array,
    length: Array,
    ring: Planes,
    new: Planes | None,
    entries: Entries | None,
    *,
    storage: Storage,
    scale: float,
    window: int,
    layer: int,
    pool_layer: int,
    ratio: int,
    batch_invariant: bool,
) -> Array:
    b, t, h, c = q.shape
    if not isinstance(storage, EntryRecord):
        raise NotImplementedError(f"sparse_attention: the kernel reads records, not {storage}")
    if jax.default_backend() == "gpu":
        _check_cuda(q, frequencies)
    if new is None:
        new = (ring[0][layer, :b, :0], ring[1][layer, :b, :0])
    if entries is None:
        nothing = (ring[0][:1, :0, :1], ring[1][:1, :0, :1])
        entries = Entries(nothing, jnp.zeros((b, 0), jnp.int32))
    pool, table, ids = entries
    if ids is None:
        ids = jnp.zeros((b, t, 0), jnp.int32)
    num_entries = ids.shape[2] or table.shape[1] * pool[0].shape[2]
    tiles = b * t * -(-h // _TILE)
    rule = _split_rule(tiles, -(-(window + num_entries) // _TILE), batch_invariant)
    parts = tiles * rule[0] if rule[0] > _PAIR else 0
    o, _ = dsv4_ffi.call(
        "sparse_attention",
        [
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((parts, _TILE, c + 2), jnp.float32),
        ],
        *(q, sink, frequencies, *ring, *new, *pool),
        *[x.astype(jnp.int32) for x in (table, ids, start, length)],
        layer=np.int64(layer),
        pool_layer=np.int64(pool_layer),
        window=np.int64(window),
        ratio=np.int64(ratio),
        scale=np.float32(scale),
        max_splits=np.int64(rule[0]),
        min_blocks=np.int64(rule[1]),
    )
    return o


def _split_rule(tiles: int, max_blocks: int, batch_invariant: bool) -> tuple[int, int]:
    """At most how many parts a query's blocks of entries are split into, each of how many or more.

    All that a query can have to do is `max_blocks`; `tiles` are the queries, once for each 64
    heads, that share the multiprocessors.
    """
    if batch_invariant:
        return _INVARIANT_SPLITS if max_blocks > _INVARIANT_BLOCKS else 1, _INVARIANT_BLOCKS

    def cost(splits: int) -> float:
        """In times of a block; measured on an H200."""
        combining = {1: 0.0, _PAIR: 0.8}.get(splits, 2 + splits / 32)
        return -(-max_blocks // splits) + combining

    limit = min(max_blocks, _MULTIPROCESSORS // max(tiles, 1), _MAX_PARTS)
    return min(range(1, max(limit, 1) + 1), key=cost), 1


def _check_cuda(q: Array, frequencies: Array) -> None:
    capability = getattr(jax.devices()[0], "compute_capability", "unknown")
    if capability != "9.0":
        raise NotImplementedError(
            f"sparse_attention: the kernel is for sm_90, the device has {capability}"
        )
    if q.dtype != jnp.bfloat16:
        raise NotImplementedError(
            f"sparse_attention: the kernel takes bfloat16 queries, got {q.dtype}"
        )
    if (q.shape[3], 2 * frequencies.shape[0]) != (_WIDTH, _ROTARY):
        raise NotImplementedError(
            f"sparse_attention: the kernel is for {_WIDTH} channels of which {_ROTARY} are rotary, "
            f"got {q.shape[3]} and {2 * frequencies.shape[0]}"
        )
