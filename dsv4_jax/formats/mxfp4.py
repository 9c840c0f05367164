"""MXFP4: pairs of E2M1 codes with one power-of-two scale per 32 elements of the last axis."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from dsv4_jax.formats import e2m1, e8m0, groups

GROUP = 32
AMAX_FLOOR = e2m1.LARGEST * e8m0.SMALLEST_NORMAL


def quantize(
    w: Float[Array, "*batch i"],
) -> tuple[UInt8[Array, "*batch half"], UInt8[Array, "*batch groups"]]:
    """Packed codes [..., i / 2] (even index in the low nibble), scale bytes [..., ceil(i / 32)].

    A group's scale is 2^ceil(log2(max(amax, 6 * 2^-126) / 6)) (DeepSeek-V4 reference,
    fp4_act_quant); the last group may be shorter. Codes as in `e2m1.encode`; subnormal float32
    inputs count as zero. A group with an infinity or a NaN gets scale 255, NaN, and decodes to
    NaN throughout. Gradient: zero.

    Raises:
        ValueError: the width is odd.
    """
    if w.shape[-1] % 2:
        raise ValueError(f"w: got width {w.shape[-1]}, codes are packed in pairs")
    grouped = groups.split(w.astype(jnp.float32), GROUP)
    amax = jnp.abs(grouped).max(-1, keepdims=True)
    scales = e8m0.from_amax(amax, e2m1.LARGEST, AMAX_FLOOR)
    codes = e2m1.encode(e8m0.divide(grouped, scales))
    return e2m1.pack(groups.join(codes, w.shape)), scales.squeeze(-1)


def dequantize(
    packed: UInt8[Array, "*batch half"], scales: UInt8[Array, "*batch groups"], dtype: DTypeLike
) -> Float[Array, "*batch i"]:
    """code * 2^(scale - 127) of the group, in `dtype`.

    Exact in float32 and bfloat16, except that a value beyond their range becomes infinite and
    one below 2^-126 is zero on backends that flush subnormals.

    Raises:
        ValueError: scales do not cover the codes in groups of 32.
    """
    values = e2m1.decode(e2m1.unpack(packed))
    if scales.shape[-1] != (expected := groups.count(values.shape[-1], GROUP)):
        raise ValueError(
            f"scales: got {scales.shape[-1]}, {values.shape[-1]} codes in groups of {GROUP} "
            f"have {expected}"
        )
    scaled = e8m0.multiply(groups.split(values, GROUP), scales[..., None])
    return groups.join(scaled, values.shape).astype(dtype)


def round_trip(x: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
    """x rounded to MXFP4 in x's dtype; n is even. Rules and special values as in `quantize`."""
    return dequantize(*quantize(x), x.dtype)
