"""MXFP4 matrices in other formats, value for value."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.formats import fp8_block, mxfp4, nvfp4
from dsv4_jax.formats.convert import mxfp4_to_fp8_block, mxfp4_to_nvfp4
from tests.oracles import formats
from tests.oracles.format_inputs import assert_same


def matrix(*shape, lowest, highest, seed=0):
    """(packed, scales, values): exponents from `lowest` to `highest`, both used in each matrix."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, shape, dtype=np.uint8)
    codes[..., 0, :16] = codes[..., 0, 32:48] = np.arange(16)
    exponents = rng.integers(lowest, highest, (*shape[:-1], shape[-1] // 32), endpoint=True)
    exponents[..., 0, 0], exponents[..., 0, 1] = lowest, highest
    values = formats.E2M1[codes] * 2.0 ** exponents.repeat(32, -1)
    return formats.packed(codes), (exponents + 127).astype(np.uint8), values


def to_nvfp4(packed, scales):
    return mxfp4_to_nvfp4(jnp.asarray(packed), jnp.asarray(scales))


def to_fp8(packed, scales):
    return mxfp4_to_fp8_block(jnp.asarray(packed), jnp.asarray(scales))


compiled = functools.cache(lambda f, num_parts: jax.jit(f, static_argnums=num_parts))


def assert_same_values(parts, dequantize, expected):
    for dtype in (jnp.float32, jnp.bfloat16):
        assert_same(compiled(dequantize, len(parts))(*parts, dtype), expected, dtype)


@pytest.mark.parametrize(("lowest", "highest"), [(-10, 7), (-3, -3), (-118, -101), (105, 122)])
@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 96)])
def test_nvfp4_is_exact(shape, lowest, highest):
    packed, scales, values = matrix(*shape, lowest=lowest, highest=highest)
    parts = to_nvfp4(packed, scales)
    np.testing.assert_array_equal(parts[0], packed)
    np.testing.assert_array_equal(parts[2], np.full(shape[:-2], 2.0 ** (highest - 8), np.float32))
    assert_same_values(parts, nvfp4.dequantize, values)
    assert_same_values((jnp.asarray(packed), jnp.asarray(scales)), mxfp4.dequantize, values)


@pytest.mark.parametrize(("lowest", "highest"), [(-7, 7), (0, 0), (-118, -104)])
@pytest.mark.parametrize("shape", [(128, 128), (2, 200, 160)])
def test_fp8_is_exact(shape, lowest, highest):
    packed, scales, values = matrix(*shape, lowest=lowest, highest=highest)
    codes, block_scales = to_fp8(packed, scales)
    assert block_scales[..., 0, 0].min() == block_scales[..., 0, 0].max() == highest + 121
    assert_same_values((codes, block_scales), fp8_block.dequantize, values)


@pytest.mark.parametrize(("convert", "span"), [(to_nvfp4, 17), (to_fp8, 14)])
def test_too_wide_a_span_is_refused(convert, span):
    packed, scales, _ = matrix(4, 64, lowest=-span - 2, highest=0)
    with pytest.raises(ValueError, match="scales: an exponent is 2 below what"):
        convert(packed, scales)


@pytest.mark.parametrize(
    ("convert", "dequantize"), [(to_nvfp4, nvfp4.dequantize), (to_fp8, fp8_block.dequantize)]
)
def test_scales_of_zeros_do_not_count(convert, dequantize):
    packed, scales, values = matrix(4, 96, lowest=-1, highest=1)
    packed[1, :16], packed[2, 16:32] = 0x80, 0x08
    scales[1, 0], scales[2, 1] = 0, 250
    values[1, :32] = np.tile([0.0, -0.0], 16)
    values[2, 32:64] = np.tile([-0.0, 0.0], 16)
    assert_same_values(convert(packed, scales), dequantize, values)


@pytest.mark.parametrize(
    ("convert", "dequantize"), [(to_nvfp4, nvfp4.dequantize), (to_fp8, fp8_block.dequantize)]
)
@pytest.mark.parametrize("scale", [0, 127, 254])
def test_all_zeros(convert, dequantize, scale):
    parts = convert(np.zeros((2, 32), np.uint8), np.full((2, 2), scale, np.uint8))
    assert_same_values(parts, dequantize, np.zeros((2, 64)))


@pytest.mark.parametrize("convert", [to_nvfp4, to_fp8])
def test_nan_is_refused(convert):
    with pytest.raises(ValueError, match="scales: got 255, NaN"):
        convert(np.zeros((2, 16), np.uint8), np.array([[1], [255]], np.uint8))
