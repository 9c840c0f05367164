"""nvfp4_quantize: every implementation gives the bytes of the definition."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_ffi
from dsv4_jax.formats import nvfp4
from dsv4_jax.ops.quantize import nvfp4_quantize
from tests.oracles import formats
from tests.oracles.format_inputs import BFLOAT16, FLOAT32, finite_rows, neighbours

DTYPES = pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
PER_ROW = pytest.mark.parametrize("per_row", [True, False], ids=["rows", "matrix"])
CPU_IMPLEMENTATIONS = ["xla", "ffi"]
implementations = pytest.mark.parametrize(
    "implementation",
    [*CPU_IMPLEMENTATIONS, pytest.param("ffi", marks=pytest.mark.gpu, id="cuda")],
)

quantize = jax.jit(nvfp4_quantize, static_argnums=(1, 2))


def expected(x, per_row):
    """(codes, swizzled scale bytes, global scales) by the oracle."""
    m, k = x.shape
    matrices = x[:, None] if per_row else x[None]
    codes, scales, globals_, _ = zip(*map(formats.nvfp4, matrices), strict=True)
    codes, scales = np.concatenate(codes), np.concatenate(scales)
    swizzled = np.zeros((-(-m // 128), -(-k // 64), 512), np.uint8)
    for row, group in np.ndindex(scales.shape):
        place = row % 32 * 16 + row % 128 // 32 * 4 + group % 4
        swizzled[row // 128, group // 4, place] = scales[row, group]
    return formats.packed(codes), swizzled, np.array(globals_, np.float32)


def check(x, per_row, implementation):
    codes, scales, global_scale = quantize(jnp.asarray(x), per_row, implementation)
    expected_codes, expected_scales, expected_global = expected(x, per_row)
    assert global_scale.shape == ((len(x),) if per_row else ())
    np.testing.assert_array_equal(np.ravel(global_scale), expected_global)
    np.testing.assert_array_equal(np.asarray(scales).view(np.uint8), expected_scales)
    np.testing.assert_array_equal(codes, expected_codes)


@implementations
@PER_ROW
@DTYPES
@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (17, 64), (65, 176), (130, 1040), (257, 80)])
def test_random(shape, dtype, per_row, implementation):
    rng = np.random.default_rng(shape[0])
    x = rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 3, (shape[0], 1))
    check(x.astype(dtype), per_row, implementation)


@implementations
@PER_ROW
@DTYPES
def test_adversarial_rows(dtype, per_row, implementation):
    """Zeros of both signs, subnormal numbers, ties and their neighbours, the ends of the range."""
    check(finite_rows(48, formats.E2M1[:8], dtype), per_row, implementation)


@implementations
@PER_ROW
@DTYPES
@pytest.mark.parametrize("exponent", [0, -20, 100])
def test_ties(exponent, dtype, per_row, implementation):
    """amax 2688 * 2^k makes global scales powers of two, so that ties are exact."""
    ties = (formats.E2M1[1:8] + formats.E2M1[:7]) / 2
    scales = formats.E4M3[:127]
    rows = [np.r_[2688, np.zeros(15), scale * np.r_[6, ties, -ties, -0.0]] for scale in scales]
    rows += [
        np.r_[2688, np.zeros(15), 6 * tie * np.linspace(-1, 1, 16)]
        for tie in (scales[1:] + scales[:-1]) / 2
    ]
    check((np.array(rows) * 2.0**exponent).astype(dtype), per_row, implementation)


@implementations
@pytest.mark.parametrize("amax", [0.77, 5.3, 7e3])
def test_beside_ties_of_block_scales(amax, implementation):
    """Where the quotient of two floats is a tie or not by its last bit."""
    global_scale = formats.to_float32(formats.to_float32(amax) * formats.to_float32(1 / 2688))
    scales = formats.E4M3[:127]
    ties = neighbours((scales[1:] + scales[:-1]) * 3 * global_scale, FLOAT32)
    x = np.zeros((1 + ties.size, 16), np.float32)
    x[0, 0], x[1:, 3] = amax, -ties
    check(x, False, implementation)
    # As rows, each with the global scale of the same amax.
    x = np.concatenate([np.full_like(x, amax), x], axis=1)
    check(x, True, implementation)


@implementations
@DTYPES
@pytest.mark.parametrize("special", [np.inf, -np.inf, np.nan])
def test_infinities_and_nan_poison_their_row_only(special, dtype, implementation):
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(dtype)
    x[3, 40] = special
    parts = quantize(jnp.asarray(x), True, implementation)
    codes, scales, global_scale = (np.asarray(part) for part in parts)
    np.testing.assert_array_equal(np.isnan(global_scale), np.arange(5) == 3)
    found = nvfp4.unswizzle(jnp.asarray(scales), 5, 4)
    found_codes, found_scales, _ = expected(np.delete(x, 3, axis=0), True)
    np.testing.assert_array_equal(np.delete(codes, 3, axis=0), found_codes)
    swizzled = np.asarray(nvfp4.swizzle(jnp.delete(found, 3, axis=0))).view(np.uint8)
    np.testing.assert_array_equal(swizzled, found_scales)
    assert np.isnan(float(quantize(jnp.asarray(x), False, implementation)[2]))


@implementations
@PER_ROW
def test_one_outlier(per_row, implementation):
    x = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    x[5, 7] = 1e4
    check(x, per_row, implementation)


@implementations
@pytest.mark.parametrize("shape", [(0, 64), (3, 0)])
def test_empty(shape, implementation):
    x = jnp.zeros(shape, jnp.float32)
    codes, _, global_scale = quantize(x, True, implementation)
    assert codes.shape == (shape[0], shape[1] // 2)
    np.testing.assert_array_equal(global_scale, np.full(shape[0], nvfp4.GLOBAL_SCALE_FLOOR))


@implementations
def test_gradient_is_zero(implementation):
    def loss(x):
        codes, scales, global_scale = nvfp4_quantize(x, True, implementation)
        return codes.sum() + scales.astype(jnp.float32).sum() + global_scale.sum()

    gradient = jax.jit(jax.grad(loss))(jnp.linspace(1, 7, 64).reshape(2, 32))
    np.testing.assert_array_equal(gradient, np.zeros((2, 32)))


@pytest.mark.gpu
@PER_ROW
@DTYPES
@pytest.mark.parametrize(
    "shape",
    [(16, 4096), (128, 4096), (1000, 7168), (5000, 1536), (2, 32768), (4097, 4096)],
)
def test_large_shapes_agree_with_xla(shape, dtype, per_row):
    """Each way of sharing a scale: a block, a cluster, a grid of one round or several."""
    x = jax.random.normal(jax.random.key(0), shape, dtype)
    x = x * jnp.exp2(jax.random.uniform(jax.random.key(1), (shape[0], 1), dtype, -9, 9))
    for found, reference in zip(
        quantize(x, per_row, "ffi"), quantize(x, per_row, "xla"), strict=True
    ):
        found, reference = (np.atleast_1d(np.asarray(part)) for part in (found, reference))
        np.testing.assert_array_equal(found.view(np.uint8), reference.view(np.uint8))


@pytest.mark.gpu
def test_rows_wider_than_registers_hold_are_refused():
    with pytest.raises(jax.errors.JaxRuntimeError, match="x: got width 65552, expected at most"):
        jax.block_until_ready(quantize(jnp.zeros((1, 65552), jnp.bfloat16), True, "ffi"))


def test_width_is_checked():
    with pytest.raises(ValueError, match="x: got width 24, expected a multiple of 16"):
        nvfp4_quantize(jnp.zeros((2, 24), jnp.float32))


def test_other_dtypes_run_in_xla_only():
    x = jnp.ones((2, 32), jnp.float16)
    with pytest.raises(NotImplementedError, match="x: got float16"):
        nvfp4_quantize(x, implementation="ffi")
    assert nvfp4_quantize(x)[0].shape == (2, 16)


def results(m=3, k=32, packed=jnp.uint8, blocks=(1, 1)):
    return (
        jax.ShapeDtypeStruct((m, k // 2), packed),
        jax.ShapeDtypeStruct((*blocks, 512), jnp.float8_e4m3fn),
        jax.ShapeDtypeStruct((m,), jnp.float32),
        jax.ShapeDtypeStruct((4096,), jnp.float32),
    )


@pytest.mark.parametrize(
    ("x", "shapes", "message"),
    [
        (jnp.zeros((3, 32), jnp.int32), results(), "x: got int32, expected bfloat16 or float32"),
        (jnp.zeros((3, 40)), results(k=40), "x: width: got 40, expected a multiple of 16"),
        (jnp.zeros((3, 32)), results(blocks=(1, 2)), r"scales: got shape \[1, 2, 512\], expected"),
        (jnp.zeros((3, 32)), results(m=4), r"packed: got shape \[4, 16\], expected \[3, 16\]"),
        (jnp.zeros((3, 32)), results(packed=jnp.int8), "packed: got int8, expected uint8"),
        (jnp.zeros((3, 2, 32)), results(), r"x: got shape \[3, 2, 32\], expected \[any, any\]"),
    ],
)
def test_the_handler_names_the_argument(x, shapes, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(dsv4_ffi.call("nvfp4_quantize", shapes, x))


IN_ONE_GRAPH = """
import jax, jax.numpy as jnp
from dsv4_jax.ops.quantize import nvfp4_quantize

def chain(x):
    results = []
    for shape_scale in (True, False) * 3:
        results.append(nvfp4_quantize(x, shape_scale, "ffi"))
        x = x + results[-1][2].max().astype(x.dtype)
    return results

for rows in (16, 1024):
    x = jax.random.normal(jax.random.key(0), (rows, 4096), jnp.bfloat16)
    first, second = jax.jit(chain)(x), jax.jit(chain)(x)
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, first, second)))
"""


@pytest.mark.gpu
def test_calls_are_captured_into_cuda_graphs(tmp_path):
    """XLA's list of what the program executes: one command buffer with every call inside."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={tmp_path}"
    subprocess.run(
        [sys.executable, "-c", IN_ONE_GRAPH], env={**os.environ, "XLA_FLAGS": flags}, check=True
    )
    dumps = list(tmp_path.glob("*jit_chain*thunk_sequence_after_thunk_passes.txt"))
    assert len(dumps) == 2
    for dump in dumps:
        lines = dump.read_text().splitlines()
        top = [line for line in lines if not line.startswith(" ")]
        assert len(top) == 1
        assert "kCommandBuffer" in top[0]
        assert sum("kCustomCall" in line for line in lines) == 6
