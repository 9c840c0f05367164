"""Scale bytes: their values, and the byte for an amax."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.formats import e8m0
from tests.oracles import formats
from tests.oracles.format_inputs import FLOAT32, assert_same, neighbours

BYTES = np.arange(256, dtype=np.uint8)
E4M3 = (448.0, 1e-4)
E2M1 = (6.0, 6 * 2.0**-126)


def test_oracle_tables_are_the_formats():
    np.testing.assert_array_equal(formats.E8M0, BYTES.view(ml_dtypes.float8_e8m0fnu).astype(float))
    np.testing.assert_array_equal(formats.E4M3, BYTES.view(ml_dtypes.float8_e4m3fn).astype(float))
    assert formats.E2M1.tolist() == [
        *(0, 0.5, 1, 1.5, 2, 3, 4, 6),
        *(-0.0, -0.5, -1, -1.5, -2, -3, -4, -6),
    ]


@pytest.mark.parametrize("transform", [jax.jit, lambda f: f])
def test_every_byte_has_its_value(transform):
    found = np.asarray(transform(e8m0.to_float32)(jnp.asarray(BYTES)))
    np.testing.assert_array_equal(found, formats.E8M0.astype(np.float32))


def test_multiply_by_every_byte():
    x = np.concatenate([formats.E2M1, formats.E4M3[:127]]).astype(np.float32)
    found = jax.jit(e8m0.multiply)(jnp.asarray(x), jnp.asarray(BYTES)[:, None])
    assert_same(found, x.astype(np.float64) * formats.E8M0[:, None])


def test_divide_by_every_byte():
    x = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    x = np.concatenate([x, np.array([0.0, -0.0, 3e38, -3e38, 2.0**-126], np.float32)])
    found = jax.jit(e8m0.divide)(jnp.asarray(x), jnp.asarray(BYTES)[:, None])
    expected = x.astype(np.float64) / formats.E8M0[:, None]
    # A result that float32 holds only as a subnormal number is rounded, so both count as zeros.
    assert_same(found, expected)


def test_subnormal_numerators_count_as_zero():
    x = jnp.array([1e-40, -1e-40, 2.0**-127, 2.0**-126], jnp.float32)
    found = jax.jit(e8m0.divide)(x, jnp.uint8(1))
    assert_same(found, np.array([0.0, -0.0, 0.0, 1.0]))


@pytest.mark.parametrize(("largest", "floor"), [E4M3, E2M1])
@pytest.mark.parametrize("transform", [jax.jit, lambda f: f])
def test_byte_of_amax(largest, floor, transform):
    rng = np.random.default_rng(0)
    powers = 2.0 ** np.arange(-126, 128)
    amax = np.concatenate(
        [
            neighbours(powers, FLOAT32),
            neighbours(powers[:-3] * largest / 2.0 ** np.floor(np.log2(largest)), FLOAT32),
            neighbours([floor, 2 * floor], FLOAT32),
            np.exp(rng.uniform(-87, 88, 2000)).astype(np.float32),
            np.array([0, 1e-45, 1e-40, np.finfo(np.float32).max, np.inf, np.nan], np.float32),
        ]
    )
    found = transform(lambda a: e8m0.from_amax(a, largest, floor))(jnp.asarray(amax))
    expected = formats.scale_code(amax.astype(np.float64), largest, floor)
    np.testing.assert_array_equal(np.asarray(found), expected)


@pytest.mark.parametrize(
    ("largest_and_floor", "amax", "exponents"),
    [
        (E4M3, [0, 1, 3.5, 448, 449], [-22, -8, -7, 0, 1]),
        (E2M1, [0, 1, 3, 6, 6.1], [-126, -2, -1, 0, 1]),
    ],
)
def test_known_exponents(largest_and_floor, amax, exponents):
    found = e8m0.from_amax(jnp.array(amax, jnp.float32), *largest_and_floor)
    assert (np.asarray(found).astype(int) - 127).tolist() == exponents


@pytest.mark.parametrize("amax", [np.inf, np.nan, -np.nan])
def test_amax_that_is_no_number_gives_nan(amax):
    assert e8m0.from_amax(jnp.float32(amax), *E4M3) == 255


def test_empty():
    empty = jnp.zeros((3, 0), jnp.uint8)
    assert e8m0.to_float32(empty).shape == (3, 0)
    assert e8m0.from_amax(jnp.zeros((0,), jnp.float32), *E4M3).shape == (0,)
