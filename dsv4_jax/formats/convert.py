"""Lossless conversions of MXFP4 matrices; what cannot be exact is refused."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float8e4m3fn, Float32, Int32, UInt8

from dsv4_jax.formats import e2m1, e8m0, fp8_block, groups, mxfp4, nvfp4

# E4M3 holds the powers of two from 2^-9 to 2^8.
SMALLEST_E4M3_EXPONENT, LARGEST_E4M3_EXPONENT = -9, 8
# E2M1 times a power of two from 2^-8 to 2^6 is an E4M3 value.
SMALLEST_SHIFT, LARGEST_SHIFT = -8, 6


def mxfp4_to_nvfp4(
    packed: UInt8[Array, "*batch o half"], scales: UInt8[Array, "*batch o groups"]
) -> tuple[
    UInt8[Array, "*batch o half"],
    Float8e4m3fn[Array, "*batch o groups16"],
    Float32[Array, "*batch"],
]:
    """The same values as NVFP4: codes unchanged, both halves of a group with its scale.

    The scale of a matrix is 2^(largest exponent - 8), but not below 2^-126. Concatenate matrices
    along `o` to give them one such scale. Groups of zeros only do not count. Not for use in jit.

    Raises:
        ValueError: a NaN scale, or exponents that span more than E4M3 scales hold.
    """
    scales_e4m3, global_scale, shortfall = _nvfp4_scales(packed, scales)
    _refuse_inexact(scales, shortfall, "the NVFP4 scales of one matrix")
    return packed, scales_e4m3, global_scale


def mxfp4_to_fp8_block(
    packed: UInt8[Array, "*batch o half"], scales: UInt8[Array, "*batch o groups"]
) -> tuple[Float8e4m3fn[Array, "*batch o i"], UInt8[Array, "*batch bo bi"]]:
    """The same values as E4M3 with a scale per 128 x 128 block: 2^(largest exponent - 6).

    That scale is not below 2^-127. Groups of zeros only do not count. Not for use in jit.

    Raises:
        ValueError: a NaN scale, or exponents in a block that span more than E4M3 holds.
    """
    codes, block_scales, shortfall = _fp8_block(packed, scales)
    _refuse_inexact(scales, shortfall, "the E4M3 values of one block")
    return codes, block_scales


@jax.jit
def _nvfp4_scales(packed: Array, scales: Array) -> tuple[Array, Array, Array]:
    used = _used(packed)
    exponent = scales.astype(jnp.int32) - 127
    top = jnp.where(used, exponent, -127).max((-2, -1), initial=-127)
    global_exponent = jnp.maximum(top - LARGEST_E4M3_EXPONENT, -126)
    relative = exponent - global_exponent[..., None, None]
    shortfall = _shortfall(used, relative, SMALLEST_E4M3_EXPONENT)
    relative = jnp.clip(relative, SMALLEST_E4M3_EXPONENT, LARGEST_E4M3_EXPONENT)
    scales_e4m3 = _power_of_two(relative).astype(jnp.float8_e4m3fn)
    repeats = mxfp4.GROUP // nvfp4.GROUP
    return jnp.repeat(scales_e4m3, repeats, axis=-1), _power_of_two(global_exponent), shortfall


@jax.jit
def _fp8_block(packed: Array, scales: Array) -> tuple[Array, Array, Array]:
    used = _used(packed)
    block = (fp8_block.BLOCK[0], fp8_block.BLOCK[1] // mxfp4.GROUP)
    inside = groups.within(2)
    top = groups.split(jnp.where(used, scales, 0), *block).max(inside, keepdims=True, initial=0)
    block_scales = jnp.maximum(top.astype(jnp.int32) - LARGEST_SHIFT, 0)
    shift = groups.split(scales.astype(jnp.int32), *block) - block_scales
    shift = groups.join(shift, scales.shape)
    shortfall = _shortfall(used, shift, SMALLEST_SHIFT)
    shift = jnp.clip(shift, SMALLEST_SHIFT, LARGEST_SHIFT)
    values = mxfp4.dequantize(packed, (shift + 127).astype(jnp.uint8), jnp.float32)
    codes = values.astype(jnp.float8_e4m3fn)
    return codes, block_scales.squeeze(inside).astype(jnp.uint8), shortfall


def _used(packed: Array) -> Bool[Array, "..."]:
    """Which groups hold a value that is not zero."""
    magnitudes = e2m1.unpack(packed) & 7
    return groups.split(magnitudes, mxfp4.GROUP).any(-1)


def _shortfall(used: Array, relative: Array, smallest: int) -> Int32[Array, ""]:
    """By how much the lowest exponent in use is below `smallest`."""
    return smallest - jnp.where(used, relative, smallest).min(initial=smallest)


def _power_of_two(exponent: Int32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    return e8m0.to_float32((exponent + 127).astype(jnp.uint8))


def _refuse_inexact(scales: Array, shortfall: Array, holder: str) -> None:
    if jnp.any(scales == 255):
        raise ValueError("scales: got 255, NaN, expected numbers")
    if shortfall > 0:
        raise ValueError(
            f"scales: an exponent is {int(shortfall)} below what {holder} hold exactly beside "
            "the largest"
        )
