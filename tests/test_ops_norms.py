"""The kernels of the root-mean-square norm against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.norms import rms_norm
from tests.cache_cases import EPS, IMPLEMENTATIONS
from tests.layers import assert_rounded_once
from tests.oracles import norms as oracle

jitted = jax.jit(rms_norm, static_argnums=(2, 3))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(1, 8), (2, 3, 1024), (5, 1000), (1, 8192)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_norm(shape, dtype, implementation):
    """Rows of very different sizes, one of zeros, none of which sees another."""
    x = normal(*shape) * np.exp2(np.arange(shape[-2]) * 9 - 12)[:, None]
    x[..., -1, :] *= shape[-2] > 1
    x = jnp.asarray(x, jnp.bfloat16)
    weight = jnp.asarray(1 + normal(shape[-1], seed=1), dtype)
    y = jitted(x, weight, EPS, implementation)
    expected = oracle.rms_norm(np.asarray(x, np.float64), np.asarray(weight, np.float64), EPS)
    assert_rounded_once(y, expected, noise=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_derivative(implementation):
    x, weight = jnp.asarray(normal(2, 16), jnp.bfloat16), jnp.asarray(normal(16, seed=1))

    def loss(x, weight):
        return (rms_norm(x, weight, EPS, implementation).astype(jnp.float32) ** 2).sum()

    found = jax.grad(loss, argnums=(0, 1))(x, weight)
    delta = 1e-6
    shifted = np.eye(16) * delta
    exact = [
        (oracle.rms_norm(np.asarray(x, np.float64), np.asarray(weight) + d, EPS) ** 2).sum()
        - (oracle.rms_norm(np.asarray(x, np.float64), np.asarray(weight) - d, EPS) ** 2).sum()
        for d in shifted
    ]
    np.testing.assert_allclose(found[1], np.array(exact) / (2 * delta), rtol=0.02)
    assert np.isfinite(np.asarray(found[0], np.float32)).all()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (jnp.ones((1, 16)), "takes bfloat16, not float32"),
        (jnp.ones((1, 12), jnp.bfloat16), "multiple of 8 up to 8192, not 12"),
        (jnp.ones((1, 8200), jnp.bfloat16), "multiple of 8 up to 8192, not 8200"),
    ],
)
def test_what_the_kernel_does_not_support(x, message):
    with pytest.raises(NotImplementedError, match=message):
        rms_norm(x, jnp.ones(x.shape[-1]), EPS, "ffi")
