"""From a compressor's rows to entries in the paged pools, tails updated.

Value and gate of a token are the two products of a compressor; its row is (value, gate + ape of
its place in the entry). Tokens that do not complete an entry wait in a tail. The flush always
runs: how many entries a chunk completes is data.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Shaped

import dsv4_ffi
from dsv4_jax.cache import paged
from dsv4_jax.cache.flush import (
    OVERLAP_RATIO,
    Completed,
    advance_overlapping,
    advance_running,
)
from dsv4_jax.cache.storage import Storage
from dsv4_jax.formats.hadamard import hadamard
from dsv4_jax.ops.cache_planes import check_entries, check_keys
from dsv4_jax.ops.dispatch import dispatch
from dsv4_jax.ops.norms import rms_norm
from dsv4_jax.ops.rotary import rotate

# The kernel's ratio of HCA layers.
RUNNING_RATIO = 128

Pool = tuple[Shaped[Array, "layers blocks entries _"], ...]


class Gated(NamedTuple):
    """What a compressor makes of a chunk.

    Attributes:
        value, gate: products of the chunk's tokens.
        ape: added to the gate of the token at position p: row p mod ratio.
        weight: of the entries' norm.
    """

    value: Float32[Array, "b t channels"]
    gate: Float32[Array, "b t channels"]
    ape: Float[Array, "ratio channels"]
    weight: Float[Array, "w"]


class Stream(NamedTuple):
    """What one compressor reads and writes.

    Attributes:
        value, gate, ape, weight: see `Gated`.
        tail: of all layers and slots; sequence i has slot i.
        pool: planes [layer, block, entry, width].
    """

    value: Float32[Array, "b t channels"]
    gate: Float32[Array, "b t channels"]
    ape: Float[Array, "ratio channels"]
    weight: Float[Array, "w"]
    tail: Float32[Array, "layers slots ..."]
    pool: Pool


class Flushed(NamedTuple):
    """A stream's tail and pool afterwards."""

    tail: Float32[Array, "layers slots ..."]
    pool: Pool


def flush_csa(
    entries: Stream,
    keys: Stream,
    layer: int,
    block_table: Int[Array, "b m"],
    start: Int[Array, "b"],
    length: Int[Array, "b"],
    frequencies: Float32[Array, "pairs"] | Float32[np.ndarray, "pairs"],
    *,
    storage: Storage,
    key_storage: Storage,
    dtype: DTypeLike,
    eps: float,
    implementation: str | None = None,
) -> tuple[Flushed, Flushed]:
    """Both flushes of a CSA layer: an entry and an indexer key of every 4 tokens.

    Entry i pools the first half of the channels of tokens 4i - 4 .. 4i - 1 with the second half
    of 4i .. 4i + 3, a softmax over the 8 scores in each channel. The pooled entry is rounded to
    `dtype`, normalised, rotated at token 4i, and stored; a key is transformed by the Hadamard
    matrix before it is stored (DeepSeek-V4 reference, Compressor and Indexer). Everything else is
    float32. No byte changes of sequences of length 0, of entries without a block, of other layers.

    Args:
        entries: channels 2c, tail [layer, slot, 8, 2, 2c], the ring of the last 8 rows (value,
            score), position p at slot p mod 8.
        keys: the same with the indexer's width.
        layer: which of the tails' and pools' layers.
        block_table: the blocks of each sequence in order; -1 where there is none.
        start: position of each sequence's first token.
        length: how many of its t tokens count, 0 to t.
        frequencies: radians per token of each pair of rotated channels.
        storage, key_storage: how the pools keep entries and keys.
        dtype: of the model.
        eps: of both norms.
        implementation: "ffi" (512 and 128 channels, bfloat16; both flushes in one launch, in
            place), "xla" or None for the fastest.

    Returns:
        Tail and pool of the entries, and of the keys.
    """
    return dispatch(
        implementation,
        {"ffi": _ffi_csa, "xla": _xla_csa},
        *(entries, keys, block_table, start, length, jnp.asarray(frequencies)),
        layer=layer,
        storage=storage,
        key_storage=key_storage,
        dtype=jnp.dtype(dtype),
        eps=eps,
    )


def flush_hca(
    entries: Stream,
    layer: int,
    block_table: Int[Array, "b m"],
    start: Int[Array, "b"],
    length: Int[Array, "b"],
    frequencies: Float32[Array, "pairs"] | Float32[np.ndarray, "pairs"],
    *,
    storage: Storage,
    dtype: DTypeLike,
    eps: float,
    implementation: str | None = None,
) -> Flushed:
    """The flush of an HCA layer: an entry of every `ratio` tokens, as many as ape has rows.

    As `flush_csa`, but an entry pools its own tokens only, and its tail [layer, slot, 3, c] is
    the running (max, sum, weighted sum) of the softmax over the last token's entry. "ffi" takes
    a ratio of 128.
    """
    return dispatch(
        implementation,
        {"ffi": _ffi_hca, "xla": _xla_hca},
        *(entries, block_table, start, length, jnp.asarray(frequencies)),
        layer=layer,
        storage=storage,
        dtype=jnp.dtype(dtype),
        eps=eps,
    )


