"""Gated feed-forward experts on packed weights, and the products of rows sorted by group."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int

import dsv4_ffi
from dsv4_jax.formats import fp8_block, tiled
from dsv4_jax.formats.tiled import TiledWeight
from dsv4_jax.ops.dispatch import dispatch
from dsv4_jax.ops.gemm import Segment, projections
from dsv4_jax.ops.grouped import route_plan, tile_size
from dsv4_jax.ops.product import product

# The kernels' widths are multiples of it.
_WIDTH_STEP = 256
_MAX_KERNEL_EXPERTS = 1024
_CAPABILITIES = ("9.0", "10.")
# Rows of the kernels' smallest blocks of rows.
_BLOCK_ROWS = 16
# What Hopper's kernel for few tokens holds in shared memory: rows of routes and of the shared
# expert, and bytes of their inputs and hidden states.
_MAX_ROUTE_ROWS, _MAX_ROUTE_BYTES = 32, 136 * 1024

# w1, w3 and w2.
Weights = tuple[TiledWeight, TiledWeight, TiledWeight]
Projection = Callable[[Array, Array], Array]


def clamped_swiglu(
    gate: Float[Array, "*batch f"], up: Float[Array, "*batch f"], limit: float
) -> Float[Array, "*batch f"]:
    """silu(min(gate, limit)) · clamp(up, -limit, limit), float32; gate has no lower clamp."""
    gate = jnp.minimum(gate.astype(jnp.float32), limit)
    up = jnp.clip(up.astype(jnp.float32), -limit, limit)
    return jax.nn.silu(gate) * up


def routed_experts(
    x: Float[Array, "n d"],
    weights: Float32[Array, "n k"],
    expert_ids: Int[Array, "n k"],
    valid: Bool[Array, "n"],
    w1: TiledWeight,
    w3: TiledWeight,
    w2: TiledWeight,
    *,
    limit: float,
    round_input: bool = False,
    implementation: str | None = None,
) -> Float32[Array, "n d"]:
    """Σ_k w2(weight_k · swiglu(w1(x), w3(x))) with the weights of expert id_k.

    Weights are decoded exactly and products accumulated in float32; gate, up, the hidden state
    and each expert's output are rounded to x's dtype, the sum over k is float32. The routing
    weight multiplies the hidden state, before w2.

    Args:
        x: rows of tokens; for "ffi" bfloat16.
        weights: routing weights.
        expert_ids: a route whose id is not within [0, E) takes no part.
        valid: tokens that take part; the rows of the others are 0, whatever x holds there.
        w1: gate projections, a stack [E, f, d].
        w3: up projections, a stack [E, f, d].
        w2: down projections, a stack [E, d, f].
        limit: of gate and up, see `clamped_swiglu`.
        round_input: x and the hidden state are rounded to E4M3 before they are multiplied, with a
            power-of-two scale per row and 128 channels (Q1, `fp8_block.round_trip`).
        implementation: "ffi", "xla" or None for the fastest. "ffi" takes packed weights with d and
            f multiples of 256.

    Raises:
        ValueError: shapes or formats of the weights do not go together.
        NotImplementedError: the implementation asked for does not support the arguments.
    """
    d, (f, _) = x.shape[1], w1.shape
    for name, weight, shape in (("w1", w1, (f, d)), ("w3", w3, (f, d)), ("w2", w2, (d, f))):
        if weight.shape != shape:
            raise ValueError(f"{name}: got {weight.shape}, expected {shape}")
        if weight.global_scale.shape != w1.global_scale.shape or weight.global_scale.ndim != 1:
            raise ValueError(
                f"{name}: got a stack {weight.global_scale.shape}, expected one of experts as w1's"
            )
        if weight.weight_format != w1.weight_format:
            raise ValueError(
                f"{name}: got format {weight.weight_format!r}, w1 has {w1.weight_format!r}"
            )
    if not weights.size:
        return jnp.zeros(x.shape, jnp.float32)
    return dispatch(
        implementation,
        {"ffi": _ffi, "xla": _xla},
        x,
        weights,
        expert_ids.astype(jnp.int32),
        valid,
        w1,
        w3,
        w2,
        limit=limit,
        round_input=round_input,
    )


def experts_with_shared(
    x: Float[Array, "n d"],
    weights: Float32[Array, "n k"],
    expert_ids: Int[Array, "n k"],
    valid: Bool[Array, "n"],
    routed: Weights,
    shared: Weights,
    *,
    limit: float,
    round_input: bool = False,
    implementation: str | None = None,
) -> Float32[Array, "n d"]:
    """`routed_experts` plus w2(swiglu(w1(x), w3(x))) of an expert that all tokens pass.

    What the shared expert computes is rounded as that of the routed ones. On Hopper one kernel
    reads the weights of both if tokens are few.

    Args:
        x: rows of tokens; for "ffi" bfloat16.
        weights: routing weights.
        expert_ids: as of `routed_experts`.
        valid: tokens that routed experts take; the shared expert takes all.
        routed: w1, w3 and w2, stacks.
        shared: w1, w3 and w2 of the shared expert.
        limit: as of `routed_experts`.
        round_input: as of `routed_experts`, for both.
        implementation: as of `routed_experts`.

    Raises:
        ValueError: shapes of the shared expert's weights are not those of the routed ones.
        NotImplementedError: the implementation asked for does not support the arguments.
    """
    for name, one, stack in zip(("w1", "w3", "w2"), shared, routed, strict=True):
        if one.shape != stack.shape or one.global_scale.ndim:
            raise ValueError(
                f"shared {name}: got {one.shape} in a stack {one.global_scale.shape}, "
                f"expected {stack.shape} in none"
            )
    return dispatch(
        implementation,
        {"ffi": _with_shared_ffi, "xla": partial(_separately, implementation="xla")},
        x,
        weights,
        expert_ids.astype(jnp.int32),
        valid,
        routed,
        shared,
        limit=limit,
        round_input=round_input,
    )


def experts_in_tiles(
    x: Float[Array, "n d"],
    weights: Float[Array, "n k"],
    expert_ids: Int[Array, "n k"],
    valid: Bool[Array, "n"],
    projections: tuple[Projection, Projection, Projection],
    *,
    num_experts: int,
    limit: float,
) -> Float32[Array, "n d"]:
    """`routed_experts` for any weights.

    Rows are sorted by expert, groups padded to tiles, and each projection is one batched product
    over the tiles.

    Args:
        projections: of w1, w3 and w2: from tiles [tiles, rows, in] and the expert of each tile
            to [tiles, rows, out].
    """
    num_tokens, d = x.shape
    top_k = weights.shape[1]
    num_rows = num_tokens * top_k
    tile = tile_size(num_rows, num_experts)
    plan = route_plan(expert_ids.reshape(-1), valid, num_experts, tile)
    project1, project3, project2 = projections

    # Empty slots hold row num_rows, the zero row appended to tokens and weights.
    slots = plan.row_of_slot.reshape(-1, tile)
    tiles = jnp.concatenate([x, jnp.zeros((1, d), x.dtype)])[slots // top_k]
    tile_weights = jnp.append(weights.reshape(-1), 0.0)[slots]
    gate, up = (
        project(tiles, plan.tile_expert).astype(x.dtype) for project in (project1, project3)
    )
    hidden = (clamped_swiglu(gate, up, limit) * tile_weights[..., None]).astype(x.dtype)
    y = project2(hidden, plan.tile_expert).astype(x.dtype).reshape(-1, d)
    y = jnp.concatenate([y, jnp.zeros((1, d), y.dtype)])[plan.slot_of_row]
    return y.reshape(num_tokens, top_k, d).astype(jnp.float32).sum(axis=1)


def sorted_gemm(
    x: Float[Array, "rows k"],
    group_sizes: Int[Array, "E"],
    weight: TiledWeight,
    *,
    round_input: bool = False,
    implementation: str | None = None,
) -> Float[Array, "rows n"]:
    """x Wᵀ of rows sorted by group, each with its group's weight, in x's dtype.

    Args:
        x: the first group_sizes[0] rows belong to group 0, and so on; for "ffi" bfloat16.
        group_sizes: they may sum up to less than the number of rows: what follows becomes 0.
        weight: a stack [E, n, k].
        round_input: as of `routed_experts`.
        implementation: "ffi", "xla" or None for the fastest. "ffi" takes packed weights with n and
            k multiples of 256.

    Raises:
        ValueError: the weight does not fit, or the sizes (where they are known before the program
            runs) are negative or sum up to more than the number of rows.
        NotImplementedError: the implementation asked for does not support the arguments.
    """
    if weight.shape[1] != x.shape[1]:
        raise ValueError(f"x: got width {x.shape[1]}, weight has {weight.shape[1]} inputs")
    if weight.global_scale.shape != group_sizes.shape:
        raise ValueError(
            f"group_sizes: got {group_sizes.shape}, weight is a stack {weight.global_scale.shape}"
        )
    if not isinstance(group_sizes, jax.core.Tracer):
        sizes = np.asarray(group_sizes)
        if (sizes < 0).any() or sizes.sum() > x.shape[0]:
            raise ValueError(
                f"group_sizes: got {sizes.tolist()}, expected sizes that sum up to "
                f"{x.shape[0]} rows or fewer"
            )
    if not x.shape[0]:
        return jnp.zeros((0, weight.shape[0]), x.dtype)
    return dispatch(
        implementation,
        {"ffi": _sorted_ffi, "xla": _sorted_xla},
        x,
        group_sizes.astype(jnp.int32),
        weight,
        round_input=round_input,
    )


def _projection(weight: TiledWeight, dtype: DTypeLike, round_input: bool) -> Projection:
    # Without its global scale a weight is exact in bfloat16.
    exact = replace(weight, global_scale=jnp.ones_like(weight.global_scale))

    def project(tiles: Array, tile_expert: Array) -> Array:
        values = tiled.dequantize(jax.tree.map(lambda a: a[tile_expert], exact), dtype)
        inputs = fp8_block.round_trip(tiles) if round_input else tiles
        y = product("gti,goi->gto", inputs, values)
        return y * weight.global_scale[tile_expert, None, None]

    return project


def _xla(
    x: Array,
    weights: Array,
    expert_ids: Array,
    valid: Array,
    w1: TiledWeight,
    w3: TiledWeight,
    w2: TiledWeight,
    *,
    limit: float,
    round_input: bool,
) -> Array:
    project1, project3, project2 = (_projection(w, x.dtype, round_input) for w in (w1, w3, w2))
    return experts_in_tiles(
        x,
        weights,
        expert_ids,
        valid,
        (project1, project3, project2),
        num_experts=w1.global_scale.shape[0],
        limit=limit,
    )


def _separately(
    x: Array,
    weights: Array,
    expert_ids: Array,
    valid: Array,
    routed: Weights,
    shared: Weights,
    *,
    limit: float,
    round_input: bool,
    implementation: str,
) -> Array:
    w1, w3, w2 = (Segment(weight, round_input) for weight in shared)
    gate, up = projections(x, [w1, w3], implementation=implementation)
    hidden = clamped_swiglu(gate, up, limit).astype(x.dtype)
    (y,) = projections(hidden, [w2], implementation=implementation)
    return y.astype(jnp.float32) + routed_experts(
        x,
        weights,
        expert_ids,
        valid,
        *routed,
        limit=limit,
        round_input=round_input,
        implementation=implementation,
    )


def _check_kernel(name: str, x: Array, weight: TiledWeight, outputs: int, inputs: int) -> None:
    num_experts = weight.global_scale.shape[0]
    capability, obstacle = _capability(), None
    if not capability.startswith(_CAPABILITIES):
        obstacle = f"devices of compute capability 9.0 or 10.x, not {capability}"
    elif x.dtype != jnp.bfloat16:
        obstacle = f"bfloat16 inputs, not {x.dtype}"
    elif weight.weight_format == "bf16":
        obstacle = "packed weights, not bf16"
    elif outputs % _WIDTH_STEP or inputs % _WIDTH_STEP:
        obstacle = f"widths that are multiples of {_WIDTH_STEP}, not {outputs} and {inputs}"
    elif num_experts > _MAX_KERNEL_EXPERTS:
        obstacle = f"up to {_MAX_KERNEL_EXPERTS} experts, not {num_experts}"
    if obstacle is not None:
        raise NotImplementedError(f"{name}: the kernel takes {obstacle}")


def _capability() -> str:
    # Of CPUs, whose handlers take the same arguments, none is known.
    return getattr(jax.local_devices()[0], "compute_capability", _CAPABILITIES[0])


def _workspace(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((sum(-(-size // 256) * 256 for size in sizes),), jnp.uint8)


def _plan_sizes(num_rows: int, num_experts: int, outputs: int) -> tuple[int, ...]:
    blocks = num_rows // _BLOCK_ROWS + min(num_rows, num_experts)
    counters = 4 * (32 + 2 * blocks + outputs // 64)
    return (counters, 4, 16 * blocks, 4 * num_rows, 4 * num_rows, 4 * num_rows)


def _operands(*weights: TiledWeight) -> list[Array]:
    return [array for w in weights for array in (w.codes, w.scales, w.global_scale)]


def _ffi(
    x: Array,
    weights: Array,
    expert_ids: Array,
    valid: Array,
    w1: TiledWeight,
    w3: TiledWeight,
    w2: TiledWeight,
    *,
    limit: float,
    round_input: bool,
    shared: Weights | None = None,
) -> Array:
    (num_tokens, d), f = x.shape, w1.shape[0]
    _check_kernel("routed_experts", x, w1, d, f)
    num_rows = num_tokens * weights.shape[1]
    operands = _operands(w1, w3, w2)
    planned = _workspace(
        *_plan_sizes(num_rows, w1.global_scale.shape[0], d),
        2 * num_tokens * d,
        2 * num_rows * f,
        2 * num_rows * d,
    )
    if shared is not None:
        operands += [array[None] for array in _operands(*shared)]
        num_rows += num_tokens
    of_routes = _workspace(128 * (1 + num_rows), 4 * num_rows * f)
    workspace = max(planned, of_routes, key=lambda memory: memory.size)
    y, _ = dsv4_ffi.call(
        "moe_ffn",
        [jax.ShapeDtypeStruct((num_tokens, d), jnp.float32), workspace],
        x,
        weights,
        expert_ids,
        valid,
        *operands,
        weight_format=np.int32(tiled.FORMATS.index(w1.weight_format)),
        limit=np.float32(limit),
        round_input=round_input,
    )
    return y


def _with_shared_ffi(
    x: Array,
    weights: Array,
    expert_ids: Array,
    valid: Array,
    routed: Weights,
    shared: Weights,
    *,
    limit: float,
    round_input: bool,
) -> Array:
    (num_tokens, d), f = x.shape, routed[0].shape[0]
    num_rows = num_tokens * (weights.shape[1] + 1)
    row_bytes = 2 * (num_tokens * d + num_rows * f)
    fits = (
        _capability() == "9.0"
        and 0 < num_rows <= _MAX_ROUTE_ROWS
        and row_bytes <= _MAX_ROUTE_BYTES
        and routed[0].weight_format in ("mxfp4", "nvfp4")
        and all(weight.weight_format == "fp8_block" for weight in shared)
    )
    options: dict[str, Any] = {"limit": limit, "round_input": round_input}
    if fits:
        return _ffi(x, weights, expert_ids, valid, *routed, shared=shared, **options)
    return _separately(
        x, weights, expert_ids, valid, routed, shared, implementation="ffi", **options
    )


def _sorted_xla(x: Array, group_sizes: Array, weight: TiledWeight, *, round_input: bool) -> Array:
    num_rows, num_experts = x.shape[0], group_sizes.shape[0]
    ends = jnp.tri(num_experts, dtype=jnp.int32) @ group_sizes
    group = (jnp.arange(num_rows)[:, None] >= ends).sum(axis=1, dtype=jnp.int32)
    tile = tile_size(num_rows, num_experts)
    plan = route_plan(group, jnp.ones(num_rows, bool), num_experts, tile)
    slots = plan.row_of_slot.reshape(-1, tile)
    tiles = jnp.concatenate([x, jnp.zeros_like(x[:1])])[slots]
    y = _projection(weight, x.dtype, round_input)(tiles, plan.tile_expert)
    y = y.astype(x.dtype).reshape(-1, weight.shape[0])
    return jnp.concatenate([y, jnp.zeros_like(y[:1])])[plan.slot_of_row]


def _sorted_ffi(x: Array, group_sizes: Array, weight: TiledWeight, *, round_input: bool) -> Array:
    (num_rows, k), n = x.shape, weight.shape[0]
    _check_kernel("sorted_gemm", x, weight, n, k)
    workspace = _workspace(*_plan_sizes(num_rows, group_sizes.shape[0], n), 2 * num_rows * k)
    y, _ = dsv4_ffi.call(
        "grouped_gemm",
        [jax.ShapeDtypeStruct((num_rows, n), jnp.bfloat16), workspace],
        x,
        group_sizes,
        *_operands(weight),
        weight_format=np.int32(tiled.FORMATS.index(weight.weight_format)),
        round_input=round_input,
    )
    return y
