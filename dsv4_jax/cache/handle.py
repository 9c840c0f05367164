"""One layer's view of what its sequences remember, for the duration of one traced step.

`StepCache` holds the arrays while the layers run and replaces them as they write; making it or a
view of it allocates nothing. `WholeSequence` gives a layer the same view when there is no cache:
the chunk starts at position 0 and is all there is.
"""

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

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
from dsv4_jax.cache.paged import BLOCK_TOKENS
from dsv4_jax.cache.schema import CacheArrays, CacheSchema, PoolName
from dsv4_jax.cache.storage import KeyRecord, Planes
from dsv4_jax.formats.hadamard import hadamard
from dsv4_jax.ops.append_swa import Appended, append_swa
from dsv4_jax.ops.attention import Source, attention, selected_source
from dsv4_jax.ops.cache_planes import KEY_DIM, ROPE_DIM
from dsv4_jax.ops.flush import Gated, Stream, finish_entries, gated_rows
from dsv4_jax.ops.indexer import indexer_topk, paged_indexer_topk
from dsv4_jax.ops.indexer_queries import rotated_queries
from dsv4_jax.ops.layer_writes import layer_writes
from dsv4_jax.ops.norms import rms_norm, rms_normalize
from dsv4_jax.ops.rotary import rotate
from dsv4_jax.ops.sparse_attention import Entries, sparse_attention
from dsv4_jax.ops.valid_lens import compute_valid_lens

Frequencies = Float32[np.ndarray, "pairs"]

# Which array holds what waits for a pool.
_TAILS: dict[PoolName, str] = {"csa": "csa_tail", "csa_keys": "key_tail", "hca": "hca_tail"}


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

    def complete(self, ratio: int) -> Int[Array, "b t"]:
        """How many entries of `ratio` tokens each token sees; 0 for those that do not count."""
        return jnp.where(self.valid, compute_valid_lens(self.positions, ratio), 0)

    def completed(self, ratio: int) -> Completed:
        return Completed.by(self.start, self.length, self.num_tokens, ratio)


class Projected(NamedTuple):
    """What the indexer's projections give.

    Attributes:
        q: queries.
        weights: of each head.
        scale: factor of the weights.
        quantize: queries are to be rounded to MXFP4.
    """

    q: Float[Array, "b t h c"]
    weights: Float32[Array, "b t h"]
    scale: float
    quantize: bool


class Prepared(NamedTuple):
    """Queries and weights with which `ops.indexer` scores keys, and whether MXFP4 holds these."""

    q: Float[Array, "b t h c"]
    weights: Float32[Array, "b t h"]
    is_mxfp4: bool


@runtime_checkable
class LayerView(Protocol):
    """What attention reads and writes in one layer."""

    chunk: Chunk

    def write(
        self,
        q: Float[Array, "b t h c"],
        kv: Float[Array, "b t c"],
        weight: Float[Array, "c"],
        frequencies: Frequencies,
        eps: float,
        streams: tuple[Gated, ...],
        projected: Projected | None,
    ) -> tuple[Float[Array, "b t h c"], Prepared | None]:
        """Remembers the chunk.

        That is its window entries (`kv`, normalised by `weight`) and what it adds to the streams:
        entries and keys of a CSA layer, entries of an HCA layer, none of others. What they
        complete is stored, the rest waits in the tails. Queries come back normalised and rotated,
        those of the indexer ready to score keys.
        """
        ...

    def num_entries(self, ratio: int) -> int:
        """An upper bound of the ids of entries of `ratio` tokens."""
        ...

    def top_entries(self, queries: Prepared, top_k: int) -> Int[Array, "b t k"]:
        """Ids of the top_k entries by `ops.indexer.indexer_scores`, -1 padded."""
        ...

    def attend(
        self,
        q: Float[Array, "b t h c"],
        sink: Float[Array, "h"],
        frequencies: Frequencies,
        scale: float,
        ratio: int,
        ids: Int[Array, "b t k"] | None,
        *,
        batch_invariant: bool = False,
    ) -> Float[Array, "b t h c"]:
        """`ops.attention.attention` over the window and, where `ratio` is not 0, entries.

        These are the ones at `ids` or, if it is None, all that are complete. The output is
        rotated back by the query's position. `batch_invariant` is that of `sparse_attention`.
        """
        ...


