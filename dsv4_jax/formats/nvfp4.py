"""NVFP4: pairs of E2M1 codes, an E4M3 scale per 16 elements, a float32 scale per matrix."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float8e4m3fn, Float32, UInt8

from dsv4_jax.formats import e2m1, fp8_block, groups

GROUP = 16
# With this floor every nonzero value of the format is a normal float32 number, 2^-126 or more.
GLOBAL_SCALE_FLOOR = 2.0**-115

_E4M3 = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
# Where amax_block / global passes from the code before k to k, for k = 0..127.
_THRESHOLDS = np.concatenate([[-1], e2m1.LARGEST / 2 * (_E4M3[1:] + _E4M3[:-1]), [np.inf]])


def _nearest_e4m3(amax: Array, global_scale: Array) -> Float8e4m3fn[Array, "..."]:
    # The quotient, and so its code, depends on how the program divides. By at most one step.
    quotient = amax / (e2m1.LARGEST * global_scale)
    code = jax.lax.bitcast_convert_type(fp8_block.to_e4m3(quotient), jnp.uint8)
    odd = code % 2 == 1
    thresholds = jnp.asarray(_THRESHOLDS, jnp.float32)
    down, up = thresholds[code] * global_scale, thresholds[code + 1] * global_scale
    below = (amax < down) | (odd & (amax == down))
    above = (amax > up) | (odd & (amax == up))
    code = code - below.astype(jnp.uint8) + above.astype(jnp.uint8)
    return jax.lax.bitcast_convert_type(code, jnp.float8_e4m3fn)


def quantize(
    w: Float[Array, "*batch o i"],
) -> tuple[
    UInt8[Array, "*batch o half"],
    Float8e4m3fn[Array, "*batch o groups"],
    Float32[Array, "*batch"],
]:
    """Packed codes [..., o, i / 2], block scales [..., o, i / 16] and the scale of each matrix.

    global = amax / (6 * 448), not below 2^-115; block = E4M3(amax_block / (6 * global)) and
    code = E2M1(w / (block * global)), both to nearest, ties to even. Nearest is decided without
    dividing, as in `e2m1.encode`, so that every backend gives the same bytes. Where the block
    scale is zero all codes are zeros of w's signs. An infinity or a NaN makes its whole matrix
    decode to NaN. Gradient: zero.

    Raises:
        ValueError: the width is not a multiple of 16.
    """
    if w.shape[-1] % GROUP:
        raise ValueError(f"w: got width {w.shape[-1]}, expected a multiple of {GROUP}")
    grouped = groups.split(jax.lax.stop_gradient(w).astype(jnp.float32), GROUP)
    amax = jnp.abs(grouped).max(-1, keepdims=True)
    amax_matrix = amax.max((-3, -2, -1), keepdims=True, initial=0)
    reciprocal = np.float32(1) / np.float32(e2m1.LARGEST * fp8_block.LARGEST)
    global_scale = jnp.maximum(amax_matrix * reciprocal, GLOBAL_SCALE_FLOOR)
    global_scale = jnp.where(jnp.isfinite(amax_matrix), global_scale, jnp.nan)
    scales = _nearest_e4m3(amax, global_scale)
    unit = scales.astype(jnp.float32) * global_scale
    codes = e2m1.encode(grouped, jnp.where(unit > 0, unit, jnp.inf))
    return (
        e2m1.pack(groups.join(codes, w.shape)),
        scales.squeeze(-1),
        global_scale.squeeze((-3, -2, -1)),
    )


def dequantize(
    packed: UInt8[Array, "*batch o half"],
    scales: Float8e4m3fn[Array, "*batch o groups"],
    global_scale: Float32[Array, "*batch"],
    dtype: DTypeLike,
) -> Float[Array, "*batch o i"]:
    """(code * block scale) * global scale, in `dtype`.

    The first product is exact; the second is rounded to float32 once, and is exact for a power
    of two. Values below 2^-126 are zero on backends that flush subnormals.

    Raises:
        ValueError: scales do not cover the codes in groups of 16.
    """
    values = e2m1.decode(e2m1.unpack(packed))
    if scales.shape[-1] * GROUP != values.shape[-1]:
        raise ValueError(
            f"scales: got {scales.shape[-1]}, {values.shape[-1]} codes in groups of {GROUP} "
            f"have {values.shape[-1] / GROUP:g}"
        )
    scaled = groups.split(values, GROUP) * scales.astype(jnp.float32)[..., None]
    scaled = scaled * global_scale[..., None, None, None]
    return groups.join(scaled, values.shape).astype(dtype)
