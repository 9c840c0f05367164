"""The rotation that spreads an indexer vector's energy over its channels."""

import jax.numpy as jnp
import numpy as np
from jax.lax import Precision
from jaxtyping import Array, Float


def hadamard(x: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
    """x H / sqrt(n) in float32, returned in x's dtype (DeepSeek-V4 reference, indexer rotation).

    H is the Sylvester matrix in natural order, H[i, j] = (-1)^popcount(i & j); it is symmetric,
    so the map is its own inverse.

    Raises:
        ValueError: n is not a power of two.
    """
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise ValueError(f"x: got width {n}, expected a power of two")
    index = np.arange(n)
    parity = np.bitwise_count(index[:, None] & index) % 2
    signs = 1 - 2 * parity.astype(np.float32)
    # The factor comes after the sum, whose terms are then exact.
    total = jnp.matmul(x.astype(jnp.float32), signs, precision=Precision.HIGHEST)
    return (total * np.float32(n**-0.5)).astype(x.dtype)
