"""Exact top-k with the tie rule of the whole library: the lower index wins."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

import dsv4_ffi
from dsv4_jax.ops.dispatch import dispatch

# What the kernels hold in shared memory.
_MAX_KERNEL_K = 2048

Selected = tuple[Float[Array, "*batch k"], Int[Array, "*batch k"]]


def topk_select(
    scores: Float[Array, "*batch n"],
    k: int,
    valid: Bool[Array, "*batch n"] | None = None,
    *,
    lengths: Int[Array, "*batch"] | None = None,
    sorted: bool = True,
    implementation: str | None = None,
) -> Selected:
    """The k largest scores of each row with their indices.

    -0.0 equals 0.0, -inf is a score like any other, NaN comes after all numbers, and among equals
    the lower index comes first. Gradient flows from the values to the chosen scores.

    Args:
        scores: float32 [..., n].
        k: how many, 1 <= k <= n.
        valid: entries that may be chosen; all when omitted.
        lengths: of each row only the first so many entries may be chosen; all when omitted.
        sorted: in descending order; else the same entries in the order of their indices or any
            other.
        implementation: "ffi" (k up to 2048, no `valid`), "xla" or None for the fastest.

    Returns:
        (values, indices int32), [..., k] each. Rows with fewer than k entries to choose from have
        value -inf and index -1 for the rest. A zero may have lost its sign, a NaN its payload.

    Raises:
        ValueError: k is not within [1, n].
        NotImplementedError: the kernel asked for does not support the arguments.
    """
    n = scores.shape[-1]
    if not 1 <= k <= n:
        raise ValueError(f"k: got {k}, expected 1 <= k <= {n} (the row length)")
    return dispatch(
        implementation,
        {"ffi": _ffi, "xla": _xla},
        scores.astype(jnp.float32),
        valid,
        lengths,
        k=k,
        sorted=sorted,
    )


def _ordered_keys(scores: Array) -> Array:
    """int32 keys in the order of the scores: above the smallest int32, NaN next to it."""
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    lowest = jnp.iinfo(jnp.int32).min
    bits = jnp.where(bits == lowest, 0, bits)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return jnp.where(jnp.isnan(scores), lowest + 1, keys)


def _xla(
    scores: Array, valid: Array | None, lengths: Array | None, *, k: int, sorted: bool
) -> Selected:
    del sorted  # the order is one of "any"
    absent = jnp.iinfo(jnp.int32).min
    keys = _ordered_keys(scores)
    if valid is not None:
        keys = jnp.where(valid, keys, absent)
    if lengths is not None:
        keys = jnp.where(jnp.arange(scores.shape[-1]) < lengths[..., None], keys, absent)
    best, indices = jax.lax.top_k(keys, k)
    values = jnp.take_along_axis(scores, indices, axis=-1)
    found = best != absent
    return jnp.where(found, values, -jnp.inf), jnp.where(found, indices, -1)


def _ffi(
    scores: Array, valid: Array | None, lengths: Array | None, *, k: int, sorted: bool
) -> Selected:
    if valid is not None:
        raise NotImplementedError("topk_select: the kernel takes lengths, not a mask")
    if k > _MAX_KERNEL_K:
        raise NotImplementedError(f"topk_select: the kernel's k is at most {_MAX_KERNEL_K}")
    if lengths is None:
        lengths = jnp.zeros((*scores.shape[:-1], 0), jnp.int32)
    return _kernel(scores.shape[-1], k, sorted, scores, lengths.astype(jnp.int32))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _kernel(n: int, k: int, sorted: bool, scores: Array, lengths: Array) -> Selected:
    del n
    shape = (*scores.shape[:-1], k)
    values, indices = dsv4_ffi.call(
        "topk_select",
        (jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.int32)),
        scores,
        lengths,
        vmap_method="broadcast_all",
        sorted=sorted,
    )
    return values, indices


def _kernel_forward(
    n: int, k: int, sorted: bool, scores: Array, lengths: Array
) -> tuple[Selected, Array]:
    values, indices = _kernel(n, k, sorted, scores, lengths)
    return (values, indices), indices


def _kernel_backward(
    n: int, k: int, sorted: bool, indices: Array, cotangents: tuple[Array, Array]
) -> tuple[Array, None]:
    del sorted
    chosen = jnp.where(indices < 0, n, indices).reshape(-1, k)
    rows = jnp.arange(chosen.shape[0])[:, None]
    gradient = jnp.zeros((chosen.shape[0], n), jnp.float32)
    gradient = gradient.at[rows, chosen].add(cotangents[0].reshape(-1, k), mode="drop")
    return gradient.reshape(*indices.shape[:-1], n), None


_kernel.defvjp(_kernel_forward, _kernel_backward)
