"""One layer's view of what its sequences remember, for the duration of one traced step.

`StepCache` holds the arrays while the layers run and replaces them as they write; making it or a
view of it allocates nothing. `WholeSequence` gives a layer the same view when there is no cache:
the chunk starts at position 0 and is all there is.
"""

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int

from dsv4_jax.cache import state
from dsv4_jax.cache.flush import (
    OVERLAP_RATIO,
    OVERLAP_ROWS,
    Completed,
    accumulate,
    pool_overlapping,
    weighted_mean,
)
from dsv4_jax.cache.schema import CacheArrays, CacheSchema, PoolName
from dsv4_jax.cache.storage import Planes
from dsv4_jax.formats.hadamard import hadamard
from dsv4_jax.ops.append_swa import append_swa
from dsv4_jax.ops.attention import Source, attention, selected_source
from dsv4_jax.ops.flush import Gated, Stream, finish_entries, flush_csa, flush_hca, gated_rows
from dsv4_jax.ops.indexer import indexer_topk, paged_indexer_topk
from dsv4_jax.ops.norms import rms_norm, rms_normalize
from dsv4_jax.ops.rotary import rotate
from dsv4_jax.ops.sparse_attention import Entries, sparse_attention
from dsv4_jax.ops.valid_lens import compute_valid_lens

Frequencies = Float32[np.ndarray, "pairs"]


@dataclass(frozen=True)
class Chunk:
    """The new tokens of each sequence in this step.

    Attributes:
        start: [b] position of each row's first token, the sequence's length so far.
        length: [b] how many of the row's tokens count, 0 <= length <= num_tokens.
        num_tokens: t, the width of the chunk.
    """

    start: Int[Array, "b"]
    length: Int[Array, "b"]
    num_tokens: int

    @cached_property
    def positions(self) -> Int[Array, "b t"]:
        return self.start[:, None] + jnp.arange(self.num_tokens)

    @cached_property
    def valid(self) -> Bool[Array, "b t"]:
        return jnp.arange(self.num_tokens) < self.length[:, None]

    def completed(self, ratio: int) -> Completed:
        return Completed.by(self.start, self.length, self.num_tokens, ratio)


@runtime_checkable
class LayerView(Protocol):
    """What attention reads and writes in one layer."""

    chunk: Chunk

    def append_swa(
        self,
        q: Float[Array, "b t h c"],
        kv: Float[Array, "b t c"],
        weight: Float[Array, "c"],
        frequencies: Frequencies,
        eps: float,
    ) -> Float[Array, "b t h c"]:
        """Remembers the chunk's window entries; queries come back normalised and rotated."""
        ...

    def flush_csa(
        self, entries: Gated, keys: Gated, frequencies: Frequencies, dtype: DTypeLike, eps: float
    ) -> None:
        """Folds the chunk into the tails and stores the entries and keys that it completes."""
        ...

    def flush_hca(
        self, entries: Gated, frequencies: Frequencies, dtype: DTypeLike, eps: float
    ) -> None:
        """As `flush_csa`, for entries of an HCA layer."""
        ...

    def num_entries(self, pool: PoolName) -> int:
        """An upper bound of the ids of entries."""
        ...

    def top_entries(
        self,
        q: Float[Array, "b t h c"],
        weights: Float[Array, "b t h"],
        visible: Bool[Array, "b t n"],
        top_k: int,
        mxfp4_queries: bool,
    ) -> Int[Array, "b t k"]:
        """Ids of the top_k visible entries by `ops.indexer.indexer_scores`, -1 padded."""
        ...

    def attend(
        self,
        q: Float[Array, "b t h c"],
        sink: Float[Array, "h"],
        frequencies: Frequencies,
        scale: float,
        ratio: int,
        ids: Int[Array, "b t k"] | None,
    ) -> Float[Array, "b t h c"]:
        """`ops.attention.attention` over the window and, where `ratio` is not 0, entries.

        These are the ones at `ids` or, if it is None, all that are complete. The output is
        rotated back by the query's position.
        """
        ...


def _in_window(query: Array, key: Array, window: int) -> Array:
    """Whether the query sees the key; positions, negative for no key."""
    return (key >= 0) & (key <= query) & (key > query - window)


class StepCache:
    """The cache's arrays while one step is traced; the first b slots take part."""

    def __init__(self, arrays: CacheArrays, chunk: Chunk):
        self.schema = arrays.schema
        self.arrays = arrays
        self.chunk = chunk
        self.num_rows = chunk.start.shape[0]
        self.block_table = arrays.block_table[: self.num_rows]

    def layer(self, index: int) -> "LayerCache":
        return LayerCache(self, index)

    def store(self, name: str, value: Array | Planes) -> None:
        """Replaces one of the arrays."""
        changed: dict[str, Any] = {name: value}
        self.arrays = replace(self.arrays, **changed)

    def finish(self) -> CacheArrays:
        """The arrays after the step: everything the layers wrote, lengths advanced."""
        lengths = self.arrays.lengths.at[: self.num_rows].add(self.chunk.length)
        return replace(self.arrays, lengths=lengths)


