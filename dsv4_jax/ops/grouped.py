"""Rows grouped by expert and padded to tiles, so that experts run as one batched product."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

import dsv4_ffi
from dsv4_jax.ops.dispatch import dispatch

_MAX_KERNEL_EXPERTS = 1024


class RoutePlan(NamedTuple):
    """Where each routed row stands among the tiles.

    Attributes:
        tile_expert: [num_tiles], the expert of each tile.
        row_of_slot: [num_tiles * tile], the routed row in each slot; num_rows where it is empty.
        slot_of_row: [num_rows], its inverse; num_tiles * tile for rows that take no part.
        group_sizes: [num_experts], rows of each expert.
    """

    tile_expert: Int[Array, "tiles"]
    row_of_slot: Int[Array, "slots"]
    slot_of_row: Int[Array, "rows"]
    group_sizes: Int[Array, "experts"]


def tile_size(num_rows: int, num_experts: int) -> int:
    """Rows of a tile: the mean group, rounded up to a power of two, at most 128."""
    mean = max(num_rows // num_experts, 1)
    return min(1 << (mean - 1).bit_length(), 128)


def route_plan(
    expert_ids: Int[Array, "rows"],
    valid: Bool[Array, "tokens"],
    num_experts: int,
    tile: int,
    implementation: str | None = None,
) -> RoutePlan:
    """Sorts rows by expert (stable) and pads every group to whole tiles.

    Args:
        expert_ids: int32, the experts of a token side by side; a row whose id is not within
            [0, num_experts) takes no part.
        valid: tokens (or, as many as there are ids, rows) that take part; the others get no slot.
        num_experts: number of groups.
        tile: rows of a tile.
        implementation: "ffi" (one launch), "xla" or None for the fastest.

    Returns:
        The plan, with num_rows // tile + min(num_experts, num_rows) tiles, which is enough for
        any ids. Tiles that are not needed belong to the last expert and are empty.

    Raises:
        ValueError: there is not a whole number of ids for each token.
        NotImplementedError: the kernel asked for does not support the arguments.
    """
    if expert_ids.shape[0] % max(valid.shape[0], 1):
        raise ValueError(
            f"expert_ids: got {expert_ids.shape[0]} rows, "
            f"expected as many for each of {valid.shape[0]} tokens"
        )
    return dispatch(
        implementation,
        {"ffi": _ffi, "xla": _xla},
        expert_ids.astype(jnp.int32),
        valid,
        num_experts=num_experts,
        tile=tile,
    )


def _num_tiles(num_rows: int, num_experts: int, tile: int) -> int:
    return num_rows // tile + min(num_experts, num_rows)


def _xla(expert_ids: Array, valid: Array, *, num_experts: int, tile: int) -> RoutePlan:
    num_rows = expert_ids.shape[0]
    num_tiles = _num_tiles(num_rows, num_experts, tile)
    valid = jnp.repeat(valid, num_rows // max(valid.shape[0], 1), total_repeat_length=num_rows)
    takes_part = valid & (expert_ids >= 0) & (expert_ids < num_experts)
    group = jnp.where(takes_part, expert_ids, num_experts)
    order = jnp.argsort(group, stable=True)
    sizes = jnp.zeros(num_experts, jnp.int32).at[group].add(1, mode="drop")
    tiles = -(-sizes // tile)
    # A cumulative sum of so few numbers is one small reduction; cumsum is a chain of them.
    up_to = jnp.tri(num_experts, dtype=jnp.int32)
    tile_ends, row_ends = up_to @ tiles, up_to @ sizes
    sorted_group = group[order]
    known = jnp.minimum(sorted_group, num_experts - 1)
    rank = jnp.arange(num_rows) - (row_ends - sizes)[known]
    slot = (tile_ends - tiles)[known] * tile + rank
    slot = jnp.where(sorted_group < num_experts, slot, num_tiles * tile)
    slot_of_row = jnp.zeros(num_rows, jnp.int32).at[order].set(slot)
    row_of_slot = jnp.full(num_tiles * tile, num_rows, jnp.int32)
    row_of_slot = row_of_slot.at[slot_of_row].set(jnp.arange(num_rows), mode="drop")
    tile_expert = (jnp.arange(num_tiles)[:, None] >= tile_ends).sum(axis=1, dtype=jnp.int32)
    return RoutePlan(jnp.minimum(tile_expert, num_experts - 1), row_of_slot, slot_of_row, sizes)


def _ffi(expert_ids: Array, valid: Array, *, num_experts: int, tile: int) -> RoutePlan:
    if num_experts > _MAX_KERNEL_EXPERTS:
        raise NotImplementedError(
            f"route_plan: the kernel takes at most {_MAX_KERNEL_EXPERTS} experts"
        )
    num_rows = expert_ids.shape[0]
    num_tiles = _num_tiles(num_rows, num_experts, tile)
    sizes = (num_tiles, num_tiles * tile, num_rows, num_experts)
    return RoutePlan(
        *dsv4_ffi.call(
            "route_plan",
            [jax.ShapeDtypeStruct((size,), jnp.int32) for size in sizes],
            expert_ids,
            valid,
            tile=np.int32(tile),
        )
    )
