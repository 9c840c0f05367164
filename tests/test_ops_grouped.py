"""route_plan against a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import dsv4_ffi
from dsv4_jax.ops.grouped import route_plan, tile_size

MISSING = dsv4_ffi.missing(jax.default_backend().replace("gpu", "cuda"))
FFI = pytest.param("ffi", marks=pytest.mark.skipif(MISSING is not None, reason=MISSING or ""))
implementations = pytest.mark.parametrize("implementation", ["xla", FFI])

plan = jax.jit(route_plan, static_argnums=(2, 3, 4))


def expected_plan(ids, valid, num_experts, tile):
    groups = [[] for _ in range(num_experts)]
    for row, expert in enumerate(ids):
        if 0 <= expert < num_experts and valid[row * len(valid) // len(ids)]:
            groups[expert].append(row)
    num_tiles = len(ids) // tile + min(num_experts, len(ids))
    tile_expert, row_of_slot = [], []
    for expert, rows in enumerate(groups):
        tiles = -(-len(rows) // tile)
        tile_expert += [expert] * tiles
        row_of_slot += rows + [len(ids)] * (tiles * tile - len(rows))
    assert len(tile_expert) <= num_tiles
    tile_expert += [num_experts - 1] * (num_tiles - len(tile_expert))
    row_of_slot += [len(ids)] * (num_tiles * tile - len(row_of_slot))
    slot_of_row = np.full(len(ids), num_tiles * tile)
    for slot, row in enumerate(row_of_slot):
        if row < len(ids):
            slot_of_row[row] = slot
    return tile_expert, row_of_slot, slot_of_row, [len(rows) for rows in groups]


def check(ids, valid, num_experts, tile, implementation):
    actual = plan(
        jnp.asarray(ids, jnp.int32), jnp.asarray(valid), num_experts, tile, implementation
    )
    expected = expected_plan(ids, valid, num_experts, tile)
    for name, a, e in zip(actual._fields, actual, expected, strict=True):
        assert a.dtype == jnp.int32, name
        np.testing.assert_array_equal(a, np.asarray(e, int), err_msg=name)


def random_ids(num_tokens, top_k, num_experts, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, num_experts, num_tokens * top_k), rng.random(num_tokens) < 0.8


@implementations
@pytest.mark.parametrize("num_experts", [1, 8, 20, 256, 384, 1000])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 63, 65, 1000])
def test_random_routes(num_tokens, num_experts, implementation):
    ids, valid = random_ids(num_tokens, 6, num_experts)
    check(ids, valid, num_experts, tile_size(len(ids), num_experts), implementation)


@implementations
@pytest.mark.parametrize("tile", [1, 3, 128])
def test_any_tile(tile, implementation):
    check(*random_ids(50, 4, 12), 12, tile, implementation)


@implementations
def test_one_expert_takes_all(implementation):
    for expert in (0, 11):
        check(np.full(300, expert), np.ones(50, bool), 12, 16, implementation)


@implementations
def test_padding_and_unknown_experts_take_no_part(implementation):
    ids, _ = random_ids(40, 3, 12)
    ids[[0, 7, 50]] = -1, 12, 2**31 - 1
    check(ids, np.zeros(40, bool), 12, 8, implementation)
    check(ids, np.arange(40) % 3 > 0, 12, 8, implementation)
    check(ids, np.arange(120) % 3 > 0, 12, 8, implementation)


@implementations
def test_under_transformations(implementation):
    ids = jnp.asarray(np.random.default_rng(3).integers(0, 12, (3, 48)), jnp.int32)
    valid = jnp.arange(24).reshape(3, 8) % 5 > 0

    def one(ids, valid):
        return route_plan(ids, valid, 12, 4, implementation)

    expected = [one(*row) for row in zip(ids, valid, strict=True)]
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    data = P("data")
    for plans in (
        jax.vmap(one)(ids, valid),
        jax.shard_map(jax.vmap(one), mesh=mesh, in_specs=data, out_specs=data)(ids, valid),
        jax.jit(lambda *a: jax.lax.scan(lambda _, row: (None, one(*row)), None, a)[1])(ids, valid),
    ):
        for i, e in enumerate(expected):
            jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda a, i=i: a[i], plans), e)


def test_rows_that_do_not_divide_by_tokens_are_refused():
    with pytest.raises(ValueError, match="expert_ids: got 7 rows, expected as many for each of 2"):
        route_plan(jnp.zeros(7, jnp.int32), jnp.ones(2, bool), 4, 2)


def test_more_experts_than_the_kernel_holds_are_refused():
    with pytest.raises(NotImplementedError, match="at most 1024 experts"):
        route_plan(jnp.zeros(7, jnp.int32), jnp.ones(7, bool), 1025, 2, "ffi")


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [683, 4096, 16384])
def test_large(num_tokens):
    ids, valid = random_ids(num_tokens, 6, 256)
    check(ids, valid, 256, 128, "ffi")
