"""Products with packed weights from 65 rows of input on, where GPUs with FP8 units use them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_ffi
from dsv4_jax.formats import tiled
from dsv4_jax.ops import gemm as ops
from tests.oracles import formats
from tests.packed_weights import tile, weight_arrays

gemm = jax.jit(ops.gemm, static_argnames=("round_input", "out_dtype", "implementation"))

missing = dsv4_ffi.missing(jax.default_backend().replace("gpu", "cuda"))
needs_ffi = pytest.mark.skipif(missing is not None, reason=missing or "")
CODED = pytest.mark.parametrize("weight_format", ["fp8_block", "mxfp4"])


def float64(x):
    return np.asarray(x, np.float64)


def inputs(num_rows, k, outliers=True):
    rng = np.random.default_rng(num_rows)
    x = rng.standard_normal((num_rows, k))
    if outliers:
        x[:, rng.integers(k)] *= 1e4
        x[num_rows // 2] = 0
    return jnp.asarray(x, jnp.bfloat16)


def rounded(x):
    """Q1 in float64."""
    return formats.fp8_rows(float64(x), 128)[2]


def relative_l2(found, expected):
    return np.linalg.norm(float64(found) - expected) / np.linalg.norm(expected)


@functools.cache
def problem(weight_format, n, k, spread=3):
    arrays, values = weight_arrays(weight_format, (n, k), seed=n + k, spread=spread)
    return tile(weight_format, arrays), values


def check(weight_format, num_rows, n, k, round_input):
    weight, values = problem(weight_format, n, k)
    x = inputs(num_rows, k)
    y = gemm(x, weight, round_input=round_input, implementation="ffi")
    assert y.dtype == jnp.bfloat16
    expected = (rounded(x) if round_input else float64(x)) @ values.T
    assert relative_l2(y, expected) <= 2e-3
    assert not np.any(y[num_rows // 2])


@needs_ffi
@CODED
def test_rounded_inputs(weight_format):
    check(weight_format, 65, 200, 416, round_input=True)


@needs_ffi
@CODED
def test_each_output_has_its_own_scales(weight_format):
    """Relative to the magnitudes that add up to an output: others would hide a small one."""
    weight, values = problem(weight_format, 256, 384, 12 if weight_format == "fp8_block" else 7)
    x = inputs(70, 384)
    y = gemm(x, weight, round_input=True, out_dtype=jnp.float32, implementation="ffi")
    magnitudes = np.abs(rounded(x)) @ np.abs(values).T
    error = np.abs(float64(y) - rounded(x) @ values.T)
    # What the FP8 units keep of a product is 2^-13 of the largest.
    assert np.all(error <= 2e-3 * magnitudes)


@needs_ffi
def test_a_group_of_weights_under_a_scale_far_below_its_neighbours():
    """MXFP4 scales more than 2^14 apart do not fit one E4M3 scale."""
    weight, values = problem("mxfp4", 128, 256, 28)
    x = inputs(66, 256, outliers=False)
    y = gemm(x, weight, round_input=True, out_dtype=jnp.float32, implementation="ffi")
    magnitudes = np.abs(rounded(x)) @ np.abs(values).T
    error = np.abs(float64(y) - rounded(x) @ values.T)
    assert np.all(error <= 2e-3 * magnitudes)


@needs_ffi
@CODED
def test_scales_too_large_for_the_kernels_are_infinite(weight_format):
    weight, _ = problem(weight_format, 64, 128)
    weight = tiled.TiledWeight(
        weight.codes,
        jnp.full_like(weight.scales, 255),
        weight.global_scale,
        weight_format,
        (64, 128),
    )
    weight = tile(weight_format, tiled.untile(weight))
    y = gemm(inputs(66, 128), weight, round_input=True, implementation="ffi")
    assert not np.isfinite(float64(y)).any()


@pytest.mark.gpu
@CODED
@pytest.mark.parametrize(
    ("num_rows", "n", "k"),
    [
        (65, 200, 416),
        (127, 1536, 4096),
        (128, 4096, 1024),
        (256, 640, 8192),
        (300, 4096, 4096),
        (1000, 2176, 1000),
        (1024, 8192, 512),
    ],
)
def test_tiles_of_codes(weight_format, num_rows, n, k):
    check(weight_format, num_rows, n, k, round_input=True)


@pytest.mark.gpu
@pytest.mark.parametrize("weight_format", tiled.FORMATS)
@pytest.mark.parametrize(
    ("num_rows", "n", "k"), [(65, 200, 416), (300, 4096, 1024), (1024, 8192, 512)]
)
def test_tiles_of_bfloat16(weight_format, num_rows, n, k):
    check(weight_format, num_rows, n, k, round_input=False)


@pytest.mark.gpu
@CODED
def test_equal_calls_give_equal_bits(weight_format):
    weight, _ = problem(weight_format, 4096, 4096)
    for num_rows in (65, 256, 700):
        x = inputs(num_rows, 4096)
        first = gemm(x, weight, round_input=True, implementation="ffi")
        for _ in range(10):
            assert (gemm(x, weight, round_input=True, implementation="ffi") == first).all()
