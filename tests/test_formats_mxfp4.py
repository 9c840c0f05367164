"""MXFP4 along the last axis, and the indexer key that is stored in it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.formats import indexer_key, mxfp4
from tests.oracles import formats
from tests.oracles.format_inputs import BFLOAT16, FLOAT32, assert_same, finite_rows, special_rows

DTYPES = pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)


quantize = jax.jit(mxfp4.quantize)
dequantize = jax.jit(mxfp4.dequantize, static_argnums=2)
round_trip = jax.jit(mxfp4.round_trip)


def test_every_code_under_every_scale():
    codes = np.tile(np.arange(16, dtype=np.uint8), (256, 2))
    packed = jnp.asarray(formats.packed(codes))
    scales = jnp.arange(256, dtype=jnp.uint8)[:, None]
    expected = formats.E2M1[codes] * formats.E8M0[:, None]
    for dtype in (jnp.float32, jnp.bfloat16):
        found = dequantize(packed, scales, dtype)
        assert_same(found, expected, dtype)


@DTYPES
@pytest.mark.parametrize("width", [32, 128, 48, 2])
def test_rows(dtype, width):
    x = finite_rows(width, formats.E2M1[:8], dtype)
    packed, scales = quantize(jnp.asarray(x))
    expected_codes, expected_scales, expected = formats.mxfp4(x)
    np.testing.assert_array_equal(scales, expected_scales)
    np.testing.assert_array_equal(packed, formats.packed(expected_codes))
    assert_same(dequantize(packed, scales, dtype), expected, dtype)
    assert_same(round_trip(jnp.asarray(x)), expected, dtype)


def test_compiled_or_not():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 64)), jnp.float32)
    for one, other in zip(mxfp4.quantize(x), quantize(x), strict=True):
        np.testing.assert_array_equal(one, other)


def test_error_is_half_a_step():
    x = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
    packed, scales = quantize(jnp.asarray(x))
    error = np.asarray(dequantize(packed, scales, jnp.float32), np.float64) - x
    assert (np.abs(error) <= formats.E8M0[np.asarray(scales)].repeat(32, -1)).all()
    assert np.abs(error).max() > 0


def test_leading_axes_are_independent():
    w = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4, 64)), jnp.float32)
    whole = quantize(w)
    assert [part.shape for part in whole] == [(2, 3, 4, 32), (2, 3, 4, 2)]
    for found, expected in zip(whole, jax.jit(jax.vmap(jax.vmap(mxfp4.quantize)))(w), strict=True):
        np.testing.assert_array_equal(found, expected)


@DTYPES
def test_infinities_and_nan_poison_their_group_only(dtype):
    x = special_rows(32, dtype)
    beside = np.random.default_rng(2).standard_normal(x.shape).astype(dtype)
    found = round_trip(jnp.asarray(np.concatenate([x, beside], -1)))
    assert np.isnan(np.asarray(found, np.float32)[:, :32]).all()
    assert_same(found[:, 32:], formats.mxfp4(beside)[2], dtype)
    _, scales = quantize(jnp.asarray(x))
    assert (np.asarray(scales) == 255).all()


@pytest.mark.parametrize("shape", [(0, 64), (3, 0)])
def test_empty(shape):
    x = jnp.zeros(shape, jnp.float32)
    packed, scales = quantize(x)
    assert packed.shape == (shape[0], shape[1] // 2)
    assert dequantize(packed, scales, jnp.float32).shape == shape
    assert round_trip(x).shape == shape


def test_gradient_is_zero():
    x = jnp.linspace(-7, 7, 64)
    np.testing.assert_array_equal(
        jax.jit(jax.grad(lambda x: mxfp4.round_trip(x).sum()))(x), np.zeros(64)
    )


def test_odd_width():
    with pytest.raises(ValueError, match="w: got width 33"):
        mxfp4.quantize(jnp.zeros((2, 33), jnp.float32))


def test_scales_that_do_not_cover_the_codes():
    with pytest.raises(ValueError, match=r"scales: got 3, 64 codes .* have 2"):
        mxfp4.dequantize(jnp.zeros((1, 32), jnp.uint8), jnp.zeros((1, 3), jnp.uint8), jnp.float32)


@DTYPES
def test_key_is_its_round_trip(dtype):
    x = jnp.asarray(finite_rows(128, formats.E2M1[:8], dtype))
    codes, scales = jax.jit(indexer_key.encode)(x)
    assert (codes.shape[-1], scales.shape[-1]) == (64, 4)
    decoded = jax.jit(indexer_key.decode, static_argnums=2)(codes, scales, dtype)
    assert_same(decoded, formats.mxfp4(np.asarray(x))[2], dtype)
    np.testing.assert_array_equal(
        np.asarray(jax.jit(indexer_key.round_trip)(x)).view(np.uint8),
        np.asarray(decoded).view(np.uint8),
    )


@pytest.mark.parametrize("width", [24, 40])
def test_key_round_trip_of_any_even_width(width):
    x = np.random.default_rng(0).standard_normal((5, width)).astype(np.float32)
    assert_same(jax.jit(indexer_key.round_trip)(jnp.asarray(x)), formats.mxfp4(x)[2])


def test_key_of_incomplete_groups():
    with pytest.raises(ValueError, match="x: got width 48, expected a multiple of 32"):
        indexer_key.encode(jnp.zeros((2, 48), jnp.float32))
