"""Planes, tables and comparisons for the tests of what is written to the caches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_ffi
from dsv4_jax.cache.storage import Dense, EntryRecord, FloatScaleRecord, KeyRecord
from dsv4_jax.config import Config
from dsv4_jax.layers.rotary import Rotary
from tests.oracles import cache_writes as oracle
from tests.oracles.formats import to_bfloat16

MISSING = dsv4_ffi.missing(jax.default_backend().replace("gpu", "cuda"))
KERNELS = [
    pytest.param("ffi", marks=pytest.mark.skipif(MISSING is not None, reason=MISSING or "")),
    pytest.param("ffi", id="gpu", marks=pytest.mark.gpu),
]
IMPLEMENTATIONS = ["xla", *KERNELS]
C, KEY, ROPE = 512, 128, 64
EPS = 1e-6
BFLOAT16 = jnp.dtype(jnp.bfloat16)
DENSE = Dense(C, BFLOAT16, "none", ROPE)
DENSE_KEY = Dense(KEY, BFLOAT16, "none")
# How an entry of bfloat16 values is stored, by the oracle.
RECORDS = [
    pytest.param(EntryRecord(C, ROPE), oracle.record, id="record"),
    pytest.param(FloatScaleRecord(C, ROPE), oracle.float_scale_record, id="float-scale"),
]
KEY_RECORD = KeyRecord(KEY)
FREQUENCIES = Rotary.of_layer(Config.FLASH, 4).frequencies()
WINDOW_FREQUENCIES = Rotary.of_layer(Config.FLASH, 0).frequencies()


def random_planes(rng, storage, *shape):
    """Planes full of what earlier sequences may have left."""
    planes = []
    for width, dtype in storage.planes:
        if dtype == np.uint8:
            planes.append(jnp.asarray(rng.integers(0, 256, (*shape, width), np.uint8)))
        else:
            planes.append(jnp.asarray(rng.standard_normal((*shape, width)), dtype))
    return tuple(planes)


def random_table(rng, batch, columns, num_blocks):
    """Blocks in no order, shared by nobody."""
    ids = rng.permutation(num_blocks)[: batch * columns]
    return ids.reshape(batch, columns).astype(np.int32)


def bytes_of(plane):
    """A plane's bytes, [..., width in bytes]."""
    return np.ascontiguousarray(plane).view(np.uint8)


def assert_same_bytes(found, expected):
    """Planes equal to the bit."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(bytes_of(np.asarray(a)), bytes_of(np.asarray(b)))


def assert_rounded(found, exact, may_differ=0.01):
    """bfloat16 values are `exact` rounded; beside a tie, here or before, they may be off by one.

    A pair that is rotated mixes two such neighbours, hence twice the larger step of a row's end.
    """
    found = np.asarray(found).astype(np.float64)
    expected = to_bfloat16(exact)
    different = found != expected
    assert different.mean() <= may_differ, f"{different.mean():.4f} of the values differ"
    pairs = np.abs(exact).reshape(*exact.shape[:-1], -1, 2).max(-1)
    step = 2.0 ** (np.floor(np.log2(np.maximum(np.repeat(pairs, 2, -1), 1e-30))) - 7)
    assert (np.abs(found - exact) <= 2 * step).all()
