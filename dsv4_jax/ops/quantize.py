"""Activations and weights to NVFP4, laid out for tensor cores."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float8e4m3fn, Float32, UInt8

import dsv4_ffi
from dsv4_jax.formats import groups, nvfp4
from dsv4_jax.ops.dispatch import dispatch

_WORKSPACE = 4096

Quantized = tuple[UInt8[Array, "m half"], Float8e4m3fn[Array, "bm bk 512"], Float32[Array, "..."]]


def nvfp4_quantize(
    x: Float[Array, "m k"], per_row: bool = True, implementation: str | None = None
) -> Quantized:
    """x as packed E2M1 codes, swizzled E4M3 scales and float32 global scales.

    Args:
        x: bfloat16 or float32 [m, k]; k is a multiple of 16.
        per_row: one global scale per row, so that no row depends on another, else one for x.
        implementation: "ffi", "xla", or None for the fastest.

    Returns:
        (codes [m, k / 2], two in a byte, the even index low;
        scales [ceil(m / 128), ceil(k / 64), 512] as in `nvfp4.swizzle`, zero in the padding;
        global scales [m] or []). Rounding as in `nvfp4.quantize`, to the bit on every backend;
        of a row or matrix with an infinity or NaN only the global scale, NaN, is specified.

    Raises:
        ValueError: k is not a multiple of 16.
        NotImplementedError: the implementation asked for cannot run here.
    """
    if x.shape[1] % nvfp4.GROUP:
        raise ValueError(f"x: got width {x.shape[1]}, expected a multiple of {nvfp4.GROUP}")
    implementations = {"ffi": _ffi, "xla": _xla}
    return dispatch(implementation, implementations, x, per_row=per_row)


def _xla(x: Array, per_row: bool) -> Quantized:
    codes, scales, global_scale = nvfp4.quantize(x, per_row)
    return codes, nvfp4.swizzle(scales), global_scale


def _ffi(x: Array, per_row: bool) -> Quantized:
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"x: got {x.dtype}, the kernel takes bfloat16 and float32")
    m, k = x.shape
    blocks = (
        groups.count(m, nvfp4.SWIZZLE_ROWS),
        groups.count(k // nvfp4.GROUP, nvfp4.SWIZZLE_GROUPS),
    )
    results = (
        jax.ShapeDtypeStruct((m, k // 2), jnp.uint8),
        jax.ShapeDtypeStruct((*blocks, nvfp4.SWIZZLE_BLOCK), jnp.float8_e4m3fn),
        jax.ShapeDtypeStruct((m,) if per_row else (), jnp.float32),
        jax.ShapeDtypeStruct((_WORKSPACE,), jnp.float32),
    )
    x = jax.lax.stop_gradient(x)
    codes, scales, global_scale, _ = dsv4_ffi.call("nvfp4_quantize", results, x)
    return codes, scales, global_scale
