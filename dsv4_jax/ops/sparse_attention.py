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

# What the CUDA kernels are made for: heads and slots of a tile, channels, rotary channels.
_TILE, _WIDTH, _ROTARY = 64, 512, 64
_MULTIPROCESSORS = 132
# The kernel of few queries takes so many slots at once. As many clusters of so many blocks each are
# on the card at a time, one block a multiprocessor.
_CHUNK = 32
_CLUSTERS = {8: 15, 4: 30, 2: 66}
# So many parts of a query are combined by the two thread blocks that have them, more of them by a
# second kernel, which has place for so many.
_PAIR, _MAX_PARTS = 2, 256
# From so many tokens of a sequence on, all entries that they can see are first written densely: at
# most so many rows for each token, and so many altogether.
_DENSE_TOKENS, _DENSE_ROWS_PER_TOKEN, _DENSE_ROWS = 64, 128, 1 << 19
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
    plan = _plan(b * t, h, window + num_entries, batch_invariant)
    in_parts = plan.heads_each == _TILE and plan.max_splits > _PAIR
    parts = b * t * -(-h // _TILE) * plan.max_splits if in_parts else 0
    rows = 0 if batch_invariant else _dense_rows(b, t, window, entries)
    o, _, _ = dsv4_ffi.call(
        "sparse_attention",
        [
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((parts, _TILE, c // 2 + 2), jnp.float32),
            jax.ShapeDtypeStruct((b, rows, c), jnp.bfloat16),
        ],
        *(q, sink, frequencies, *ring, *new, *pool),
        *[x.astype(jnp.int32) for x in (table, ids, start, length)],
        layer=np.int64(layer),
        pool_layer=np.int64(pool_layer),
        window=np.int64(window),
        ratio=np.int64(ratio),
        scale=np.float32(scale),
        heads_each=np.int64(plan.heads_each),
        max_splits=np.int64(plan.max_splits),
        min_blocks=np.int64(plan.min_blocks),
    )
    return o


def _dense_rows(b: int, t: int, window: int, entries: Entries) -> int:
    """How many entries of each sequence are made dense: all that its t tokens can see, or none."""
    num_blocks, per_block = entries.pool[0].shape[1:3]
    rows = window - 1 + t + (entries.block_table.shape[1] * per_block if num_blocks else 0)
    worth_it = t >= _DENSE_TOKENS and rows <= _DENSE_ROWS_PER_TOKEN * t
    return rows if worth_it and b * rows <= _DENSE_ROWS else 0


class _Plan(NamedTuple):
    """How the CUDA kernels divide the work.

    Attributes:
        heads_each: of a thread block. Below 64 it is the kernel of few queries.
        max_splits: at most how many parts a query's entries are split into; the blocks of a cluster
            in the kernel of few queries.
        min_blocks: how many blocks of 64 entries a part has at least.
    """

    heads_each: int
    max_splits: int
    min_blocks: int


def _plan(queries: int, heads: int, num_slots: int, batch_invariant: bool) -> _Plan:
    """The plan that should take the shortest time; all that a query can see is `num_slots`.

    Times in microseconds, fitted to measurements on an H200.
    """
    max_blocks = -(-num_slots // _TILE)
    if batch_invariant:
        splits = _INVARIANT_SPLITS if max_blocks > _INVARIANT_BLOCKS else 1
        return _Plan(_TILE, splits, _INVARIANT_BLOCKS)

    def tiled_us(splits: int) -> float:
        second_kernel = (1.5 if splits <= 8 else 2.5) + splits / 64
        combining = {1: 0.0, _PAIR: 0.8}.get(splits, second_kernel)
        return 5 + 3.5 * (-(-max_blocks // splits) + combining)

    def clustered_us(heads_each: int, ranks: int) -> float:
        waves = -(-queries * -(-heads // heads_each) // _CLUSTERS[ranks])
        chunks = -(-num_slots // (ranks * _CHUNK))
        return waves * {8: 3.7 + 1.25 * chunks, 16: 4.7 + 1.45 * chunks}[heads_each]

    tiles = queries * -(-heads // _TILE)
    limit = min(max_blocks, _MULTIPROCESSORS // max(tiles, 1), _MAX_PARTS)
    times = {_Plan(_TILE, n, 1): tiled_us(n) for n in range(1, max(limit, 1) + 1)}
    times |= {_Plan(h, r, 1): clustered_us(h, r) for h in (8, 16) for r in _CLUSTERS}
    return min(times, key=lambda plan: times[plan])


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
