"""Hyper-connections against the oracle."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.config import Config
from dsv4_jax.layers.hyper_connections import HyperConnection, HyperHead, sinkhorn
from tests.checkpoints import random_config
from tests.layers import assert_close, load, run
from tests.oracles import hyper_connections as oracle
from tests.oracles.weights import float64

CONFIG = random_config()
N, D = CONFIG["hc_mult"], CONFIG["hidden_size"]


def normal(*shape, seed=0, std=1.0):
    return (std * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def connection(base_std=1.0, gain=1.0):
    """Random (module, float64 parameters)."""
    rows = (2 + N) * N
    w = {
        "fn": normal(rows, N * D, seed=1, std=gain / np.sqrt(N * D)),
        "base": normal(rows, seed=2, std=base_std),
        "scale": 1 + normal(3, seed=3, std=0.3),
    }
    return load(HyperConnection(Config.from_dict(CONFIG)), w), float64(w)


@pytest.mark.parametrize("num_iterations", [1, 2, 20])
@pytest.mark.parametrize("spread", [0.0, 1.0, 10.0, 60.0])
def test_sinkhorn(spread, num_iterations):
    """From equal logits to rows that the first softmax makes one-hot."""
    logits = normal(9, N, N, std=spread)
    actual = sinkhorn(jnp.asarray(logits), num_iterations, 1e-6)
    expected = oracle.sinkhorn(logits.astype(np.float64), num_iterations, 1e-6)
    # Logits of 60 enter an exponential: their rounding of 60 · 2^-24 is one of the result.
    assert_close(actual, expected, 2.0**-24 * (32 + 4 * spread))


def test_sinkhorn_of_all_mass_in_one_column():
    """Columns that the softmax leaves empty consist of eps."""
    logits = np.zeros((1, N, N), np.float32)
    logits[..., 0] = 100.0
    actual = np.asarray(sinkhorn(jnp.asarray(logits), 20, 1e-6))
    assert_close(actual, oracle.sinkhorn(logits.astype(np.float64), 20, 1e-6))
    np.testing.assert_allclose(actual.sum(axis=1), 1, atol=0.6)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("magnitude", [0.0, 1e-6, 1.0, 1e4, 1e15])
def test_pre(magnitude, tokens):
    module, w = connection()
    streams = normal(2, tokens, N, D, seed=4, std=magnitude)
    u, post, comb = run(module, HyperConnection.pre, streams)
    for row in range(2):
        x = streams[row].astype(np.float64)
        expected = oracle.hc_pre(x, w["fn"], w["scale"], w["base"], CONFIG)
        for actual, wanted in zip((u[row], post[row], comb[row]), expected, strict=True):
            assert_close(actual, wanted)


def test_pre_with_saturated_gates():
    module, w = connection(base_std=40.0, gain=8.0)
    streams = normal(1, 6, N, D, seed=5)
    actual = run(module, HyperConnection.pre, streams)
    expected = oracle.hc_pre(streams[0].astype(np.float64), w["fn"], w["scale"], w["base"], CONFIG)
    for a, wanted in zip(actual, expected, strict=True):
        assert_close(a[0], wanted, 2.0**-24 * (32 + 4 * 60))


def test_streams_with_one_far_larger():
    """The statistic is over all streams together."""
    module, w = connection()
    streams = normal(1, 3, N, D, seed=6)
    streams[:, :, 2] *= 1e5
    u, post, comb = run(module, HyperConnection.pre, streams)
    expected = oracle.hc_pre(streams[0].astype(np.float64), w["fn"], w["scale"], w["base"], CONFIG)
    for a, wanted in zip((u, post, comb), expected, strict=True):
        assert_close(a[0], wanted)


@pytest.mark.parametrize("magnitude", [0.0, 1.0, 1e6])
def test_post_sums_over_the_first_index(magnitude):
    module, _ = connection()
    streams, output = normal(2, 3, N, D, seed=7, std=magnitude), normal(2, 3, D, seed=8)
    post, comb = abs(normal(2, 3, N, seed=9)), abs(normal(2, 3, N, N, seed=10))
    actual = run(module, HyperConnection.post, output, streams, post, comb)
    for row in range(2):
        arrays = [a[row].astype(np.float64) for a in (output, streams, post, comb)]
        assert_close(actual[row], oracle.hc_post(*arrays))


def test_output_is_used_with_post_only():
    module, _ = connection()
    streams, post = np.zeros((1, 1, N, D), np.float32), np.zeros((1, 1, N), np.float32)
    post[..., 1] = 2.0
    output, comb = normal(1, 1, D), np.zeros((1, 1, N, N), np.float32)
    y = np.asarray(run(module, HyperConnection.post, output, streams, post, comb))
    np.testing.assert_array_equal(y[0, 0, 1], 2 * output[0, 0])
    assert not y[0, 0, [0, 2, 3]].any()


@pytest.mark.parametrize("magnitude", [0.0, 1e-6, 1.0, 1e4, 1e15])
def test_head(magnitude):
    w = {
        "fn": normal(N, N * D, seed=1, std=1 / np.sqrt(N * D)),
        "base": normal(N, seed=2),
        "scale": 1 + normal(1, seed=3),
    }
    module = load(HyperHead(Config.from_dict(CONFIG)), w)
    streams = normal(2, 4, N, D, seed=4, std=magnitude)
    actual = run(module, HyperHead.__call__, streams)
    w = float64(w)
    for row in range(2):
        x = streams[row].astype(np.float64)
        assert_close(actual[row], oracle.hc_head(x, w["fn"], w["scale"], w["base"], CONFIG))
