"""hc_pre, hc_post and hc_post_pre against float64; values that are rounded are rounded the same."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import dsv4_ffi
from dsv4_jax.ops.hyper_connections import (
    Gates,
    hc_post,
    hc_post_pre,
    hc_pre,
    sinkhorn,
)
from tests.layers import assert_close, assert_rounded_once
from tests.oracles import hyper_connections as oracle
from tests.oracles.norms import rms_norm

MISSING = dsv4_ffi.missing(jax.default_backend().replace("gpu", "cuda"))
FFI = pytest.param("ffi", marks=pytest.mark.skipif(MISSING is not None, reason=MISSING or ""))
IMPLEMENTATIONS = ["xla", FFI]
EPS, NORM_EPS, ROUNDS = 1e-6, 1e-6, 20
CONFIG = {"hc_mult": 4, "hc_eps": EPS, "rms_norm_eps": NORM_EPS, "hc_sinkhorn_iters": ROUNDS}
STATIC = {"num_iterations": ROUNDS, "eps": EPS, "norm_eps": NORM_EPS}
# Of gates and mixing matrices, which are at most 2.
TOLERANCE = 2e-5


def normal(*shape, seed=0, std=1.0):
    return (std * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def bfloat16(x):
    return np.asarray(x, ml_dtypes.bfloat16)


def random_gates(width, n=4, base_std=1.0, gain=1.0):
    rows = (2 + n) * n
    return Gates(
        fn=normal(rows, n * width, seed=1, std=gain / np.sqrt(n * width)),
        base=normal(rows, seed=2, std=base_std),
        scale=1 + normal(3, seed=3, std=0.3),
        norm_weight=1 + normal(width, seed=4, std=0.2),
    )


def random_spread(num_tokens, width, std=1.0):
    """(output, streams, post, comb); columns of comb add up to 1."""
    comb = abs(normal(num_tokens, 4, 4, seed=7))
    return (
        bfloat16(normal(num_tokens, width, seed=5, std=std)),
        bfloat16(normal(num_tokens, 4, width, seed=6, std=std)),
        abs(normal(num_tokens, 4, seed=8)),
        comb / comb.sum(axis=1, keepdims=True),
    )


def check_pre(actual, streams, gates):
    x, post, comb = map(np.asarray, actual)
    streams64 = np.asarray(streams, np.float64)
    fn, base, scale, weight = (np.asarray(a, np.float64) for a in gates)
    collapsed, *expected = oracle.hc_pre(streams64, fn, scale, base, CONFIG)
    for a, e in zip((post, comb), expected, strict=True):
        assert a.dtype == np.float32
        assert a.shape == e.shape
        np.testing.assert_allclose(a, e, rtol=0, atol=TOLERANCE)
    # Two roundings: a whole step of the first, where a sum is next to a tie, half of the second.
    rounded = bfloat16(collapsed).astype(np.float64)
    expected_x = rms_norm(rounded, weight, NORM_EPS)
    assert x.dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(x.astype(np.float64), expected_x, rtol=1.6 * 2.0**-7, atol=TOLERANCE)
    assert (x == bfloat16(expected_x)).mean() > 0.99


def check_post(actual, output, streams, post, comb):
    arrays = (np.asarray(a, np.float64) for a in (output, streams, post, comb))
    assert_rounded_once(actual, oracle.hc_post(*arrays), 2e-6 * float(abs(streams).max(initial=0)))


def check_post_pre(width, num_tokens, implementation, gates=None, std=1.0):
    spread, gates = random_spread(num_tokens, width, std), gates or random_gates(width)
    run = jax.jit(partial(hc_post_pre, **STATIC, implementation=implementation))
    new, *collapsed = run(*spread, gates)
    check_post(new, *spread)
    check_pre(collapsed, np.asarray(new), gates)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("width", "num_tokens"), [(256, 1), (256, 9), (512, 17)])
def test_post_pre(width, num_tokens, implementation):
    check_post_pre(width, num_tokens, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("std", [0.0, 1e-6, 1e4, 1e15])
def test_magnitudes(std, implementation):
    check_post_pre(256, 5, implementation, std=std)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_saturated_gates(implementation):
    """Logits of 60: their own rounding shows, gates of 0 and 1 are exact."""
    gates = random_gates(256, base_std=40.0, gain=8.0)
    check_post_pre(256, 6, implementation, gates)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_pre(implementation):
    streams, gates = bfloat16(normal(11, 4, 256)), random_gates(256)
    run = jax.jit(partial(hc_pre, **STATIC, implementation=implementation))
    check_pre(run(streams, gates), streams, gates)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_streams_that_cancel(implementation):
    """The norm is that of the small difference, not of its terms."""
    streams = normal(3, 4, 256)
    streams[:, 1], streams[:, 2:] = -1.01 * streams[:, 0], 0.0
    streams = bfloat16(streams)
    gates = random_gates(256)._replace(scale=np.zeros(3, np.float32), base=np.zeros(24, np.float32))
    run = jax.jit(partial(hc_pre, **STATIC, implementation=implementation))
    check_pre(run(streams, gates), streams, gates)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("width", [8, 256])
def test_post(width, implementation):
    spread = random_spread(7, width)
    check_post(jax.jit(partial(hc_post, implementation=implementation))(*spread), *spread)


@pytest.mark.parametrize("magnitude", [0.0, 1.0, 1e6])
def test_post_in_float32(magnitude):
    """Sums over the first index of comb, here not one whose columns add up to 1."""
    output, streams = normal(3, 64), normal(3, 4, 64, seed=1, std=magnitude)
    post, comb = abs(normal(3, 4, seed=2)), abs(normal(3, 4, 4, seed=3))
    arrays = output, streams, post, comb
    expected = oracle.hc_post(*(a.astype(np.float64) for a in arrays))
    assert_close(hc_post(*map(jnp.asarray, arrays)), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_output_is_used_with_post_only(implementation):
    streams, post = np.zeros((1, 4, 64), ml_dtypes.bfloat16), np.zeros((1, 4), np.float32)
    post[..., 1] = 2.0
    output, comb = bfloat16(normal(1, 64)), np.zeros((1, 4, 4), np.float32)
    arrays = map(jnp.asarray, (output, streams, post, comb))
    y = np.asarray(hc_post(*arrays, implementation=implementation))
    np.testing.assert_array_equal(y[0, 1], 2 * output[0])
    assert not y[0, [0, 2, 3]].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_leading_axes(implementation):
    spread, gates = random_spread(6, 256), random_gates(256)
    run = jax.jit(partial(hc_post_pre, **STATIC, implementation=implementation))
    flat = run(*spread, gates)
    batched = run(*(a.reshape(2, 3, *a.shape[1:]) for a in spread), gates)
    empty = run(*(a[:0] for a in spread), gates)
    for a, b, none in zip(flat, batched, empty, strict=True):
        np.testing.assert_array_equal(a, b.reshape(a.shape))
        assert none.shape == (0, *a.shape[1:])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_derivatives_are_the_reference_s(implementation):
    spread, gates = random_spread(3, 256), random_gates(256)

    def loss(implementation, spread, gates):
        results = hc_post_pre(*spread, gates, **STATIC, implementation=implementation)
        again = hc_post(results[1], results[0], *results[2:], implementation=implementation)
        return sum(jnp.sin(a.astype(jnp.float32)).sum() for a in (*results, again))

    gradient = jax.jit(jax.grad(loss, argnums=(1, 2)), static_argnums=0)
    for a, b in zip(
        *map(
            jax.tree.leaves,
            (gradient(implementation, spread, gates), gradient("xla", spread, gates)),
        ),
        strict=True,
    ):
        assert abs(np.asarray(b, np.float32)).max() > 0
        difference = abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max()
        assert difference <= 0.02 * abs(np.asarray(b, np.float32)).max()


@pytest.mark.parametrize("num_iterations", [1, 2, 20])
@pytest.mark.parametrize("spread", [0.0, 1.0, 10.0, 60.0])
def test_sinkhorn(spread, num_iterations):
    """From equal logits to rows that the first softmax makes one-hot."""
    logits = normal(9, 4, 4, std=spread)
    actual = sinkhorn(jnp.asarray(logits), num_iterations, 1e-6)
    expected = oracle.sinkhorn(logits.astype(np.float64), num_iterations, 1e-6)
    # Logits of 60 enter an exponential: their rounding of 60 · 2^-24 is one of the result.
    assert_close(actual, expected, 2.0**-24 * (32 + 4 * spread))


def test_sinkhorn_of_all_mass_in_one_column():
    """Columns that the softmax leaves empty consist of eps."""
    logits = np.zeros((1, 4, 4), np.float32)
    logits[..., 0] = 100.0
    actual = np.asarray(sinkhorn(jnp.asarray(logits), 20, 1e-6))
    assert_close(actual, oracle.sinkhorn(logits.astype(np.float64), 20, 1e-6))
    np.testing.assert_allclose(actual.sum(axis=1), 1, atol=0.6)


def test_what_kernels_do_not_take():
    gates = random_gates(256)
    streams = jnp.asarray(normal(2, 4, 256), jnp.bfloat16)
    pre = jax.jit(partial(hc_pre, **STATIC, implementation="ffi"))
    with pytest.raises(NotImplementedError, match="streams in bfloat16, not float32"):
        pre(streams.astype(jnp.float32), gates)
    with pytest.raises(NotImplementedError, match="width that 256 divides, not 264"):
        pre(bfloat16(normal(2, 4, 264)), random_gates(264))
    with pytest.raises(NotImplementedError, match="width up to 8192, not 8448"):
        pre(bfloat16(normal(2, 4, 8448)), random_gates(8448))
    with pytest.raises(NotImplementedError, match="takes 4 streams, not 2"):
        pre(streams[:, :2], random_gates(256, n=2))
    with pytest.raises(NotImplementedError, match="width that 8 divides, not 12"):
        jax.jit(partial(hc_post, implementation="ffi"))(*random_spread(2, 12))
    with pytest.raises(ValueError, match="num_iterations: got 0"):
        jax.jit(partial(hc_pre, **STATIC | {"num_iterations": 0}))(streams, gates)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 8, 67, 600])
@pytest.mark.parametrize("width", [256, 768, 4096, 7168])
def test_kernel(width, num_tokens):
    """Few and many tokens, with a tile that is not full."""
    check_post_pre(width, num_tokens, "ffi")
    streams, gates = bfloat16(normal(num_tokens, 4, width)), random_gates(width)
    run = jax.jit(partial(hc_pre, **STATIC, implementation="ffi"))
    check_pre(run(streams, gates), streams, gates)


@pytest.mark.gpu
def test_kernel_on_many_tokens():
    """Every token's result is that of the token alone, bit for bit."""
    spread, gates = random_spread(4096, 4096), random_gates(4096)
    run = jax.jit(partial(hc_post_pre, **STATIC, implementation="ffi"))
    whole = run(*spread, gates)
    for first, last in ((0, 1), (1000, 1003), (4031, 4096)):
        part = run(*(a[first:last] for a in spread), gates)
        for a, b in zip(whole, part, strict=True):
            np.testing.assert_array_equal(a[first:last], b)
    check_post(whole[0][:64], *(a[:64] for a in spread))
    check_pre([a[:64] for a in whole[1:]], np.asarray(whole[0][:64]), gates)


@pytest.mark.gpu
@pytest.mark.parametrize("std", [0.0, 1e-6, 1e4, 1e15])
def test_kernel_magnitudes(std):
    check_post_pre(4096, 5, "ffi", std=std)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [8, 7168])
def test_kernel_post(width):
    spread = random_spread(130, width)
    check_post(jax.jit(partial(hc_post, implementation="ffi"))(*spread), *spread)
