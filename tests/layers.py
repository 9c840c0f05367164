"""Running one layer of the library in float32 beside the oracle."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from dsv4_jax.cache.handle import WholeSequence
from dsv4_jax.config import Config
from dsv4_jax.layers.compressor import Compressor
from dsv4_jax.layers.linear import products
from dsv4_jax.numerics import Numerics
from dsv4_jax.ops.flush import Gated
from dsv4_jax.transformer import Transformer
from tests.oracles.weights import Tensors

# One float32 rounding is 2^-24 of a value. Sums of up to 512 products in any order, then a few
# roundings on the way, stay below 32 of them, measured against the largest value of the result:
# a sum's error is that of its largest terms, not of its own size.
ONE_STAGE = 32 * 2.0**-24
# Layers that chain several such stages (norm, product, softmax, product, product).
CHAINED = 4 * ONE_STAGE


def assert_close(actual: Any, expected: np.ndarray, tolerance: float = ONE_STAGE) -> None:
    """max |actual - expected| <= tolerance · max |expected|, shapes equal, nothing NaN."""
    actual = np.asarray(actual, np.float64)
    assert actual.shape == expected.shape
    error = abs(actual - expected).max(initial=0.0)
    assert error <= tolerance * abs(expected).max(initial=0.0), f"error {error:.3e}"


def assert_rounded_once(actual: Any, exact: np.ndarray, noise: float = 1e-6) -> None:
    """bfloat16 `actual` is `exact`, computed with an absolute error of at most `noise`, rounded."""
    assert actual.dtype == jnp.bfloat16
    half_step = 2.0 ** (np.floor(np.log2(np.maximum(abs(exact), 1e-30))) - 8)
    assert (abs(np.asarray(actual, np.float64) - exact) <= half_step + noise).all()


def official_name(path: tuple[str | int, ...]) -> str:
    """The checkpoint's name of a parameter; a stack of experts has {} for the expert's number."""
    name = ".".join(str(part) for part in path)
    name = re.sub(r"\b(hc_\w+)\.(fn|base|scale)$", r"\1_\2", name)
    name = re.sub(r"\bsink$", "attn_sink", name)
    # Not shared_experts: there is no word boundary inside it.
    return re.sub(r"\bexperts\.(w\d)", r"experts.{}.\1", name)


def load(module: nnx.Module, tensors: Tensors, *inside: str) -> nnx.Module:
    """Gives every parameter its values from tensors in official names.

    `inside` is the path of the module from where the names begin.
    """
    graph, params = nnx.split(module)

    def value(path: tuple[str | int, ...]) -> np.ndarray:
        name = official_name(path)
        if "{}" not in name:
            return tensors[name]
        count = sum(re.fullmatch(name.replace("{}", r"\d+"), n) is not None for n in tensors)
        return np.stack([tensors[name.format(e)] for e in range(count)])

    filled = []
    for path, param in nnx.to_flat_state(params):
        spec, array = param.get_value(), value((*inside, *path))
        assert spec.shape == array.shape, official_name(path)
        filled.append((path, param.replace(jnp.asarray(array, spec.dtype))))
    return nnx.merge(graph, nnx.from_flat_state(filled))


@partial(jax.jit, static_argnames=("graph", "function"))
def _compiled(graph: nnx.GraphDef, params: nnx.State, function: Any, args: Any) -> Any:
    return function(nnx.merge(graph, params), *args)


def run(module: nnx.Module, function: Any, *args: Any) -> Any:
    """function(module, *args) compiled once per function, with float32 products everywhere."""
    graph, params = nnx.split(module)
    with jax.default_matmul_precision("highest"):
        args = tuple(jnp.asarray(a, _float32_or_int32(a)) for a in args)
        return _compiled(graph, params, function, args)


def _float32_or_int32(a: Any) -> Any:
    kind = np.asarray(a).dtype.kind
    return {"f": jnp.float32, "i": jnp.int32, "b": jnp.bool_}[kind]


def gated(compressor: Compressor, x: Array) -> Gated:
    """What a compressor makes of hidden states."""
    return compressor.gated(*products(x, compressor.linears()))


def whole_sequence(config: Config, batch: int, num_tokens: int) -> WholeSequence:
    """A layer's view of sequences that start at position 0, without a cache."""
    return Transformer(config, jnp.float32, Numerics.EXACT).whole_sequence(batch, num_tokens)
