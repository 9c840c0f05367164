"""Power-of-two scales: byte b stands for 2^(b - 127), 255 for NaN (OCP Microscaling, E8M0)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, UInt8

SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)


def to_float32(scales: UInt8[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """2^(b - 127), exact for every byte; 255 becomes NaN.

    Byte 0 is the subnormal 2^-127. Backends that flush subnormals (XLA on CPU does) read it as
    zero in the next product; `multiply` is the product that is right for every byte.
    """
    bits = scales.astype(jnp.uint32) << 23
    bits = jnp.where(scales == 0, 0x00400000, bits)
    bits = jnp.where(scales == 255, 0x7FC00000, bits)
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32), jnp.float32)


def from_amax(
    amax: Float32[Array, "*shape"], largest: float, floor: float
) -> UInt8[Array, "*shape"]:
    """The byte of 2^ceil(log2(max(amax, floor) / largest)), amax >= 0.

    As in the DeepSeek-V4 reference the quotient is a float32 product with the float32 reciprocal
    of `largest` (448 for E4M3, 6 for E2M1) and the ceiling is taken on its bits: exponent, plus
    one if the mantissa is not zero. An infinite or NaN amax gives 255.
    """
    reciprocal = np.float32(1) / np.float32(largest)
    bits = jax.lax.bitcast_convert_type(jnp.maximum(amax, floor) * reciprocal, jnp.uint32)
    exponent = ((bits >> 23) & 0xFF) + ((bits & 0x7FFFFF) != 0)
    return jnp.minimum(exponent, 255).astype(jnp.uint8)


def multiply(x: Float32[Array, "..."], scales: UInt8[Array, "..."]) -> Float32[Array, "..."]:
    """x * 2^(b - 127), broadcasting; exact unless the result overflows or is subnormal.

    A subnormal result is zero on backends that flush subnormals.
    """
    # Both halves of the exponent are those of normal numbers, also for bytes 0 and 254.
    half = (scales.astype(jnp.int32) - 127) >> 1
    rest = scales.astype(jnp.int32) - 127 - half
    return x * jnp.where(scales == 255, jnp.nan, _power_of_two(half)) * _power_of_two(rest)


def _power_of_two(exponent: Int32[Array, "..."]) -> Float32[Array, "..."]:
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def divide(x: Float32[Array, "..."], scales: UInt8[Array, "..."]) -> Float32[Array, "..."]:
    """x / 2^(b - 127), broadcasting; exact unless the result overflows or is subnormal.

    A subnormal x counts as zero of its sign on every backend, because some flush it anyway.
    """
    x = jnp.where(jnp.abs(x) < SMALLEST_NORMAL, 0 * x, x)
    # Modulo 256 this maps b to the byte of the inverse and NaN, 255, to itself.
    return multiply(x, 254 - scales)
