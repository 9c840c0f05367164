"""From tokens to experts and weights: the gate's product and the choice in one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float8e4m3fn, Float32, Int, UInt8

import dsv4_ffi
from dsv4_jax.formats import nvfp4
from dsv4_jax.ops.dispatch import dispatch
from dsv4_jax.ops.product import product
from dsv4_jax.ops.router import (
    Routing,
    activation_topk,
    check_kernel,
    check_top_k,
    straight_through,
)

# What the kernels hold; tokens of one launch.
MAX_KERNEL_TOKENS = 64
MAX_KERNEL_EXPERTS = 384
MAX_FUSED_TOP_K = 8
# Tiles of tokens, and of experts; for fewer and for more tokens XLA's product is faster
# (`benchmarks/router.py`).
TILE = 128
MIN_TILED_TOKENS, MAX_TILED_TOKENS = 512, 2048
MAX_SLICES = 8
SLICE_COLUMNS = 64


class Nvfp4Gate(NamedTuple):
    """A gate [E, d] as `formats.nvfp4.quantize` packs it.

    Attributes:
        packed: pairs of E2M1 codes, [E, d / 2].
        scales: per 16 weights, [E, d / 16].
        global_scale: [].
    """

    packed: UInt8[Array, "e half"]
    scales: Float8e4m3fn[Array, "e groups"]
    global_scale: Float32[Array, ""]

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[0], 2 * self.packed.shape[1]


Gate = Float[Array, "e d"] | Nvfp4Gate


def gate_logits(x: Float[Array, "*batch d"], gate: Gate) -> Float[Array, "*batch e"]:
    """x gateᵀ, accumulated and returned in float32.

    Two bfloat16 operands, or x in bfloat16 and an NVFP4 gate, are multiplied as they are, which
    is exact; else both are promoted to float32.
    """
    if isinstance(gate, Nvfp4Gate):
        # Codes times block scales are exact in bfloat16.
        ones = jnp.ones((), jnp.float32)
        decoded = nvfp4.dequantize(gate.packed, gate.scales, ones, jnp.bfloat16)
        return gate_logits(x, decoded) * gate.global_scale
    if not x.dtype == gate.dtype == jnp.bfloat16:
        x, gate = x.astype(jnp.float32), gate.astype(jnp.float32)
    return product("...d,ed->...e", x, gate)


def dense_router(
    x: Float[Array, "*batch d"],
    gate: Gate,
    bias: Float[Array, "e"],
    top_k: int,
    scale: float,
    implementation: str | None = None,
) -> tuple[Float[Array, "*batch k"], Int[Array, "*batch k"]]:
    """`activation_topk(gate_logits(x, gate), bias, top_k, scale)`.

    Gradient flows to x and to a float gate through the weights, straight through the selection.

    Args:
        x: tokens.
        gate: [E, d], float or NVFP4.
        bias: [E], for the selection only.
        top_k: experts of a token, at most E.
        scale: what the weights of a token add up to.
        implementation: "ffi" (tokens in bfloat16, up to 64 in one launch, 512 to 2,048 in two; a
            gate in bfloat16 or, of up to 64 tokens, NVFP4, up to 384 experts, top_k up to 8),
            "unfused" (the product, then the fastest activation_topk), "xla" or None for the first
            of these that supports the arguments.

    Returns:
        (weights float32, ids int32), [..., k] each, as of `activation_topk`.

    Raises:
        ValueError: top_k is not within [1, E].
        NotImplementedError: the kernel asked for does not support the arguments.
    """
    num_experts = gate.shape[0]
    return dispatch(
        implementation,
        {"ffi": _ffi, "unfused": _unfused, "xla": _xla},
        x,
        gate,
        bias.astype(jnp.float32),
        top_k=check_top_k(top_k, num_experts),
        scale=scale,
    )


def num_tokens(x: Array) -> int:
    """How many rows x [..., d] has."""
    return int(np.prod(x.shape[:-1]))


def kernel_operands(name: str, x: Array, gate: Gate) -> tuple[Array, Array, Array]:
    """Gate, block scales and global scale as the kernels take them (scales empty without).

    Raises:
        NotImplementedError: the operands are not for them.
    """
    if x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"{name}: the kernel takes x in bfloat16, not {x.dtype}")
    if isinstance(gate, Nvfp4Gate):
        return gate.packed, gate.scales, gate.global_scale.reshape(1)
    if gate.dtype != jnp.bfloat16:
        raise NotImplementedError(
            f"{name}: the kernel takes the gate in bfloat16 or NVFP4, not {gate.dtype}"
        )
    if x.shape[-1] % 8:
        raise NotImplementedError(f"{name}: the kernel takes a width that 8 divides")
    return gate, jnp.zeros(0, jnp.float8_e4m3fn), jnp.zeros(0, jnp.float32)


def _scratch_shape(num_tokens: int, num_experts: int, width: int) -> tuple[int, ...]:
    """What blocks leave for each other: scores; of many tokens sums over slices of the width."""
    if num_tokens <= MAX_KERNEL_TOKENS:
        return num_tokens, num_experts
    tiles = -(-num_tokens // TILE) * -(-num_experts // TILE)
    # As many blocks as there are multiprocessors.
    slices = max(1, min(MAX_SLICES, 132 // tiles, width // SLICE_COLUMNS))
    return slices, num_tokens, -(-num_experts // 4) * 4


def _check_tiled(num_tokens: int, gate: Gate) -> None:
    if isinstance(gate, Nvfp4Gate):
        raise NotImplementedError(
            f"dense_router: the kernel takes an NVFP4 gate for at most {MAX_KERNEL_TOKENS} tokens"
        )
    if not MIN_TILED_TOKENS <= num_tokens <= MAX_TILED_TOKENS:
        raise NotImplementedError(
            f"dense_router: the kernels take at most {MAX_KERNEL_TOKENS} tokens, or "
            f"{MIN_TILED_TOKENS} to {MAX_TILED_TOKENS}"
        )
    capability = getattr(jax.local_devices()[0], "compute_capability", "9.0")
    if not capability.startswith("9."):
        raise NotImplementedError(
            f"dense_router: more than {MAX_KERNEL_TOKENS} tokens are for sm_90, the device has "
            f"{capability}"
        )


def _unfused(x: Array, gate: Gate, bias: Array, *, top_k: int, scale: float) -> Routing:
    return activation_topk(gate_logits(x, gate), bias, top_k, scale)


def _xla(x: Array, gate: Gate, bias: Array, *, top_k: int, scale: float) -> Routing:
    return activation_topk(gate_logits(x, gate), bias, top_k, scale, "xla")


def _ffi(x: Array, gate: Gate, bias: Array, *, top_k: int, scale: float) -> Routing:
    check_kernel("dense_router", bias.shape[0], top_k, MAX_KERNEL_EXPERTS, MAX_FUSED_TOP_K)
    kernel_operands("dense_router", x, gate)
    if num_tokens(x) > MAX_KERNEL_TOKENS:
        _check_tiled(num_tokens(x), gate)

    def route(x: Array, gate: Gate, bias: Array) -> Routing:
        rows = x.reshape(-1, x.shape[-1])
        shape = (rows.shape[0], top_k)
        weights, ids, _ = dsv4_ffi.call(
            "dense_router",
            (
                jax.ShapeDtypeStruct(shape, jnp.float32),
                jax.ShapeDtypeStruct(shape, jnp.int32),
                jax.ShapeDtypeStruct(
                    _scratch_shape(len(rows), len(bias), x.shape[-1]), jnp.float32
                ),
            ),
            rows,
            *kernel_operands("dense_router", x, gate),
            bias,
            scale=np.float32(scale),
        )
        batched = (*x.shape[:-1], top_k)
        return weights.reshape(batched), ids.reshape(batched)

    return straight_through(route, lambda x, gate, bias: gate_logits(x, gate), scale)(x, gate, bias)
