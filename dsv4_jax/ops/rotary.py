"""Rotary position embedding of the trailing channels."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int


def rotate(
    x: Float[Array, "*batch c"],
    positions: Int[Array, "..."],
    frequencies: Float32[Array, "pairs"] | Float32[np.ndarray, "pairs"],
    inverse: bool = False,
) -> Float[Array, "*batch c"]:
    """Rotates adjacent channel pairs of x's end, computed in float32, returned in x's dtype.

    Args:
        x: [..., c] with c >= 2 * pairs; channels before the last 2 * pairs pass through.
        positions: int32, its shape equal to leading axes of x (missing axes broadcast).
        frequencies: radians per token of each pair.
        inverse: rotate by the negative angle.
    """
    # The angle is one float32 product, as in the reference: a more accurate angle would differ
    # from it by up to 0.06 rad at a million tokens.
    angle = positions.astype(jnp.float32)[..., None] * frequencies
    angle = angle.reshape(
        angle.shape[:-1] + (1,) * (x.ndim - positions.ndim - 1) + angle.shape[-1:]
    )
    cos, sin = jnp.cos(angle), jnp.sin(-angle if inverse else angle)
    width = 2 * frequencies.shape[0]
    rest, rotated = x[..., : x.shape[-1] - width], x[..., x.shape[-1] - width :]
    pairs = rotated.astype(jnp.float32).reshape(*rotated.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    pairs = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return jnp.concatenate([rest, pairs.reshape(rotated.shape).astype(x.dtype)], axis=-1)
