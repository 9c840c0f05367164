"""Everything that a layer with compressed entries writes for a chunk."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

import dsv4_ffi
from dsv4_jax.cache.storage import Storage
from dsv4_jax.ops.append_swa import Appended, Ring, append_swa
from dsv4_jax.ops.cache_planes import check_entries, check_keys
from dsv4_jax.ops.dispatch import dispatch
from dsv4_jax.ops.flush import RUNNING_RATIO, Flushed, Stream, flush_csa, flush_hca
from dsv4_jax.ops.indexer_queries import coded_shapes, indexer_queries

# Of so many tokens of a sequence one launch writes all.
_MAX_JOINED_TOKENS = 4

Queries = tuple[Float[Array, "b t heads width"], Float32[Array, "b t heads"]]


class Written(NamedTuple):
    """What `append_swa`, the flush and `indexer_queries` return."""

    appended: Appended
    flushed: tuple[Flushed, ...]
    queries: Queries | None


def layer_writes(
    q: Float[Array, "b t h c"],
    kv: Float[Array, "b t c"],
    weight: Float[Array, "c"],
    window: Ring,
    layer: int,
    start: Int[Array, "b"],
    length: Int[Array, "b"],
    frequencies: Float32[Array, "pairs"] | Float32[np.ndarray, "pairs"],
    streams: tuple[Stream, ...],
    pool_layer: int,
    block_table: Int[Array, "b m"],
    queries: Queries | None = None,
    *,
    storage: Storage,
    key_storage: Storage,
    eps: float,
    with_chunk: bool = False,
    query_scale: float = 1.0,
    implementation: str | None = None,
) -> Written:
    """`append_swa`, `flush_csa` or `flush_hca`, and `indexer_queries`: none needs another's result.

    Args:
        q, kv, weight, window, layer, start, length, frequencies, storage, eps, with_chunk: as of
            `append_swa`.
        streams: entries and keys of a CSA layer, entries of an HCA layer.
        pool_layer, block_table, key_storage: `layer` and others of the flush.
        queries: q and weights of `indexer_queries`, if there are any.
        query_scale: its scale.
        implementation: "ffi" (what these take; one launch for up to 4 tokens of a sequence that
            `with_chunk` is not needed for), "xla" (one after the other, each in the implementation
            that the model's `Kernels` name) or None for the fastest.
    """
    return dispatch(
        implementation,
        {"ffi": _ffi, "xla": _separately},
        *(q, kv, weight, window, start, length, jnp.asarray(frequencies), streams, block_table),
        queries,
        layer=layer,
        pool_layer=pool_layer,
        storage=storage,
        key_storage=key_storage,
        eps=eps,
        with_chunk=with_chunk,
        query_scale=query_scale,
    )


def _positions(start: Array, num_tokens: int) -> Array:
    return start[:, None] + jnp.arange(num_tokens)


def _separately(
    q: Array,
    kv: Array,
    weight: Array,
    window: Ring,
    start: Array,
    length: Array,
    frequencies: Array,
    streams: tuple[Stream, ...],
    block_table: Array,
    queries: Queries | None,
    *,
    layer: int,
    pool_layer: int,
    storage: Storage,
    key_storage: Storage,
    eps: float,
    with_chunk: bool,
    query_scale: float,
    implementation: str | None = None,
) -> Written:
    appended = append_swa(
        *(q, kv, weight, window, layer, start, length, frequencies),
        storage=storage,
        eps=eps,
        with_chunk=with_chunk,
        implementation=implementation,
    )
    flushed: tuple[Flushed, ...]
    if len(streams) == 2:
        flushed = flush_csa(
            *(streams[0], streams[1], pool_layer, block_table, start, length, frequencies),
            storage=storage,
            key_storage=key_storage,
            dtype=q.dtype,
            eps=eps,
            implementation=implementation,
        )
    else:
        entries = flush_hca(
            *(streams[0], pool_layer, block_table, start, length, frequencies),
            storage=storage,
            dtype=q.dtype,
            eps=eps,
            implementation=implementation,
        )
        flushed = (entries,)
    coded = queries and indexer_queries(
        *(*queries, _positions(start, q.shape[1]), frequencies),
        scale=query_scale,
        implementation=implementation,
    )
    return Written(appended, flushed, coded)


def _ffi(*arrays: Any, with_chunk: bool, **static: Any) -> Written:
    num_tokens = arrays[0].shape[1]
    if with_chunk or num_tokens > _MAX_JOINED_TOKENS:
        return _separately(*arrays, **static, with_chunk=with_chunk, implementation="ffi")
    return _joined(*arrays, **static)


def _joined(
    q: Array,
    kv: Array,
    weight: Array,
    window: Ring,
    start: Array,
    length: Array,
    frequencies: Array,
    streams: tuple[Stream, ...],
    block_table: Array,
    queries: Queries | None,
    *,
    layer: int,
    pool_layer: int,
    storage: Storage,
    key_storage: Storage,
    eps: float,
    query_scale: float,
) -> Written:
    check_entries("layer_writes", storage, q.dtype)
    if len(streams) == 2:
        check_keys("layer_writes", key_storage)
    elif streams[0].ape.shape[0] != RUNNING_RATIO:
        raise NotImplementedError(f"layer_writes: the kernel's HCA ratio is {RUNNING_RATIO}")
    if len({len(window), *(len(stream.pool) for stream in streams)}) > 1:
        raise NotImplementedError("layer_writes: the kernel takes only records or only dense pools")

    start, length = start.astype(jnp.int32), length.astype(jnp.int32)
    operands: list[Array] = [q, kv, weight, start, length, frequencies]
    states: list[Array] = []
    aliases = {}

    def add_states(*arrays: Array) -> None:
        for array in arrays:
            aliases[len(operands)] = 1 + len(states)
            operands.append(array)
            states.append(array)

    add_states(*window)
    operands.append(block_table.astype(jnp.int32))
    for value, gate, ape, norm_weight, tail, pool in streams:
        operands += [value, gate, ape.astype(jnp.float32), norm_weight]
        add_states(tail, *pool)
    shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (q, *states)]
    if queries is not None:
        operands += [*queries, _positions(start, q.shape[1])]
        shapes += coded_shapes(queries[0])
    q, *results = dsv4_ffi.call(
        "layer_writes",
        shapes,
        *operands,
        aliases=aliases,
        num_planes=np.int64(len(window)),
        num_streams=np.int64(len(streams)),
        layer=np.int64(layer),
        pool_layer=np.int64(pool_layer),
        eps=np.float32(eps),
        query_scale=np.float32(query_scale),
    )
    states, coded = results[: len(states)], results[len(states) :]
    size = 1 + len(window)
    flushed = tuple(
        Flushed(states[i], tuple(states[i + 1 : i + size]))
        for i in range(len(window), len(states), size)
    )
    appended = Appended(q, tuple(states[: len(window)]), (), ())
    return Written(appended, flushed, tuple(coded) if queries is not None else None)