class LayerCache:
    """View of one layer of a `StepCache`; writes replace the step's arrays."""

    def __init__(self, step: StepCache, index: int):
        self.step = step
        self.chunk = step.chunk
        self.index = index
        self.pool_index = step.schema.pool_index(index)

    def append_swa(
        self,
        q: Float[Array, "b t h c"],
        kv: Float[Array, "b t c"],
        weight: Float[Array, "c"],
        frequencies: Frequencies,
        eps: float,
    ) -> Float[Array, "b t h c"]:
        arrays, schema = self.step.arrays, self.step.schema
        # Where the ring can take the chunk and still hold what the first token needs, as for
        # every single token, it is read as written: a read of the old one beside the write
        # would cost a copy of it.
        fits = arrays.window[0].shape[2] >= schema.window + q.shape[1] - 1
        appended = append_swa(
            q,
            kv,
            weight,
            arrays.window,
            self.index,
            self.chunk.start,
            self.chunk.length,
            frequencies,
            storage=schema.entries,
            eps=eps,
            with_chunk=not fits,
        )
        self.step.store("window", appended.window)
        self._ring = appended.window if fits else tuple(x[None] for x in appended.before)
        self._ring_layer = self.index if fits else 0
        self._new = None if fits else appended.new
        return appended.q

    def flush_csa(
        self, entries: Gated, keys: Gated, frequencies: Frequencies, dtype: DTypeLike, eps: float
    ) -> None:
        arrays, schema = self.step.arrays, self.step.schema
        flushed, flushed_keys = flush_csa(
            Stream(*entries, arrays.csa_tail, arrays.csa),
            Stream(*keys, arrays.key_tail, arrays.csa_keys),
            self.pool_index,
            self.step.block_table,
            self.chunk.start,
            self.chunk.length,
            frequencies,
            storage=schema.entries,
            key_storage=schema.keys,
            dtype=dtype,
            eps=eps,
        )
        self.step.store("csa_tail", flushed.tail)
        self.step.store("csa", flushed.pool)
        self.step.store("key_tail", flushed_keys.tail)
        self.step.store("csa_keys", flushed_keys.pool)

    def flush_hca(
        self, entries: Gated, frequencies: Frequencies, dtype: DTypeLike, eps: float
    ) -> None:
        arrays = self.step.arrays
        flushed = flush_hca(
            Stream(*entries, arrays.hca_tail, arrays.hca),
            self.pool_index,
            self.step.block_table,
            self.chunk.start,
            self.chunk.length,
            frequencies,
            storage=self.step.schema.entries,
            dtype=dtype,
            eps=eps,
        )
        self.step.store("hca_tail", flushed.tail)
        self.step.store("hca", flushed.pool)

    def num_entries(self, pool: PoolName) -> int:
        return self.step.block_table.shape[1] * getattr(self.step.arrays, pool)[0].shape[2]

    def top_entries(
        self,
        q: Float[Array, "b t h c"],
        weights: Float[Array, "b t h"],
        visible: Bool[Array, "b t n"],
        top_k: int,
        mxfp4_queries: bool,
    ) -> Int[Array, "b t k"]:
        """Reads the keys where they lie; rows of tokens that do not count give anything."""
        complete = compute_valid_lens(self.chunk.positions, OVERLAP_RATIO)
        return paged_indexer_topk(
            q,
            weights,
            self.step.arrays.csa_keys,
            self.pool_index,
            self.step.block_table,
            jnp.where(self.chunk.valid, complete, 0),
            top_k,
            mxfp4_queries=mxfp4_queries,
        )

    def attend(
        self,
        q: Float[Array, "b t h c"],
        sink: Float[Array, "h"],
        frequencies: Frequencies,
        scale: float,
        ratio: int,
        ids: Int[Array, "b t k"] | None,
    ) -> Float[Array, "b t h c"]:
        entries = None
        if ratio:
            pool: PoolName = "csa" if ratio == OVERLAP_RATIO else "hca"
            entries = Entries(getattr(self.step.arrays, pool), self.step.block_table, ids)
        return sparse_attention(
            q,
            sink,
            frequencies,
            self.chunk.start,
            self.chunk.length,
            self._ring,
            self._new,
            entries,
            storage=self.step.schema.entries,
            scale=scale,
            window=self.step.schema.window,
            layer=self._ring_layer,
            pool_layer=self.pool_index if ratio else 0,
            ratio=ratio,
        )


