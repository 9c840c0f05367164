"""The quantised KV entry: E4M3 channels with a scale per 64, rotary channels in bfloat16.

For head_dim 512 and 64 rotary channels this is the 584-byte record, in two planes of 576 and 8.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from dsv4_jax.formats import fp8_block

GROUP = 64
SCALE_BYTES = 8


def _check_width(name: str, width: int, rope_dim: int) -> None:
    nope = width - rope_dim
    if rope_dim < 0 or nope < 0 or nope % GROUP or nope > GROUP * SCALE_BYTES:
        raise ValueError(
            f"{name}: {width} channels with rope_dim {rope_dim} leave {nope} for E4M3, expected a "
            f"multiple of {GROUP} from 0 to {GROUP * SCALE_BYTES}"
        )


def encode(
    x: Float[Array, "*batch d"], rope_dim: int
) -> tuple[UInt8[Array, "*batch body"], UInt8[Array, "*batch scales"]]:
    """Body [..., d + rope_dim] and scale bytes [..., 8].

    The body holds the E4M3 codes of the first d - rope_dim channels, then the last rope_dim
    channels as little-endian bfloat16. Scales are E8M0 per 64 channels, then zeros. Rules and
    special values as in `fp8_block.quantize`.

    Raises:
        ValueError: d - rope_dim is not a multiple of 64 from 0 to 512.
    """
    _check_width("x", x.shape[-1], rope_dim)
    batch, nope = x.shape[:-1], x.shape[-1] - rope_dim
    codes, scales = fp8_block.quantize(x[..., None, :nope], (1, GROUP))
    codes_bytes = jax.lax.bitcast_convert_type(codes[..., 0, :], jnp.uint8)
    rope_bytes = jax.lax.bitcast_convert_type(x[..., nope:].astype(jnp.bfloat16), jnp.uint8)
    body = jnp.concatenate([codes_bytes, rope_bytes.reshape(*batch, 2 * rope_dim)], -1)
    padding = jnp.zeros((*batch, SCALE_BYTES - nope // GROUP), jnp.uint8)
    return body, jnp.concatenate([scales[..., 0, :], padding], -1)


def decode(
    body: UInt8[Array, "*batch body"],
    scales: UInt8[Array, "*batch scales"],
    rope_dim: int,
    dtype: DTypeLike,
) -> Float[Array, "*batch d"]:
    """The entry in `dtype`, exact in float32 and bfloat16.

    Raises:
        ValueError: the planes are not those of a record with `rope_dim` rotary channels.
    """
    width = body.shape[-1] - rope_dim
    _check_width("body", width, rope_dim)
    if scales.shape[-1] != SCALE_BYTES:
        raise ValueError(f"scales: got {scales.shape[-1]} bytes, expected {SCALE_BYTES}")
    nope = width - rope_dim
    codes = jax.lax.bitcast_convert_type(body[..., None, :nope], jnp.float8_e4m3fn)
    values = fp8_block.dequantize(codes, scales[..., None, : nope // GROUP], dtype, (1, GROUP))
    rope_bytes = body[..., nope:].reshape(*body.shape[:-1], rope_dim, 2)
    rope = jax.lax.bitcast_convert_type(rope_bytes, jnp.bfloat16)
    return jnp.concatenate([values[..., 0, :], rope.astype(dtype)], -1)


def round_trip(x: Float[Array, "*batch d"], rope_dim: int) -> Float[Array, "*batch d"]:
    """What `decode(*encode(x))` gives, in x's dtype and for every width.

    The last group of E4M3 channels may be shorter than 64 (DeepSeek-V4 reference: KV entries are
    quantised before the attention reads them, whatever they are stored in).

    Raises:
        ValueError: rope_dim is not in 0..d.
    """
    nope = x.shape[-1] - rope_dim
    if rope_dim < 0 or nope < 0:
        raise ValueError(f"rope_dim: got {rope_dim}, expected 0 to {x.shape[-1]}")
    # Not a cast and back, which compilers may take for the identity.
    rope = jax.lax.reduce_precision(x[..., nope:], exponent_bits=8, mantissa_bits=7)
    return jnp.concatenate([fp8_block.round_trip(x[..., :nope], GROUP), rope], -1)
