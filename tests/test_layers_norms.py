"""RMS normalisation against the oracle."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.layers.norms import RMSNorm
from dsv4_jax.ops.norms import rms_normalize
from tests.layers import assert_close, assert_rounded_once, load, run
from tests.oracles.norms import rms_norm

EPS = 1e-6


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(1, 1, 7), (2, 5, 48), (3, 512), (1, 2, 4, 40)])
@pytest.mark.parametrize("magnitude", [1e-12, 1e-3, 1.0, 1e4, 1e17])
def test_norm(shape, magnitude):
    """From rows that vanish beside eps to rows whose squares barely fit into float32."""
    x, weight = magnitude * normal(*shape), 1 + normal(shape[-1], seed=1)
    module = load(RMSNorm(shape[-1], EPS), {"weight": weight})
    x = x.astype(np.float32)
    expected = rms_norm(x.astype(np.float64), weight.astype(np.float64), EPS)
    assert_close(run(module, RMSNorm.__call__, x), expected)
    assert_close(rms_normalize(jnp.asarray(x), EPS), rms_norm(x.astype(np.float64), 1.0, EPS))


def test_zero_row_stays_zero():
    x = normal(3, 16)
    x[1] = 0
    y = np.asarray(rms_normalize(jnp.asarray(x), EPS))
    assert not y[1].any()
    assert y[0].any()
    assert y[2].any()


def test_rows_are_independent():
    x = normal(4, 16)
    x[2] *= 1e6
    whole = np.asarray(rms_normalize(jnp.asarray(x), EPS))
    row = np.asarray(rms_normalize(jnp.asarray(x[1]), EPS))
    np.testing.assert_allclose(whole[1], row, rtol=1e-6)


def test_bfloat16_is_rounded_once():
    """Weight and result are applied in float32: the error is half a bfloat16 step, not more."""
    x = jnp.asarray(normal(64, 96), jnp.bfloat16)
    weight = np.asarray(jnp.asarray(1 + normal(96, seed=1), jnp.bfloat16), np.float32)
    y = load(RMSNorm(96, EPS), {"weight": weight})(x)
    expected = rms_norm(np.asarray(x, np.float64), weight.astype(np.float64), EPS)
    assert_rounded_once(y, expected)
