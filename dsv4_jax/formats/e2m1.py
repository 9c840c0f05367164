"""FP4: four-bit codes 0..7 for 0, 0.5, 1, 1.5, 2, 3, 4, 6, codes 8..15 for their negatives."""

import jax.numpy as jnp
from jaxtyping import Array, Float32, UInt8

LARGEST = 6.0

# Between codes k and k + 1.
_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
# Twice the magnitude of code k in the k-th nibble from below.
_DOUBLED_MAGNITUDES = 0xC8643210


def encode(
    x: Float32[Array, "..."], unit: Float32[Array, "..."] | float = 1.0
) -> UInt8[Array, "..."]:
    """Code nearest to x / unit, ties to even, magnitudes above 6 to 6; `unit` broadcasts to x.

    |x| is compared with the float32 products of `unit` and the points half-way between codes,
    because XLA's division is not the same on every backend and in every program.

    As in the conversion instruction of NVIDIA GPUs (cvt.rn.satfinite.e2m1x2) the sign is kept
    where the magnitude rounds to zero (code 8), infinities saturate and NaN becomes code 7.
    """
    magnitude = jnp.abs(x)
    code = jnp.zeros(x.shape, jnp.uint8)
    for lower, midpoint in enumerate(_MIDPOINTS):
        threshold = midpoint * unit
        stays = magnitude < threshold if lower % 2 else magnitude <= threshold
        code += (~stays).astype(jnp.uint8)
    negative = jnp.signbit(x) & ~jnp.isnan(x)
    return code + 8 * negative.astype(jnp.uint8)


def decode(codes: UInt8[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """The values of codes 0..15."""
    # Arithmetic instead of a table: faster on CPU, and it fuses into products on GPU.
    nibble = (codes.astype(jnp.uint32) & 7) * 4
    magnitude = ((jnp.uint32(_DOUBLED_MAGNITUDES) >> nibble) & 15).astype(jnp.int32)
    value = magnitude.astype(jnp.float32) * 0.5
    return jnp.where(codes > 7, -value, value)


def pack(codes: UInt8[Array, "*batch n"]) -> UInt8[Array, "*batch half"]:
    """Two codes a byte, the even index in the low nibble; n is even."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: UInt8[Array, "*batch half"]) -> UInt8[Array, "*batch n"]:
    """The codes of each byte, low nibble first."""
    nibbles = packed[..., None] >> jnp.array([0, 4], jnp.uint8)
    return (nibbles & 15).reshape(*packed.shape[:-1], 2 * packed.shape[-1])
