"""One layer's view of what its sequences remember, for the duration of one traced step.

`StepCache` holds the arrays while the layers run and replaces them as they write; making it or a
view of it allocates nothing. `WholeSequence` gives a layer the same view when there is no cache:
the chunk starts at position 0 and is all there is.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from dsv4_jax.cache import paged, state
from dsv4_jax.cache.flush import (
    OVERLAP_ROWS,
    Completed,
    accumulate,
    advance_overlapping,
    advance_running,
    pool_overlapping,
    weighted_mean,
)
from dsv4_jax.cache.schema import CacheArrays, CacheSchema, PoolName
from dsv4_jax.cache.storage import Planes, Storage
from dsv4_jax.ops.attention import Source
from dsv4_jax.ops.indexer import indexer_topk, paged_indexer_topk

TailName = Literal["csa_tail", "key_tail"]


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

    def storage(self, pool: PoolName) -> Storage: ...

    def window(self, new: Planes, dtype: DTypeLike) -> Source:
        """Remembers the chunk's entries and returns the window of every query."""
        ...

    def pool_overlapping(
        self, tail: TailName, rows: Float[Array, "b t 2 w2"]
    ) -> Float[Array, "b n w"]:
        """Remembers the chunk's rows and returns the entries it completes (ratio 4)."""
        ...

    def accumulate(self, rows: Float[Array, "b t 2 w"], ratio: int) -> Float[Array, "b n w"]:
        """Folds the chunk's rows into the running tail and returns the entries it completes."""
        ...

    def append(self, pool: PoolName, completed: Completed, new: Planes) -> None:
        """Stores the completed entries, encoded as `new`."""
        ...

    def num_entries(self, pool: PoolName) -> int:
        """How many entries `entries` returns without ids; an upper bound of ids."""
        ...

    def entries(
        self, pool: PoolName, dtype: DTypeLike, ids: Int[Array, "b *n"] | None = None
    ) -> Float[Array, "b ..."]:
        """All entries [b, n, c], or those at `ids` [b, *n, c]; ids nobody wrote give anything."""
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

    def storage(self, pool: PoolName) -> Storage:
        return self.step.schema.storage(pool)

    def window(self, new: Planes, dtype: DTypeLike) -> Source:
        chunk, window = self.chunk, self.step.schema.window
        rings, recent = state.advance_ring(
            self.step.arrays.window, self.index, chunk.start, chunk.length, new, window
        )
        self.step.store("window", rings)
        kv = self.step.schema.entries.decode(recent.rows(), dtype)
        keys = recent.positions()[:, None]
        return Source(kv[:, None], _in_window(chunk.positions[..., None], keys, window))

    def pool_overlapping(
        self, tail: TailName, rows: Float[Array, "b t 2 w2"]
    ) -> Float[Array, "b n w"]:
        tails, pooled = advance_overlapping(
            getattr(self.step.arrays, tail),
            self.pool_index,
            self.chunk.start,
            self.chunk.length,
            rows,
        )
        self.step.store(tail, tails)
        return pooled

    def accumulate(self, rows: Float[Array, "b t 2 w"], ratio: int) -> Float[Array, "b n w"]:
        chunk = self.chunk
        tails, pooled = advance_running(
            self.step.arrays.hca_tail, self.pool_index, chunk.start, chunk.length, rows, ratio
        )
        self.step.store("hca_tail", tails)
        return pooled

    def append(self, pool: PoolName, completed: Completed, new: Planes) -> None:
        planes = paged.write(
            getattr(self.step.arrays, pool),
            self.pool_index,
            self.step.block_table,
            completed.first,
            completed.count,
            new,
        )
        self.step.store(pool, planes)

    def num_entries(self, pool: PoolName) -> int:
        return self.step.block_table.shape[1] * getattr(self.step.arrays, pool)[0].shape[2]

    def entries(
        self, pool: PoolName, dtype: DTypeLike, ids: Int[Array, "b *n"] | None = None
    ) -> Float[Array, "b ..."]:
        planes = getattr(self.step.arrays, pool)
        if ids is None:
            found = paged.read_all(planes, self.pool_index, self.step.block_table)
        else:
            found = paged.read(planes, self.pool_index, self.step.block_table, ids)
        return self.storage(pool).decode(found, dtype)

    def top_entries(
        self,
        q: Float[Array, "b t h c"],
        weights: Float[Array, "b t h"],
        visible: Bool[Array, "b t n"],
        top_k: int,
        mxfp4_queries: bool,
    ) -> Int[Array, "b t k"]:
        """Reads the keys where they lie; rows of tokens that do not count give anything."""
        complete = (self.chunk.positions + 1) // 4
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


class WholeSequence:
    """View of a layer without a cache: the chunk is the whole sequence, from position 0."""

    def __init__(self, schema: CacheSchema, chunk: Chunk):
        self.schema = schema
        self.chunk = chunk
        self._planes: dict[str, Planes] = {}

    def storage(self, pool: PoolName) -> Storage:
        return self.schema.storage(pool)

    def window(self, new: Planes, dtype: DTypeLike) -> Source:
        """Blocks of one window's length see themselves and the block before."""
        kv = self.schema.entries.decode(new, dtype)
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

    def pool_overlapping(
        self, tail: TailName, rows: Float[Array, "b t 2 w2"]
    ) -> Float[Array, "b n w"]:
        nothing = jnp.zeros((rows.shape[0], OVERLAP_ROWS, *rows.shape[2:]), rows.dtype)
        recent = state.Recent((nothing,), (rows,), self.chunk.start)
        return pool_overlapping(recent, self.chunk.completed(4))

    def accumulate(self, rows: Float[Array, "b t 2 w"], ratio: int) -> Float[Array, "b n w"]:
        nothing = jnp.zeros((rows.shape[0], 3, rows.shape[-1]), rows.dtype)
        states = accumulate(rows, nothing, self.chunk.start, self.chunk.length, ratio)
        return weighted_mean(states)[:, : self.chunk.completed(ratio).bound]

    def append(self, pool: PoolName, completed: Completed, new: Planes) -> None:
        self._planes[pool] = new

    def num_entries(self, pool: PoolName) -> int:
        return self._planes[pool][0].shape[1]

    def entries(
        self, pool: PoolName, dtype: DTypeLike, ids: Int[Array, "b *n"] | None = None
    ) -> Float[Array, "b ..."]:
        found = self._planes[pool]
        if ids is not None:
            flat = ids.reshape(ids.shape[0], -1, 1)
            found = tuple(
                jnp.take_along_axis(plane, flat, axis=1, mode="clip").reshape(*ids.shape, -1)
                for plane in found
            )
        return self.storage(pool).decode(found, dtype)

    def top_entries(
        self,
        q: Float[Array, "b t h c"],
        weights: Float[Array, "b t h"],
        visible: Bool[Array, "b t n"],
        top_k: int,
        mxfp4_queries: bool,
    ) -> Int[Array, "b t k"]:
        return indexer_topk(q, self.entries("csa_keys", q.dtype), weights, visible, top_k)
