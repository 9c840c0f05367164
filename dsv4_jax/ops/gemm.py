"""Products with packed weights: x Wᵀ, the weight kept in 4, 8 or 16 bits and decoded on the way."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

import dsv4_ffi
from dsv4_jax.formats import fp8_block, groups, tiled
from dsv4_jax.formats.tiled import TiledWeight
from dsv4_jax.ops.dispatch import dispatch
from dsv4_jax.ops.product import product

_MAX_SEGMENTS = 8
# A kernel's tile of outputs reads one group.
_GROUP_ROWS = 128
# Up to so many rows the kernels read the input where it lies; beyond, they copy it into tiles.
_MAX_STREAMED_ROWS = 16


class Segment(NamedTuple):
    """One of several products of the same input.

    Attributes:
        weight: [n, k] in blocks.
        round_input: x is rounded to E4M3 first, with a power-of-two scale per row and 128 inputs
            (Q1, `fp8_block.round_trip`).
        out_dtype: bfloat16, float32, or None for the input's dtype.
    """

    weight: TiledWeight
    round_input: bool = False
    out_dtype: DTypeLike | None = None


def gemm(
    x: Float[Array, "*batch k"],
    weight: TiledWeight,
    *,
    round_input: bool = False,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Float[Array, "*batch n"]:
    """x Wᵀ for one weight: `projections` of a single segment."""
    segment = Segment(weight, round_input, out_dtype)
    return projections(x, [segment], implementation=implementation)[0]


def grouped_gemm(
    x: Float[Array, "*batch groups k"],
    weight: TiledWeight,
    *,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Float[Array, "*batch n"]:
    """Block-diagonal product: outputs [i n / groups, (i + 1) n / groups) are those of x[..., i, :].

    As `projections` otherwise; for "ffi" a group's outputs are a multiple of 128.
    """
    return _run(x, [Segment(weight, False, out_dtype)], implementation)[0]


def projections(
    x: Float[Array, "*batch k"],
    segments: Sequence[Segment],
    *,
    implementation: str | None = None,
) -> tuple[Array, ...]:
    """The products of one input with several weights, in one launch for up to 16 rows.

    Weights are decoded exactly, products are accumulated in float32, multiplied by the weight's
    global scale and rounded once. From 65 rows on the CUDA kernel multiplies rounded inputs and
    FP8 weights by FP8 units, see `coded_gemm`. "ffi" takes bfloat16 inputs with k a multiple of 8.

    Args:
        x: [..., k].
        segments: 1 to 8 weights with k inputs.
        implementation: "ffi", "xla" or None for the fastest.

    Returns:
        [..., n] of each segment.

    Raises:
        ValueError: a weight is a stack, or has not k inputs.
        NotImplementedError: the implementation asked for does not support the arguments.
    """
    return _run(x[..., None, :], segments, implementation)


def _run(x: Array, segments: Sequence[Segment], implementation: str | None) -> tuple[Array, ...]:
    *batch, num_groups, k = x.shape
    if not 1 <= len(segments) <= _MAX_SEGMENTS:
        raise ValueError(f"segments: got {len(segments)}, expected 1 to {_MAX_SEGMENTS}")
    for index, (weight, _, _) in enumerate(segments):
        if weight.global_scale.ndim:
            raise ValueError(
                f"segments[{index}].weight: got a stack {weight.global_scale.shape}, expected one"
            )
        if weight.shape[1] != k:
            raise ValueError(
                f"x: got width {k}, segments[{index}].weight has {weight.shape[1]} inputs"
            )
        if weight.shape[0] % num_groups:
            raise ValueError(
                f"weight: got {weight.shape[0]} outputs, expected a multiple of {num_groups} groups"
            )
    weights = [weight for weight, _, _ in segments]
    outputs = dispatch(
        implementation,
        {"ffi": _ffi, "xla": _xla},
        x.reshape(math.prod(batch), num_groups, k),
        weights,
        rounded=tuple(round_input for _, round_input, _ in segments),
        dtypes=tuple(jnp.dtype(dtype or x.dtype) for _, _, dtype in segments),
    )
    return tuple(y.reshape(*batch, y.shape[-1]) for y in outputs)


def _xla(
    x: Array, weights: list[TiledWeight], *, rounded: tuple[bool, ...], dtypes: tuple[np.dtype, ...]
) -> list[Array]:
    outputs = []
    for weight, round_input, dtype in zip(weights, rounded, dtypes, strict=True):
        # Without its global scale a weight is exact in bfloat16.
        values = tiled.dequantize(replace(weight, global_scale=jnp.ones(())), x.dtype)
        blocks = values.reshape(x.shape[1], -1, x.shape[2])
        inputs = fp8_block.round_trip(x) if round_input else x
        y = product("mgk,gnk->mgn", inputs, blocks) * weight.global_scale
        outputs.append(y.reshape(x.shape[0], weight.shape[0]).astype(dtype))
    return outputs


def _ffi(
    x: Array, weights: list[TiledWeight], *, rounded: tuple[bool, ...], dtypes: tuple[np.dtype, ...]
) -> list[Array]:
    num_rows, num_groups, k = x.shape
    if x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"gemm: the kernel takes bfloat16 inputs, not {x.dtype}")
    if num_groups > 1 and weights[0].shape[0] % (num_groups * _GROUP_ROWS):
        raise NotImplementedError(
            f"gemm: the kernel's groups have a multiple of {_GROUP_ROWS} outputs, "
            f"not {weights[0].shape[0]} / {num_groups}"
        )
    if k % 8:
        raise NotImplementedError(f"gemm: the kernel's width is a multiple of 8, not {k}")
    copies = len(set(rounded)) if num_rows > _MAX_STREAMED_ROWS else 0
    copied_rows = groups.count(num_rows, 8) * 8 * num_groups
    copy_bytes = copied_rows * groups.count(k, tiled.COLUMNS) * tiled.COLUMNS * 2
    results = [
        jax.ShapeDtypeStruct((num_rows, weight.shape[0]), dtype)
        for weight, dtype in zip(weights, dtypes, strict=True)
    ]
    workspace = jax.ShapeDtypeStruct((copies * copy_bytes,), jnp.uint8)
    operands = [a for w in weights for a in (w.codes, w.scales, w.global_scale)]
    *outputs, _ = dsv4_ffi.call(
        "gemm",
        [*results, workspace],
        x,
        *operands,
        formats=np.array([tiled.FORMATS.index(w.weight_format) for w in weights], np.int32),
        rounded=np.array(rounded, np.int32),
    )
    return outputs
