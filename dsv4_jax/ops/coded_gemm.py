"""Products of inputs that are E4M3 codes already with packed weights, for many rows."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

import dsv4_ffi
from dsv4_jax.formats import coded_inputs, tiled
from dsv4_jax.formats.coded_inputs import CodedInputs
from dsv4_jax.formats.tiled import TiledWeight
from dsv4_jax.ops.dispatch import dispatch
from dsv4_jax.ops.product import product

FORMATS = ("fp8_block", "mxfp4")


def coded_gemm(
    inputs: CodedInputs,
    weight: TiledWeight,
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    implementation: str | None = None,
) -> Float[Array, "rows n"]:
    """x Wᵀ of rounded inputs: `ops.gemm.gemm` with `round_input`, the rounding done before.

    "ffi" multiplies by FP8 units. What they keep of a sum over 128 inputs is less than float32; of
    normal inputs the relative L2 error was 1.3e-4 (FP8 weights) and 0.7e-4 (MXFP4) on an H200, for
    any k. Of MXFP4 weights, codes under scales down to 2^-14 of the largest of an output's 128
    inputs are exact; below they lose what is less than 2^-24 of it.

    Args:
        inputs: x [rows, k].
        weight: [n, k] in blocks.
        out_dtype: bfloat16 or float32.
        implementation: "ffi", "xla" or None for the fastest.

    Returns:
        [rows, n].

    Raises:
        ValueError: the weight is a stack, or has not k inputs.
        NotImplementedError: the implementation asked for does not support the arguments.
    """
    if weight.global_scale.ndim:
        raise ValueError(f"weight: got a stack {weight.global_scale.shape}, expected one")
    if weight.shape[1] != inputs.shape[1]:
        raise ValueError(
            f"inputs: got width {inputs.shape[1]}, weight has {weight.shape[1]} inputs"
        )
    implementations = {"ffi": _ffi, "xla": _xla}
    return dispatch(implementation, implementations, inputs, weight, dtype=jnp.dtype(out_dtype))


def _xla(inputs: CodedInputs, weight: TiledWeight, *, dtype: np.dtype) -> Array:
    # Without its global scale a weight is exact in bfloat16.
    values = tiled.dequantize(replace(weight, global_scale=jnp.ones(())), jnp.bfloat16)
    x = coded_inputs.decode(inputs, jnp.bfloat16)
    return (product("mk,nk->mn", x, values) * weight.global_scale).astype(dtype)


def _ffi(inputs: CodedInputs, weight: TiledWeight, *, dtype: np.dtype) -> Array:
    # Of CPUs, whose handlers take the same arguments, none is known.
    capability = getattr(jax.local_devices()[0], "compute_capability", "9.0")
    if capability != "9.0":
        raise NotImplementedError(
            f"coded_gemm: the kernel is for devices of compute capability 9.0, not {capability}"
        )
    if weight.weight_format not in FORMATS:
        raise NotImplementedError(
            f"coded_gemm: the kernel takes weights in {' or '.join(FORMATS)}, "
            f"not {weight.weight_format}"
        )
    (output,) = dsv4_ffi.call(
        "coded_gemm",
        [jax.ShapeDtypeStruct((inputs.shape[0], weight.shape[0]), dtype)],
        inputs.codes,
        inputs.scales,
        weight.codes,
        weight.scales,
        weight.global_scale,
        format=np.int32(tiled.FORMATS.index(weight.weight_format)),
    )
    return output
