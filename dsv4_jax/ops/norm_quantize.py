"""Root-mean-square norm and the rounding of its result (Q1), in one pass."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import dsv4_ffi
from dsv4_jax.formats import coded_inputs
from dsv4_jax.formats.coded_inputs import CodedInputs
from dsv4_jax.ops.dispatch import dispatch
from dsv4_jax.ops.norms import rms_norm

_MAX_WIDTH = 8192


def rms_norm_quantize(
    x: Float[Array, "rows d"],
    weight: Float[Array, "w"],
    eps: float,
    implementation: str | None = None,
) -> tuple[Float[Array, "rows d"], CodedInputs]:
    """`rms_norm`, and its result as E4M3 codes for products with many rows (`coded_gemm`).

    Args:
        x: [rows, d]. "ffi" takes bfloat16, d a multiple of 128 and at most 8,192.
        weight: [d].
        eps: added to the mean square.
        implementation: "ffi", "xla" or None for the fastest.

    Returns:
        x / sqrt(mean(x²) + eps) times weight in x's dtype, one rounding at the end, and that
        rounded to E4M3 with a power-of-two scale per row and 128 channels.

    Raises:
        ValueError: weight has not d elements.
        NotImplementedError: the implementation asked for does not support the arguments.
    """
    if weight.shape[0] != x.shape[1]:
        raise ValueError(f"weight: got {weight.shape[0]} elements, x has width {x.shape[1]}")
    return dispatch(implementation, {"ffi": _ffi, "xla": _xla}, x, weight, eps=eps)


def _xla(x: Array, weight: Array, *, eps: float) -> tuple[Array, CodedInputs]:
    y = rms_norm(x, weight, eps)
    return y, coded_inputs.encode(y)


def _ffi(x: Array, weight: Array, *, eps: float) -> tuple[Array, CodedInputs]:
    num_rows, width = x.shape
    if x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"rms_norm_quantize: the kernel takes bfloat16, not {x.dtype}")
    if width % coded_inputs.COLUMNS or width > _MAX_WIDTH:
        raise NotImplementedError(
            f"rms_norm_quantize: the kernel's width is a multiple of {coded_inputs.COLUMNS} up to "
            f"{_MAX_WIDTH}, not {width}"
        )
    shapes = jax.eval_shape(coded_inputs.encode, x)
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype), shapes.codes, shapes.scales]
    y, codes, scales = dsv4_ffi.call(
        "rms_norm_quantize", results, x, weight.astype(jnp.float32), eps=np.float32(eps)
    )
    return y, CodedInputs(codes, scales, (num_rows, width))
