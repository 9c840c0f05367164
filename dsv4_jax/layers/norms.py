"""Root-mean-square normalisation (DeepSeek-V4 reference, RMSNorm)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsv4_jax.layers.parameter import parameter
from dsv4_jax.ops.product import sum_of_squares


def rms_normalize(x: Float[Array, "*batch d"], eps: float) -> Float[Array, "*batch d"]:
    """x / sqrt(mean(x²) + eps) over the last axis, computed in float32, returned in x's dtype."""
    scale = jax.lax.rsqrt(sum_of_squares(x) / x.shape[-1] + eps)
    return (x.astype(jnp.float32) * scale).astype(x.dtype)


class RMSNorm(nnx.Module):
    """`rms_normalize` times a learned weight; one rounding to x's dtype at the very end."""

    def __init__(self, width: int, eps: float):
        self.eps = eps
        self.weight = parameter(width, init="ones")

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        y = rms_normalize(x.astype(jnp.float32), self.eps)
        return (y * self.weight[...].astype(jnp.float32)).astype(x.dtype)
