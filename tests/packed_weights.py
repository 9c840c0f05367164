"""Random weights in every packed format, with their values."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from dsv4_jax.formats import tiled
from tests.oracles import formats


def weight_arrays(weight_format, shape, seed=0, spread=10):
    """A random weight as the format's checkpoint arrays, and its float64 values.

    Power-of-two scales lie between 2^-spread and 2^spread.
    """
    rng = np.random.default_rng(seed)
    *stack, n, k = shape
    if weight_format == "bf16":
        w = rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
        return (w,), w.astype(np.float64)
    if weight_format == "fp8_block":
        codes = rng.integers(0, 256, shape).astype(np.uint8)
        codes[codes & 0x7F == 0x7F] = 0
        blocks = (*stack, -(-n // 128), -(-k // 128))
        scales = (127 + rng.integers(-spread, spread, blocks)).astype(np.uint8)
        of_code = np.repeat(np.repeat(scales, 128, -2), 128, -1)[..., :n, :k]
        values = formats.E4M3[codes] * formats.E8M0[of_code]
        return (codes.view(ml_dtypes.float8_e4m3fn), scales), values
    codes = rng.integers(0, 16, shape).astype(np.uint8)
    if weight_format == "mxfp4":
        scales = (127 + rng.integers(-spread, spread, (*stack, n, -(-k // 32)))).astype(np.uint8)
        values = formats.E2M1[codes] * formats.E8M0[np.repeat(scales, 32, -1)[..., :k]]
        return (formats.packed(codes), scales), values
    scales = rng.integers(0, 127, (*stack, n, -(-k // 16))).astype(np.uint8)
    scales[..., 0] %= 8
    of_code = np.repeat(scales, 16, -1)[..., :k]
    codes[of_code == 0] = 0
    global_scale = np.asarray(rng.uniform(1e-4, 1, stack), np.float32)
    values = formats.E2M1[codes] * formats.E4M3[of_code] * np.float64(global_scale)[..., None, None]
    return (formats.packed(codes), scales.view(ml_dtypes.float8_e4m3fn), global_scale), values


def tile(weight_format, arrays):
    return jax.jit(getattr(tiled, f"tile_{weight_format}"))(*map(jnp.asarray, arrays))
