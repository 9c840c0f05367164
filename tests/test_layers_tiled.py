"""Layers whose weights are in the kernels' blocks compute what they did before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv4_jax.formats import fp8_block, mxfp4, nvfp4
from dsv4_jax.layers.linear import Linear
from dsv4_jax.numerics import Numerics

# BF16 results of float32 sums in another order: one unit in the last of 8 bits.
TOLERANCE = 2**-7


def linear(weight_format, stack=()):
    """A linear [192, 256] with random weights of a format."""
    w = jax.random.normal(jax.random.key(0), (*stack, 192, 256)) / 16
    module = Linear(256, 192, Numerics.CHECKPOINT, stack)
    module.repack(weight_format)
    match weight_format:
        case "float":
            values = {"weight": w.astype(jnp.bfloat16)}
        case "fp8_block":
            values = dict(zip(("weight", "scale"), fp8_block.quantize(w), strict=True))
        case "mxfp4":
            values = dict(zip(("weight", "scale"), mxfp4.quantize(w), strict=True))
        case _:
            values = dict(zip(("weight", "scale", "scale_2"), nvfp4.quantize(w), strict=True))
            values["input_scale"] = jnp.ones(stack)
    for name, value in values.items():
        setattr(module, name, nnx.Param(value))
    return module


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (3, 5, 256), jnp.bfloat16)


def assert_close(ours, expected):
    scale = np.abs(np.asarray(expected, np.float32)).max()
    difference = np.asarray(ours, np.float32) - np.asarray(expected, np.float32)
    assert np.abs(difference).max() <= TOLERANCE * scale


@pytest.mark.parametrize("weight_format", ["float", "fp8_block", "mxfp4", "nvfp4"])
def test_linear(weight_format, x):
    module = linear(weight_format)
    rounded = x if weight_format == "float" else fp8_block.round_trip(x)
    oracle = np.asarray(rounded, np.float64) @ np.asarray(module.decoded(jnp.float32), np.float64).T
    assert_close(module(x), oracle)
    module.tile()
    assert module.is_tiled and not hasattr(module, "weight")
    assert module(x).dtype == jnp.bfloat16
    assert_close(module(x), oracle)
    np.testing.assert_allclose(module(x, jnp.float32), oracle, rtol=0, atol=1e-5)


@pytest.mark.parametrize("weight_format", ["float", "fp8_block"])
def test_grouped(weight_format):
    w = jax.random.normal(jax.random.key(2), (3, 2, 128), jnp.bfloat16)
    module = Linear(128, 256, Numerics.CHECKPOINT)
    module.repack(weight_format)
    dense = jax.random.normal(jax.random.key(3), (256, 128)) / 11
    if weight_format == "float":
        module.weight = nnx.Param(dense.astype(jnp.bfloat16))
    else:
        codes, scale = fp8_block.quantize(dense)
        module.weight, module.scale = nnx.Param(codes), nnx.Param(scale)
    expected = module.grouped(w)
    values = np.asarray(module.decoded(jnp.float32), np.float64).reshape(2, 128, 128)
    oracle = np.einsum("bgi,goi->bgo", np.asarray(w, np.float64), values).reshape(3, 256)
    assert_close(expected, oracle)
    module.tile()
    assert_close(module.grouped(w), oracle)


def test_float32_weights_stay():
    module = Linear(8, 4, Numerics.EXACT)
    module.weight = nnx.Param(jnp.ones((4, 8)))
    module.tile()
    assert not module.is_tiled
    assert (module(jnp.ones((1, 8))) == 8).all()
