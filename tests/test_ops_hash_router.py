"""hash_router against float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import dsv4_ffi
from dsv4_jax.formats import nvfp4
from dsv4_jax.ops import hash_router as op
from dsv4_jax.ops.dense_router import Nvfp4Gate
from tests.oracles.router import normalized, sqrt_softplus

SCALE = 1.5
VOCAB = 100
MISSING = dsv4_ffi.missing(jax.default_backend().replace("gpu", "cuda"))
FFI = pytest.param("ffi", marks=pytest.mark.skipif(MISSING is not None, reason=MISSING or ""))
implementations = pytest.mark.parametrize("implementation", ["xla", FFI])


def hash_router(token_ids, table, *args, **options):
    return op.hash_router(jnp.asarray(token_ids), jnp.asarray(table), *args, **options)


def inputs(num_tokens, num_experts=20, width=64, k=6):
    rng = np.random.default_rng(num_tokens)
    table = rng.permuted(np.tile(np.arange(num_experts), (VOCAB, 1)), axis=1)[:, :k]
    x = jnp.asarray(rng.standard_normal((num_tokens, width)), jnp.bfloat16)
    gate = jnp.asarray(rng.standard_normal((num_experts, width)) * width**-0.5, jnp.bfloat16)
    token_ids = rng.integers(0, VOCAB, num_tokens).astype(np.int32)
    return token_ids, table.astype(np.int32), x, gate


def check(token_ids, table, x, gate, implementation):
    route = jax.jit(partial(hash_router, scale=SCALE, implementation=implementation))
    weights, ids = route(token_ids, table, x=x, gate=gate)
    assert weights.dtype == jnp.float32 and ids.dtype == jnp.int32
    if isinstance(gate, Nvfp4Gate):
        gate = nvfp4.dequantize(*gate, jnp.float32)
    scores = sqrt_softplus(np.asarray(x, np.float64) @ np.asarray(gate, np.float64).T)
    np.testing.assert_array_equal(ids, table[token_ids])
    expected = normalized(scores, table[token_ids], SCALE)
    np.testing.assert_allclose(weights, expected, rtol=2e-5)


@implementations
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 63, 64, 65, 1000, 16384])
def test_gathered_weights(num_tokens, implementation):
    check(*inputs(num_tokens), implementation)


@implementations
@pytest.mark.parametrize(
    ("num_experts", "width", "k"), [(8, 8, 1), (12, 40, 12), (384, 504, 6), (256, 1024, 16)]
)
def test_any_size(num_experts, width, k, implementation):
    check(*inputs(5, num_experts, width, k), implementation)


@implementations
def test_a_packed_gate(implementation):
    token_ids, table, x, gate = inputs(9)
    check(token_ids, table, x, Nvfp4Gate(*jax.jit(nvfp4.quantize)(gate)), implementation)


def test_uniform_weights():
    token_ids, table, _, _ = inputs(10)
    weights, ids = hash_router(token_ids, table, SCALE)
    np.testing.assert_array_equal(ids, table[token_ids])
    np.testing.assert_array_equal(weights, np.full((10, 6), np.float32(SCALE / 6)))


@implementations
def test_ids_outside_the_table_are_masked_rows(implementation):
    token_ids, table, x, gate = inputs(6)
    token_ids[[0, 2, 5]] = -1, VOCAB, 2**31 - 1
    route = jax.jit(partial(hash_router, scale=SCALE, implementation=implementation))
    weights, ids = map(np.asarray, route(token_ids, table, x=x, gate=gate))
    outside = [0, 2, 5]
    assert (ids[outside] == -1).all() and (weights[outside] == 0).all()
    inside = [1, 3, 4]
    np.testing.assert_array_equal(ids[inside], table[token_ids[inside]])
    np.testing.assert_allclose(weights[inside].sum(-1), SCALE, rtol=1e-6)
    uniform = jax.jit(partial(hash_router, scale=SCALE))
    weights, ids = map(np.asarray, uniform(token_ids, table))
    assert (ids[outside] == -1).all() and (weights[outside] == 0).all()


@pytest.mark.parametrize("token_id", [-2, VOCAB])
def test_concrete_ids_outside_the_table_are_refused(token_id):
    token_ids, table, x, gate = inputs(3)
    token_ids[:2] = -1, token_id
    with pytest.raises(ValueError, match=rf"token_ids: got {token_id}, expected -1 .* to 99"):
        hash_router(token_ids, table, SCALE)
    token_ids[1] = 5
    np.testing.assert_array_equal(hash_router(token_ids, table, SCALE, x, gate)[1][0], [-1] * 6)


def test_x_without_gate_is_refused():
    token_ids, table, x, gate = inputs(3)
    for options in ({"x": x}, {"gate": gate}):
        with pytest.raises(ValueError, match="gate: got x without gate or gate without x"):
            hash_router(token_ids, table, SCALE, **options)


def test_what_the_kernel_does_not_take_is_refused():
    token_ids, table, x, gate = inputs(3)
    for options, reason in [
        ({}, "uniform weights need no kernel"),
        ({"x": x.astype(jnp.float32), "gate": gate}, "x in bfloat16"),
        ({"x": x, "gate": gate.astype(jnp.float32)}, "gate in bfloat16 or NVFP4"),
    ]:
        with pytest.raises(NotImplementedError, match=reason):
            hash_router(token_ids, table, SCALE, implementation="ffi", **options)


@implementations
def test_gradient(implementation):
    token_ids, table, x, gate = inputs(7)
    token_ids[3] = -1
    direction = jnp.asarray(np.random.default_rng(0).standard_normal((7, 6)), jnp.float32)

    def loss(x, gate, implementation):
        weights, _ = hash_router(jnp.asarray(token_ids), table, SCALE, x, gate, implementation)
        return (weights * direction).sum()

    actual = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)(x, gate, implementation)
    expected = jax.grad(loss, (0, 1))(x.astype(jnp.float32), gate.astype(jnp.float32), "xla")
    assert not np.asarray(actual[0][3], np.float32).any()
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), e, rtol=0.02, atol=0.01 * abs(e).max())


@implementations
def test_under_transformations(implementation):
    token_ids, table, x, gate = inputs(12)
    token_ids, x = jnp.asarray(token_ids).reshape(3, 4), x.reshape(3, 4, -1)

    def route(token_ids, x):
        return hash_router(token_ids, table, SCALE, x, gate, implementation)

    expected = route(token_ids, x)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(route, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    for actual in (
        jax.vmap(route)(token_ids, x),
        jax.jit(jax.vmap(route))(token_ids, x),
        jax.jit(sharded)(token_ids, x),
        jax.lax.scan(lambda _, row: (None, route(*row)), None, (token_ids, x))[1],
    ):
        np.testing.assert_array_equal(actual[1], expected[1])
        np.testing.assert_allclose(actual[0], expected[0], rtol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(("num_experts", "width"), [(256, 4096), (384, 7168)])
@pytest.mark.parametrize("num_tokens", [1, 64, 300])
def test_at_full_size(num_tokens, num_experts, width):
    token_ids, table, x, gate = inputs(num_tokens, num_experts, width)
    check(token_ids, table, x, gate, "ffi")
    check(token_ids, table, x, Nvfp4Gate(*jax.jit(nvfp4.quantize)(gate)), "ffi")
