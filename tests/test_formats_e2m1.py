"""Four-bit codes: all sixteen, all ties, packing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.formats import e2m1
from tests.oracles import formats
from tests.oracles.format_inputs import FLOAT32, assert_same, neighbours

CODES = np.arange(16, dtype=np.uint8)


encode = jax.jit(e2m1.encode)


def test_every_code_has_its_value():
    assert_same(jax.jit(e2m1.decode)(jnp.asarray(CODES)), formats.E2M1, np.float32)


def test_values_encode_to_their_codes():
    np.testing.assert_array_equal(encode(jnp.asarray(formats.E2M1, jnp.float32)), CODES)


def test_ties_go_to_the_even_code():
    ties = jnp.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], jnp.float32)
    assert np.asarray(e2m1.decode(encode(ties))).tolist() == [0, 1, 1, 2, 2, 4, 4]
    np.testing.assert_array_equal(encode(-ties), np.asarray(encode(ties)) + 8)


@pytest.mark.parametrize("transform", [jax.jit, lambda f: f])
def test_encode_is_nearest(transform):
    ties = (formats.E2M1[1:8] + formats.E2M1[:7]) / 2
    x = np.concatenate(
        [
            neighbours(ties, FLOAT32),
            neighbours(formats.E2M1, FLOAT32),
            np.random.default_rng(0).uniform(-8, 8, 5000).astype(np.float32),
            np.array([0, 1e-45, 1e-38, 7, 1e30, np.inf], np.float32),
        ]
    )
    x = np.concatenate([x, -x])
    found = np.asarray(transform(e2m1.encode)(jnp.asarray(x)))
    np.testing.assert_array_equal(found, formats.to_e2m1(x.astype(np.float64)))


def test_zero_keeps_its_sign():
    assert np.asarray(encode(jnp.array([0.0, -0.0, -1e-9, 1e-9], jnp.float32))).tolist() == [
        *(0, 8, 8, 0)
    ]


def test_infinities_saturate_and_nan_becomes_six():
    x = jnp.array([np.inf, -np.inf, np.nan, -np.nan], jnp.float32)
    assert np.asarray(encode(x)).tolist() == [7, 15, 7, 7]


def test_even_index_is_the_low_nibble():
    assert np.asarray(e2m1.pack(jnp.array([1, 7], jnp.uint8))).tolist() == [0x71]
    assert np.asarray(e2m1.unpack(jnp.array([0x71], jnp.uint8))).tolist() == [1, 7]


def test_every_byte_unpacks_and_packs():
    packed = jnp.arange(256, dtype=jnp.uint8).reshape(2, 8, 16)
    codes = e2m1.unpack(packed)
    assert codes.shape == (2, 8, 32)
    np.testing.assert_array_equal(formats.packed(np.asarray(codes)), packed)
    np.testing.assert_array_equal(e2m1.pack(codes), packed)


def test_empty():
    assert e2m1.unpack(e2m1.pack(jnp.zeros((2, 0), jnp.uint8))).shape == (2, 0)
    assert e2m1.encode(jnp.zeros((0, 4), jnp.float32)).shape == (0, 4)
