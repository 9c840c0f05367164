"""Blocks of packed weights: read back, and read as the kernels read them."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.formats import tiled
from tests.packed_weights import tile, weight_arrays

SHAPES = pytest.mark.parametrize("shape", [(2, 64, 256), (3, 130, 160)])


@SHAPES
@pytest.mark.parametrize("weight_format", tiled.FORMATS)
def test_untile_gives_back_what_was_tiled(weight_format, shape):
    arrays, values = weight_arrays(weight_format, shape)
    weight = tile(weight_format, arrays)
    assert weight.shape == shape[-2:]
    for found, expected in zip(tiled.untile(weight), arrays, strict=True):
        assert found.dtype == expected.dtype
        assert np.asarray(found).tobytes() == expected.tobytes()
    found = np.asarray(tiled.dequantize(weight, jnp.float32), np.float64)
    np.testing.assert_allclose(found, values, rtol=1e-7)


def bf16(bits):
    """The float64 values of the halves of words, low half first."""
    halves = np.stack([bits & 0xFFFF, bits >> 16], -1).astype(np.uint16)
    return halves.view(ml_dtypes.bfloat16).astype(np.float64)


def rotated(words, right):
    return (words >> right) | (words << (32 - right))


def step_registers(weight_format, words):
    """Registers [..., 8 steps, 4] and the scale exponent they are short of, as a kernel decodes."""
    words = np.asarray(words)
    if weight_format == "bf16":
        return words.swapaxes(-2, -3), 0
    if weight_format == "fp8_block":
        rows = words.swapaxes(-2, -3).reshape(*words.shape[:-3], 32, 8, 2)
        first = (rows & 0x80008000) | ((rows >> 4) & 0x07F007F0)
        second = ((rows << 8) & 0x80008000) | ((rows << 4) & 0x07F007F0)
        return np.concatenate([first, second], -1), 120
    steps = words.swapaxes(-2, -3).reshape(*words.shape[:-3], 32, 8)
    sign, magnitude = np.uint32(0x80008000), np.uint32(0x01C001C0)
    return np.stack(
        [
            steps & (sign | magnitude),
            rotated(steps, 3) & (sign | magnitude),
            ((steps >> 6) & magnitude) | ((steps << 15) & sign),
            ((steps << 3) & magnitude) | ((steps << 14) & sign),
        ],
        -1,
    ), 126


def scale_of_steps(weight_format, scales):
    """[bn, bk, 4, 32, 8 steps, 2 outputs], as a kernel decodes them."""
    scales = np.asarray(scales).astype(np.int64)
    if weight_format == "bf16":
        return np.ones((1, 1, 1, 1, 1, 2))
    if weight_format == "fp8_block":
        return np.repeat(2.0 ** (scales - 127)[..., None, None, None, None], 2, axis=-1)
    if weight_format == "mxfp4":
        return 2.0 ** (scales - 127)[..., None, :]
    value = (1 + scales % 8 / 8) * 2.0 ** (scales // 8 - 10)
    return np.repeat(value.reshape(*value.shape[:-1], 2, 2), 4, axis=-2)


@pytest.mark.parametrize("weight_format", tiled.FORMATS)
def test_lanes_hold_the_fragments_of_matrix_instructions(weight_format):
    arrays, values = weight_arrays(weight_format, (192, 256), seed=1)
    weight = tile(weight_format, arrays)
    registers, exponent = step_registers(weight_format, weight.codes)
    scale = scale_of_steps(weight_format, weight.scales) * np.float64(weight.global_scale)
    bn, bk, sub, lane, step, register = np.indices((3, 2, 4, 32, 8, 4))
    row, pair = register % 2, register // 2
    n = 64 * bn + 16 * sub + lane // 4 + 8 * row
    k = 128 * bk + 32 * (lane % 4) + 4 * step + 2 * pair
    found = bf16(registers) * 2.0**exponent * np.concatenate([scale, scale], -1)[..., None]
    expected = np.stack([values[n, k], values[n, k + 1]], -1)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_scales_beyond_the_kernels_range():
    packed = jnp.full((1, 16), 0x11, jnp.uint8)
    for byte, stored in [(158, 158), (159, 159), (200, 159), (255, 159)]:
        weight = tiled.tile_mxfp4(packed, jnp.full((1, 1), byte, jnp.uint8))
        assert weight.scales.max() == stored
    for bits, stored in [(0x7E, 150), (0x7F, 0xF8), (0x81, 0xF8), (0x80, 0)]:
        scales = jax.lax.bitcast_convert_type(jnp.full((1, 2), bits, jnp.uint8), jnp.float8_e4m3fn)
        weight = tiled.tile_nvfp4(packed, scales, jnp.ones(()))
        assert weight.scales.max() == stored


@pytest.mark.parametrize("weight_format", ["mxfp4", "nvfp4", "fp8_block"])
def test_scales_of_another_shape(weight_format):
    arrays, _ = weight_arrays(weight_format, (64, 256))
    arrays = [jnp.asarray(a) for a in arrays]
    arrays[1] = jnp.pad(arrays[1], [(0, 0), (0, 1)])
    with pytest.raises(ValueError, match="scales: got"):
        getattr(tiled, f"tile_{weight_format}")(*arrays)


def test_global_scale_of_another_stack():
    (packed, scales, _), _ = weight_arrays("nvfp4", (2, 64, 128))
    with pytest.raises(ValueError, match="global_scale: got"):
        tiled.tile_nvfp4(jnp.asarray(packed), jnp.asarray(scales), jnp.ones(3))
