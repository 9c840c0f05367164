"""activation_topk and dense_router against float64: exact ids, weights to 2e-5."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import dsv4_ffi
from dsv4_jax.formats import nvfp4
from dsv4_jax.ops.dense_router import (
    MAX_KERNEL_TOKENS,
    MAX_TILED_TOKENS,
    MIN_TILED_TOKENS,
    Nvfp4Gate,
    dense_router,
    gate_logits,
)
from dsv4_jax.ops.router import activation_topk
from tests.oracles.router import normalized, scored_ids, sqrt_softplus

SCALE = 2.5
MISSING = dsv4_ffi.missing(jax.default_backend().replace("gpu", "cuda"))
FFI = pytest.param("ffi", marks=pytest.mark.skipif(MISSING is not None, reason=MISSING or ""))
IMPLEMENTATIONS = ["xla", FFI]
EXPERTS = [8, 12, 20, 384]
TOKENS = [0, 1, 2, 63, 64, 65, 1000]
WEIGHT_TOLERANCE = 2e-5


def normal(*shape, seed=0, std=1.0):
    return (std * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def expected_routing(logits, bias, k):
    """Ids and weights in float64; a row is decided when no choice is closer than float32 can tell.

    Scores are rounded to float32 and the sum with the bias once more, which is what makes equal
    scores equal.
    """
    scores = sqrt_softplus(np.asarray(logits, np.float64))
    with np.errstate(invalid="ignore"):
        biased = scores.astype(np.float32) + np.asarray(bias, np.float32)
    ids = scored_ids(biased.astype(np.float64), 0.0, k).astype(int)
    best = -np.sort(-(scores + np.asarray(bias, np.float64)), axis=-1)[:, : k + 1]
    gaps = np.diff(-best, axis=-1)
    decided = ((gaps == 0) | (gaps > 4e-6 * (abs(best[:, 1:]) + abs(bias).max(initial=0)))).all(-1)
    return ids, normalized(scores, ids, SCALE), decided


def check(actual, logits, bias, k, least_decided=0.99):
    weights, ids = map(np.asarray, actual)
    assert weights.shape == ids.shape == (len(logits), k)
    assert weights.dtype == np.float32 and ids.dtype == np.int32
    expected_ids, expected_weights, decided = expected_routing(logits, bias, k)
    assert decided.sum() >= least_decided * len(logits)
    np.testing.assert_array_equal(ids[decided], expected_ids[decided])
    np.testing.assert_allclose(weights[decided], expected_weights[decided], WEIGHT_TOLERANCE)
    scores = sqrt_softplus(logits[~decided].astype(np.float64))
    np.testing.assert_allclose(
        weights[~decided], normalized(scores, ids[~decided], SCALE), WEIGHT_TOLERANCE
    )


def sharded(function, in_specs, out_specs):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


def activated(logits, bias, k, implementation):
    route = jax.jit(partial(activation_topk, top_k=k, scale=SCALE, implementation=implementation))
    return route(jnp.asarray(logits), jnp.asarray(bias))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("num_tokens", "num_experts"), [*((n, 256) for n in TOKENS), *((65, e) for e in EXPERTS)]
)
def test_activation_topk(num_tokens, num_experts, implementation):
    logits = normal(num_tokens, num_experts, std=3.0)
    bias = normal(num_experts, seed=1, std=0.3)
    check(activated(logits, bias, 6, implementation), logits, bias, 6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_many_tokens(implementation):
    logits, bias = normal(16384, 256), normal(256, seed=1, std=0.1)
    check(activated(logits, bias, 6, implementation), logits, bias, 6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("num_experts", "k"), [(8, 1), (8, 8), (20, 16), (256, 16), (1000, 10)])
def test_any_k(num_experts, k, implementation):
    logits, bias = normal(40, num_experts), normal(num_experts, seed=1, std=0.1)
    check(activated(logits, bias, k, implementation), logits, bias, k, 0.9)


def sigmoid_order(rng):
    """softplus goes on growing where a sigmoid has saturated, and the bias sees it."""
    logits = rng.uniform(20, 60, (50, 256))
    return logits, rng.uniform(-0.05, 0.05, 256)


def leaking_bias(rng):
    """Biases as large as scores: weights of biased scores would be far off."""
    return rng.standard_normal((50, 256)), rng.choice([-2.0, 2.0], 256) + rng.normal(0, 0.01, 256)


def negative_biased_scores(rng):
    """Biased scores that are negative, or sum to nothing, where weights must not be."""
    return rng.standard_normal((50, 256)), rng.normal(-3.0, 0.5, 256)


def far_below_zero(rng):
    """softplus is exp(x) here: what is lost in 1 + exp(x) decides."""
    return rng.uniform(-40, -20, (50, 256)), np.zeros(256)


def equal_rows(rng):
    return np.repeat(rng.standard_normal((50, 1)), 256, axis=1), np.zeros(256)


def few_values(rng):
    return rng.integers(-2, 3, (50, 256)), rng.integers(0, 2, 256)


def extremes(rng):
    return rng.choice([-1e4, -104.0, -88.0, 0.0, 20.0, 88.0, 1e4, 3e38], (50, 256)), np.zeros(256)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "rows",
    [
        sigmoid_order,
        leaking_bias,
        negative_biased_scores,
        far_below_zero,
        equal_rows,
        few_values,
    ],
)
def test_rows_that_separate_orders_of_operations(rows, implementation):
    logits, bias = (a.astype(np.float32) for a in rows(np.random.default_rng(2)))
    check(activated(logits, bias, 6, implementation), logits, bias, 6, 0.8)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_biased_scores_one_ulp_apart(implementation):
    bias = np.float32(5.0).view(np.int32) + np.random.default_rng(2).permutation(256)
    bias = bias.astype(np.int32).view(np.float32)
    _, ids = activated(np.zeros((3, 256), np.float32), bias, 6, implementation)
    np.testing.assert_array_equal(ids, np.tile(np.argsort(-bias)[:6], (3, 1)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_neighbouring_logits_keep_their_order(implementation):
    """One ulp apart, a larger logit is never behind a smaller one that scores less."""
    rng = np.random.default_rng(4)
    start = rng.uniform(-8, 8, (64, 1)).astype(np.float32).view(np.int32)
    logits = (start + rng.permuted(np.tile(np.arange(256), (64, 1)), axis=1)).astype(np.int32)
    logits = logits.view(np.float32)
    weights, ids = map(np.asarray, activated(logits, np.zeros(256, np.float32), 6, implementation))
    scores = sqrt_softplus(logits.astype(np.float64))
    chosen = np.take_along_axis(scores, ids, axis=1)
    best = -np.sort(-scores, axis=1)[:, :6]
    np.testing.assert_allclose(chosen, best, rtol=5e-7)
    np.testing.assert_allclose(weights, normalized(scores, ids, SCALE), WEIGHT_TOLERANCE)
    assert (np.sort(ids, axis=1)[:, 1:] > np.sort(ids, axis=1)[:, :-1]).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scores_that_underflow_or_are_huge(implementation):
    logits, bias = (a.astype(np.float32) for a in extremes(np.random.default_rng(2)))
    logits[0] = -1e4
    logits[1, :] = np.where(np.arange(256) == 77, 5.0, -1e4)
    weights, ids = map(np.asarray, activated(logits, bias, 6, implementation))
    expected_ids, expected_weights, _ = expected_routing(logits[1:], bias, 6)
    np.testing.assert_array_equal(ids[1:], expected_ids)
    np.testing.assert_allclose(weights[1:], expected_weights, 1e-4, 1e-20)
    np.testing.assert_array_equal(ids[0], np.arange(6))
    np.testing.assert_array_equal(weights[0], np.zeros(6))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_is_chosen_first(implementation):
    """It shows in the weights, and the ids are still those of experts."""
    logits = normal(3, 12)
    logits[:, [1, 5, 7]] = np.nan
    logits[2] = np.nan
    weights, ids = activated(logits, np.zeros(12, np.float32), 9, implementation)
    order = np.argsort(-np.where(np.isnan(logits), np.inf, logits), axis=1, kind="stable")
    np.testing.assert_array_equal(ids, order[:, :9])
    assert np.isnan(weights).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_bias_of_minus_infinity_switches_experts_off(implementation):
    bias = np.where(np.arange(20) % 2 == 0, -np.inf, 0.0).astype(np.float32)
    _, ids = activated(normal(30, 20), bias, 12, implementation)
    ids = np.asarray(ids)
    assert (ids[:, :10] % 2 == 1).all()
    np.testing.assert_array_equal(ids[:, 10:], np.tile([0, 2], (30, 1)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradient_goes_through_the_weights(implementation):
    logits, bias = jnp.asarray(normal(30, 20)), jnp.asarray(normal(20, seed=1, std=0.2))
    direction = jnp.asarray(normal(30, 6, seed=2))

    def loss(logits, bias, implementation):
        weights, _ = activation_topk(logits, bias, 6, SCALE, implementation)
        return (weights * direction).sum()

    gradients = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)(logits, bias, implementation)
    ids = np.asarray(activation_topk(logits, bias, 6, SCALE)[1])
    step = 1e-6
    for row, expert in [(0, ids[0, 0]), (3, ids[3, 5]), (7, ids[7, 2])]:
        ends = []
        for sign in (1, -1):
            moved = np.asarray(logits[row], np.float64)
            moved[expert] += sign * step
            weights = normalized(sqrt_softplus(moved)[None], ids[row][None], SCALE)
            ends.append((weights * np.asarray(direction[row], np.float64)).sum())
        numeric = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(gradients[0][row, expert], numeric, rtol=1e-4, atol=1e-5)
    reference = jax.grad(loss, (0, 1))(logits, bias, "xla")
    np.testing.assert_allclose(gradients[0], reference[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(gradients[1], np.zeros(20))


def test_gradient_of_underflowing_scores_is_zero():
    logits = jnp.asarray([[3.0, 2.0, -1e4, -200.0, 1.0]])
    gradient = jax.grad(lambda x: activation_topk(x, jnp.zeros(5), 2, 1.0)[0][0, 0])(logits)
    assert np.isfinite(gradient).all()
    assert gradient[0, 0] > 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_under_transformations(implementation):
    logits, bias = jnp.asarray(normal(2, 3, 8, 20)), jnp.asarray(normal(2, 20, seed=1, std=0.3))
    route = partial(activation_topk, top_k=4, scale=SCALE, implementation=implementation)
    expected = [route(logits[i, j], bias[i]) for i in range(2) for j in range(3)]
    expected = jax.tree.map(lambda *a: jnp.stack(a).reshape(2, 3, 8, 4), *expected)

    def same(actual):
        for a, e in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(a, e)

    same(jax.vmap(route)(logits, bias))
    same(jax.jit(jax.vmap(jax.vmap(route, (0, None))))(logits, bias))
    same(jax.lax.scan(lambda _, row: (None, route(*row)), None, (logits, bias))[1])
    of_shards = sharded(route, (P(None, "data"), P()), P(None, "data"))
    np.testing.assert_array_equal(jax.jit(of_shards)(logits[0], bias[0])[1], expected[1][0])


@pytest.mark.parametrize("k", [0, 9])
def test_top_k_outside_the_experts_is_refused(k):
    with pytest.raises(ValueError, match=f"top_k: got {k}, expected 1 <= top_k <= 8"):
        activation_topk(jnp.zeros((2, 8)), jnp.zeros(8), k, 1.0)
    with pytest.raises(ValueError, match=f"top_k: got {k}"):
        dense_router(jnp.zeros((2, 16)), jnp.zeros((8, 16)), jnp.zeros(8), k, 1.0)


def test_what_the_kernels_do_not_hold_is_refused():
    with pytest.raises(NotImplementedError, match="top_k is at most 16"):
        activation_topk(jnp.zeros((2, 32)), jnp.zeros(32), 17, 1.0, "ffi")
    with pytest.raises(NotImplementedError, match="at most 1024 experts"):
        activation_topk(jnp.zeros((2, 1025)), jnp.zeros(1025), 2, 1.0, "ffi")
    bf16 = partial(jnp.zeros, dtype=jnp.bfloat16)
    for x, gate, reason in [
        (jnp.zeros((2, 32)), bf16((8, 32)), "x in bfloat16, not float32"),
        (bf16((2, 32)), jnp.zeros((8, 32)), "bfloat16 or NVFP4, not float32"),
        (bf16((2, 20)), bf16((8, 20)), "a width that 8 divides"),
        (bf16((2, 32)), bf16((385, 32)), "at most 384 experts"),
        (bf16((65, 32)), nvfp4_gate(jnp.ones((8, 32))), "an NVFP4 gate for at most 64 tokens"),
        (bf16((65, 8)), bf16((8, 8)), "at most 64 tokens, or 512 to 2048"),
        (bf16((2049, 8)), bf16((8, 8)), "at most 64 tokens, or 512 to 2048"),
    ]:
        with pytest.raises(NotImplementedError, match=reason):
            dense_router(x, gate, jnp.zeros(gate.shape[0]), 2, 1.0, "ffi")


def test_tiles_are_for_hopper(monkeypatch):
    blackwell = [SimpleNamespace(compute_capability="10.0")]
    monkeypatch.setattr(jax, "local_devices", lambda: blackwell)
    x, gate, bias = tokens_and_gate(MIN_TILED_TOKENS, 8, 32)
    with pytest.raises(NotImplementedError, match=r"more than 64 .* sm_90, the device has 10\.0"):
        dense_router(x, gate, bias, 2, 1.0, "ffi")


def tokens_and_gate(num_tokens, num_experts, width, seed=0):
    x = jnp.asarray(normal(num_tokens, width, seed=seed), jnp.bfloat16)
    gate = jnp.asarray(normal(num_experts, width, seed=seed + 1, std=width**-0.5), jnp.bfloat16)
    return x, gate, jnp.asarray(normal(num_experts, seed=seed + 2, std=0.2))


def nvfp4_gate(gate):
    return Nvfp4Gate(*jax.jit(nvfp4.quantize)(gate))


def decoded(gate):
    if isinstance(gate, Nvfp4Gate):
        gate = nvfp4.dequantize(*gate, jnp.float32)
    return np.asarray(gate, np.float64)


def check_dense(implementation, x, gate, bias, k=6, least_decided=0.95):
    route = jax.jit(partial(dense_router, top_k=k, scale=SCALE, implementation=implementation))
    logits = np.asarray(x, np.float64) @ decoded(gate).T
    check(route(x, gate, bias), logits, bias, k, least_decided)


DENSE = ["xla", "unfused", FFI]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 8, 9, 17, 63, 64])
def test_dense_router(num_tokens, implementation):
    check_dense(implementation, *tokens_and_gate(num_tokens, 256, 256))


@pytest.mark.parametrize("implementation", [None, "unfused"])
@pytest.mark.parametrize(("num_tokens", "num_experts"), [(65, 384), (1000, 256), (16384, 20)])
def test_dense_router_of_many_tokens(num_tokens, num_experts, implementation):
    check_dense(implementation, *tokens_and_gate(num_tokens, num_experts, 64), k=4)


@pytest.mark.parametrize("implementation", [FFI])
@pytest.mark.parametrize(("num_tokens", "num_experts"), [(512, 384), (1000, 256), (2000, 21)])
def test_dense_router_in_tiles(num_tokens, num_experts, implementation):
    check_dense(implementation, *tokens_and_gate(num_tokens, num_experts, 64), k=4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dense_router_prefers_the_lower_of_equal_experts(implementation):
    """Experts 5 to 14 have one row; tokens of zeros find all experts equal."""
    x, gate, _ = tokens_and_gate(10, 20, 64)
    gate = gate.at[6:15].set(gate[5])
    x = x.at[3].set(0)
    check_dense(implementation, x, gate, jnp.zeros(20), k=8)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("num_experts", "width"), [(8, 8), (12, 40), (20, 504), (384, 2048)])
def test_dense_router_of_any_size(num_experts, width, implementation):
    check_dense(implementation, *tokens_and_gate(5, num_experts, width), k=4)


@pytest.mark.parametrize("implementation", DENSE)
def test_dense_router_with_a_packed_gate(implementation):
    x, gate, bias = tokens_and_gate(9, 20, 48)
    check_dense(implementation, x, nvfp4_gate(gate), bias, k=4)


def test_float32_operands_are_not_rounded():
    x, gate = jnp.asarray(normal(40, 512)), jnp.asarray(normal(64, 512, seed=1, std=0.05))
    bias = jnp.asarray(normal(64, seed=2, std=0.2))
    check_dense("xla", x, gate, bias)
    check_dense("unfused", x, gate, bias)
    rounded = x.astype(jnp.bfloat16), gate.astype(jnp.bfloat16)
    assert (dense_router(*rounded, bias, 6, 1.0)[1] != dense_router(x, gate, bias, 6, 1.0)[1]).any()


def test_products_of_bfloat16_operands_are_exact():
    x, gate, _ = tokens_and_gate(16, 32, 4096)
    expected = np.asarray(x, np.float64) @ np.asarray(gate, np.float64).T
    np.testing.assert_allclose(gate_logits(x, gate), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("implementation", DENSE)
def test_dense_gradient(implementation):
    x, gate, bias = tokens_and_gate(7, 20, 64)
    direction = jnp.asarray(normal(7, 4, seed=5))

    def loss(x, gate, implementation):
        return (dense_router(x, gate, bias, 4, SCALE, implementation)[0] * direction).sum()

    actual = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)(x, gate, implementation)
    float32 = x.astype(jnp.float32), gate.astype(jnp.float32)
    expected = jax.grad(loss, (0, 1))(*float32, "xla")
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), e, rtol=0.02, atol=0.01 * abs(e).max())


@pytest.mark.parametrize("implementation", DENSE)
def test_dense_under_transformations(implementation):
    x, gate, bias = tokens_and_gate(24, 20, 64)
    x = x.reshape(2, 3, 4, 64)
    route = partial(
        dense_router, gate=gate, bias=bias, top_k=4, scale=SCALE, implementation=implementation
    )
    expected = route(x)
    for actual in (
        jax.vmap(route)(x),
        jax.jit(jax.vmap(jax.vmap(route)))(x),
        jax.lax.scan(lambda _, row: (None, route(row)), None, x)[1],
        jax.jit(sharded(route, P("data"), P("data")))(x),
    ):
        np.testing.assert_array_equal(actual[1], expected[1])
        np.testing.assert_allclose(actual[0], expected[0], rtol=1e-6)


def test_the_kernels_are_for_the_tokens_that_they_gain_with(monkeypatch):
    """Without a name other numbers of tokens take XLA's product first."""
    on_cuda = SimpleNamespace(platform=lambda: "cuda")
    monkeypatch.setattr("dsv4_jax.ops.dispatch.dsv4_ffi", on_cuda)
    few, least, most = MAX_KERNEL_TOKENS, MIN_TILED_TOKENS, MAX_TILED_TOKENS
    for num_tokens, fused in [
        (few, True),
        (few + 1, False),
        (least - 1, False),
        (least, True),
        (most + 1, False),
    ]:
        x, gate, bias = tokens_and_gate(num_tokens, 256, 64)
        traced = jax.jit(partial(dense_router, top_k=6, scale=1.0)).trace(x, gate, bias)
        text = str(traced.jaxpr)
        assert ("dsv4_dense_router" in text) == (fused and MISSING is None)
        assert ("dsv4_activation_topk" in text) == (not fused and MISSING is None)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "width"),
    [
        (n, *gate)
        for gate in ((8, 16), (20, 496), (300, 1008), (256, 4096), (384, 7168))
        for n in (1, 7, 16, 33, 64)
    ],
)
def test_dense_router_on_a_gpu(num_tokens, num_experts, width):
    x, gate, bias = tokens_and_gate(num_tokens, num_experts, width)
    check_dense("ffi", x, gate, bias)
    check_dense("ffi", x, nvfp4_gate(gate), bias)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "width"),
    [
        (n, *gate)
        for gate in ((8, 16), (21, 504), (300, 1008), (256, 4096), (384, 7168))
        for n in (65, 512, 1000, 2048)
    ],
)
def test_tiles_on_a_gpu(monkeypatch, num_tokens, num_experts, width):
    monkeypatch.setattr("dsv4_jax.ops.dense_router.MIN_TILED_TOKENS", 65)
    x, gate, bias = tokens_and_gate(num_tokens, num_experts, width)
    check_dense("ffi", x, gate, bias)
    route = jax.jit(partial(dense_router, top_k=6, scale=SCALE, implementation="ffi"))
    for first, again in zip(route(x, gate, bias), route(x, gate, bias), strict=True):
        np.testing.assert_array_equal(first, again)


@pytest.mark.gpu
def test_launches_at_the_same_time_do_not_mix():
    """Many calls in one program, and the same program again: the same bits."""
    x, gate, bias = tokens_and_gate(64, 256, 4096)

    @jax.jit
    def many(x):
        return [
            dense_router((x + i)[: 1 + 7 * i % 64], gate, bias, 6, SCALE, "ffi") for i in range(100)
        ]

    first = many(x)
    for _ in range(5):
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(many(x)), strict=True):
            np.testing.assert_array_equal(a, b)
