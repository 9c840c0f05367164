"""Declaring parameters: modules say shapes, a checkpoint or `initialize` brings the values."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


def parameter(*shape: int, dtype: DTypeLike = jnp.float32, init: str = "normal") -> nnx.Param:
    """Declares a parameter without allocating it.

    Args:
        shape: the array's shape.
        dtype: dtype of freshly initialised values; a checkpoint's stored dtype replaces it.
        init: "normal", "zeros", "ones" or "experts" (random expert ids), read by `initialize`.
    """
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype), init=init)
