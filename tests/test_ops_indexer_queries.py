"""Indexer queries from what the projections give, against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.indexer_queries import indexer_queries, rotated_queries
from tests.cache_cases import IMPLEMENTATIONS
from tests.oracles import formats
from tests.oracles.indexer import hadamard_matrix
from tests.oracles.rotary import rotate

HEADS, WIDTH, PAIRS = 64, 128, 32
FREQUENCIES = (160000.0 ** (-np.arange(PAIRS) / PAIRS)).astype(np.float32)
SCALE = (HEADS * WIDTH) ** -0.5


def projected(b, t, heads=HEADS, seed=0):
    """bfloat16 queries [b, t, h, c] of very different heads, weights of both signs, positions."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((b, t, heads, WIDTH)) * np.exp2(rng.integers(-9, 9, (b, t, heads, 1)))
    q[0, 0, 0] = 0
    weights = rng.standard_normal((b, t, heads)).astype(np.float32)
    positions = rng.integers(0, 2**20, (b, t)).astype(np.int32)
    return jnp.asarray(q, jnp.bfloat16), jnp.asarray(weights), jnp.asarray(positions)


def expected_queries(q, positions):
    """Rounded to bfloat16 after each rotation, then to MXFP4."""
    flat = np.asarray(q, np.float64).reshape(-1, *q.shape[2:])
    turned = formats.to_bfloat16(rotate(flat, np.asarray(positions).reshape(-1), FREQUENCIES))
    spread = formats.to_bfloat16(turned @ hadamard_matrix(WIDTH))
    groups = spread.reshape(*spread.shape[:-1], -1, 32)
    scales = formats.scale_code(np.abs(groups).max(-1), 6.0, 6 * formats.SMALLEST_NORMAL)
    scales = formats.E8M0[scales][..., None]
    values = formats.E2M1[formats.to_e2m1(groups / scales)] * scales
    return values.reshape(q.shape), np.repeat(scales, 32, -1).reshape(q.shape)


jitted = jax.jit(indexer_queries, static_argnames=("scale", "implementation"))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("b", "t"), [(1, 1), (3, 2)])
def test_queries(b, t, implementation):
    """The same value nearly everywhere; where a sum in another order rounds elsewhere, the next.

    Each head's largest code is near the end of E4M3's range.
    """
    q, weights, positions = projected(b, t)
    expected, unit = expected_queries(q, positions)
    codes, scaled = jitted(
        q, weights, positions, FREQUENCIES, scale=SCALE, implementation=implementation
    )
    powers = np.asarray(scaled, np.float64) / (np.asarray(weights) * np.float32(SCALE))
    assert np.array_equal(np.log2(powers), np.round(np.log2(powers)))
    codes = np.asarray(codes.astype(jnp.float32), np.float64)
    largest = np.abs(codes).max(-1)
    assert (((largest >= 128) & (largest < 256)) | (largest == 0)).all()
    found = codes * powers[..., None]
    assert (np.abs(found - expected) <= 2 * unit).all()
    assert np.mean(found == expected) > 0.998


def test_not_rounded_queries():
    q, _, positions = projected(2, 3)
    found = rotated_queries(q.astype(jnp.float32), positions, FREQUENCIES, quantize=False)
    flat = np.asarray(q, np.float64).reshape(-1, HEADS, WIDTH)
    turned = rotate(flat, np.asarray(positions).reshape(-1), FREQUENCIES)
    expected = (turned @ hadamard_matrix(WIDTH)).reshape(q.shape)
    largest = np.abs(expected).max(-1, keepdims=True)
    assert (np.abs(np.asarray(found, np.float64) - expected) <= 1e-5 * largest).all()


@pytest.mark.parametrize(
    ("dtype", "pairs", "message"),
    [
        (jnp.float32, 32, "takes bfloat16, not float32"),
        (jnp.bfloat16, 16, "128 channels of which 64 are rotary, got 128 and 32"),
    ],
)
def test_what_the_kernel_does_not_support(dtype, pairs, message):
    q, weights, positions = projected(1, 1)
    rest = q.astype(dtype), weights, positions, FREQUENCIES[:pairs]
    with pytest.raises(NotImplementedError, match=message):
        indexer_queries(*rest, scale=1.0, implementation="ffi")
