"""The quantised indexer key: MXFP4, 64 + 4 bytes for 128 channels, in two planes."""

from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from dsv4_jax.formats import mxfp4


def encode(
    x: Float[Array, "*batch n"],
) -> tuple[UInt8[Array, "*batch half"], UInt8[Array, "*batch groups"]]:
    """Packed codes [..., n / 2] and scale bytes [..., n / 32], as `mxfp4.quantize`.

    Raises:
        ValueError: n is not a multiple of 32.
    """
    if x.shape[-1] % mxfp4.GROUP:
        raise ValueError(f"x: got width {x.shape[-1]}, expected a multiple of {mxfp4.GROUP}")
    return mxfp4.quantize(x)


def decode(
    codes: UInt8[Array, "*batch half"], scales: UInt8[Array, "*batch groups"], dtype: DTypeLike
) -> Float[Array, "*batch n"]:
    """The key in `dtype`, as `mxfp4.dequantize`."""
    return mxfp4.dequantize(codes, scales, dtype)


def round_trip(x: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
    """x rounded to what a key holds, in x's dtype; n is even, its last group may be shorter."""
    return mxfp4.round_trip(x)
