"""Rows grouped by expert and padded to tiles, so that experts run as one batched product."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class RoutePlan(NamedTuple):
    """Where each routed row stands among the tiles.

    Attributes:
        tile_expert: [num_tiles], the expert of each tile.
        row_of_slot: [num_tiles * tile], the routed row in each slot; num_rows where it is empty.
        slot_of_row: [num_rows], its inverse; num_tiles * tile for rows that take no part.
    """

    tile_expert: Int[Array, "tiles"]
    row_of_slot: Int[Array, "slots"]
    slot_of_row: Int[Array, "rows"]


def tile_size(num_rows: int, num_experts: int) -> int:
    """Rows of a tile: the mean group, rounded up to a power of two, at most 128."""
    mean = max(num_rows // num_experts, 1)
    return min(1 << (mean - 1).bit_length(), 128)


def route_plan(
    expert_ids: Int[Array, "rows"], valid: Bool[Array, "rows"], num_experts: int, tile: int
) -> RoutePlan:
    """Sorts rows by expert (stable) and pads every group to whole tiles.

    Args:
        expert_ids: int32 in [0, num_experts).
        valid: rows that take part; the others get no slot.
        num_experts: number of groups.
        tile: rows of a tile.
    """
    num_rows = expert_ids.shape[0]
    num_tiles = num_rows // tile + min(num_experts, num_rows)
    group = jnp.where(valid, expert_ids, num_experts)
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
    return RoutePlan(jnp.minimum(tile_expert, num_experts - 1), row_of_slot, slot_of_row)
