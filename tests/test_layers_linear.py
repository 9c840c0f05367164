"""Linear layers of every weight format, codes decoded by their definition."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.kernels import Kernels
from dsv4_jax.layers.linear import Linear
from dsv4_jax.numerics import Numerics
from tests.layers import assert_close, assert_rounded_once, load, run
from tests.oracles import formats

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E2M1 = np.concatenate([E2M1, -E2M1])
# Widths that are no multiple of an FP8 block, where the format allows it.
ROWS, COLUMNS = 200, 160


def normal(*shape, seed=0, std=1.0):
    return (std * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def fp8_block(rng, *stack):
    """(parameters, the float64 matrix they mean)."""
    codes = rng.standard_normal((*stack, ROWS, COLUMNS)).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.integers(120, 135, (*stack, -(-ROWS // 128), -(-COLUMNS // 128)), dtype=np.uint8)
    factor = 2.0 ** (scale.astype(int) - 127)
    factor = factor.repeat(128, axis=-2)[..., :ROWS, :].repeat(128, axis=-1)[..., :COLUMNS]
    return {"weight": codes, "scale": scale}, codes.astype(np.float64) * factor


def e2m1_pairs(rng, *stack):
    """(bytes, values): the first of two channels is the low nibble."""
    packed = rng.integers(0, 256, (*stack, ROWS, COLUMNS // 2), dtype=np.uint8)
    return packed, E2M1[np.stack([packed & 15, packed >> 4], axis=-1)].reshape(*stack, ROWS, -1)


def mxfp4(rng, *stack):
    packed, values = e2m1_pairs(rng, *stack)
    scale = rng.integers(120, 135, (*stack, ROWS, COLUMNS // 32), dtype=np.uint8)
    return {"weight": packed, "scale": scale}, values * (2.0 ** (scale.astype(int) - 127)).repeat(
        32, axis=-1
    )


def nvfp4(rng, *stack):
    packed, values = e2m1_pairs(rng, *stack)
    scale = abs(rng.standard_normal((*stack, ROWS, COLUMNS // 16)))
    scale = scale.astype(ml_dtypes.float8_e4m3fn)
    scale_2 = rng.uniform(0.01, 0.02, stack).astype(np.float32)
    parameters = {
        "weight": packed,
        "scale": scale,
        "scale_2": scale_2,
        "input_scale": np.full(stack, 123.0, np.float32),
    }
    factor = scale.astype(np.float64).repeat(16, axis=-1) * scale_2[..., None, None]
    return parameters, values * factor


FORMATS = {"fp8_block": fp8_block, "mxfp4": mxfp4, "nvfp4": nvfp4}


BF16, E4M3, NVFP4 = (Numerics(activations=name) for name in ("bf16", "e4m3", "nvfp4"))


def linear(weight_format, parameters, numerics=Numerics.EXACT, stack=()):
    module = Linear(COLUMNS, ROWS, numerics, stack)
    module.repack(weight_format)
    return load(module, parameters)


@pytest.mark.parametrize("shape", [(COLUMNS,), (1, COLUMNS), (2, 3, 4, COLUMNS)])
@pytest.mark.parametrize("magnitude", [0.0, 1e-15, 1.0, 1e15])
def test_float(shape, magnitude):
    w, x = normal(ROWS, COLUMNS, seed=1), normal(*shape, std=magnitude)
    y = run(linear("float", {"weight": w}), Linear.__call__, x)
    assert_close(y, x.astype(np.float64) @ w.T.astype(np.float64))


def test_bfloat16_is_accumulated_in_float32():
    """2000 ones after a 256: in bfloat16 sums they would all be lost."""
    w = np.ones((1, 2001), np.float32)
    x = jnp.ones((1, 2001), jnp.bfloat16).at[0, 0].set(256)
    module = load(Linear(2001, 1, Numerics.EXACT), {"weight": w})
    assert float(module(x, jnp.float32)[0, 0]) == 2256
    assert_rounded_once(module(x), np.array([[2256.0]]))


def test_float32_result_of_a_float32_weight_keeps_the_weight():
    """Such products (compressors, head) must not round the weight to bfloat16."""
    w, x = normal(ROWS, COLUMNS, seed=1), jnp.asarray(normal(3, COLUMNS), jnp.bfloat16)
    y = linear("float", {"weight": w})(x, jnp.float32)
    assert_close(y, np.asarray(x, np.float64) @ w.T.astype(np.float64))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("weight_format", ["fp8_block", "mxfp4"])
def test_power_of_two_formats_decode_exactly(weight_format, dtype):
    parameters, expected = FORMATS[weight_format](np.random.default_rng(2))
    decoded = linear(weight_format, parameters).decoded(dtype)
    assert decoded.dtype == dtype
    np.testing.assert_array_equal(np.asarray(decoded, np.float64), expected)


def test_nvfp4_decodes():
    """Three factors: two float32 roundings."""
    parameters, expected = nvfp4(np.random.default_rng(2))
    decoded = np.asarray(linear("nvfp4", parameters).decoded(jnp.float32), np.float64)
    np.testing.assert_allclose(decoded, expected, rtol=2.0**-23)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_packed(weight_format):
    parameters, w = FORMATS[weight_format](np.random.default_rng(3))
    x = normal(2, 5, COLUMNS)
    y = run(linear(weight_format, parameters), Linear.__call__, x)
    assert_close(y, x.astype(np.float64) @ w.T)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_stacked(weight_format):
    """Rows of a stack in any order and repeated, as experts are taken."""
    parameters, w = FORMATS[weight_format](np.random.default_rng(4), 3)
    module = linear(weight_format, parameters, stack=(3,))
    index = np.array([2, 0, 0, 1])
    decoded = module.decoded(jnp.float32, jnp.asarray(index, jnp.int32))
    np.testing.assert_allclose(np.asarray(decoded, np.float64), w[index], rtol=2.0**-23)
    np.testing.assert_array_equal(decoded, module.decoded(jnp.float32)[index])


def q1(x):
    """E4M3 with a power-of-two scale per row and 128 channels."""
    y = np.empty(x.shape)
    for begin in range(0, x.shape[-1], 128):
        group = x[..., begin : begin + 128].astype(np.float64)
        amax = np.maximum(abs(group).max(axis=-1, keepdims=True), 1e-4)
        scale = 2.0 ** np.ceil(np.log2(amax / 448))
        y[..., begin : begin + 128] = scale * (group / scale).astype(
            ml_dtypes.float8_e4m3fn
        ).astype(np.float64)
    return y


def nvfp4_rows(x):
    """NVFP4 with a global scale per row."""
    return np.concatenate([formats.nvfp4(row[None])[3] for row in x])


def inputs_of(weight_format, numerics):
    """How the oracle rounds."""
    if numerics is BF16:
        return np.float64
    return nvfp4_rows if numerics is NVFP4 and weight_format != "fp8_block" else q1


@pytest.mark.parametrize("numerics", [BF16, E4M3, NVFP4], ids=lambda n: n.activations)
@pytest.mark.parametrize("weight_format", FORMATS)
def test_activation_policy(weight_format, numerics):
    parameters, w = FORMATS[weight_format](np.random.default_rng(5))
    x = normal(3, COLUMNS) * np.array([[1.0], [300.0], [1e-6]], np.float32)
    rounded = inputs_of(weight_format, numerics)(x)
    assert numerics is BF16 or abs(rounded - x).max() > 1
    y = run(linear(weight_format, parameters, numerics), Linear.__call__, x)
    for row, expected in enumerate(rounded @ w.T):
        assert_close(y[row], expected)


@pytest.mark.parametrize(
    ("weight_format", "numerics"),
    [("fp8_block", E4M3), ("nvfp4", E4M3), ("mxfp4", NVFP4), ("nvfp4", NVFP4)],
)
def test_outliers_zeros_and_padding(weight_format, numerics):
    """An outlier in one row saturates nothing, and no other row's result changes by a bit."""
    parameters, w = FORMATS[weight_format](np.random.default_rng(6))
    module = linear(weight_format, parameters, numerics)
    x = normal(4, COLUMNS, seed=7)
    x[1] = 0
    calm = np.asarray(run(module, Linear.__call__, x))
    x[2, 5] = 1e4 * abs(x).max()
    x[3] = np.nan  # what stands in padding
    y = np.asarray(run(module, Linear.__call__, x))
    np.testing.assert_array_equal(y[:2], calm[:2])
    assert not y[1].any()
    assert_close(y[2], inputs_of(weight_format, numerics)(x[2:3])[0] @ w.T)
    rounded = inputs_of(weight_format, numerics)(x[2:3])[0]
    assert abs(rounded[5] / x[2, 5] - 1) < 2**-3


