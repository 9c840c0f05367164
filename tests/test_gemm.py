"""Products with packed weights against the dequantised product in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_ffi
from dsv4_jax.formats import tiled
from dsv4_jax.ops import gemm as ops
from dsv4_jax.ops.gemm import Segment, grouped_gemm, projections
from tests.oracles import formats
from tests.packed_weights import tile, weight_arrays

gemm = jax.jit(ops.gemm, static_argnames=("round_input", "out_dtype", "implementation"))

missing = dsv4_ffi.missing(jax.default_backend().replace("gpu", "cuda"))
FFI = pytest.param("ffi", marks=pytest.mark.skipif(missing is not None, reason=missing or ""))
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["xla", FFI])
CASES = pytest.mark.parametrize(
    ("weight_format", "implementation"),
    [("nvfp4", "xla"), *(pytest.param(f, "ffi", marks=FFI.marks) for f in tiled.FORMATS)],
)
# Relative L2 error of a bfloat16 and of a float32 result. Tensor cores round sums towards zero.
TOLERANCE = {"bfloat16": 2e-3, "float32": 1e-5 if jax.default_backend() == "gpu" else 2e-6}


def inputs(shape, seed=0):
    x = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(x, jnp.bfloat16)


def float64(x):
    return np.asarray(x, np.float64)


def error(found, expected):
    return np.linalg.norm(float64(found) - expected) / max(np.linalg.norm(expected), 1e-300)


def rounded(x):
    """Q1 in float64."""
    return formats.fp8_rows(float64(x), 128)[2]


def check(x, weight, values, implementation, dtype, round_input=False):
    y = gemm(x, weight, round_input=round_input, out_dtype=dtype, implementation=implementation)
    assert y.shape == (*x.shape[:-1], weight.shape[0])
    assert y.dtype == dtype
    expected = (rounded(x) if round_input else float64(x)) @ values.T
    assert error(y, expected) <= TOLERANCE[jnp.dtype(dtype).name]


@IMPLEMENTATIONS
@pytest.mark.parametrize("weight_format", tiled.FORMATS)
@pytest.mark.parametrize("num_rows", [1, 3, 17])
def test_rows(weight_format, num_rows, implementation):
    arrays, values = weight_arrays(weight_format, (128, 256), seed=num_rows, spread=3)
    weight = tile(weight_format, arrays)
    x = inputs((num_rows, 256))
    check(x, weight, values, implementation, jnp.bfloat16)
    if weight_format != "bf16":
        check(x, weight, values, implementation, jnp.float32, round_input=True)


@CASES
@pytest.mark.parametrize("shape", [(8, 32), (65, 416)])
def test_ragged_outputs_and_inputs(weight_format, shape, implementation):
    arrays, values = weight_arrays(weight_format, shape, spread=3)
    x = inputs((2, 3, shape[1]))
    check(x, tile(weight_format, arrays), values, implementation, jnp.float32)


@IMPLEMENTATIONS
def test_no_rows(implementation):
    weight = tile("mxfp4", weight_arrays("mxfp4", (64, 128))[0])
    y = gemm(inputs((0, 128)), weight, implementation=implementation)
    assert y.shape == (0, 64)


@CASES
def test_one_input_ten_thousand_times_the_rest(weight_format, implementation):
    arrays, values = weight_arrays(weight_format, (128, 256), spread=3)
    x = inputs((4, 256)).at[1, 77].set(1e4)
    weight = tile(weight_format, arrays)
    check(x, weight, values, implementation, jnp.float32)
    check(x, weight, values, implementation, jnp.float32, round_input=True)
    check(x[1:2], weight, values, implementation, jnp.float32)
    alone = gemm(x[2:3], weight, implementation=implementation)
    together = gemm(x, weight, implementation=implementation)[2:3]
    assert error(together, float64(alone)) <= 1e-5


@CASES
@pytest.mark.parametrize("round_input", [False, True])
def test_zeros_give_zeros(weight_format, round_input, implementation):
    weight = tile(weight_format, weight_arrays(weight_format, (128, 256))[0])
    y = gemm(
        jnp.zeros((3, 256), jnp.bfloat16),
        weight,
        round_input=round_input,
        implementation=implementation,
    )
    assert not y.any()


@CASES
def test_scales_far_apart(weight_format, implementation):
    """Each output on its own, because the largest would hide the others."""
    arrays, values = weight_arrays(weight_format, (128, 256), spread=28)
    x = inputs((1, 256))
    y = gemm(x, tile(weight_format, arrays), out_dtype=jnp.float32, implementation=implementation)
    expected = float64(x) @ values.T
    magnitude = np.abs(float64(x)) @ np.abs(values).T
    assert np.max(np.abs(float64(y) - expected) / magnitude) <= 1e-6


@IMPLEMENTATIONS
def test_segments_have_their_own_format_rounding_and_dtype(implementation):
    plan = [
        ("fp8_block", 128, True, jnp.bfloat16),
        ("bf16", 128, False, jnp.float32),
        ("fp8_block", 128, False, None),
        ("mxfp4", 128, True, jnp.float32),
    ]
    x = inputs((3, 256))
    segments, expected = [], []
    for seed, (weight_format, n, round_input, dtype) in enumerate(plan):
        arrays, values = weight_arrays(weight_format, (n, 256), seed, spread=3)
        segments.append(Segment(tile(weight_format, arrays), round_input, dtype))
        expected.append((rounded(x) if round_input else float64(x)) @ values.T)
    outputs = jax.jit(
        lambda x, weights: projections(
            x,
            [s._replace(weight=w) for s, w in zip(segments, weights, strict=True)],
            implementation=implementation,
        )
    )(x, [s.weight for s in segments])
    for y, e, (_, _, _, dtype) in zip(outputs, expected, plan, strict=True):
        assert y.dtype == (dtype or x.dtype)
        assert error(y, e) <= TOLERANCE[y.dtype.name]


@IMPLEMENTATIONS
@pytest.mark.parametrize("num_rows", [1, 2, 20])
def test_groups(num_rows, implementation):
    arrays, values = weight_arrays("fp8_block", (256, 256), spread=3)
    x = inputs((num_rows, 2, 256))
    y = grouped_gemm(x, tile("fp8_block", arrays), implementation=implementation)
    blocks = values.reshape(2, 128, 256)
    expected = np.einsum("mgk,gnk->mgn", float64(x), blocks).reshape(num_rows, 256)
    assert error(y, expected) <= TOLERANCE["bfloat16"]


def test_float32_inputs_stay_float32():
    arrays, values = weight_arrays("nvfp4", (128, 256))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 256)), jnp.float32)
    y = gemm(x, tile("nvfp4", arrays))
    assert error(y, float64(x) @ values.T) <= TOLERANCE["float32"]
    with pytest.raises(NotImplementedError, match="bfloat16"):
        gemm(x, tile("nvfp4", arrays), implementation="ffi")


def test_arguments_that_do_not_fit():
    weight = tile("mxfp4", weight_arrays("mxfp4", (64, 128))[0])
    with pytest.raises(ValueError, match="x: got width 96"):
        gemm(inputs((1, 96)), weight)
    stack = tile("mxfp4", weight_arrays("mxfp4", (2, 64, 128))[0])
    with pytest.raises(ValueError, match="weight: got a stack"):
        gemm(inputs((1, 128)), stack)
    with pytest.raises(ValueError, match="weight: got 64 outputs"):
        grouped_gemm(inputs((1, 3, 128)), weight)
    with pytest.raises(NotImplementedError, match="multiple of 128 outputs"):
        grouped_gemm(inputs((1, 2, 128)), weight, implementation="ffi")
    with pytest.raises(ValueError, match="segments: got 0"):
        projections(inputs((1, 128)), [])
    odd = tile("bf16", weight_arrays("bf16", (64, 12))[0])
    with pytest.raises(NotImplementedError, match="multiple of 8"):
        gemm(inputs((1, 12)), odd, implementation="ffi")


# (n, k) of the linears of Flash and of Pro.
LINEARS = [
    (1024, 4096),
    (512, 4096),
    (32768, 1024),
    (8192, 1024),
    (4096, 8192),
    (2048, 4096),
    (4096, 2048),
    (4096, 4096),
    (1536, 7168),
    (512, 7168),
    (65536, 1536),
    (8192, 1536),
    (7168, 16384),
    (3072, 7168),
    (7168, 3072),
]
NUM_ROWS = (1, 3, 8, 9, 16, 17, 33, 64, 65, 129, 256, 1000, 4096)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("shape", LINEARS, ids=str)
@pytest.mark.parametrize("weight_format", tiled.FORMATS)
def test_linears_of_flash_and_pro(weight_format, shape):
    """The rows of weight and input repeat, because the values of all would not fit into memory."""
    n, k = shape
    rng = np.random.default_rng(0)
    arrays, values = weight_arrays(weight_format, (4 * 128, k), spread=3)
    runs, x_rows = rng.integers(4, size=n // 128), rng.integers(64, size=max(NUM_ROWS))
    whole = [a.reshape(4, -1, a.shape[1])[runs].reshape(-1, a.shape[1]) for a in arrays if a.ndim]
    weight = tile(weight_format, [*whole, *arrays[len(whole) :]])
    few = inputs((64, k))
    x = few[x_rows]
    outputs = rng.choice(n, 64, replace=False)
    rows = runs[outputs // 128] * 128 + outputs % 128
    for round_input in (False, True):
        products = (rounded(few) if round_input else float64(few)) @ values[rows].T
        for num_rows in NUM_ROWS:
            y = gemm(x[:num_rows], weight, round_input=round_input, implementation="ffi")
            assert jnp.isfinite(y).all()
            assert error(y[:, outputs], products[x_rows[:num_rows]]) <= TOLERANCE["bfloat16"]


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 5, 16, 40, 200])
def test_the_output_head(num_rows):
    """Float32 outputs of bfloat16 weights; the vocabulary is not a multiple of a tile."""
    arrays, values = weight_arrays("bf16", (129280 // 8, 4096))
    x = inputs((num_rows, 4096))
    check(x, tile("bf16", arrays), values, "ffi", jnp.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 9, 16, 20, 33, 64])
def test_segments_of_two_formats(num_rows):
    """FP8 and bfloat16 weights, up to 64 rows: one launch."""
    x = inputs((num_rows, 4096))
    plan = [("fp8_block", 1000), ("bf16", 72), ("fp8_block", 512), ("bf16", 512)]
    segments, expected = [], []
    for seed, (weight_format, n) in enumerate(plan):
        arrays, values = weight_arrays(weight_format, (n, 4096), seed, spread=3)
        rounds = weight_format == "fp8_block"
        segments.append(Segment(tile(weight_format, arrays), rounds, jnp.float32))
        expected.append((rounded(x) if rounds else float64(x)) @ values.T)
    for y, e in zip(projections(x, segments, implementation="ffi"), expected, strict=True):
        assert error(y, e) <= 1e-5


@pytest.mark.gpu
def test_equal_calls_give_equal_bits():
    weight = tile("nvfp4", weight_arrays("nvfp4", (4096, 4096))[0])
    for num_rows in (1, 16, 64, 256):
        x = inputs((num_rows, 4096))
        first = gemm(x, weight, implementation="ffi")
        for _ in range(20):
            assert (gemm(x, weight, implementation="ffi") == first).all()


def call(x, codes, scales, global_scale=None, formats=(0,), n=64, workspace=0):
    """The kernel itself, which must not trust its caller."""
    results = [
        jax.ShapeDtypeStruct((x.shape[0], n), jnp.bfloat16),
        jax.ShapeDtypeStruct((workspace,), jnp.uint8),
    ]
    return dsv4_ffi.call(
        "gemm",
        results,
        x,
        codes,
        scales,
        jnp.ones(()) if global_scale is None else global_scale,
        formats=np.array(formats, np.int32),
        rounded=np.zeros(len(formats), np.int32),
    )[0].block_until_ready()


@pytest.mark.skipif(missing is not None, reason=missing or "")
def test_the_kernel_names_what_does_not_fit():
    weight = tile("mxfp4", weight_arrays("mxfp4", (64, 128))[0])
    x = inputs((1, 1, 128))
    call(x, weight.codes, weight.scales)
    for message, arguments in [
        ("x: got float32", (x.astype(jnp.float32), weight.codes, weight.scales)),
        ("x: width: got 124", (x[..., :124], weight.codes, weight.scales)),
        ("x: got shape", (x[0], weight.codes, weight.scales)),
        ("segment 0 codes: got int32", (x, weight.codes.astype(jnp.int32), weight.scales)),
        ("segment 0 codes: got shape", (inputs((1, 1, 136)), weight.codes, weight.scales)),
        ("segment 0 scales: got uint32", (x, weight.codes, weight.scales.astype(jnp.uint32))),
        ("segment 0 scales: got shape", (x, weight.codes, weight.scales[..., :1])),
        ("segment 0 global_scale", (x, weight.codes, weight.scales, jnp.ones(1))),
        ("segment 0 format: got 4", (x, weight.codes, weight.scales, None, (4,))),
        ("segments: got 4 operands", (x, weight.codes, weight.scales, None, (0, 0))),
        ("segment 0 codes: got shape", (x, weight.codes, weight.scales, None, (0,), 65)),
        ("workspace: got shape", (x, weight.codes, weight.scales, None, (0,), 64, 8)),
    ]:
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            call(*arguments)
