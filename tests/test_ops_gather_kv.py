"""Selected entries of a paged pool as dense numbers, and how many entries a query sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.cache.storage import EntryRecord, FloatScaleRecord
from dsv4_jax.ops.gather_kv import gather_kv
from dsv4_jax.ops.valid_lens import compute_valid_lens
from tests.cache_cases import DENSE, IMPLEMENTATIONS, C, random_planes, random_table
from tests.oracles.formats import E4M3, E8M0, to_bfloat16

LAYERS, LAYER, PER_BLOCK, COLUMNS = 3, 1, 32, 4
STORAGES = {"record": EntryRecord(C, 64), "float-scale": FloatScaleRecord(C, 64), "dense": DENSE}

gather = jax.jit(gather_kv, static_argnames=("layer", "storage", "dtype", "implementation"))


def decoded(planes, storage):
    """Every entry of the planes in float64, from the definition of the formats."""
    body = np.asarray(planes[0])
    if storage is DENSE:
        return body.astype(np.float64)
    codes = E4M3[body[..., :448]]
    scales = np.asarray(planes[1])
    if scales.dtype == np.uint8:
        values = codes * np.repeat(E8M0[scales[..., :7]], 64, -1)
    else:
        values = to_bfloat16((codes.astype(np.float32) * scales).astype(np.float64))
    bits = body[..., 448:].copy().view("<u2").astype(np.uint32) << 16
    return np.concatenate([values, bits.view(np.float32)], -1)


def pool(rng, storage, num_blocks):
    planes = random_planes(rng, storage, LAYERS, num_blocks, PER_BLOCK)
    if len(planes) == 1:
        return planes
    body, scales = np.array(planes[0]), np.array(planes[1])
    if scales.dtype == np.uint8:
        # Beyond these products are no bfloat16 numbers any more.
        scales = rng.integers(20, 230, scales.shape, np.uint8)
    # Finite numbers: exponents below the largest.
    body[..., 449::2] &= 0xBF
    return jnp.asarray(body), jnp.asarray(scales)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES.keys())
@pytest.mark.parametrize("shape", [(2, 7), (3, 5, 9), (1, 0), (2,)])
def test_values(implementation, storage, shape):
    rng = np.random.default_rng(0)
    planes = pool(rng, storage, 15)
    table = random_table(rng, shape[0], COLUMNS, 15)
    ids = rng.integers(-1, COLUMNS * PER_BLOCK, shape).astype(np.int32)
    found = gather(
        planes,
        LAYER,
        jnp.asarray(table),
        jnp.asarray(ids),
        storage=storage,
        implementation=implementation,
    )
    assert found.shape == (*shape, C)
    assert found.dtype == jnp.bfloat16
    every = decoded(planes, storage)[LAYER]
    sequence = np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    at = table[sequence, np.maximum(ids, 0) // PER_BLOCK], np.maximum(ids, 0) % PER_BLOCK
    expected = np.where(ids[..., None] < 0, 0, every[at])
    np.testing.assert_array_equal(np.asarray(found).astype(np.float64), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_entries_without_a_block_are_zero(implementation):
    rng = np.random.default_rng(1)
    storage = STORAGES["record"]
    table = np.array([[3, -1]], np.int32)
    ids = np.array([[0, 31, 32, 63, 64, 10_000]], np.int32)
    found = np.asarray(
        gather(
            pool(rng, storage, 4),
            LAYER,
            jnp.asarray(table),
            jnp.asarray(ids),
            storage=storage,
            implementation=implementation,
        )
    )
    assert found[0, :2].any(axis=-1).all()
    assert not found[0, 2:].any()


@pytest.mark.parametrize(
    ("position", "csa", "hca"),
    [(0, 0, 0), (2, 0, 0), (3, 1, 0), (126, 31, 0), (127, 32, 1), (1_048_575, 262_144, 8192)],
)
def test_valid_lens(position, csa, hca):
    positions = jnp.full((2, 3), position)
    assert (compute_valid_lens(positions, 4) == csa).all()
    assert (compute_valid_lens(positions, 128) == hca).all()
