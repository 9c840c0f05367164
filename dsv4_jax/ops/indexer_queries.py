"""From what the indexer's projections give to the queries that score keys."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float8e4m3fn, Float32, Int

import dsv4_ffi
from dsv4_jax.formats import indexer_key
from dsv4_jax.formats.hadamard import hadamard
from dsv4_jax.ops.cache_planes import KEY_DIM, ROPE_DIM
from dsv4_jax.ops.dispatch import dispatch
from dsv4_jax.ops.indexer import fp8_queries
from dsv4_jax.ops.rotary import rotate


def rotated_queries(
    q: Float[Array, "b t h c"],
    positions: Int[Array, "b t"],
    frequencies: Float32[Array, "pairs"] | Float32[np.ndarray, "pairs"],
    quantize: bool,
) -> Float[Array, "b t h c"]:
    """q rotated at its position, by the Hadamard matrix, and perhaps rounded to MXFP4 (Q3)."""
    q = hadamard(rotate(q, positions, frequencies))
    return indexer_key.round_trip(q) if quantize else q


def indexer_queries(
    q: Float[Array, "b t h c"],
    weights: Float32[Array, "b t h"],
    positions: Int[Array, "b t"],
    frequencies: Float32[Array, "pairs"] | Float32[np.ndarray, "pairs"],
    *,
    scale: float,
    implementation: str | None = None,
) -> tuple[Float8e4m3fn[Array, "b t h c"], Float32[Array, "b t h"]]:
    """`fp8_queries` of `rotated_queries` that are rounded to MXFP4, and of weights times `scale`.

    No gradient flows.

    Args:
        q: projected queries.
        weights: of each head; may be negative.
        positions: of the queries.
        frequencies: radians per token of each pair of rotated channels.
        scale: factor of the weights.
        implementation: "ffi" (128 bfloat16 channels, 64 of them rotary), "xla" or None for the
            fastest.

    Raises:
        NotImplementedError: the kernel asked for does not support the arguments.
    """
    return dispatch(
        implementation,
        {"ffi": _ffi, "xla": _xla},
        *jax.lax.stop_gradient((q, weights)),
        *(positions, jnp.asarray(frequencies)),
        scale=scale,
    )


def _xla(
    q: Array, weights: Array, positions: Array, frequencies: Array, *, scale: float
) -> tuple[Array, Array]:
    return fp8_queries(rotated_queries(q, positions, frequencies, True), weights * scale)


def _ffi(
    q: Array, weights: Array, positions: Array, frequencies: Array, *, scale: float
) -> tuple[Array, Array]:
    if q.dtype != jnp.bfloat16:
        raise NotImplementedError(f"indexer_queries: the kernel takes bfloat16, not {q.dtype}")
    if (q.shape[3], 2 * frequencies.shape[0]) != (KEY_DIM, ROPE_DIM):
        raise NotImplementedError(
            f"indexer_queries: the kernel is for {KEY_DIM} channels of which {ROPE_DIM} are "
            f"rotary, got {q.shape[3]} and {2 * frequencies.shape[0]}"
        )
    codes, weights = dsv4_ffi.call(
        "indexer_queries",
        coded_shapes(q),
        *(q, weights, positions.astype(jnp.int32), frequencies),
        scale=np.float32(scale),
    )
    return codes, weights


def coded_shapes(q: Float[Array, "b t h c"]) -> list[jax.ShapeDtypeStruct]:
    """Of what `indexer_queries` returns."""
    return [
        jax.ShapeDtypeStruct(q.shape, jnp.float8_e4m3fn),
        jax.ShapeDtypeStruct(q.shape[:3], jnp.float32),
    ]