def finish_entries(
    pooled: Float[Array, "b n w"],
    ids: Int[Array, "b n"],
    ratio: int,
    weight: Float[Array, "w"],
    frequencies: Float32[Array, "pairs"] | Float32[np.ndarray, "pairs"],
    *,
    dtype: DTypeLike,
    eps: float,
) -> Float[Array, "b n w"]:
    """Pooled entries rounded to `dtype`, normalised, and rotated at their first token."""
    limits = jnp.finfo(dtype)
    # A cast alone and its inverse in the norm are taken for the identity under jit.
    rounded = jax.lax.reduce_precision(pooled, limits.nexp, limits.nmant).astype(dtype)
    return rotate(rms_norm(rounded, weight, eps), ids * ratio, frequencies)


def gated_rows(stream: Gated | Stream, start: Int[Array, "b"]) -> Float32[Array, "b t 2 channels"]:
    """(value, score) of every token."""
    ratio = stream.ape.shape[0]
    positions = start[:, None] + jnp.arange(stream.value.shape[1])
    ape = stream.ape.astype(jnp.float32)[positions % ratio]
    return jnp.stack([stream.value, stream.gate + ape], axis=2)


def _xla_csa(
    entries: Stream,
    keys: Stream,
    block_table: Array,
    start: Array,
    length: Array,
    frequencies: Array,
    *,
    layer: int,
    storage: Storage,
    key_storage: Storage,
    dtype: np.dtype,
    eps: float,
) -> tuple[Flushed, Flushed]:
    completed = Completed.by(start, length, entries.value.shape[1], OVERLAP_RATIO)

    def flush(stream: Stream, storage: Storage, transformed: bool) -> Flushed:
        rows = gated_rows(stream, start)
        tail, pooled = advance_overlapping(stream.tail, layer, start, length, rows)
        finished = finish_entries(
            pooled, completed.ids, OVERLAP_RATIO, stream.weight, frequencies, dtype=dtype, eps=eps
        )
        new = storage.encode(hadamard(finished) if transformed else finished)
        first, count = completed.first, completed.count
        return Flushed(tail, paged.write(stream.pool, layer, block_table, first, count, new))

    return flush(entries, storage, False), flush(keys, key_storage, True)


def _xla_hca(
    entries: Stream,
    block_table: Array,
    start: Array,
    length: Array,
    frequencies: Array,
    *,
    layer: int,
    storage: Storage,
    dtype: np.dtype,
    eps: float,
) -> Flushed:
    ratio = entries.ape.shape[0]
    completed = Completed.by(start, length, entries.value.shape[1], ratio)
    rows = gated_rows(entries, start)
    tail, pooled = advance_running(entries.tail, layer, start, length, rows, ratio)
    new = storage.encode(
        finish_entries(
            pooled, completed.ids, ratio, entries.weight, frequencies, dtype=dtype, eps=eps
        )
    )
    first, count = completed.first, completed.count
    return Flushed(tail, paged.write(entries.pool, layer, block_table, first, count, new))


def _ffi_csa(
    entries: Stream,
    keys: Stream,
    block_table: Array,
    start: Array,
    length: Array,
    frequencies: Array,
    *,
    layer: int,
    storage: Storage,
    key_storage: Storage,
    dtype: np.dtype,
    eps: float,
) -> tuple[Flushed, Flushed]:
    check_entries("flush_csa", storage, dtype)
    check_keys("flush_csa", key_storage)
    if len(entries.pool) != len(keys.pool):
        raise NotImplementedError("flush_csa: the kernel takes two records or two dense pools")
    shared = (block_table, start, length, frequencies)
    first, second = _call("flush_csa", [entries, keys], shared, layer, eps)
    return first, second


def _ffi_hca(
    entries: Stream,
    block_table: Array,
    start: Array,
    length: Array,
    frequencies: Array,
    *,
    layer: int,
    storage: Storage,
    dtype: np.dtype,
    eps: float,
) -> Flushed:
    check_entries("flush_hca", storage, dtype)
    if entries.ape.shape[0] != RUNNING_RATIO:
        raise NotImplementedError(f"flush_hca: the kernel's ratio is {RUNNING_RATIO}")
    shared = (block_table, start, length, frequencies)
    return _call("flush_hca", [entries], shared, layer, eps)[0]


def _call(
    name: str, streams: list[Stream], shared: tuple[Array, ...], layer: int, eps: float
) -> list[Flushed]:
    """Operands: table, start, length, frequencies; then of each stream value, gate, ape, weight,
    tail and planes. Results: of each stream tail and planes."""
    block_table, start, length, frequencies = shared
    operands = [*(x.astype(jnp.int32) for x in (block_table, start, length)), frequencies]
    states: list[Array] = []
    aliases = {}
    for value, gate, ape, weight, tail, pool in streams:
        operands += [value, gate, ape.astype(jnp.float32), weight]
        for state in (tail, *pool):
            aliases[len(operands)] = len(states)
            operands.append(state)
            states.append(state)
    results = dsv4_ffi.call(
        name,
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in states],
        *operands,
        aliases=aliases,
        layer=np.int64(layer),
        eps=np.float32(eps),
    )
    size = 1 + len(streams[0].pool)
    grouped = [results[i : i + size] for i in range(0, len(results), size)]
    return [Flushed(tail, tuple(planes)) for tail, *planes in grouped]
