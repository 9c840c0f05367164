"""NVFP4: pairs of E2M1 codes, an E4M3 scale per 16 elements, a float32 scale per matrix or row."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float8e4m3fn, Float32, Shaped, UInt8

from dsv4_jax.formats import e2m1, fp8_block, groups

GROUP = 16
# With this floor every nonzero value of the format is a normal float32 number, 2^-126 or more.
GLOBAL_SCALE_FLOOR = 2.0**-115
# Tensor cores read scales in blocks of 128 rows x 4 groups; rows r, r + 32, ... are neighbours.
SWIZZLE_ROWS, SWIZZLE_GROUPS, SWIZZLE_STRIDE = 128, 4, 32
SWIZZLE_BLOCK = SWIZZLE_ROWS * SWIZZLE_GROUPS

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
    w: Float[Array, "*batch o i"], per_row: bool = False
) -> tuple[
    UInt8[Array, "*batch o half"],
    Float8e4m3fn[Array, "*batch o groups"],
    Float32[Array, "..."],
]:
    """Packed codes [..., o, i / 2], block scales [..., o, i / 16] and global scales.

    Each matrix has one global scale, [...], or each row, [..., o], if `per_row`. amax is that of
    the matrix or row:
    global = amax / (6 * 448), not below 2^-115; block = E4M3(amax_block / (6 * global)) and
    code = E2M1(w / (block * global)), both to nearest, ties to even. Nearest is decided without
    dividing, as in `e2m1.encode`, so that every backend gives the same bytes. Where the block
    scale is zero all codes are zeros of w's signs. An infinity or a NaN makes its whole matrix
    or row decode to NaN. Gradient: zero.

    Raises:
        ValueError: the width is not a multiple of 16.
    """
    if w.shape[-1] % GROUP:
        raise ValueError(f"w: got width {w.shape[-1]}, expected a multiple of {GROUP}")
    grouped = groups.split(jax.lax.stop_gradient(w).astype(jnp.float32), GROUP)
    amax = jnp.abs(grouped).max(-1, keepdims=True)
    shared = (-2, -1) if per_row else (-3, -2, -1)
    amax_shared = amax.max(shared, keepdims=True, initial=0)
    reciprocal = np.float32(1) / np.float32(e2m1.LARGEST * fp8_block.LARGEST)
    global_scale = jnp.maximum(amax_shared * reciprocal, GLOBAL_SCALE_FLOOR)
    global_scale = jnp.where(jnp.isfinite(amax_shared), global_scale, jnp.nan)
    scales = _nearest_e4m3(amax, global_scale)
    unit = scales.astype(jnp.float32) * global_scale
    codes = e2m1.encode(grouped, jnp.where(unit > 0, unit, jnp.inf))
    return (
        e2m1.pack(groups.join(codes, w.shape)),
        scales.squeeze(-1),
        global_scale.squeeze(shared),
    )


def dequantize(
    packed: UInt8[Array, "*batch o half"],
    scales: Float8e4m3fn[Array, "*batch o groups"],
    global_scale: Float32[Array, "..."],
    dtype: DTypeLike,
) -> Float[Array, "*batch o i"]:
    """(code * block scale) * global scale, in `dtype`; a global scale per matrix or per row.

    The first product is exact; the second is rounded to float32 once, and is exact for a power
    of two. Values below 2^-126 are zero on backends that flush subnormals.

    Raises:
        ValueError: scales do not cover the codes in groups of 16; global scales are neither one
            per matrix nor one per row.
    """
    values = e2m1.decode(e2m1.unpack(packed))
    if scales.shape[-1] * GROUP != values.shape[-1]:
        raise ValueError(
            f"scales: got {scales.shape[-1]}, {values.shape[-1]} codes in groups of {GROUP} "
            f"have {values.shape[-1] / GROUP:g}"
        )
    per_matrix, per_row = packed.shape[:-2], packed.shape[:-1]
    if global_scale.shape not in (per_matrix, per_row):
        raise ValueError(
            f"global_scale: got shape {global_scale.shape}, expected {per_matrix} or {per_row}"
        )
    row_scale = (
        jnp.expand_dims(global_scale, -1) if global_scale.shape == per_matrix else global_scale
    )
    scaled = groups.split(values, GROUP) * scales.astype(jnp.float32)[..., None]
    return groups.join(scaled * row_scale[..., None, None], values.shape).astype(dtype)


def swizzle(scales: Shaped[Array, "*batch o groups"]) -> Shaped[Array, "*batch bo bg 512"]:
    """Block scales in the order of tensor cores: [..., ceil(o / 128), ceil(groups / 4), 512].

    The scale of row r and group g of a block is at (r % 32) * 16 + (r // 32) * 4 + g (CUTLASS
    SfAtom, cuBLASLt VEC16_UE4M3). What is missing to whole blocks is filled with zeros.
    """
    blocks = groups.split(scales, SWIZZLE_ROWS, SWIZZLE_GROUPS)  # [..., bo, 128, bg, 4]
    *batch, rows, _, columns, _ = blocks.shape
    quarters = SWIZZLE_ROWS // SWIZZLE_STRIDE
    blocks = blocks.reshape(*batch, rows, quarters, SWIZZLE_STRIDE, columns, SWIZZLE_GROUPS)
    blocks = jnp.moveaxis(blocks, (-2, -3, -4), (-4, -3, -2))  # [..., bo, bg, 32, quarters, 4]
    return blocks.reshape(*batch, rows, columns, SWIZZLE_BLOCK)


def unswizzle(
    swizzled: Shaped[Array, "*batch bo bg 512"], num_rows: int, num_groups: int
) -> Shaped[Array, "*batch o groups"]:
    """The inverse of `swizzle`: [..., num_rows, num_groups].

    Raises:
        ValueError: other sizes fill these blocks.
    """
    *batch, rows, columns, _ = swizzled.shape
    expected = groups.count(num_rows, SWIZZLE_ROWS), groups.count(num_groups, SWIZZLE_GROUPS)
    if (rows, columns) != expected:
        raise ValueError(
            f"swizzled: got {rows} x {columns} blocks, {num_rows} rows of {num_groups} groups "
            f"have {expected[0]} x {expected[1]}"
        )
    quarters = SWIZZLE_ROWS // SWIZZLE_STRIDE
    blocks = swizzled.reshape(*batch, rows, columns, SWIZZLE_STRIDE, quarters, SWIZZLE_GROUPS)
    blocks = jnp.moveaxis(blocks, (-4, -3, -2), (-2, -3, -4))
    blocks = blocks.reshape(*batch, rows, SWIZZLE_ROWS, columns, SWIZZLE_GROUPS)
    return groups.join(blocks, (*batch, num_rows, num_groups))
