"""FP8: E4M3 codes with one power-of-two scale per block of a matrix or group of a row."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float8e4m3fn, Float32, UInt8

from dsv4_jax.formats import e8m0, groups

BLOCK = (128, 128)
LARGEST = 448.0
SMALLEST_NORMAL = 2.0**-6
SMALLEST_SUBNORMAL = 2.0**-9
AMAX_FLOOR = 1e-4


def to_e4m3(x: Float32[Array, "*shape"]) -> Float8e4m3fn[Array, "*shape"]:
    """Nearest E4M3 value, ties to even, magnitudes above 448 to 448; NaN stays NaN."""
    # The cast alone turns everything that rounds above 448 into NaN. And it must have nothing left
    # to round: XLA on GPU takes a cast to E4M3 and back for the identity (excess precision).
    x = jnp.clip(x, -LARGEST, LARGEST)
    normal = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=3)
    subnormal = jnp.round(x / SMALLEST_SUBNORMAL) * SMALLEST_SUBNORMAL
    x = jnp.where(jnp.abs(x) < SMALLEST_NORMAL, subnormal, normal)
    return x.astype(jnp.float8_e4m3fn)


def quantize(
    w: Float[Array, "*batch o i"], block: tuple[int, int] = BLOCK
) -> tuple[Float8e4m3fn[Array, "*batch o i"], UInt8[Array, "*batch bo bi"]]:
    """E4M3 codes and E8M0 scale bytes [..., ceil(o / block[0]), ceil(i / block[1])].

    A block's scale is 2^ceil(log2(max(amax, 1e-4) / 448)) (DeepSeek-V4 reference, act_quant).
    Blocks at the lower and right edge may be smaller. A block with an infinity or a NaN gets
    scale 255, NaN, and decodes to NaN throughout; its codes are unspecified. Gradient: zero.
    """
    # The rounding is piecewise constant, but JAX would pass a gradient through the cast as E4M3.
    blocks = groups.split(jax.lax.stop_gradient(w).astype(jnp.float32), *block)
    inside = groups.within(2)
    amax = jnp.abs(blocks).max(inside, keepdims=True)
    scales = e8m0.from_amax(amax, LARGEST, AMAX_FLOOR)
    codes = to_e4m3(e8m0.divide(blocks, scales))
    return groups.join(codes, w.shape), scales.squeeze(inside)


def dequantize(
    codes: Float8e4m3fn[Array, "*batch o i"],
    scales: UInt8[Array, "*batch bo bi"],
    dtype: DTypeLike,
    block: tuple[int, int] = BLOCK,
) -> Float[Array, "*batch o i"]:
    """code * 2^(scale - 127) of the block, in `dtype`.

    Exact in float32 and bfloat16, except that a value beyond their range becomes infinite and
    one below 2^-126 is zero on backends that flush subnormals.

    Raises:
        ValueError: scales do not cover the codes in blocks of `block`.
    """
    expected = tuple(groups.count(n, size) for n, size in zip(codes.shape[-2:], block, strict=True))
    if scales.shape[-2:] != expected:
        raise ValueError(
            f"scales: got {scales.shape[-2:]}, codes {codes.shape[-2:]} in blocks of {block} "
            f"have {expected}"
        )
    blocks = groups.split(codes.astype(jnp.float32), *block)
    values = e8m0.multiply(blocks, jnp.expand_dims(scales, groups.within(2)))
    return groups.join(values, codes.shape).astype(dtype)


def round_trip(x: Float[Array, "*batch n"], group: int = 128) -> Float[Array, "*batch n"]:
    """x rounded to E4M3 with one scale per row and `group` channels, in x's dtype.

    The last group may be shorter. Rules and special values as in `quantize`.
    """
    block = (1, group)
    codes, scales = quantize(x[..., None, :], block)
    return dequantize(codes, scales, x.dtype, block)[..., 0, :]
