"""NVFP4: three levels of scale."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.formats import nvfp4
from tests.oracles import formats
from tests.oracles.format_inputs import BFLOAT16, FLOAT32, assert_same, neighbours

DTYPES = pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)


quantize = jax.jit(nvfp4.quantize)
dequantize = jax.jit(nvfp4.dequantize, static_argnums=3)


def scale_bytes(scales):
    return np.asarray(scales).view(np.uint8)


def check(w, quantize=quantize):
    packed, scales, global_scale = quantize(jnp.asarray(w))
    codes, expected_scales, expected_global, expected = formats.nvfp4(w)
    assert float(global_scale) == expected_global
    np.testing.assert_array_equal(scale_bytes(scales), expected_scales)
    np.testing.assert_array_equal(packed, formats.packed(codes))
    assert_same(dequantize(packed, scales, global_scale, jnp.float32), expected, np.float32)


def test_every_code_under_every_scale():
    codes = np.tile(np.arange(16, dtype=np.uint8), (256, 1))
    scale_codes = np.arange(256, dtype=np.uint8)[:, None]
    scales = jnp.asarray(scale_codes.view(ml_dtypes.float8_e4m3fn))
    for global_scale in (1.0, 2.0**-100, 0.0123, 1e30):
        exact = formats.E2M1[codes] * formats.E4M3[scale_codes] * formats.to_float32(global_scale)
        expected = formats.to_float32(exact)
        for dtype in (jnp.float32, jnp.bfloat16):
            found = dequantize(
                jnp.asarray(formats.packed(codes)), scales, jnp.float32(global_scale), dtype
            )
            assert_same(found, expected, dtype)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 16), (33, 176)])
@pytest.mark.parametrize("spread", [0, 3, 12])
def test_random(dtype, shape, spread):
    rng = np.random.default_rng(shape[0] + spread)
    check((rng.standard_normal(shape) * 2.0 ** rng.uniform(-spread, spread, shape)).astype(dtype))


@DTYPES
@pytest.mark.parametrize("exponent", [0, -20, 30, -100])
def test_ties(dtype, exponent):
    """amax 2688 * 2^k makes the global scale 2^k, so ties of codes and block scales are exact."""
    ties = (formats.E2M1[1:8] + formats.E2M1[:7]) / 2
    scales = formats.E4M3[:127]
    rows = []
    for scale in scales[[1, 2, 9, 40, 80, 100, 126]]:
        rows.append(scale * np.concatenate([[6], ties, -ties, [-0.0]]))
    for tie in (scales[1:] + scales[:-1]) / 2:
        rows.append(np.concatenate([[6 * tie], np.linspace(-1, 1, 15) * 6 * tie]))
    w = np.array([[2688] + [0] * 15, *rows]) * 2.0**exponent
    check(w.astype(dtype))


@pytest.mark.parametrize("amax", [0.77, 5.3, 7e3])
def test_beside_ties(amax):
    """Where the quotient of two floats is a tie or not by its last bit."""
    global_scale = formats.to_float32(formats.to_float32(amax) * formats.to_float32(1 / 2688))
    scales, codes = formats.E4M3[:127], formats.E2M1[:8]
    block_ties = neighbours((scales[1:] + scales[:-1]) * 3 * global_scale, FLOAT32)
    w = np.zeros((1 + block_ties.size + scales.size, 48), np.float32)
    w[0, 0] = amax
    w[1 : 1 + block_ties.size, 0] = block_ties
    unit = formats.to_float32(scales * global_scale)
    for row, block_unit in zip(w[1 + block_ties.size :], unit, strict=True):
        ties = neighbours(block_unit * (codes[1:] + codes[:-1]) / 2, FLOAT32)
        row[[16, 32]] = 6 * block_unit
        row[17:31], row[33:40] = ties[:14], ties[14:]
    check(w)


@pytest.mark.parametrize("amax", [1e-45, 1e-38, 1e-33, 3e-32, 1e-20, 1e30, 3e38])
def test_ends_of_the_range(amax):
    w = np.random.default_rng(0).uniform(-1, 1, (8, 32)) * amax
    w[3, 5] = amax
    check(w.astype(np.float32))


def test_compiled_or_not():
    w = np.random.default_rng(5).standard_normal((64, 128)).astype(np.float32)
    check(w, nvfp4.quantize)


def test_zeros():
    w = jnp.array([[0.0] * 16, [-0.0] * 16], jnp.float32)
    packed, scales, global_scale = quantize(w)
    assert (scale_bytes(scales) == 0).all()
    assert float(global_scale) > 0
    assert_same(dequantize(packed, scales, global_scale, jnp.float32), np.asarray(w))


def test_block_far_below_the_largest_is_zero():
    w = np.zeros((2, 16), np.float32)
    w[0, 0], w[1] = 1e6, -1e-6
    packed, scales, global_scale = quantize(jnp.asarray(w))
    assert scale_bytes(scales).ravel().tolist() == [formats.to_e4m3(np.float64(448)), 0]
    assert (np.asarray(packed)[1] == 0x88).all()
    decoded = np.asarray(dequantize(packed, scales, global_scale, jnp.float32))
    assert abs(decoded[0, 0] / 1e6 - 1) < 1e-6


def test_error_is_half_a_step():
    w = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
    packed, scales, global_scale = quantize(jnp.asarray(w))
    decoded = np.asarray(dequantize(packed, scales, global_scale, jnp.float32), np.float64)
    unit = formats.E4M3[scale_bytes(scales)].repeat(16, -1) * float(global_scale)
    assert (np.abs(decoded - w) <= unit * (1 + 1e-6)).all()
    assert np.abs(decoded - w).max() > 0


def test_leading_axes_are_independent():
    rng = np.random.default_rng(0)
    w = rng.standard_normal((2, 3, 4, 32)) * 10.0 ** rng.uniform(-3, 3, (2, 3, 1, 1))
    w = jnp.asarray(w, jnp.float32)
    whole = quantize(w)
    assert [part.shape for part in whole] == [(2, 3, 4, 16), (2, 3, 4, 2), (2, 3)]
    for found, expected in zip(whole, jax.jit(jax.vmap(jax.vmap(nvfp4.quantize)))(w), strict=True):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    decoded = dequantize(*whole, jnp.float32)
    assert_same(decoded[1, 2], formats.nvfp4(np.asarray(w[1, 2]))[3])


@pytest.mark.parametrize("special", [np.inf, -np.inf, np.nan])
def test_infinities_and_nan_poison_their_matrix_only(special):
    w = np.random.default_rng(0).standard_normal((3, 2, 32)).astype(np.float32)
    w[1, 1, 20] = special
    decoded = dequantize(*quantize(jnp.asarray(w)), jnp.float32)
    assert np.isnan(decoded[1]).all()
    for matrix in (0, 2):
        assert_same(decoded[matrix], formats.nvfp4(w[matrix])[3])


@pytest.mark.parametrize("shape", [(3, 0), (2, 0, 16)])
def test_empty(shape):
    parts = quantize(jnp.zeros(shape, jnp.float32))
    assert dequantize(*parts, jnp.bfloat16).shape == shape


def test_gradient_is_zero():
    def loss(w):
        return nvfp4.dequantize(*nvfp4.quantize(w), jnp.float32).sum()

    w = jnp.linspace(1, 7, 64).reshape(2, 32)
    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(w), np.zeros((2, 32)))


def test_a_scale_per_row():
    rng = np.random.default_rng(1)
    w = (rng.standard_normal((2, 5, 48)) * 10.0 ** rng.uniform(-6, 6, (2, 5, 1))).astype(np.float32)
    w[0, 3, 7], w[1, 1] = np.inf, 0
    packed, scales, global_scale = jax.jit(nvfp4.quantize, static_argnums=1)(w, True)
    assert global_scale.shape == (2, 5)
    decoded = np.asarray(dequantize(packed, scales, global_scale, jnp.float32))
    assert np.isnan(decoded[0, 3]).all()
    for row in set(np.ndindex(2, 5)) - {(0, 3)}:
        codes, expected_scales, expected_global, expected = formats.nvfp4(w[row][None])
        assert float(global_scale[row]) == expected_global
        np.testing.assert_array_equal(scale_bytes(scales)[row], expected_scales[0])
        np.testing.assert_array_equal(np.asarray(packed)[row], formats.packed(codes)[0])
        assert_same(decoded[row], expected[0])


def test_a_global_scale_that_is_neither_of_matrices_nor_of_rows():
    packed, scales, _ = quantize(jnp.ones((2, 32), jnp.float32))
    with pytest.raises(
        ValueError, match=r"global_scale: got shape \(3,\), expected \(\) or \(2,\)"
    ):
        nvfp4.dequantize(packed, scales, jnp.ones(3), jnp.float32)


@pytest.mark.parametrize("shape", [(1, 1), (32, 4), (33, 5), (128, 4), (300, 13), (2, 129, 8)])
def test_swizzle(shape):
    """The byte offset as cuBLASLt and CUTLASS define it."""
    scales = np.random.default_rng(0).integers(1, 255, shape, dtype=np.uint8)
    swizzled = np.asarray(nvfp4.swizzle(jnp.asarray(scales)))
    *batch, rows, columns = shape
    blocks = -(-columns // 4)
    expected = np.zeros((*batch, -(-rows // 128) * blocks * 512), np.uint8)
    for m, s in np.ndindex(rows, columns):
        offset = (m // 128 * blocks + s // 4) * 512 + m % 32 * 16 + m % 128 // 32 * 4 + s % 4
        expected[..., offset] = scales[..., m, s]
    np.testing.assert_array_equal(swizzled.reshape(expected.shape), expected)
    assert swizzled.shape == (*batch, -(-rows // 128), blocks, 512)
    np.testing.assert_array_equal(nvfp4.unswizzle(jnp.asarray(swizzled), rows, columns), scales)


def test_unswizzle_of_other_sizes():
    swizzled = nvfp4.swizzle(jnp.zeros((130, 5), jnp.uint8))
    with pytest.raises(ValueError, match="swizzled: got 2 x 2 blocks, 128 rows of 5 groups have 1"):
        nvfp4.unswizzle(swizzled, 128, 5)


def test_incomplete_groups():
    with pytest.raises(ValueError, match="w: got width 24, expected a multiple of 16"):
        nvfp4.quantize(jnp.zeros((2, 24), jnp.float32))


def test_scales_that_do_not_cover_the_codes():
    packed, scales, global_scale = quantize(jnp.ones((2, 32), jnp.float32))
    with pytest.raises(ValueError, match=r"scales: got 1, 32 codes .* have 2"):
        nvfp4.dequantize(packed, scales[:, :1], global_scale, jnp.float32)
