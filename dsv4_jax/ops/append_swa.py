"""Queries and window entries of new tokens: normalised, rotated, written to the ring."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Shaped

import dsv4_ffi
from dsv4_jax.cache.state import write_ring
from dsv4_jax.cache.storage import Storage
from dsv4_jax.ops.cache_planes import check_entries
from dsv4_jax.ops.dispatch import dispatch
from dsv4_jax.ops.norms import rms_norm, rms_normalize
from dsv4_jax.ops.rotary import rotate

Ring = tuple[Shaped[Array, "layers slots ring _"], ...]
Entries = tuple[Shaped[Array, "b n _"], ...]


class Appended(NamedTuple):
    """What `append_swa` returns.

    Attributes:
        q: [b, t, h, c], each head normalised without a weight and rotated.
        window: the planes with the chunk in them.
        before: planes [b, ring, ...], the sequences' slots as they were; empty unless asked for.
        new: planes [b, t, ...], the chunk's entries; empty unless asked for.
    """

    q: Float[Array, "b t h c"]
    window: Ring
    before: Entries
    new: Entries


def append_swa(
    q: Float[Array, "b t h c"],
    kv: Float[Array, "b t c"],
    weight: Float[Array, "c"],
    window: Ring,
    layer: int,
    start: Int[Array, "b"],
    length: Int[Array, "b"],
    frequencies: Float32[Array, "pairs"] | Float32[np.ndarray, "pairs"],
    *,
    storage: Storage,
    eps: float,
    with_chunk: bool = False,
    implementation: str | None = None,
) -> Appended:
    """Normalises and rotates a chunk's queries and entries, and writes the entries to the ring.

    q / rms(q) of each head and kv / rms(kv) · weight are rounded to their dtype, then their last
    2 · pairs channels are rotated at the token's position (DeepSeek-V4 reference, Attention). Of
    each sequence the last ring-full of its `length` tokens is written, position p at slot
    p mod ring; no other byte of the planes changes.

    A token that stands before others of its chunk needs what those overwrite: where the ring is
    shorter than the sliding window + t - 1, attention reads `before` and `new` instead.

    Args:
        q: projected queries.
        kv: projected entries, in q's dtype.
        weight: of the entries' norm.
        window: planes [layer, slot, ring, width] of `storage`; sequence i has slot i.
        layer: which of the planes' layers.
        start: position of each sequence's first token.
        length: how many of its t tokens count, 0 to t. The others' q and entries are returned
            all the same.
        frequencies: radians per token of each pair of rotated channels.
        storage: how the ring keeps entries.
        eps: of both norms.
        with_chunk: return `before` and `new`, else nothing in their place.
        implementation: "ffi" (448 + 64 channels, bfloat16; in place), "xla" or None for the
            fastest.
    """
    return dispatch(
        implementation,
        {"ffi": _ffi, "xla": _xla},
        *(q, kv, weight, window, start, length, jnp.asarray(frequencies)),
        layer=layer,
        storage=storage,
        eps=eps,
        with_chunk=with_chunk,
    )


def _xla(
    q: Array,
    kv: Array,
    weight: Array,
    window: Ring,
    start: Array,
    length: Array,
    frequencies: Array,
    *,
    layer: int,
    storage: Storage,
    eps: float,
    with_chunk: bool,
) -> Appended:
    b, t = kv.shape[:2]
    positions = start[:, None] + jnp.arange(t)
    q = rotate(rms_normalize(q, eps), positions, frequencies)
    new = storage.encode(rotate(rms_norm(kv, weight, eps), positions, frequencies))
    before = tuple(ring[layer, :b] for ring in window)
    written = tuple(
        write_ring(ring, layer, start, length, rows) for ring, rows in zip(window, new, strict=True)
    )
    return Appended(q, written, before, new) if with_chunk else Appended(q, written, (), ())


def _ffi(
    q: Array,
    kv: Array,
    weight: Array,
    window: Ring,
    start: Array,
    length: Array,
    frequencies: Array,
    *,
    layer: int,
    storage: Storage,
    eps: float,
    with_chunk: bool,
) -> Appended:
    check_entries("append_swa", storage, q.dtype)
    b, t = kv.shape[:2]
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, *window)]
    for tokens in (window[0].shape[2], t) if with_chunk else ():
        results += [
            jax.ShapeDtypeStruct((b, tokens, plane.shape[3]), plane.dtype) for plane in window
        ]
    operands = (q, kv, weight, start.astype(jnp.int32), length.astype(jnp.int32), frequencies)
    first = len(operands)
    q, *planes = dsv4_ffi.call(
        "append_swa",
        results,
        *operands,
        *window,
        aliases={first + i: 1 + i for i in range(len(window))},
        layer=np.int64(layer),
        eps=np.float32(eps),
    )
    n = len(window)
    return Appended(q, tuple(planes[:n]), tuple(planes[n : 2 * n]), tuple(planes[2 * n :]))
