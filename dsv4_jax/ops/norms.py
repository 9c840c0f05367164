"""Root-mean-square normalisation (DeepSeek-V4 reference, RMSNorm)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import dsv4_ffi
from dsv4_jax.ops.dispatch import differentiable, dispatch
from dsv4_jax.ops.product import sum_of_squares

# A row is held by the threads of a block, so many values by each.
_VALUES, _MAX_WIDTH = 8, 8192


def rms_normalize(x: Float[Array, "*batch d"], eps: float) -> Float[Array, "*batch d"]:
    """x / sqrt(mean(x²) + eps) over the last axis, computed in float32, returned in x's dtype."""
    scale = jax.lax.rsqrt(sum_of_squares(x) / x.shape[-1] + eps)
    return (x.astype(jnp.float32) * scale).astype(x.dtype)


def rms_norm(
    x: Float[Array, "*batch d"],
    weight: Float[Array, "d"],
    eps: float,
    implementation: str | None = None,
) -> Float[Array, "*batch d"]:
    """`rms_normalize` times a weight; one rounding to x's dtype at the very end.

    Args:
        x: [..., d].
        weight: [d].
        eps: added to the mean square.
        implementation: "ffi" (bfloat16 x, d a multiple of 8 up to 8,192), "xla" or None for the
            fastest.

    Raises:
        NotImplementedError: the kernel asked for does not support the arguments.
    """
    return dispatch(implementation, {"ffi": _ffi, "xla": _xla}, x, weight, eps=eps)


def _xla(x: Array, weight: Array, *, eps: float) -> Array:
    y = rms_normalize(x.astype(jnp.float32), eps)
    return (y * weight.astype(jnp.float32)).astype(x.dtype)


def _ffi(x: Array, weight: Array, *, eps: float) -> Array:
    width = x.shape[-1]
    if x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"rms_norm: the kernel takes bfloat16, not {x.dtype}")
    if not 0 < width <= _MAX_WIDTH or width % _VALUES:
        raise NotImplementedError(
            f"rms_norm: the kernel's width is a multiple of {_VALUES} up to {_MAX_WIDTH}, "
            f"not {width}"
        )

    def kernel(x: Array, weight: Array) -> Array:
        rows = x.reshape(math.prod(x.shape[:-1]), width)
        result = jax.ShapeDtypeStruct(rows.shape, rows.dtype)
        y: Array = dsv4_ffi.call("rms_norm", result, rows, weight, eps=np.float32(eps))
        return y.reshape(x.shape)

    return differentiable(kernel, lambda x, weight: _xla(x, weight, eps=eps))(x, weight)
