"""Products of activations and weights that are both NVFP4, as tensor cores of sm_100 take them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float8e4m3fn, Float32, Int32, UInt8

import dsv4_ffi
from dsv4_jax.formats import nvfp4
from dsv4_jax.ops.dispatch import dispatch

# (codes, swizzled scales, global scales), as `nvfp4_quantize` returns them.
Tokens = tuple[UInt8[Array, "m half"], Float8e4m3fn[Array, "bm bk 512"], Float32[Array, " m"]]
Weights = tuple[UInt8[Array, "n half_n"], Float8e4m3fn[Array, "bn bk_n 512"], Float32[Array, ""]]
StackedWeights = tuple[
    UInt8[Array, "g n half_n"], Float8e4m3fn[Array, "g bn bk_n 512"], Float32[Array, " g"]
]
# A copy engine takes rows that begin at multiples of 16 bytes.
_WIDTH_MULTIPLE = 32


def nvfp4_gemm(
    tokens: Tokens, weights: Weights, implementation: str | None = None
) -> BFloat16[Array, "m n"]:
    """x Wᵀ of two operands as `nvfp4_quantize` lays them out.

    Args:
        tokens: [m, k] with a global scale per row.
        weights: [n, k] with one global scale.
        implementation: "ffi", "xla", or None for the fastest. The CUDA kernel runs on devices of
            compute capability 10.x.

    Returns:
        sum_k x[m, k] W[n, k] of the decoded values, accumulated in float32 and rounded once.

    Raises:
        ValueError: k is not a multiple of 32, or differs.
        NotImplementedError: the implementation asked for cannot run here.
    """
    _check_widths(tokens, weights)
    return dispatch(implementation, {"ffi": _ffi, "xla": _xla}, tokens, weights)


def nvfp4_grouped_gemm(
    tokens: Tokens,
    weights: StackedWeights,
    group_sizes: Int32[Array, " g"],
    implementation: str | None = None,
) -> BFloat16[Array, "m n"]:
    """`nvfp4_gemm` of consecutive groups of tokens, each with its own matrix.

    Args:
        tokens: [m, k], sorted by group, with a global scale per row.
        weights: [g, n, k] with a global scale each.
        group_sizes: how many tokens each group has. What follows the last group is unspecified.
        implementation: as of `nvfp4_gemm`.
    """
    _check_widths(tokens, weights)
    implementations = {"ffi": _grouped_ffi, "xla": _grouped_xla}
    return dispatch(implementation, implementations, tokens, weights, group_sizes)


def _check_widths(tokens: Tokens, weights: Weights | StackedWeights) -> None:
    k, weights_k = 2 * tokens[0].shape[-1], 2 * weights[0].shape[-1]
    if k != weights_k:
        raise ValueError(f"weights: got width {weights_k}, the tokens have {k}")
    if k % _WIDTH_MULTIPLE:
        raise ValueError(f"tokens: got width {k}, expected a multiple of {_WIDTH_MULTIPLE}")


def _decoded(codes: Array, scales: Array) -> Array:
    *batch, rows, half = codes.shape
    plain = nvfp4.unswizzle(scales, rows, 2 * half // nvfp4.GROUP)
    return nvfp4.dequantize(codes, plain, jnp.ones(batch, jnp.float32), jnp.float32)


def _xla(tokens: Tokens, weights: Weights) -> Array:
    x, w = _decoded(*tokens[:2]), _decoded(*weights[:2])
    sums = jnp.einsum("mk,nk->mn", x, w, precision=jax.lax.Precision.HIGHEST)
    return (sums * weights[2] * tokens[2][:, None]).astype(jnp.bfloat16)


def _grouped_xla(tokens: Tokens, weights: StackedWeights, group_sizes: Array) -> Array:
    x, w = _decoded(*tokens[:2]), _decoded(*weights[:2])
    highest = jax.lax.Precision.HIGHEST
    sums = jax.lax.ragged_dot(x, w.swapaxes(1, 2), group_sizes, precision=highest)
    groups = jnp.repeat(weights[2], group_sizes, total_repeat_length=len(x))
    return (sums * groups[:, None] * tokens[2][:, None]).astype(jnp.bfloat16)


def _ffi(tokens: Tokens, weights: Weights) -> Array:
    return _call("nvfp4_gemm", *tokens, *weights)


def _grouped_ffi(tokens: Tokens, weights: StackedWeights, group_sizes: Array) -> Array:
    return _call("nvfp4_grouped_gemm", *tokens, *weights, group_sizes)


def _call(name: str, *operands: Array) -> Array:
    if jax.default_backend() == "gpu":
        capability = jax.local_devices()[0].compute_capability
        if not capability.startswith("10."):
            raise NotImplementedError(
                f"{name}: needs a device of compute capability 10.x, this one has {capability}"
            )
    m, n = operands[0].shape[0], operands[3].shape[-2]
    return dsv4_ffi.call(name, jax.ShapeDtypeStruct((m, n), jnp.bfloat16), *operands)
