"""FP8: the E4M3 cast, blocks of matrices, groups of rows."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.formats import fp8_block
from tests.oracles import formats
from tests.oracles.format_inputs import (
    BFLOAT16,
    FLOAT32,
    assert_same,
    finite_rows,
    neighbours,
    special_rows,
)

DTYPES = pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
MAGNITUDES = formats.E4M3[:127]


quantize = jax.jit(fp8_block.quantize, static_argnums=1)
dequantize = jax.jit(fp8_block.dequantize, static_argnums=2)
round_trip = jax.jit(fp8_block.round_trip, static_argnums=1)


def as_bytes(codes):
    return np.asarray(codes).view(np.uint8)


def test_every_byte_has_its_value():
    codes = jnp.asarray(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn))[:, None]
    for dtype in (jnp.float32, jnp.bfloat16):
        for scale in (127, 0, 1, 246):
            scales = jnp.full((2, 1), scale, jnp.uint8)
            found = dequantize(codes, scales, dtype)
            assert_same(found, formats.E4M3[:, None] * 2.0 ** (scale - 127), dtype)


def test_every_scale_byte():
    codes = jnp.asarray(np.array([[-448, 0.25, 2.0**-9, 0]], ml_dtypes.float8_e4m3fn))
    codes = jnp.broadcast_to(codes, (256, 1, 4))
    scales = jnp.arange(256, dtype=jnp.uint8)[:, None, None]
    expected = formats.E8M0[:, None, None] * np.asarray(codes, np.float64)
    for dtype in (jnp.float32, jnp.bfloat16):
        assert_same(dequantize(codes, scales, dtype), expected, dtype)


def test_cast_is_nearest_and_saturates():
    ties = (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2
    x = np.concatenate(
        [
            neighbours(ties, FLOAT32),
            neighbours(MAGNITUDES, FLOAT32),
            np.random.default_rng(0).uniform(-500, 500, 2000).astype(np.float32),
            np.array([464, 465, 480, 1e30, np.inf, 2.0**-10, 1e-45], np.float32),
        ]
    )
    x = np.concatenate([x, -x])
    found = as_bytes(jax.jit(fp8_block.to_e4m3)(jnp.asarray(x)))
    np.testing.assert_array_equal(found, formats.to_e4m3(x.astype(np.float64)))


def test_cast_keeps_nan():
    assert np.isnan(np.asarray(fp8_block.to_e4m3(jnp.float32(np.nan)), np.float32))


@DTYPES
@pytest.mark.parametrize("group", [64, 128])
def test_rows(dtype, group):
    x = finite_rows(2 * group, MAGNITUDES, dtype)
    codes, scales = quantize(jnp.asarray(x), (1, group))
    expected_codes, expected_scales, expected = formats.fp8_rows(x, group)
    np.testing.assert_array_equal(scales, expected_scales)
    np.testing.assert_array_equal(as_bytes(codes), expected_codes)
    assert_same(round_trip(jnp.asarray(x), group), expected, dtype)


@DTYPES
@pytest.mark.parametrize("width", [1, 127, 300])
def test_rows_with_a_shorter_last_group(dtype, width):
    x = np.random.default_rng(width).standard_normal((2, 3, width)).astype(dtype)
    assert_same(round_trip(jnp.asarray(x)), formats.fp8_rows(x, 128)[2], dtype)


@DTYPES
@pytest.mark.parametrize("shape", [(256, 128), (200, 300), (1, 1), (127, 257)])
def test_matrices(dtype, shape):
    rng = np.random.default_rng(0)
    w = rng.standard_normal(shape) * 2.0 ** rng.integers(-20, 20, (shape[0], 1))
    w = w.astype(dtype)
    codes, scales = quantize(jnp.asarray(w))
    expected_codes, expected_scales, expected = formats.fp8_blocks(w, (128, 128))
    np.testing.assert_array_equal(scales, expected_scales)
    np.testing.assert_array_equal(as_bytes(codes), expected_codes)
    for out in (jnp.float32, jnp.bfloat16):
        assert_same(dequantize(codes, scales, out), expected, out)


def test_error_is_half_a_step():
    w = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    codes, scales = quantize(jnp.asarray(w))
    decoded = np.asarray(dequantize(codes, scales, jnp.float32), np.float64)
    step = formats.E8M0[np.asarray(scales)].repeat(128, 0).repeat(128, 1)
    assert (np.abs(decoded - w) <= np.maximum(np.abs(w) * 2.0**-4, step * 2.0**-10)).all()
    assert np.abs(decoded - w).max() > 0


def test_leading_axes_are_independent():
    w = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 130, 140)), jnp.float32)
    codes, scales = quantize(w)
    assert scales.shape == (2, 3, 2, 2)
    one_by_one = jax.jit(jax.vmap(jax.vmap(fp8_block.quantize)))(w)
    for found, expected in zip((codes, scales), one_by_one, strict=True):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    decoded = dequantize(codes, scales, jnp.float32)
    expected = formats.fp8_blocks(np.asarray(w[1, 2]), (128, 128))[2]
    assert_same(decoded[1, 2], expected)


@DTYPES
def test_infinities_and_nan_poison_their_group_only(dtype):
    x = special_rows(256, dtype)
    x[:, 128:] = np.where(np.isfinite(x[:, 128:]), x[:, 128:], np.asarray(1, dtype))
    x[3, :128] = np.asarray(np.inf, dtype)
    found = np.asarray(round_trip(jnp.asarray(x)), np.float32)
    poisoned = ~np.isfinite(x[:, :128].astype(np.float32)).all(-1)
    assert poisoned.sum() >= 4
    np.testing.assert_array_equal(np.isnan(found[:, :128]).all(-1), poisoned)
    assert_same(found[:, 128:], formats.fp8_rows(x[:, 128:], 128)[2])
    _, scales = quantize(jnp.asarray(x), (1, 128))
    np.testing.assert_array_equal(np.asarray(scales)[:, 0] == 255, poisoned)


@pytest.mark.parametrize("shape", [(0, 256), (3, 0)])
def test_empty(shape):
    x = jnp.zeros(shape, jnp.float32)
    assert round_trip(x).shape == shape
    codes, scales = quantize(x)
    assert dequantize(codes, scales, jnp.bfloat16).shape == shape


def test_gradient_is_zero():
    x = jnp.linspace(-1e6, 1e6, 256)
    gradient = jax.jit(jax.grad(lambda x: (1e6 * fp8_block.round_trip(x)).sum()))(x)
    np.testing.assert_array_equal(gradient, np.zeros(256))


def test_scales_that_do_not_cover_the_codes():
    codes = jnp.zeros((256, 128), jnp.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"scales: got \(1, 2\).*\(2, 1\)"):
        fp8_block.dequantize(codes, jnp.zeros((1, 2), jnp.uint8), jnp.float32)


def test_compiled_or_not():
    w = jnp.asarray(np.random.default_rng(0).standard_normal((130, 5)), jnp.float32)
    for one, other in zip(fp8_block.quantize(w), quantize(w), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
