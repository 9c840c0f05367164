"""The KV entry with one float32 scale, against the oracle."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.formats import kv_entry_float_scale as entry
from tests.oracles.cache_writes import float_scale_record
from tests.oracles.formats import E4M3, to_bfloat16


def rows():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 512)) * np.exp(rng.uniform(-12, 12, (40, 1)))
    x[0] = 0
    x[1, :448] = 0
    x[2, :448] *= 1e-8
    x[3, 5] = -448
    return to_bfloat16(x)


def test_encode():
    x = rows()
    body, scale = entry.encode(jnp.asarray(x, jnp.bfloat16), 64)
    expected_body, expected_scale = float_scale_record(x)
    np.testing.assert_array_equal(scale, expected_scale)
    np.testing.assert_array_equal(body, expected_body)


def test_decode():
    x = rows()
    body, scale = entry.encode(jnp.asarray(x, jnp.bfloat16), 64)
    found = np.asarray(entry.decode(body, scale, 64, jnp.float32))
    expected = (E4M3[np.asarray(body)[:, :448]] * np.asarray(scale, np.float64)).astype(np.float32)
    np.testing.assert_array_equal(found[:, :448], expected)
    np.testing.assert_array_equal(found[:, 448:], x[:, 448:])
    half_step = np.maximum(np.abs(x[:, :448]), np.asarray(scale) * 2.0**-6) * 2.0**-4
    assert (np.abs(found[:, :448] - x[:, :448]) <= 1.0001 * half_step).all()


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_bad_number_is_seen(bad):
    x = rows()
    x[3, 7] = bad
    body, scale = entry.encode(jnp.asarray(x, jnp.bfloat16), 64)
    found = np.asarray(entry.decode(body, scale, 64, jnp.float32))
    assert not np.isfinite(found[3, 7])
    assert np.isfinite(np.delete(found, 3, axis=0)).all()


def test_refuses():
    with pytest.raises(ValueError, match="rope_dim: got 65, expected 0 to 64"):
        entry.encode(jnp.zeros(64), 65)
