"""The quantised KV entry with one float32 scale: E4M3 channels, rotary channels in bfloat16.

For head_dim 512 and 64 rotary channels 580 bytes, in two planes of 576 bytes and one number.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, UInt8

from dsv4_jax.formats import fp8_block


def _check_rope_dim(width: int, rope_dim: int) -> None:
    if not 0 <= rope_dim <= width:
        raise ValueError(f"rope_dim: got {rope_dim}, expected 0 to {width}")


def encode(
    x: Float[Array, "*batch d"], rope_dim: int
) -> tuple[UInt8[Array, "*batch body"], Float32[Array, "*batch 1"]]:
    """Body [..., d + rope_dim] as of `kv_entry.encode`, and what its codes are multiplied by.

    The scale is max(amax, 1e-4) times the float32 reciprocal of 448, the largest E4M3 value; the
    codes are nearest to the product of x and the scale's float32 reciprocal. XLA on GPU may take
    a neighbour of that reciprocal. An entry with an infinity or a NaN in these channels decodes
    to NaN or infinities there.

    Raises:
        ValueError: rope_dim is not in 0..d.
    """
    _check_rope_dim(x.shape[-1], rope_dim)
    nope = x.shape[-1] - rope_dim
    values = jax.lax.stop_gradient(x[..., :nope]).astype(jnp.float32)
    amax = jnp.abs(values).max(-1, keepdims=True, initial=fp8_block.AMAX_FLOOR)
    scale = amax * (np.float32(1) / np.float32(fp8_block.LARGEST))
    codes = jax.lax.bitcast_convert_type(fp8_block.to_e4m3(values * (1 / scale)), jnp.uint8)
    rope = jax.lax.bitcast_convert_type(x[..., nope:].astype(jnp.bfloat16), jnp.uint8)
    return jnp.concatenate([codes, rope.reshape(*x.shape[:-1], 2 * rope_dim)], -1), scale


def decode(
    body: UInt8[Array, "*batch body"],
    scale: Float32[Array, "*batch 1"],
    rope_dim: int,
    dtype: DTypeLike,
) -> Float[Array, "*batch d"]:
    """The entry in `dtype`: float32 products, rounded once; rotary channels exact.

    Raises:
        ValueError: rope_dim is not in 0..d.
    """
    width = body.shape[-1] - rope_dim
    _check_rope_dim(width, rope_dim)
    nope = width - rope_dim
    codes = jax.lax.bitcast_convert_type(body[..., :nope], jnp.float8_e4m3fn)
    rope_bytes = body[..., nope:].reshape(*body.shape[:-1], rope_dim, 2)
    rope = jax.lax.bitcast_convert_type(rope_bytes, jnp.bfloat16)
    values = codes.astype(jnp.float32) * scale
    return jnp.concatenate([values.astype(dtype), rope.astype(dtype)], -1)