class WholeSequence:
    """View of a layer without a cache: the chunk is the whole sequence, from position 0.

    Everything is XLA's and differentiable.
    """

    def __init__(self, schema: CacheSchema, chunk: Chunk):
        self.schema = schema
        self.chunk = chunk
        self._planes: dict[str, Planes] = {}

    def append_swa(
        self,
        q: Float[Array, "b t h c"],
        kv: Float[Array, "b t c"],
        weight: Float[Array, "c"],
        frequencies: Frequencies,
        eps: float,
    ) -> Float[Array, "b t h c"]:
        positions = self.chunk.positions
        kv = rotate(rms_norm(kv, weight, eps), positions, frequencies)
        self._planes["window"] = self.schema.entries.encode(kv)
        return rotate(rms_normalize(q, eps), positions, frequencies)

    def flush_csa(
        self, entries: Gated, keys: Gated, frequencies: Frequencies, dtype: DTypeLike, eps: float
    ) -> None:
        completed = self.chunk.completed(OVERLAP_RATIO)
        pools: tuple[tuple[PoolName, Gated], ...] = (("csa", entries), ("csa_keys", keys))
        for pool, gated in pools:
            rows = gated_rows(gated, self.chunk.start)
            nothing = jnp.zeros((rows.shape[0], OVERLAP_ROWS, *rows.shape[2:]), rows.dtype)
            recent = state.Recent((nothing,), (rows,), self.chunk.start)
            pooled = pool_overlapping(recent, completed)
            self._finish(pool, gated, pooled, completed, frequencies, dtype, eps)

    def flush_hca(
        self, entries: Gated, frequencies: Frequencies, dtype: DTypeLike, eps: float
    ) -> None:
        ratio = entries.ape.shape[0]
        rows = gated_rows(entries, self.chunk.start)
        nothing = jnp.zeros((rows.shape[0], 3, rows.shape[-1]), rows.dtype)
        states = accumulate(rows, nothing, self.chunk.start, self.chunk.length, ratio)
        completed = self.chunk.completed(ratio)
        pooled = weighted_mean(states)[:, : completed.bound]
        self._finish("hca", entries, pooled, completed, frequencies, dtype, eps)

    def _finish(
        self,
        pool: PoolName,
        gated: Gated,
        pooled: Float[Array, "b n w"],
        completed: Completed,
        frequencies: Frequencies,
        dtype: DTypeLike,
        eps: float,
    ) -> None:
        ratio = gated.ape.shape[0]
        entries = finish_entries(
            pooled, completed.ids, ratio, gated.weight, frequencies, dtype=dtype, eps=eps
        )
        entries = hadamard(entries) if pool == "csa_keys" else entries
        self._planes[pool] = self.schema.storage(pool).encode(entries)

    def num_entries(self, pool: PoolName) -> int:
        return self._planes[pool][0].shape[1]

    def entries(
        self, pool: PoolName, dtype: DTypeLike, ids: Int[Array, "b *n"] | None = None
    ) -> Float[Array, "b ..."]:
        """All entries [b, n, c], or those at `ids` [b, *n, c]; ids nobody wrote give anything."""
        found = self._planes[pool]
        if ids is not None:
            flat = ids.reshape(ids.shape[0], -1, 1)
            found = tuple(
                jnp.take_along_axis(plane, flat, axis=1, mode="clip").reshape(*ids.shape, -1)
                for plane in found
            )
        return self.schema.storage(pool).decode(found, dtype)

    def top_entries(
        self,
        q: Float[Array, "b t h c"],
        weights: Float[Array, "b t h"],
        visible: Bool[Array, "b t n"],
        top_k: int,
        mxfp4_queries: bool,
    ) -> Int[Array, "b t k"]:
        return indexer_topk(q, self.entries("csa_keys", q.dtype), weights, visible, top_k)

    def attend(
        self,
        q: Float[Array, "b t h c"],
        sink: Float[Array, "h"],
        frequencies: Frequencies,
        scale: float,
        ratio: int,
        ids: Int[Array, "b t k"] | None,
    ) -> Float[Array, "b t h c"]:
        sources = [self.window(q.dtype)]
        if ratio:
            pool: PoolName = "csa" if ratio == OVERLAP_RATIO else "hca"
            num_entries = self.num_entries(pool)
            if ids is None:
                valid = compute_valid_lens(self.chunk.positions, ratio)[..., None]
                kv = self.entries(pool, q.dtype)[:, None]
                sources.append(Source(kv, jnp.arange(num_entries) < valid))
            else:
                take = partial(self.entries, pool, q.dtype)
                sources.append(selected_source(take, ids, num_entries))
        o = attention(q, sources, sink, scale)
        return rotate(o, self.chunk.positions, frequencies, inverse=True)

    def window(self, dtype: DTypeLike) -> Source:
        """The window of every query; blocks of its length see themselves and the one before."""
        kv = self.schema.entries.decode(self._planes["window"], dtype)
        b, t, c = kv.shape
        window = self.schema.window
        if t <= window or t % window:
            position = jnp.arange(t)
            visible = _in_window(position[:, None], position, window)
            return Source(kv[:, None], jnp.broadcast_to(visible, (b, t, t)))
        blocks = kv.reshape(b, t // window, window, c)
        before = jnp.pad(blocks[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))
        query = jnp.arange(t)[:, None]
        key = (query // window - 1) * window + jnp.arange(2 * window)
        visible = jnp.broadcast_to(_in_window(query, key, window), (b, t, 2 * window))
        return Source(jnp.concatenate([before, blocks], axis=2), visible)
