"""The norm with its rounding, the tiles of codes, and products of them."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import dsv4_ffi
from dsv4_jax.formats import coded_inputs
from dsv4_jax.ops.coded_gemm import coded_gemm
from dsv4_jax.ops.gemm import gemm
from dsv4_jax.ops.norm_quantize import rms_norm_quantize
from tests.oracles import formats
from tests.packed_weights import tile, weight_arrays

missing = dsv4_ffi.missing(jax.default_backend().replace("gpu", "cuda"))
FFI = pytest.param("ffi", marks=pytest.mark.skipif(missing is not None, reason=missing or ""))
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["xla", FFI])
EPS = 1e-6


def inputs(num_rows, width, seed=0):
    x = np.random.default_rng(seed).standard_normal((num_rows, width))
    x[:, :5] *= 1e3
    x[num_rows // 2] = 0
    return jnp.asarray(x, jnp.bfloat16)


def float64(x):
    return np.asarray(x, np.float64)


def in_tiles(codes, scales):
    """Codes [rows, k] and their scales where the format says, element after element."""
    num_rows, k = codes.shape
    blocks, tiles = -(-k // 128), -(-num_rows // 8)
    out = np.zeros((blocks, tiles, 8, 128), np.uint8)
    of_row = np.full((blocks, tiles * 8), formats.E8M0[formats.scale_code(np.zeros(()), 448, 1e-4)])
    for row in range(num_rows):
        of_row[:, row] = formats.E8M0[scales[row]]
        for column in range(k):
            t, s, j = column % 128 // 32, column % 32 // 4, column % 4
            byte = (s ^ row % 8) * 16 + t * 4 + (1, 3, 0, 2)[j]
            out[column // 128, row // 8, row % 8, byte] = codes[row, column]
    return out, of_row


@pytest.mark.parametrize("shape", [(3, 128), (8, 40), (13, 300)])
def test_codes_lie_in_tiles(shape):
    x = inputs(*shape)
    codes, scales, values = formats.fp8_rows(float64(x), 128)
    found = jax.jit(coded_inputs.encode)(x)
    expected_codes, expected_scales = in_tiles(codes, scales)
    np.testing.assert_array_equal(found.codes, expected_codes)
    np.testing.assert_array_equal(found.scales, expected_scales)
    np.testing.assert_array_equal(coded_inputs.decode(found, jnp.float32), values)


@IMPLEMENTATIONS
@pytest.mark.parametrize("shape", [(3, 128), (20, 384)])
def test_norm_and_codes(shape, implementation):
    x = inputs(*shape)
    weight = jnp.asarray(np.random.default_rng(1).standard_normal(shape[1]), jnp.float32)
    y, coded = jax.jit(rms_norm_quantize, static_argnums=(2, 3))(x, weight, EPS, implementation)
    exact = float64(x)
    exact = exact / np.sqrt(np.mean(exact**2, -1, keepdims=True) + EPS) * float64(weight)
    np.testing.assert_allclose(float64(y), exact, rtol=2**-8)
    assert np.mean(np.asarray(y) == exact.astype(ml_dtypes.bfloat16)) > 0.99
    expected = jax.jit(coded_inputs.encode)(y)
    np.testing.assert_array_equal(coded.codes, expected.codes)
    np.testing.assert_array_equal(coded.scales, expected.scales)
    assert coded.shape == shape


@IMPLEMENTATIONS
@pytest.mark.parametrize("weight_format", ["fp8_block", "mxfp4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_product_of_codes(weight_format, dtype, implementation):
    arrays, values = weight_arrays(weight_format, (136, 256), spread=3)
    x = inputs(70, 256)
    coded = jax.jit(coded_inputs.encode)(x)
    weight = tile(weight_format, arrays)
    y = coded_gemm(coded, weight, out_dtype=dtype, implementation=implementation)
    assert y.dtype == dtype
    expected = formats.fp8_rows(float64(x), 128)[2] @ values.T
    assert np.linalg.norm(float64(y) - expected) <= 2e-3 * np.linalg.norm(expected)
    rounded = gemm(x, weight, round_input=True, out_dtype=dtype, implementation=implementation)
    np.testing.assert_array_equal(np.asarray(y), np.asarray(rounded))


@IMPLEMENTATIONS
def test_a_row_with_nan_or_infinity_changes_no_other(implementation):
    arrays, _ = weight_arrays("fp8_block", (128, 128), spread=3)
    x = inputs(66, 128).at[2, 5].set(jnp.nan).at[9, 7].set(jnp.inf)
    weight = tile("fp8_block", arrays)
    _, coded = rms_norm_quantize(x, jnp.ones(128), EPS, implementation)
    y = float64(coded_gemm(coded, weight, implementation=implementation))
    bad = np.isin(np.arange(66), (2, 9))
    assert np.isnan(y[bad]).all()
    assert np.isfinite(y[~bad]).all()


def test_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match="weight: got 64 elements"):
        rms_norm_quantize(inputs(1, 128), jnp.ones(64), EPS)
    with pytest.raises(NotImplementedError, match="bfloat16"):
        rms_norm_quantize(jnp.ones((1, 128)), jnp.ones(128), EPS, "ffi")
    with pytest.raises(NotImplementedError, match="multiple of 128"):
        rms_norm_quantize(inputs(1, 96), jnp.ones(96), EPS, "ffi")
    coded = coded_inputs.encode(inputs(3, 128))
    with pytest.raises(ValueError, match="inputs: got width 128"):
        coded_gemm(coded, tile("mxfp4", weight_arrays("mxfp4", (64, 256))[0]))
    with pytest.raises(ValueError, match="weight: got a stack"):
        coded_gemm(coded, tile("mxfp4", weight_arrays("mxfp4", (2, 64, 128))[0]))
    with pytest.raises(NotImplementedError, match="fp8_block or mxfp4"):
        coded_gemm(coded, tile("nvfp4", weight_arrays("nvfp4", (64, 128))[0]), implementation="ffi")


@pytest.mark.skipif(missing is not None, reason=missing or "")
def test_the_kernels_name_what_does_not_fit():
    def norm(x, weight, codes=(1, 1, 8, 128), scales=(1, 8)):
        results = [
            jax.ShapeDtypeStruct(x.shape, jnp.bfloat16),
            jax.ShapeDtypeStruct(codes, jnp.uint8),
            jax.ShapeDtypeStruct(scales, jnp.float32),
        ]
        out = dsv4_ffi.call("rms_norm_quantize", results, x, weight, eps=np.float32(EPS))
        jax.block_until_ready(out)

    x, ones = inputs(3, 128), jnp.ones(128)
    norm(x, ones)
    for message, arguments in [
        ("x: got float32", (x.astype(jnp.float32), ones)),
        ("x: width: got 96", (x[:, :96], ones[:96])),
        ("weight: got shape", (x, ones[:64])),
        ("input codes: got shape", (x, ones, (1, 1, 8, 64))),
        ("input scales: got shape", (x, ones, (1, 1, 8, 128), (1, 4))),
    ]:
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            norm(*arguments)
    coded = coded_inputs.encode(x)
    weight = tile("mxfp4", weight_arrays("mxfp4", (64, 128))[0])

    def product(codes, scales, weight_codes, weight_format=0):
        result = jax.ShapeDtypeStruct((3, 64), jnp.bfloat16)
        weights = weight_codes, weight.scales, weight.global_scale
        attribute = np.int32(weight_format)
        (out,) = dsv4_ffi.call("coded_gemm", [result], codes, scales, *weights, format=attribute)
        out.block_until_ready()

    product(coded.codes, coded.scales, weight.codes)
    for message, arguments in [
        ("input codes: got int8", (coded.codes.astype(jnp.int8), coded.scales, weight.codes)),
        ("input codes: got shape", (coded.codes[:, :0], coded.scales, weight.codes)),
        ("input scales: got shape", (coded.codes, coded.scales[:, :4], weight.codes)),
        ("weight codes: got shape", (coded.codes, coded.scales, weight.codes[:0])),
        ("format: got 1", (coded.codes, coded.scales, weight.codes, 1)),
    ]:
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            product(*arguments)