@pytest.mark.parametrize("weight_format", ["mxfp4", "nvfp4"])
def test_nvfp4_inputs_lose_nothing_in_bfloat16(weight_format):
    """Values without their global scales are exact there."""
    parameters, w = FORMATS[weight_format](np.random.default_rng(8))
    x = normal(3, COLUMNS, std=0.3)
    x = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)
    module = linear(weight_format, parameters, NVFP4)
    y = jax.jit(lambda x: module(x, jnp.float32))(jnp.asarray(x, jnp.bfloat16))
    assert_close(y, nvfp4_rows(x) @ w.T)


def test_activations_are_not_quantised_for_float_weights():
    w, x = normal(ROWS, COLUMNS, seed=1), normal(3, COLUMNS)
    exact = run(linear("float", {"weight": w}), Linear.__call__, x)
    for numerics in (E4M3, NVFP4):
        y = run(linear("float", {"weight": w}, numerics), Linear.__call__, x)
        np.testing.assert_array_equal(exact, y)


def test_input_scale_is_never_used():
    parameters, _ = nvfp4(np.random.default_rng(9))
    x = normal(3, COLUMNS)
    for numerics in (E4M3, NVFP4):
        with_scale = run(linear("nvfp4", parameters, numerics), Linear.__call__, x)
        module = linear("nvfp4", parameters | {"input_scale": np.float32(np.nan)}, numerics)
        assert np.isnan(module.input_scale[...])
        np.testing.assert_array_equal(run(module, Linear.__call__, x), with_scale)


def test_nvfp4_products_in_the_order_of_tensor_cores():
    """What the kernels for them read; on this CPU their XLA reference, rounded to bfloat16."""
    parameters, w = nvfp4(np.random.default_rng(10))
    module = linear("nvfp4", parameters, NVFP4)
    module.arrange(Kernels.XLA, jnp.bfloat16)
    assert not module.is_arranged
    module.arrange(Kernels(nvfp4_gemm="ffi"), jnp.bfloat16)
    assert module.is_swizzled and module.is_arranged
    x = normal(2, 3, COLUMNS)
    y = jax.jit(module)(jnp.asarray(x))
    assert y.dtype == jnp.float32
    assert_close(y, (nvfp4_rows(x.reshape(6, -1)) @ w.T).reshape(2, 3, -1), 2.0**-8)


def test_unknown_format_is_refused():
    with pytest.raises(ValueError, match="weight_format: got 'int4'"):
        Linear(COLUMNS, ROWS, Numerics.EXACT).repack("int4")