def _prepared(
    projected: Projected, positions: Int[Array, "b t"], frequencies: Frequencies
) -> Prepared:
    q, weights, scale, quantize = projected
    return Prepared(
        rotated_queries(q, positions, frequencies, quantize), weights * scale, is_mxfp4=quantize
    )


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

    def write(
        self,
        q: Float[Array, "b t h c"],
        kv: Float[Array, "b t c"],
        weight: Float[Array, "c"],
        frequencies: Frequencies,
        eps: float,
        streams: tuple[Gated, ...],
        projected: Projected | None,
    ) -> tuple[Float[Array, "b t h c"], Prepared | None]:
        arrays, schema = self.step.arrays, self.step.schema
        # Where the ring can take the chunk and still hold what the first token needs, as for
        # every single token, it is read as written: a read of the old one beside the write
        # would cost a copy of it.
        fits = arrays.window[0].shape[2] >= schema.window + q.shape[1] - 1
        appending: dict[str, Any] = {
            "q": q,
            "kv": kv,
            "weight": weight,
            "window": arrays.window,
            "layer": self.index,
            "start": self.chunk.start,
            "length": self.chunk.length,
            "frequencies": frequencies,
            "storage": schema.entries,
            "eps": eps,
            "with_chunk": not fits,
        }
        prepared = None
        if streams:
            appended, prepared = self._write_all(appending, streams, projected)
        else:
            appended = append_swa(**appending)
        self.step.store("window", appended.window)
        self._ring = appended.window if fits else tuple(x[None] for x in appended.before)
        self._ring_layer = self.index if fits else 0
        self._new = None if fits else appended.new
        return appended.q, prepared

    def _write_all(
        self, appending: dict[str, Any], streams: tuple[Gated, ...], projected: Projected | None
    ) -> tuple[Appended, Prepared | None]:
        """Appends and flushes; `appending` are arguments of `append_swa`."""
        arrays, frequencies = self.step.arrays, appending["frequencies"]
        pools: tuple[PoolName, ...] = ("csa", "csa_keys") if len(streams) == 2 else ("hca",)
        held = [(getattr(arrays, _TAILS[pool]), getattr(arrays, pool)) for pool in pools]
        coded = projected if projected and self._codes(projected, frequencies) else None
        appended, flushed, queries = layer_writes(
            **appending,
            streams=tuple(
                Stream(*gated, *state) for gated, state in zip(streams, held, strict=True)
            ),
            pool_layer=self.pool_index,
            block_table=self.step.block_table,
            queries=coded and (coded.q, coded.weights),
            key_storage=self.step.schema.keys,
            query_scale=coded.scale if coded else 1.0,
        )
        for pool, stream in zip(pools, flushed, strict=True):
            self.step.store(_TAILS[pool], stream.tail)
            self.step.store(pool, stream.pool)
        if queries is not None:
            return appended, Prepared(*queries, is_mxfp4=False)
        if projected is None:
            return appended, None
        return appended, _prepared(projected, self.chunk.positions, frequencies)

    def _codes(self, projected: Projected, frequencies: Frequencies) -> bool:
        """Whether queries become E4M3, in which kernels take them."""
        return (
            projected.quantize
            and projected.q.dtype == jnp.bfloat16
            and (projected.q.shape[-1], 2 * len(frequencies)) == (KEY_DIM, ROPE_DIM)
            and isinstance(self.step.schema.keys, KeyRecord)
        )

    def num_entries(self, ratio: int) -> int:
        return self.step.block_table.shape[1] * BLOCK_TOKENS // ratio

    def top_entries(self, queries: Prepared, top_k: int) -> Int[Array, "b t k"]:
        """Reads the keys where they lie; rows of tokens that do not count give anything."""
        return paged_indexer_topk(
            queries.q,
            queries.weights,
            self.step.arrays.csa_keys,
            self.pool_index,
            self.step.block_table,
            self.chunk.complete(OVERLAP_RATIO),
            top_k,
            mxfp4_queries=queries.is_mxfp4,
        )

    def attend(
        self,
        q: Float[Array, "b t h c"],
        sink: Float[Array, "h"],
        frequencies: Frequencies,
        scale: float,
        ratio: int,
        ids: Int[Array, "b t k"] | None,
        *,
        batch_invariant: bool = False,
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
            batch_invariant=batch_invariant,
        )


class WholeSequence:
    """View of a layer without a cache: the chunk is the whole sequence, from position 0.

    Everything is XLA's and differentiable.
    """

    def __init__(self, schema: CacheSchema, chunk: Chunk):
        self.schema = schema
        self.chunk = chunk
        self._planes: dict[str, Planes] = {}

    def write(
        self,
        q: Float[Array, "b t h c"],
        kv: Float[Array, "b t c"],
        weight: Float[Array, "c"],
        frequencies: Frequencies,
        eps: float,
        streams: tuple[Gated, ...],
        projected: Projected | None,
    ) -> tuple[Float[Array, "b t h c"], Prepared | None]:
        positions = self.chunk.positions
        kv = rotate(rms_norm(kv, weight, eps), positions, frequencies)
        self._planes["window"] = self.schema.entries.encode(kv)
        if len(streams) == 2:
            self.flush_csa(streams[0], streams[1], frequencies, q.dtype, eps)
        elif streams:
            self.flush_hca(streams[0], frequencies, q.dtype, eps)
        prepared = projected and _prepared(projected, positions, frequencies)
        return rotate(rms_normalize(q, eps), positions, frequencies), prepared

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

    def num_entries(self, ratio: int) -> int:
        return self.chunk.completed(ratio).bound

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

    def top_entries(self, queries: Prepared, top_k: int) -> Int[Array, "b t k"]:
        valid = compute_valid_lens(self.chunk.positions, OVERLAP_RATIO)[..., None]
        visible = jnp.arange(self.num_entries(OVERLAP_RATIO)) < valid
        keys = self.entries("csa_keys", queries.q.dtype)
        return indexer_topk(queries.q, keys, queries.weights, visible, top_k)

    def attend(
        self,
        q: Float[Array, "b t h c"],
        sink: Float[Array, "h"],
        frequencies: Frequencies,
        scale: float,
        ratio: int,
        ids: Int[Array, "b t k"] | None,
        *,
        batch_invariant: bool = False,
    ) -> Float[Array, "b t h c"]:
        del batch_invariant  # a property of the kernels
        sources = [self.window(q.dtype)]
        if ratio:
            pool: PoolName = "csa" if ratio == OVERLAP_RATIO else "hca"
            num_entries = self.num_entries(ratio)
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
