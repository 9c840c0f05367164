"""Root-mean-square normalisation (DeepSeek-V4 reference, RMSNorm)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv4_jax.ops.product import sum_of_squares


def rms_normalize(x: Float[Array, "*batch d"], eps: float) -> Float[Array, "*batch d"]:
    """x / sqrt(mean(x²) + eps) over the last axis, computed in float32, returned in x's dtype."""
    scale = jax.lax.rsqrt(sum_of_squares(x) / x.shape[-1] + eps)
    return (x.astype(jnp.float32) * scale).astype(x.dtype)


def rms_norm(
    x: Float[Array, "*batch d"], weight: Float[Array, "d"], eps: float
) -> Float[Array, "*batch d"]:
    """`rms_normalize` times a weight; one rounding to x's dtype at the very end."""
    y = rms_normalize(x.astype(jnp.float32), eps)
    return (y * weight.astype(jnp.float32)).astype(x.dtype)
