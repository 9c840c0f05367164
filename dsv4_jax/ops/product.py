"""Matrix products with a known accumulator."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_exact: ContextVar[bool] = ContextVar("exact", default=False)


@contextmanager
def accumulation(exact: bool) -> Iterator[None]:
    """How `product` and `sum_of_squares` add up while a function is traced.

    With `exact` sums of float32 products are accumulated in float64 and rounded once, so that the
    shape of a call (a chunk, a batch, a single step) does not show in the last digits.
    """
    token = _exact.set(exact)
    try:
        yield
    finally:
        _exact.reset(token)


def _float32_product(spec: str, a: Array, b: Array) -> Array:
    # Without HIGHEST a GPU rounds float32 operands to TF32. With it the derivative of a bfloat16
    # product would become a slow float32 one.
    precision = jax.lax.Precision.HIGHEST if a.dtype == b.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _float64_product(spec: str, a: Array, b: Array) -> Array:
    with jax.enable_x64(True):
        y = jnp.einsum(spec, a.astype(jnp.float64), b.astype(jnp.float64))
        return y.astype(jnp.float32)


@_float64_product.defjvp
def _float64_product_jvp(
    spec: str, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (a, b), (da, db) = primals, tangents
    tangent = _float32_product(spec, da, b) + _float32_product(spec, a, db)
    return _float64_product(spec, a, b), tangent


def product(spec: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """`jnp.einsum(spec, a, b)` accumulated and returned in float32; see `accumulation`.

    Float32 operands are never rounded to a shorter format. Derivatives are float32 products in
    any case.
    """
    if _exact.get() and a.dtype == b.dtype == jnp.float32:
        return _float64_product(spec, a, b)
    return _float32_product(spec, a, b)


def sum_of_squares(x: Float[Array, "*batch d"]) -> Float[Array, "*batch 1"]:
    """Σ x² over the last axis, float32; see `accumulation`."""
    x = x.astype(jnp.float32)
    if _exact.get():
        return _float64_product("...d,...d->...", x, x)[..., None]
    return (x * x).sum(axis=-1, keepdims=True)
