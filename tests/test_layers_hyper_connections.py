"""Hyper-connections against the oracle."""

import numpy as np
import pytest

from dsv4_jax.config import Config
from dsv4_jax.layers.hyper_connections import HyperConnection, HyperHead
from dsv4_jax.layers.norms import RMSNorm
from tests.checkpoints import random_config
from tests.layers import CHAINED, assert_close, load, run
from tests.oracles import hyper_connections as oracle
from tests.oracles.norms import rms_norm
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


NORM_WEIGHT = 1 + normal(D, seed=12, std=0.2)
NORM = load(RMSNorm(D, CONFIG["rms_norm_eps"]), {"weight": NORM_WEIGHT})


def pre(module, streams):
    return module.pre(streams, NORM)


def post_pre(module, output, streams, post, comb):
    return module.post_pre((output, streams, post, comb), NORM)


def expected_pre(streams, w):
    u, post, comb = oracle.hc_pre(streams, w["fn"], w["scale"], w["base"], CONFIG)
    return rms_norm(u, NORM_WEIGHT.astype(np.float64), CONFIG["rms_norm_eps"]), post, comb


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("magnitude", [0.0, 1e-6, 1.0, 1e4, 1e15])
def test_pre(magnitude, tokens):
    module, w = connection()
    streams = normal(2, tokens, N, D, seed=4, std=magnitude)
    same, *actual = run(module, pre, streams)
    np.testing.assert_array_equal(same, streams)
    for row in range(2):
        expected = expected_pre(streams[row].astype(np.float64), w)
        for a, wanted in zip(actual, expected, strict=True):
            # Of vanishing rows the norm divides by little: an error of the collapse grows.
            assert_close(a[row], wanted, CHAINED)


def test_pre_with_saturated_gates():
    module, w = connection(base_std=40.0, gain=8.0)
    streams = normal(1, 6, N, D, seed=5)
    actual = run(module, pre, streams)[1:]
    for a, wanted in zip(actual, expected_pre(streams[0].astype(np.float64), w), strict=True):
        assert_close(a[0], wanted, 2.0**-24 * (32 + 4 * 60))


def test_streams_with_one_far_larger():
    """The statistic is over all streams together."""
    module, w = connection()
    streams = normal(1, 3, N, D, seed=6)
    streams[:, :, 2] *= 1e5
    actual = run(module, pre, streams)[1:]
    for a, wanted in zip(actual, expected_pre(streams[0].astype(np.float64), w), strict=True):
        assert_close(a[0], wanted, CHAINED)


@pytest.mark.parametrize("magnitude", [0.0, 1.0, 1e6])
def test_post_pre(magnitude):
    """The output goes to the streams with what an earlier collapse gave, then they collapse."""
    module, w = connection()
    streams, output = normal(2, 3, N, D, seed=7, std=magnitude), normal(2, 3, D, seed=8)
    post, comb = abs(normal(2, 3, N, seed=9)), abs(normal(2, 3, N, N, seed=10))
    actual = run(module, post_pre, output, streams, post, comb)
    for row in range(2):
        before = oracle.hc_post(*(a[row].astype(np.float64) for a in (output, streams, post, comb)))
        for a, wanted in zip(actual, (before, *expected_pre(before, w)), strict=True):
            assert_close(a[row], wanted, CHAINED)


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
