"""The Hadamard rotation against the recursive definition of its matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.formats.hadamard import hadamard


def sylvester(n):
    """Orthonormal, in natural order."""
    if n == 1:
        return np.ones((1, 1))
    half = sylvester(n // 2)
    return np.block([[half, half], [half, -half]]) / np.sqrt(2)


@pytest.mark.parametrize("n", [1, 2, 4, 64, 128, 512])
@pytest.mark.parametrize("transform", [jax.jit, lambda f: f])
def test_float32(n, transform):
    x = np.random.default_rng(n).standard_normal((3, 5, n)).astype(np.float32)
    found = np.asarray(transform(hadamard)(jnp.asarray(x)))
    assert found.dtype == np.float32
    # n additions of terms below sqrt(n) in size, after division by sqrt(n).
    tolerance = 2.0**-23 * np.abs(x).sum(-1).max()
    np.testing.assert_allclose(found, x @ sylvester(n), rtol=0, atol=tolerance)


def test_bfloat16_is_rounded_once():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((9, 128)), jnp.bfloat16)
    found = hadamard(x)
    assert found.dtype == jnp.bfloat16
    expected = np.asarray(x, np.float64) @ sylvester(128)
    error = np.abs(np.asarray(found, np.float64) - expected)
    assert (error <= 2.0**-8 * np.abs(expected) + 1e-6).all()


def test_columns_are_in_natural_order():
    rows = np.asarray(hadamard(jnp.eye(4, dtype=jnp.float32))) * 2
    assert rows.tolist() == [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]


def test_it_is_its_own_inverse_and_keeps_products():
    q, k = (jnp.asarray(np.random.default_rng(s).standard_normal(128), jnp.float32) for s in (0, 1))
    np.testing.assert_allclose(hadamard(hadamard(q)), q, atol=2e-6)
    np.testing.assert_allclose(hadamard(q) @ hadamard(k), q @ k, atol=2e-5)


def test_gradient_is_the_same_rotation():
    x, weight = (jnp.asarray(np.random.default_rng(s).standard_normal(64)) for s in (0, 1))
    gradient = jax.grad(lambda x: hadamard(x) @ weight)(x)
    np.testing.assert_allclose(gradient, hadamard(weight), atol=1e-6)


def test_a_nan_reaches_every_channel():
    x = jnp.zeros((2, 8), jnp.float32).at[0, 3].set(jnp.nan)
    found = np.asarray(hadamard(x))
    assert np.isnan(found[0]).all()
    assert (found[1] == 0).all()


def test_empty_batch():
    assert hadamard(jnp.zeros((0, 16), jnp.float32)).shape == (0, 16)


@pytest.mark.parametrize("n", [0, 3, 48, 127])
def test_other_widths(n):
    with pytest.raises(ValueError, match=f"x: got width {n}, expected a power of two"):
        hadamard(jnp.zeros((2, n), jnp.float32))
